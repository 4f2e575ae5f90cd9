"""Step 1: fetch MagnaTagATune, check every file's MD5 and unpack the clips; or, with --demo, render a small stand-in.

The clips come as one zip cut in three parts (3 GB, 25,863 clips), the annotations and the clips' origin as two
tables. Started again after any interruption, the script goes on from where it was.
"""

import lib  # noqa: F401 - first: Ctrl-C during the slow imports below

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import shlex
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PureWindowsPath
from typing import Annotated

import requests
import tenacity
import urllib3

from lib.common import ROOT, InputError, Range, progress, reason, run, settings_from_command_line, whole_file

HOSTS = ("https://mirg.city.ac.uk/datasets/magnatagatune/", "http://mi.soi.city.ac.uk/datasets/magnatagatune/")
MD5SUMS = {
    "annotations_final.csv": "f04fa01752a8cc64f6e1ca142a0fef1d",
    "clip_info_final.csv": "03ef3cb8ddcfe53fdcdb8e0cda005be2",
    "mp3.zip.001": "179c91c8c2a6e9b3da3d4e69d306fd3b",
    "mp3.zip.002": "acf8265ff2e35c6ff22210e46457a824",
    "mp3.zip.003": "582dc649cabb8cd991f09e14b99349a5",
}
PARTS = tuple(name for name in MD5SUMS if name.startswith("mp3"))
ARCHIVE_BYTES = 2_970_000_000  # of the three parts together, about
CHUNK = 1 << 14  # bytes read and written at once; at most so many are lost when the script is killed
IN_BYTES = {"unit": "B", "unit_scale": True, "leave": False}  # for progress bars
LONGEST_PAUSE = 60  # seconds, however many attempts failed and whatever a host asks for


@dataclasses.dataclass
class Settings:
    data: Path = ROOT / "data"  # folder for all files; those put there by hand are taken if their MD5 is right
    hosts: tuple[str, ...] = HOSTS  # addresses of folders that hold the files, tried in this order
    md5sums: Path | None = None  # file of lines "MD5  name" to use in place of the built-in ones, with a mirror
    timeout: Annotated[float, Range(0.1, 3600)] = 30  # seconds without a byte after which an attempt has failed
    attempts: Annotated[int, Range(1, 1000)] = 5  # per file and host
    pause: Annotated[float, Range(0, LONGEST_PAUSE)] = 1  # seconds before the second attempt; doubles each time
    demo: bool = False  # fetch nothing, render synthetic clips into the folder "demo" inside the data folder
    demo_clips: Annotated[int, Range(1, 100_000)] = 192  # how many clips the demo has
    demo_seed: Annotated[int, Range(0)] = 1337  # of the demo's random generator


def main():
    settings = settings_from_command_line(Settings, __doc__)
    if settings.demo:
        from lib.demo import render  # here, because a download does not need what it imports

        folder = settings.data / "demo"
        render(folder, settings.demo_clips, settings.demo_seed)
    else:
        folder = settings.data
        fetch_and_unpack(settings)
    where = "" if folder == Settings.data else f" --data {shlex.quote(str(folder))}"
    print(f"next: python gen_spectrograms.py{where}")


def fetch_and_unpack(settings):
    if not settings.hosts or not all(re.fullmatch("https?://.+/", host) for host in settings.hosts):
        raise InputError("--hosts takes addresses that begin with http:// or https:// and end with /")
    md5sums = read_md5sums(settings.md5sums) if settings.md5sums else MD5SUMS
    settings.data.mkdir(parents=True, exist_ok=True)
    if not settings.md5sums:  # whose archive may have another size
        require_disk_space(settings.data)
    for name in MD5SUMS:
        obtain(settings, name, md5sums[name])
    unpack(settings.data)


