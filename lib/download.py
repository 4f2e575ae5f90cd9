"""Fetch files from several hosts, none of which is trusted: a file is believed when its MD5 is right."""

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

from lib.common import InputError, naming, reason

CHUNK = 1 << 14  # bytes read and written at a time, and the most that a kill can lose
WINDOW = 30  # seconds over which the rate is taken
SLOWEST = 30_000  # bytes a second; a host slower than this for two windows gives way to an untried one
BREATH = 1  # seconds before a host is asked again after an early break
TIMEOUT = 30  # seconds without a byte before a connection counts as failed
ATTEMPTS = 10  # of all hosts for a piece; each lasts as long as the host delivers
PAUSE, LONGEST_PAUSE = 1, 60  # seconds before the second attempt; doubles up to the longest


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
    demoted: bool = False  # because it is slow, or sent wrong bytes: the other hosts come first
    fault: str | None = None  # why a connection brought nothing; None: the host is untried

    def stream(self, whole, piece, position):
        """Yield (chunk, bytes received) from `position` in the whole file to the piece's end, or until a `fault`."""
        self.fault = "it sent nothing"
        try:
            response, skip = self.ask(whole, piece, position)
            with response:
                while chunk := response.raw.read1(CHUNK):
                    yield chunk[skip:], len(chunk)
                    skip = max(0, skip - len(chunk))
        except Exception as error:  # odd answers raise errors of requests, urllib3, http.client, idna and codecs
            while error.__context__:  # requests wraps several errors around the cause
                error = error.__context__
            # The query of a redirected address may be a signature; control characters could command a terminal
            self.fault = re.sub(r"\?\S*|[\x00-\x1f\x7f-\x9f]", "", reason(error))[:200]

    def ask(self, whole, piece, position):
        """Return the response and how many of its bytes to skip. Raises InputError if the host refuses both names."""
        refusals = []
        for name, begin in {whole.name: 0, piece.name: piece.begin}.items():
            response = self.get(name, position - begin, piece.end - begin)
            status, kind = response.status_code, response.headers.get("Content-Type", "")
            if status in (200, 206) and "html" not in kind:  # some hosts report a missing file by a web page
                return response, position - begin if status == 200 else 0  # servers may ignore Range
            response.close()
            refusals.append(f"{name}: {'a web page' if status in (200, 206) else f'HTTP status {status}'}")
        raise InputError(", ".join(refusals))

    def get(self, name, begin, end):
        """Return the answer to a request for bytes `begin` to `end` of a file, whatever the certificate."""
        # A range counts the bytes of what is sent: compressed, they would be others
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
        try:
            return requests.get(self.url + name, headers=headers, timeout=TIMEOUT, stream=True, verify=self.verify)
        except requests.exceptions.SSLError as error:
            if not self.verify or "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise
        tqdm.write(f"{self.url}: its certificate cannot be verified; continuing, because every file's MD5 is checked")
        requests.packages.urllib3.disable_warnings()  # one for each request
        self.verify = False
        return self.get(name, begin, end)


def fetch(path, hosts, whole, parts=()):
    """Download the Piece `whole`, which some hosts have only as `parts`, to `path`, unless that exists.

    A part that the user has put beside it is used. Raises InputError if all hosts fail, or an existing file has another
    MD5.
    """
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        with naming(partial), open(partial, "ab") as output:
            for piece in parts or (whole,):
                copy_part(output, piece)
                complete(output, whole, piece, sorted(hosts, key=lambda host: host.demoted))
            output.truncate(whole.end)
        os.replace(partial, path)
    require_md5(path, whole.md5)
    print(f"{path}: complete")


def require_md5(path, md5):
    if (found := digest(path)) != md5:
        raise InputError(f"{path} has MD5 {found}, not {md5}: move it away, and it will be fetched again")


def digest(path, begin=0, end=None):
    """Return the MD5 of a file's bytes `begin` to `end`."""
    md5 = hashlib.md5()
    with open(path, "rb") as file:
        file.seek(begin)
        while chunk := file.read(CHUNK if end is None else min(CHUNK, end - file.tell())):
            md5.update(chunk)
    return md5.hexdigest()


def copy_part(output, piece):
    """Copy a piece from its own file into `output`, if the user has put that into the folder."""
    part = Path(output.name).with_name(piece.name)
    if part.exists() and digest(output.name, piece.begin, piece.end) != piece.md5:
        require_md5(part, piece.md5)
        output.truncate(output.seek(piece.begin))
        with open(part, "rb") as file:
            shutil.copyfileobj(file, output)
        output.flush()


def complete(output, whole, piece, hosts):
    """Append the rest of a piece from the first host; one that fails becomes the last. Raises InputError at the end."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
        for _ in range(len(hosts)):
            if receive(output, whole, piece, *hosts):
                return
            print(f"{piece.name} from {hosts[0].url}: {hosts[0].fault}")
            hosts.append(hosts.pop(0))
    faults = "; ".join(f"{host.url}: {host.fault}" for host in hosts)
    remedy = f"try later, or put {whole.name} (MD5 {whole.md5}) into {Path(output.name).parent} by hand"
    raise InputError(f"{piece.name} could not be fetched ({faults}): {remedy}")


def receive(output, whole, piece, host, *others):
    """Append the rest of a piece from one host, over several connections if they break off.

    Return whether the piece is now complete and has its MD5; if not, `host.fault` says why.
    """
    begun, failed = output.tell(), False
    with Watch(f"{whole.name} from {host.url.split('/')[2]}", begun, whole.end) as watch:
        while (position := output.tell()) < piece.end:
            for chunk, n_received in host.stream(whole, piece, position):
                output.write(chunk[: piece.end - output.tell()])
                output.flush()
                watch.count(output.tell(), n_received)
                if watch.n_slow > 1 and any(other.fault is None for other in others):
                    host.fault, host.demoted = f"only {watch.rate / 1e3:.0f} KB/s", True
                    return False
                if output.tell() == piece.end:
                    break
            if output.tell() == position and (failed or not host.served):
                return False
            failed = output.tell() == position  # a host that has served gets a second request: signatures expire
            host.served = True
            if output.tell() < min(position + SLOWEST, piece.end):
                time.sleep(BREATH)
    if digest(output.name, piece.begin, piece.end) == piece.md5:
        return True
    output.truncate(output.seek(piece.begin))
    if begun > piece.begin:  # the wrong bytes may be another host's: fetch the whole piece from this one
        return receive(output, whole, piece, host, *others)
    host.fault, host.demoted = "wrong MD5", True
    return False


class Watch(tqdm):
    """Measures the rate and shows it: a bar or, where the output is no terminal, a line for each WINDOW."""

    def __init__(self, title, done, total):
        super().__init__(desc=title, total=total, initial=done, unit="B", unit_scale=True, disable=None)
        self.title, self.received, self.since = title, 0, time.monotonic()
        self.rate = self.n_slow = 0  # bytes a second in the last window, windows in a row below SLOWEST

    def count(self, done, n_received):
        self.received += n_received
        self.update(done - self.n)
        if (seconds := time.monotonic() - self.since) > WINDOW:
            self.rate = self.received / seconds
            self.n_slow = self.n_slow + 1 if self.rate < SLOWEST else 0
            self.received, self.since = 0, time.monotonic()
            if self.disable:
                left = self.format_interval((self.total - done) / self.rate)
                print(f"{self.title}: {done / self.total:.0%}, {self.rate / 1e3:,.0f} KB/s, {left} left")
