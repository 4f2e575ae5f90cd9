"""Step 1: fetch MagnaTagATune, check every file's MD5 and unpack the clips; or, with --demo, render a small stand-in.

The clips come as one zip cut in three parts (3 GB, 25,863 clips), the annotations and the clips' origin as two
tables. Started again after any interruption, the script goes on from where it was.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated

import requests

from lib.common import ROOT, InputError, Range, naming, progress, reason, run, settings_from_command_line, whole_file
from lib.demo import render

HOSTS = ("https://mirg.city.ac.uk/datasets/magnatagatune/", "http://mi.soi.city.ac.uk/datasets/magnatagatune/")
MD5SUMS = {
    "annotations_final.csv": "f04fa01752a8cc64f6e1ca142a0fef1d",
    "clip_info_final.csv": "03ef3cb8ddcfe53fdcdb8e0cda005be2",
    "mp3.zip.001": "179c91c8c2a6e9b3da3d4e69d306fd3b",
    "mp3.zip.002": "acf8265ff2e35c6ff22210e46457a824",
    "mp3.zip.003": "582dc649cabb8cd991f09e14b99349a5",
}
PARTS = tuple(name for name in MD5SUMS if name.startswith("mp3"))
CHUNK = 1 << 14  # bytes read and written at once; at most so many are lost when the script is killed
LONGEST_PAUSE = 60  # seconds, however many attempts failed


@dataclasses.dataclass
class Settings:
    data: Path = ROOT / "data"  # folder for all files; those put there by hand are taken if their MD5 is right
    hosts: tuple[str, ...] = HOSTS  # addresses of folders that hold the files, tried in turn
    md5sums: Path | None = None  # file of lines "MD5  name" to use in place of the built-in ones, with a mirror
    timeout: Annotated[float, Range(0.1, 3600)] = 30  # seconds without a byte after which an attempt has failed
    attempts: Annotated[int, Range(1, 1000)] = 5  # per file and host
    pause: Annotated[float, Range(0, LONGEST_PAUSE)] = 1  # seconds before the second attempts; doubles each time
    demo: bool = False  # fetch nothing, render synthetic clips into the folder "demo" inside the data folder
    demo_clips: Annotated[int, Range(1, 100_000)] = 192  # how many clips the demo has
    demo_seed: Annotated[int, Range(0)] = 1337  # of the demo's random generator


def main():
    settings = settings_from_command_line(Settings, __doc__)
    folder = settings.data / "demo" if settings.demo else settings.data
    if settings.demo:
        render(folder, settings.demo_clips, settings.demo_seed)
    else:
        fetch(settings)
        unpack(folder)
    where = "" if folder == Settings.data else f" --data {shlex.quote(str(folder))}"
    print(f"next: python gen_spectrograms.py{where}")


def fetch(settings):
    """Bring all files into the data folder. Raises InputError if no host delivers one, or another has its name."""
    if not settings.hosts or not all(re.fullmatch("https?://.+/", host) for host in settings.hosts):
        raise InputError("--hosts takes addresses that begin with http:// or https:// and end with /")
    md5sums = read_md5sums(settings.md5sums) if settings.md5sums else MD5SUMS
    settings.data.mkdir(parents=True, exist_ok=True)
    if not settings.md5sums:  # a mirror's archive may have another size
        require_disk_space(settings.data)
    for name in MD5SUMS:
        fetch_file(settings, name, md5sums[name])


def read_md5sums(path):
    """Return {name: MD5} from a file as the program md5sum writes it; InputError if one of ours is missing."""
    lines = re.findall(r"^([0-9a-fA-F]{32}) [ *](\S+)$", path.read_text(errors="replace"), re.MULTILINE)
    md5sums = {name: md5.lower() for md5, name in lines}
    if missing := MD5SUMS.keys() - md5sums.keys():
        raise InputError(f"{path} has no line 'MD5  name' for {', '.join(sorted(missing))}")
    return md5sums


def require_disk_space(data):
    """Raise InputError if the archive's parts, the archive and the clips, each as large, will not fit."""
    there = [*data.glob("mp3.zip.00*"), *data.glob("?/*.mp3")]
    needed, free = 3 * 2_970_000_000 - sum(path.stat().st_size for path in there), shutil.disk_usage(data).free
    if needed > free:
        has = f"{data} has {free / 1e9:.3f} GB free, {needed / 1e9:.3f} are needed"
        raise InputError(f"{has}: make room or give another --data")


