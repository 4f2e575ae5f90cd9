"""Step 1: fetch MagnaTagATune, check every file's MD5 and unpack the clips; or, with --demo, render a small stand-in.

The clips come as one zip cut in three parts (3 GB, 25,863 clips), the annotations and the clips' origin as two
tables. Started again after any interruption, the script goes on from where it was.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import re
import shlex
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

import requests
import tenacity
import urllib3
from tqdm import tqdm

from common import ROOT, InputError, run, settings_from_command_line, whole_file

HOSTS = ("https://mirg.city.ac.uk/datasets/magnatagatune/", "http://mi.soi.city.ac.uk/datasets/magnatagatune/")
PARTS = ("mp3.zip.001", "mp3.zip.002", "mp3.zip.003")
ARCHIVE = "mp3.zip"  # the three parts one after another; never written to disk
STORED_AS = {"annotations_final.csv": "tags.csv", "clip_info_final.csv": "clip_info_final.csv"}
MD5SUMS = {
    "mp3.zip.001": "179c91c8c2a6e9b3da3d4e69d306fd3b",
    "mp3.zip.002": "acf8265ff2e35c6ff22210e46457a824",
    "mp3.zip.003": "582dc649cabb8cd991f09e14b99349a5",
    "mp3.zip": "f12add0eb4cd6c2a3ab7e4afaf7b7467",
    "annotations_final.csv": "f04fa01752a8cc64f6e1ca142a0fef1d",
    "clip_info_final.csv": "03ef3cb8ddcfe53fdcdb8e0cda005be2",
}
ARCHIVE_BYTES = 2_970_000_000  # about; for the look at the free space if no host tells
CHUNK = 1 << 14  # bytes read and written at once; at most so many are lost when the script is killed
LONGEST_PAUSE = 60  # seconds, however many attempts failed and whatever a host asks for
PLAIN = {"Accept-Encoding": "identity"}  # compressed on the way, a file has another length and other ranges


@dataclasses.dataclass
class Settings:
    data: Path = ROOT / "data"  # folder for all files; those put there by hand are taken if their MD5 is right
    hosts: tuple[str, ...] = HOSTS  # addresses of folders that hold the files, tried in this order
    md5sums: Path | None = None  # file of lines "MD5  name" to use in place of the built-in ones, with a mirror
    timeout: float = 30  # seconds without a byte after which an attempt has failed
    attempts: int = 5  # per file and host
    pause: float = 1  # seconds before the second attempt; doubles with each further one
    demo: bool = False  # fetch nothing, render synthetic clips into the folder "demo" inside the data folder
    demo_clips: int = 192  # how many clips the demo has
    demo_seed: int = 1337  # of the demo's random generator


def main():
    settings = settings_from_command_line(Settings, __doc__)
    check(settings)
    if settings.demo:
        render_demo(settings)
        return
    md5sums = read_md5sums(settings.md5sums) if settings.md5sums else MD5SUMS
    settings.data.mkdir(parents=True, exist_ok=True)
    require_disk_space(settings)
    obtain_tables(settings, md5sums)
    obtain_parts(settings, md5sums)
    unpack(settings.data)
    print_next_step(settings.data)


def check(settings):
    if not settings.hosts or not all(re.fullmatch("https?://.+/", host) for host in settings.hosts):
        raise InputError("--hosts takes addresses that begin with http:// or https:// and end with /")
    if not (settings.timeout > 0 and settings.attempts > 0 and settings.pause >= 0):
        raise InputError("--timeout and --attempts have to be more than 0, --pause not less")


def render_demo(settings):
    from demo import render  # here, because a download does not need what it imports

    folder = settings.data / "demo"
    render(folder, n_clips=settings.demo_clips, seed=settings.demo_seed)
    print_next_step(folder)


def print_next_step(folder):
    where = "" if folder == Settings.data else f" --data {shlex.quote(str(folder))}"
    print(f"next: python gen_spectrograms.py{where}")


def read_md5sums(path):
    """Return {name: MD5} from a file as the program md5sum writes it; InputError if one of ours is missing."""
    lines = re.findall(r"^([0-9a-fA-F]{32}) [ *](\S+)$", path.read_text(errors="replace"), re.MULTILINE)
    md5sums = {name: md5.lower() for md5, name in lines}
    missing = [name for name in MD5SUMS if name not in md5sums]
    if missing:
        raise InputError(f"{path} has no line 'MD5  name' for {', '.join(missing)}")
    return md5sums


def require_disk_space(settings):
    """Raise InputError, with figures, if the parts and the clips unpacked from them will not fit.

    mp3 does not compress, so the clips take what the archive takes. The tables' 20 MB are left out.
    """
    there = [*settings.data.glob(f"{ARCHIVE}.00*"), *settings.data.glob("?/*.mp3")]
    needed = 2 * archive_bytes(settings) - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(settings.data).free
    if needed > free:
        raise InputError(
            f"{settings.data} has {free / 1e9:.3f} GB free, the archive and the clips in it need {needed / 1e9:.3f} "
            "GB more: make room, or choose another folder with --data"
        )


def archive_bytes(settings):
    """Return the size of the three parts together, as they lie here or as the first host that answers has them."""
    for host in settings.hosts:
        with contextlib.suppress(requests.RequestException, KeyError, ValueError):
            return sum(part_bytes(settings.data / part, host + part, settings.timeout) for part in PARTS)
    return ARCHIVE_BYTES


def part_bytes(path, url, timeout):
    if path.exists():
        return path.stat().st_size
    with requests.head(url, headers=PLAIN, timeout=timeout, allow_redirects=True) as response:
        response.raise_for_status()
        return int(response.headers["Content-Length"])


def obtain_tables(settings, md5sums):
    for table in STORED_AS:
        obtain(settings, table, md5sums[table], before=hashlib.md5())


def obtain_parts(settings, md5sums):
    joined = hashlib.md5()
    for part in PARTS:
        joined = obtain(settings, part, md5sums[part], before=joined)
    if joined.hexdigest() != md5sums[ARCHIVE]:
        raise InputError(f"{settings.md5sums}: the parts, each right, make an {ARCHIVE} of MD5 {joined.hexdigest()}")


def obtain(settings, name, md5, before):
    """Bring one file into the data folder unless it is there; return `before`, an md5 object, carried on over it.

    Raises InputError if no host delivers, or if another file has its name: a person's, since ours get it when right.
    """
    stored = settings.data / STORED_AS.get(name, name)
    for path in (stored, settings.data / name):
        if path.exists():
            found, joined = digest(path, before)
            if found != md5:
                raise InputError(f"{path} has MD5 {found}, not {md5}: move it away, and it will be fetched anew")
            os.replace(path, stored)
            print(f"{stored}: already there")
            return joined
    return fetch(settings, name, stored, md5, before)


def digest(path, before):
    """Return the MD5 of a file and, from the same read, the md5 object `before` carried on over it."""
    md5, joined = hashlib.md5(), before.copy()
    with open(path, "rb") as file, progress_bar(f"checking {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK):
            md5.update(chunk)
            joined.update(chunk)
            bar.update(len(chunk))
    return md5.hexdigest(), joined


class Failure(Exception):
    """An attempt that brought no right file; `final`: no other will; `pause`: seconds the host asked us to wait."""

    def __init__(self, reason, final=False, pause=0):
        super().__init__(reason)
        self.final, self.pause = final, pause


def fetch(settings, name, path, md5, before):
    """Fetch `name` into `path` from the first host that delivers it; return as `obtain` does."""
    reasons = []
    for host in settings.hosts:
        print(f"{path}: fetching {host + name}")
        try:
            return retrying(settings)(download, host + name, path, md5, before, settings.timeout)
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


def download(url, path, md5, before, timeout):
    """Make one attempt to complete `<path>.partial` and give it its name; return as `obtain` does, or raise Failure.

    If it turns out to be another file it is thrown away, so that the next attempt starts from zero.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        receive(url, partial, timeout)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Failure(innermost(error)) from error
    found, joined = digest(partial, before)
    if found != md5:
        size = partial.stat().st_size
        partial.unlink()
        raise Failure(f"{size} bytes of the wrong MD5 {found}")
    os.replace(partial, path)
    return joined


