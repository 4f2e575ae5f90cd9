"""Fetch files from several hosts, none of which is trusted: a file is believed when its MD5 is right."""

import contextlib
import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import requests
from tqdm import tqdm

from lib.common import InputError, naming, progress, reason

CHUNK = 1 << 14  # bytes read and written at once; at most so many are lost when the script is killed
WINDOW = 30  # seconds over which the rate is taken
SLOWEST = 30_000  # bytes a second; a host that is slower for two windows gives way to one that is untried
BREATH = 1  # seconds until a host is asked again whose connection has broken off early
TIMEOUT = 30  # seconds without a byte after which a connection has failed
ATTEMPTS = 10  # of all hosts for a piece; each lasts as long as the host delivers
PAUSE, LONGEST_PAUSE = 1, 60  # seconds before the second attempt; it doubles, but only so far


class Piece(NamedTuple):
    """Bytes `begin` to `end` of a file. A host has the file, or its pieces as files with these names."""

    name: str
    begin: int
    end: int
    md5: str


@dataclass
class Host:
    url: str  # of the folder with the files; ends with /
    verify: bool = True  # its certificate
    served: bool = False  # whether anything has come from it
    demoted: bool = False  # slow, or sent something wrong: the others come first
    fault: str | None = None  # what is wrong with it if a connection brings nothing; None: it is untried

    def stream(self, whole, piece, position):
        """Yield the bytes of a piece from `position` in the whole file on, in chunks, with how many came for each.

        If none are left or the host fails, there are no more; if it failed, `fault` says why.
        """
        self.fault = "it sent nothing"
        try:
            response, skip = self.ask(whole, piece, position)
            with response:
                while chunk := response.raw.read1(CHUNK):
                    yield chunk[skip:], len(chunk)
                    skip = max(0, skip - len(chunk))
        except Exception as error:  # an odd answer raises errors of requests, urllib3, http.client, idna and codecs
            while error.__context__:  # those of requests wrap several others around the cause
                error = error.__context__
            # The query of a redirect's address may be a signature, and a host could send a terminal's commands.
            self.fault = re.sub(r"\?\S*|[\x00-\x1f\x7f-\x9f]", "", reason(error))[:200]

    def ask(self, whole, piece, position):
        """Return the answer with the whole file, or with the piece if that is refused, and how many bytes to skip.

        Raises InputError if both are refused.
        """
        refusals = []
        for name, begin in {whole.name: 0, piece.name: piece.begin}.items():
            response = self.get(name, position - begin, piece.end - begin)
            status, kind = response.status_code, response.headers.get("Content-Type", "")
            if status in (200, 206) and "html" not in kind:  # a web page says that the file is not there
                return response, position - begin if status == 200 else 0  # servers may ignore Range
            response.close()
            refusals.append(f"{name}: {'a web page' if status in (200, 206) else f'HTTP status {status}'}")
        raise InputError(", ".join(refusals))

    def get(self, name, begin, end):
        """Return the answer to a request for bytes `begin` to `end` of a file, whatever the certificate."""
        # A server that compressed the file would count other bytes.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
        try:
            return requests.get(self.url + name, headers=headers, timeout=TIMEOUT, stream=True, verify=self.verify)
        except requests.exceptions.SSLError as error:
            if not self.verify or "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise
        tqdm.write(f"{self.url}: a certificate cannot be verified; going on, as nothing is believed but a file's MD5")
        requests.packages.urllib3.disable_warnings()  # which would come with every request
        self.verify = False
        return self.get(name, begin, end)


def fetch(path, pieces, hosts):
    """Bring a file to `path`, unless it is there. `pieces`: the whole file and its parts, if some hosts have those.

    A part that a person has put beside it is used. Each host gets so many `attempts`, and after all have failed there
    is a `pause` in seconds, which doubles. Raises InputError if all fail, or a file that is there has another MD5.
    """
    whole, *parts = pieces
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        with naming(partial), open(partial, "ab") as output:
            for piece in parts or [whole]:
                copy_part(output, piece)
                complete(output, whole, piece, sorted(hosts, key=lambda host: host.demoted))
            output.truncate(whole.end)
        os.replace(partial, path)
    require_md5(path, whole.md5)
    print(f"{path}: complete")


