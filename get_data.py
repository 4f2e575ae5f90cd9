"""Step 1: fetch MagnaTagATune, check every file's MD5 and unpack the clips; or, with --demo, render a small stand-in.

The clips come as one zip (3 GB, 25,863 clips), which some hosts have whole and others in parts; the annotations and the
clips' origin come as two tables. After an interruption, the same command resumes.
"""

import os
import re
import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from lib.common import ROOT, FromPython, InputError, lock, progress, reason, run, whole_file
from lib.demo import render
from lib.download import Host, Piece, fetch
from tags import annotations_file

HOSTS = (
    "https://huggingface.co/datasets/confit/magnatagatune/resolve/main/",
    "https://mirg.city.ac.uk/datasets/magnatagatune/",
    "http://mi.soi.city.ac.uk/datasets/magnatagatune/",
)
# Name, first byte, end, and the original program's MD5
ANNOTATIONS = Piece("annotations_final.csv", 0, 21_517_373, "f04fa01752a8cc64f6e1ca142a0fef1d")
CLIP_INFO = Piece("clip_info_final.csv", 0, 8_608_397, "03ef3cb8ddcfe53fdcdb8e0cda005be2")
ARCHIVE = Piece("mp3.zip", 0, 2_972_769_864, "f12add0eb4cd6c2a3ab7e4afaf7b7467")
ARCHIVE_PARTS = (
    Piece("mp3.zip.001", 0, 1_100_000_000, "179c91c8c2a6e9b3da3d4e69d306fd3b"),
    Piece("mp3.zip.002", 1_100_000_000, 2_200_000_000, "acf8265ff2e35c6ff22210e46457a824"),
    Piece("mp3.zip.003", 2_200_000_000, 2_972_769_864, "582dc649cabb8cd991f09e14b99349a5"),
)
UNPACKED = "unpacked.txt"  # "bytes name" of each clip and, last, the MD5 of the archive


@dataclass(frozen=True)
class Settings(FromPython):
    data: Path = ROOT / "data"  # folder for all files; those put there by hand are used if their MD5 is right
    hosts: tuple[str, ...] = HOSTS  # addresses of folders with both tables and mp3.zip, whole or in parts
    demo: bool = False  # fetch nothing, render synthetic clips into the folder "demo" inside the data folder


def main(settings=None):
    settings = settings or tyro.cli(Settings, description=__doc__)
    folder = settings.data / "demo" if settings.demo else settings.data
    if settings.demo:
        render(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ARCHIVE.name):
            fetch_and_unpack(settings)
    where = "" if folder == Settings.data else f" --data {shlex.quote(str(folder))}"
    print(f"next: python gen_spectrograms.py{where}")


def fetch_and_unpack(settings):
    """Download both tables and the clips into the data folder. Raises InputError if no host delivers a file."""
    if not settings.hosts or not all(re.fullmatch("https?://.+/", host) for host in settings.hosts):
        raise InputError("--hosts takes addresses that begin with http:// or https:// and end with /")
    data, hosts = settings.data, [Host(url) for url in settings.hosts]
    fetch(annotations_file(data), hosts, ANNOTATIONS)
    fetch(data / CLIP_INFO.name, hosts, CLIP_INFO)
    if not is_unpacked(data):
        require_disk_space(data)
        fetch(data / ARCHIVE.name, hosts, ARCHIVE, ARCHIVE_PARTS)
        unpack(data)
    print(f"{data}: all clips are unpacked; {ARCHIVE.name} may be deleted")


def require_disk_space(data):
    """Raise InputError if the disk has no room for the archive and the clips, which are as large."""
    there = [*data.glob(f"{ARCHIVE.name}.partial"), *data.glob(ARCHIVE.name), *data.glob("?/*.mp3")]
    needed, free = 2 * ARCHIVE.end - sum(path.stat().st_size for path in there), shutil.disk_usage(data).free
    if needed > free:
        has = f"{data} has {free / 1e9:.3f} GB free, {needed / 1e9:.3f} are needed"
        raise InputError(f"{has}: make room or give another --data")


def is_unpacked(data):
    """Return whether all clips of the archive exist, each in its full size."""
    if not (data / UNPACKED).exists():
        return False
    *clips, archive = (data / UNPACKED).read_text(encoding="utf-8", errors="replace").split("\n")
    paths = [data / clip.partition(" ")[2] for clip in clips]
    sizes = [str(os.path.getsize(path)) if os.path.isfile(path) else None for path in paths]  # whatever the name
    return archive == ARCHIVE.md5 and clips != [] and sizes == [clip.partition(" ")[0] for clip in clips]


def unpack(data):
    """Unpack the clips into `data`, except those that are there, and list them. Raises InputError as clips_in does."""
    listed = []
    for name, clip in clips_in(data / ARCHIVE.name):
        path = data / name
        if not (path.is_file() and path.read_bytes() == clip):
            path.parent.mkdir(exist_ok=True)
            with whole_file(path, durable=False) as file:
                file.write(clip)
        listed.append(f"{len(clip)} {name}\n")
    os.sync()  # all clips reach the disk before the list of them
    with whole_file(data / UNPACKED, "w", encoding="utf-8") as file:
        file.writelines([*listed, ARCHIVE.md5])
    print(f"{data}: {len(listed):,} clips unpacked")


def clips_in(path):
    """Yield (name, bytes) of each clip in an archive. Raises InputError if it is damaged or holds anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in progress(members, "unpacking", unit="clip"):
                if not re.fullmatch(r"[0-9a-f]/[^/]+\.mp3", member.filename):
                    raise InputError(f"{member.filename!r} is not a clip of MagnaTagATune")
                yield member.filename, archive.read(member)
    except Exception as error:  # zipfile raises errors of many kinds
        raise InputError(f"{path}: damaged archive ({reason(error)}); fetch it from elsewhere") from error


if __name__ == "__main__":
    run(main)