def receive(url, partial, timeout):
    """Append to `partial` what the server has beyond it; whether it is the right file, its MD5 will tell."""
    offset = partial.stat().st_size if partial.exists() else 0
    ranged = {"Range": f"bytes={offset}-"} if offset else {}
    with requests.get(url, headers=PLAIN | ranged, timeout=timeout, stream=True) as response:
        if offset and response.status_code == 416:  # nothing beyond, as after a kill just before the renaming
            return
        require_file(response)
        if response.status_code == 200:  # the whole file: servers may ignore Range
            offset = 0
        bar = progress_bar(f"fetching {partial.stem}", offset + (response.raw.length_remaining or 0), offset)
        with bar, open(partial, "ab" if offset else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def require_file(response):
    """Raise Failure unless the body is a file or the rest of one; a web page would cost us the partial file."""
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status not in (200, 206) or "html" in kind:
        pause = urllib3.Retry().get_retry_after(response.raw) or 0  # only parses: seconds, or a date
        raise Failure(f"{status} {response.reason} {kind}".strip(), final=status in (403, 404, 410), pause=pause)


def innermost(error):
    """Return what lies under the layers of requests and urllib3, such as "[Errno 111] Connection refused"."""
    while error.__context__:
        error = error.__context__
    return " ".join(str(error).split()) or type(error).__name__


def progress_bar(what, total, done=0):
    """Return a bar that counts bytes, with rate and remaining time; it shows itself only in a terminal."""
    return tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, leave=False, disable=None)