def read_md5sums(path):
    """Return {name: MD5} from a file as the program md5sum writes it; InputError if one of ours is missing."""
    lines = re.findall(r"^([0-9a-fA-F]{32}) [ *](\S+)$", path.read_text(errors="replace"), re.MULTILINE)
    md5sums = {name: md5.lower() for md5, name in lines}
    missing = [name for name in MD5SUMS if name not in md5sums]
    if missing:
        raise InputError(f"{path} has no line 'MD5  name' for {', '.join(missing)}")
    return md5sums


def require_disk_space(data):
    """Raise InputError if the parts and the clips unpacked from them, which take as much again, will not fit."""
    there = [*data.glob("mp3.zip.00*"), *data.glob("?/*.mp3")]
    needed = 2 * ARCHIVE_BYTES - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(data).free
    if needed > free:
        raise InputError(
            f"{data} has {free / 1e9:.3f} GB free, the archive and the clips in it need {needed / 1e9:.3f} GB more: "
            "make room, or choose another folder with --data"
        )


def obtain(settings, name, md5):
    """Bring one file into the data folder unless it is there.

    Raises InputError if no host delivers, or if another file has its name: a person's, since ours get it when right.
    """
    stored = settings.data / ("tags.csv" if name == "annotations_final.csv" else name)
    for path in (stored, settings.data / name):
        if path.exists():
            found = digest(path)
            if found != md5:
                raise InputError(f"{path} has MD5 {found}, not {md5}: move it away, and it will be fetched anew")
            os.replace(path, stored)
            print(f"{stored}: already there")
            return
    fetch(settings, name, stored, md5)


def digest(path):
    """Return the MD5 of a file."""
    md5, size = hashlib.md5(), path.stat().st_size
    with open(path, "rb") as file, progress(desc=f"checking {path.name}", total=size, **IN_BYTES) as bar:
        while chunk := file.read(CHUNK):
            md5.update(chunk)
            bar.update(len(chunk))
    return md5.hexdigest()


class Failure(Exception):
    """An attempt that brought no right file; `final`: no other will; `pause`: seconds the host asked us to wait."""

    def __init__(self, message, final=False, pause=0):
        super().__init__(message)
        self.final, self.pause = final, pause


def fetch(settings, name, path, md5):
    """Fetch `name` into `path` from the first host that delivers it. Raises InputError if none does."""
    reasons = []
    for host in settings.hosts:
        print(f"{path}: fetching {host + name}")
        try:
            return retrying(settings)(download, host + name, path, md5, settings.timeout)
        except Failure as failure:
            reasons.append(f"{host}: {failure}")
    raise InputError(
        f"{name} could not be fetched ({'; '.join(reasons)}): run the same command later, or first download "
        f"{settings.hosts[0] + name} by hand into {settings.data} (its MD5 is {md5})"
    )


def retrying(settings):
    """Return a caller that repeats an attempt after a Failure; this is the only place where anything is repeated."""
    growing = tenacity.wait_exponential(multiplier=settings.pause)
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Failure) and not error.final),
        stop=tenacity.stop_after_attempt(settings.attempts),
        wait=lambda state: min(max(growing(state), state.outcome.exception().pause), LONGEST_PAUSE),
        before_sleep=lambda state: print(f"{state.outcome.exception()}; again in {state.next_action.sleep:.0f} s"),
        reraise=True,
    )