def require_md5(path, md5):
    if (found := digest(path)) != md5:
        raise InputError(f"{path} has MD5 {found}, not {md5}: move it away, and it will be fetched anew")


def digest(path, begin=0, end=None):
    """Return the MD5 of a file's bytes `begin` to `end`."""
    md5 = hashlib.md5()
    with open(path, "rb") as file:
        file.seek(begin)
        while chunk := file.read(CHUNK if end is None else min(CHUNK, end - file.tell())):
            md5.update(chunk)
    return md5.hexdigest()


def copy_part(output, piece):
    """Put a piece into `output` from its own file, if a person has put that into the folder."""
    part = Path(output.name).with_name(piece.name)
    if part.exists() and digest(output.name, piece.begin, piece.end) != piece.md5:
        require_md5(part, piece.md5)
        cut(output, piece.begin)
        with open(part, "rb") as file:
            shutil.copyfileobj(file, output)
        output.flush()


def cut(output, size):
    output.seek(size)
    output.truncate()


def complete(output, whole, piece, hosts):
    """Append to `output` what it lacks of a piece, from the first host; where one fails, it becomes the last."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
        for _ in range(len(hosts)):
            if receive(output, whole, piece, *hosts):
                return
            print(f"{piece.name} from {hosts[0].url}: {hosts[0].fault}")
            hosts.append(hosts.pop(0))
    faults = "; ".join(f"{host.url}: {host.fault}" for host in hosts)
    raise InputError(
        f"{piece.name} could not be fetched ({faults}): run the same command later, or first put {whole.name} (MD5 "
        f"{whole.md5}) into {Path(output.name).parent} by hand"
    )


def receive(output, whole, piece, host, *others):
    """Let a host append what `output` lacks of a piece, in several connections if they break off.

    Returns whether the piece is complete and right then; if not, `host.fault` says why.
    """
    begun, failed = output.tell(), False
    with Watch(f"{whole.name} from {host.url.split('/')[2]}", begun, whole.end) as watch:
        while (position := output.tell()) < piece.end:
            for chunk, n_received in host.stream(whole, piece, position):
                output.write(chunk[: piece.end - output.tell()])
                output.flush()
                watch.update(output.tell(), n_received)
                if watch.n_slow > 1 and any(other.fault is None for other in others):
                    host.fault, host.demoted = f"only {watch.rate / 1e3:.0f} KB/s", True
                    return False
                if output.tell() == piece.end:
                    break
            if output.tell() == position and (failed or not host.served):
                return False
            failed = output.tell() == position  # a host that has served is asked again: a signature may have expired
            host.served = True
            if output.tell() < min(position + SLOWEST, piece.end):
                time.sleep(BREATH)
    if digest(output.name, piece.begin, piece.end) == piece.md5:
        return True
    cut(output, piece.begin)
    if begun > piece.begin:  # others sent some of it, and the wrong bytes may be theirs: all of it from this host
        return receive(output, whole, piece, host, *others)
    host.fault, host.demoted = "wrong MD5", True
    return False


class Watch(contextlib.AbstractContextManager):
    """Shows how a file grows: a bar or, where the output is no terminal, a line for each WINDOW."""

    def __init__(self, title, done, total):
        self.bar = progress(desc=title, total=total, initial=done, unit="B", unit_scale=True)
        self.title, self.total, self.received, self.since = title, total, 0, time.monotonic()
        self.rate = self.n_slow = 0  # bytes a second in the last window, windows in a row below SLOWEST

    def update(self, done, n_received):
        self.received += n_received
        self.bar.update(done - self.bar.n)
        if (seconds := time.monotonic() - self.since) > WINDOW:
            self.rate = self.received / seconds
            self.n_slow = self.n_slow + 1 if self.rate < SLOWEST else 0
            self.received, self.since = 0, time.monotonic()
            if self.bar.disable:
                left = tqdm.format_interval((self.total - done) / self.rate)
                print(f"{self.title}: {done / self.total:.0%}, {self.rate / 1e3:,.0f} KB/s, {left} left")

    def __exit__(self, *_):
        self.bar.close()