def unpack(data):
    """Unpack the clips into `data`, keeping those that are there and whole.

    Raises InputError if a member would land outside `data` (then nothing is written) or if the archive is damaged,
    which right MD5 sums leave possible for a mirror's only.
    """
    parts = JoinedParts([data / part for part in PARTS])
    try:
        with zipfile.ZipFile(io.BufferedReader(parts, CHUNK)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            refuse_escapes(members)
            refuse_damage(members)
            with progress_bar("unpacking", sum(member.file_size for member in members)) as bar:
                for member in members:
                    extract(archive, member, data / member.filename)
                    bar.update(member.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:  # zipfile has them all
        raise InputError(f"{data / ARCHIVE}.001 to .003 are a damaged archive ({error}): fetch them from elsewhere")
    print(f"{data}: {len(members)} clips unpacked; the three parts of {ARCHIVE} may go")


class JoinedParts(io.RawIOBase):
    """The parts read as the one file they were cut from, without a second 3 GB on the disk."""

    def __init__(self, paths):
        self.paths = paths
        self.starts = [0, *itertools.accumulate(path.stat().st_size for path in paths)]  # the last is the whole's end
        self.position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.position = offset + (0, self.position, self.starts[-1])[whence]
        if self.position < 0:
            raise ValueError("a position before the start")
        return self.position

    def readinto(self, buffer):
        if self.position >= self.starts[-1]:
            return 0
        part = bisect.bisect_right(self.starts, self.position) - 1
        with open(self.paths[part], "rb", buffering=0) as file:
            file.seek(self.position - self.starts[part])
            count = file.readinto(buffer)  # fewer than asked at a part's end; BufferedReader asks again
        self.position += count
        return count


def refuse_escapes(members):
    for member in members:
        path = PureWindowsPath(member.filename)  # knows all that a Posix path does, and drives and backslashes
        if not path.parts or path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{ARCHIVE}: {member.filename!r} would leave the data folder; nothing was unpacked")


def refuse_damage(members):
    """Raise BadZipFile for what zipfile takes without a word: other methods, entries hidden in another's comment."""
    for member in members:
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