def download(url, path, md5, timeout):
    """Make one attempt to complete `<path>.partial` and give it its name.

    If it turns out to be another file it is thrown away, so that the next attempt starts from zero. Raises Failure,
    or OSError if the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "ab") as file:
            for position, chunk in receive(url, file.tell(), timeout):
                if position == 0:
                    file.truncate(0)
                file.write(chunk)
                file.flush()
    except OSError as error:
        error.filename = str(partial)  # a full disk does not say which file it had no room for
        raise
    found = digest(partial)
    if found != md5:
        size = partial.stat().st_size
        partial.unlink()
        raise Failure(f"{size} bytes of the wrong MD5 {found}")
    os.replace(partial, path)


def receive(url, offset, timeout):
    """Yield (position, bytes) of the file at `url` from `offset` on, or from 0, since servers may ignore Range.

    Raises Failure for whatever goes wrong. Whether it is the right file, its MD5 will tell.
    """
    headers = {"Accept-Encoding": "identity"}  # compressed on the way, a file has another length and other ranges
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
            if offset and response.status_code == 416:  # nothing beyond, as after a kill just before the renaming
                return
            require_file(response)
            if response.status_code == 200:
                offset = 0
            length, name = response.raw.length_remaining, url.rpartition("/")[2]
            total = None if length is None else offset + length
            with progress(desc=f"fetching {name}", total=total, initial=offset, **IN_BYTES) as bar:
                for chunk in response.iter_content(CHUNK):
                    yield offset, chunk
                    offset += len(chunk)
                    bar.update(len(chunk))
    except Failure:
        raise
    except Exception as error:  # an odd answer raises errors of requests, urllib3, http.client, idna and codecs
        while error.__context__:  # they come in layers, with ConnectionRefusedError and the like at the bottom
            error = error.__context__
        raise Failure(reason(error)) from error


def require_file(response):
    """Raise Failure unless the body is a file or the rest of one; a web page would cost us the partial file."""
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status in (200, 206) and "html" not in kind:
        return
    pause = 0
    with contextlib.suppress(ValueError, OverflowError, urllib3.exceptions.InvalidHeader):  # such as the year 99999
        pause = urllib3.Retry().get_retry_after(response.raw) or 0  # only parses: seconds, or a date
    raise Failure(f"{status} {response.reason} {kind}".strip(), final=status in (403, 404, 410), pause=pause)


def unpack(data):
    """Unpack the clips into `data`, keeping those that are there and whole.

    Raises InputError if a member would land outside `data` (then nothing is written) or if the archive is damaged,
    which right MD5 sums leave possible for a mirror's only.
    """
    parts = JoinedParts([data / part for part in PARTS])
    try:
        with zipfile.ZipFile(io.BufferedReader(parts, CHUNK)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                check_member(member)
            size = sum(member.file_size for member in members)
            with progress(desc="unpacking", total=size, **IN_BYTES) as bar:
                for member in members:
                    extract(archive, member, data / member.filename)
                    bar.update(member.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:  # zipfile has them all
        raise InputError(f"{data / PARTS[0]} to .003 are a damaged archive ({error}): fetch them from elsewhere")
    print(f"{data}: {len(members)} clips unpacked; mp3.zip.001 to .003 may go")


class JoinedParts(io.RawIOBase):
    """The parts read as the one file they were cut from, without a second 3 GB on the disk."""

    def __init__(self, paths):
        self.sizes = {path: path.stat().st_size for path in paths}
        self.position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset + (0, self.position, sum(self.sizes.values()))[whence]
        if self.position < 0:
            raise ValueError("a position before the start")
        return self.position

    def readinto(self, buffer):
        offset = self.position
        for path, size in self.sizes.items():
            if offset < size:
                with open(path, "rb", buffering=0) as file:
                    file.seek(offset)
                    count = file.readinto(buffer)  # fewer than asked at a part's end; BufferedReader asks again
                self.position += count
                return count
            offset -= size
        return 0


def check_member(member):
    """Raise InputError for a name outside the folder, BadZipFile for damage that zipfile takes without a word."""
    path = PureWindowsPath(member.filename)  # knows all that a Posix path does, and drives and backslashes
    if not path.parts or path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
        raise InputError(f"mp3.zip: {member.filename!r} would leave the data folder; nothing was unpacked")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{member.filename!r} is compressed by method {member.compress_type}")
    if b"PK\1\2" in member.comment + member.extra:
        raise zipfile.BadZipFile(f"its directory has lost the entries after {member.filename!r}")


def extract(archive, member, path):
    if path.is_file() and path.stat().st_size == member.file_size and zlib.crc32(path.read_bytes()) == member.CRC:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, whole_file(path, durable=False) as target:
        shutil.copyfileobj(source, target, CHUNK)


if __name__ == "__main__":
    run(main)