def fetch_file(settings, name, md5):
    """Fetch a file, unless it is there, from the hosts in turn, until one delivers it."""
    stored = settings.data / ("tags.csv" if name == "annotations_final.csv" else name)
    for path in (stored, settings.data / name):
        if path.exists():
            if (found := digest(path)) != md5:  # a person's: we give files their names when they are right
                raise InputError(f"{path} has MD5 {found}, not {md5}: move it away, and it will be fetched anew")
            os.replace(path, stored)
            print(f"{stored}: already there")
            return
    failures = {}
    for attempt in range(settings.attempts):
        if attempt:
            time.sleep(min(settings.pause * 2 ** (attempt - 1), LONGEST_PAUSE))
        for host in settings.hosts:
            print(f"{stored}: fetching {host + name}")
            try:
                return download(host + name, stored, md5, settings.timeout)
            except InputError as error:
                print(f"{host + name}: {error}")
                failures[host] = error
    raise InputError(
        f"{name} could not be fetched ({'; '.join(f'{host}: {error}' for host, error in failures.items())}): run the "
        f"same command later, or first download {settings.hosts[0] + name} by hand into {settings.data} (MD5 {md5})"
    )


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url, path, md5, timeout):
    """Make one attempt to complete `<path>.partial` and give it its name.

    Raises InputError if that fails, OSError if the disk is full. A wrong file is thrown away.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "ab") as file:
            receive(url, file, timeout)
    except Exception as error:  # an odd answer raises errors of requests, urllib3, http.client, idna and codecs
        if getattr(error, "errno", None):  # the disk's, without the file's name; those of requests have no number
            error.filename = str(partial)
            raise
        raise InputError(reason(error)) from error
    if (found := digest(partial)) != md5:
        partial.unlink()
        raise InputError(f"wrong MD5 {found}")
    os.replace(partial, path)


def receive(url, file, timeout):
    """Append to `file` what it lacks of the file at `url`. Whether that was the right one, its MD5 will tell."""
    headers = {"Accept-Encoding": "identity"}  # compressed on the way, a file has another length and other ranges
    if begun := file.tell():
        headers["Range"] = f"bytes={begun}-"
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
        status, kind = response.status_code, response.headers.get("Content-Type", "")
        if status == 416:  # nothing beyond, as after a kill just before the renaming
            return
        if status not in (200, 206) or "html" in kind:  # a web page would cost us the partial file
            raise InputError(f"{status} {response.reason} {kind}".strip())
        if status == 200:  # the whole file: servers may ignore Range
            begun = file.truncate(0)
        total, name = begun + (response.raw.length_remaining or 0), url.rpartition("/")[2]
        with progress(desc=f"fetching {name}", total=total, initial=begun, unit="B", unit_scale=True) as bar:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))


def unpack(data):
    """Unpack the clips into `data`, keeping those that are there and whole.

    Raises InputError if the archive, a mirror's, is damaged, or a clip would land outside `data`.
    """
    n_clips = 0
    for name, clip in files_in_archive(data):
        path = data / name
        if Path(os.path.abspath(data)) not in Path(os.path.abspath(path)).parents:
            raise InputError(f"{data / PARTS[0]}: {name!r} would leave the folder; fetch it from elsewhere")
        if not (path.is_file() and path.read_bytes() == clip):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, durable=False) as file:
                file.write(clip)
        n_clips += 1
    print(f"{data}: {n_clips} clips unpacked; mp3.zip.001 to .003 can be deleted")


def files_in_archive(data):
    """Yield (name, bytes) of each file in the zip that was cut into PARTS. Raises InputError if it is damaged."""
    with tempfile.TemporaryFile(dir=data) as joined:
        with naming(data):
            for part in PARTS:
                with open(data / part, "rb") as file:
                    shutil.copyfileobj(file, joined)
        try:
            with zipfile.ZipFile(joined) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                for member in progress(members, "unpacking", unit="clip"):
                    yield member.filename, archive.read(member)
        except Exception as error:  # zipfile raises errors of many kinds
            fault = f"damaged archive ({reason(error)})"
            raise InputError(f"{data / PARTS[0]} to .003: {fault}; fetch them from elsewhere") from error


if __name__ == "__main__":
    run(main)
