"""Kill the long scripts at random instants, and give every reader damaged files. Run by hand; pytest leaves it alone.

Kills: get_data.py, gen_spectrograms.py and trainer.py --resume, or one of their workers, are killed and started anew
with the same command until they are done. What they leave has to be what an undisturbed run leaves.
Damage: a file with flipped bits, lost or foreign pieces, or zeros has to be refused in one line, or read as an
independent reader reads it.

    python tests/stress.py                                      everything, in about half an hour
    python tests/stress.py --kills 0 --damages 1 --first 417    damaged input 417 once more

The exit status is 0 if nothing went wrong; otherwise the inputs that failed are left in the folder that is named.
"""

import contextlib
import csv
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # one thread: the same sums in the same order

import librosa
import numpy as np
import torch
from http_server import Server, behave

import gen_spectrograms
import get_data
from common import InputError, run, settings_from_command_line
from dump import Dump
from tagger import load_checkpoint, network_of
from tags import clip_info_of, read_annotations

Part = Literal["get_data", "gen_spectrograms", "trainer", "mp3", "tables", "archives", "checkpoints", "dumps"]


@dataclass(frozen=True)
class Settings:
    kills: int = 100  # of each of the three long scripts
    damages: int = 1000  # damaged inputs, of all kinds together
    seed: int = 1337  # of the kills' instants and of the damage
    first: int = 0  # number of the first damaged input
    only: tuple[Part, ...] = ()  # parts to run; empty: all
    script_every: int = 49  # one damaged input in so many goes through its script as well


REAL_MUSIC = ROOT.parent / "shared/gtzan60"  # used where it is there
COMMANDS = {  # each runs in a folder that prepare() has filled
    "get_data": "get_data.py --data got --md5sums md5sums.txt --hosts",  # and an address
    "gen_spectrograms": "gen_spectrograms.py --data . --n-chunks 4",
    "trainer": "trainer.py --data music --experiments . --name tiny --resume --train-size 8 --validation-size 4 "
    "--epochs 3 --batch-size 2 --super-batch-size 4",
    "evaluate": "evaluate.py --data music --checkpoint best.pt --resamples 10",
}
KILLED = ("get_data", "gen_spectrograms", "trainer")
DAMAGED = 6 * ["mp3"] + 5 * ["tables"] + 3 * ["archives"] + 4 * ["checkpoints"] + 2 * ["dumps"]  # of twenty inputs
SCRIPT_SECONDS, READER_SECONDS = 120, 30  # after which it hangs
READER_MEMORY = 1 << 34  # bytes of address space: a damaged length must not take all there is
OUTCOMES = {0: "right", 1: "refused", 2: "silent wrong answers", -signal.SIGALRM: "hangs"}  # others are tracebacks


def main():
    settings = settings_from_command_line(Settings, __doc__)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    good = Good(folder / "good")
    killed = [script for script in KILLED if settings.kills and script in (settings.only or KILLED)]
    kills = {script: kill_script(script, good, folder / script, settings) for script in killed}
    damages = damage_inputs(good, folder, settings)
    n_failures = summarise("kills", kills, ("differences", "hangs"))
    n_failures += summarise("damaged inputs", damages, ("tracebacks", "hangs", "silent wrong answers"))
    if n_failures:
        print(f"see {folder}")
        return 1
    shutil.rmtree(folder)


def summarise(what, tallies, failures):
    """Print a line on {part: Counter}; return the number of failures."""
    total = sum(tallies.values(), Counter())
    parts = ", ".join(f"{part} {tally[what]}" for part, tally in tallies.items()) or "none"
    print(f"{what}: {parts}: {total[what]} {what}, {', '.join(f'{total[kind]} {kind}' for kind in failures)}")
    return sum(total[kind] for kind in failures)


# Undamaged files and undisturbed scripts


class Good:
    """Small files of every kind in `folder`, and what the scripts make of them."""

    def __init__(self, folder):
        folder.mkdir()
        complete(folder, "get_data.py --demo --demo-clips 16 --data .")
        complete(folder, "gen_spectrograms.py --data demo --n-chunks 2")
        self.music = folder / "demo"
        self.mp3s = [path.read_bytes() for path in sorted([*self.music.rglob("*.mp3"), *REAL_MUSIC.rglob("*.mp3")])]
        self.tables = [path.read_bytes() for path in (self.music / "tags.csv", *REAL_MUSIC.glob("*.csv"))]
        self.clip_info = (self.music / "clip_info_final.csv").read_bytes()
        self.members = {f"{n % 16:x}/clip{n}.mp3": random.Random(n).randbytes(20_000) for n in range(80)}
        self.downloads = parts_of_archive(self.members)
        self.downloads |= {name: (self.music / ours).read_bytes() for name, ours in get_data.STORED_AS.items()}
        self.host = serve_slowly(self.downloads)
        self.dump_files = {path.name: path.read_bytes() for path in self.music.glob("*.npy")}
        self.dump_files["dump.json"] = (self.music / "dump.json").read_bytes()
        self.dump = all_of_dump(self.music)
        prepare(folder / "run", self)
        complete(folder / "run", COMMANDS["trainer"])
        self.best, self.last = ((folder / "run/tiny" / name).read_bytes() for name in ("best.pt", "last.pt"))
        self.checkpoint = frozen(torch.load(io.BytesIO(self.best)))
        (folder / "run/best.pt").write_bytes(self.best)
        complete(folder / "run", COMMANDS["evaluate"])
        self.scores = (folder / "run/per_tag.csv").read_bytes()


def parts_of_archive(members):
    """Return {name: bytes} of the archive of `members`, cut in three through clips."""
    joined = io.BytesIO()
    with zipfile.ZipFile(joined, "w") as archive:
        for number, (name, content) in enumerate(members.items()):
            archive.writestr(name, content, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2])
    third = len(joined.getvalue()) // 3 + 7
    return {part: joined.getvalue()[n * third :][:third] for n, part in enumerate(get_data.PARTS)}


def serve_slowly(files):
    """Start a server that sends 20 kB at a time, so that kills find files half fetched; return its address."""

    def slowly(handler, content):
        def write(content, fast=handler.wfile.write):
            for start in range(0, len(content), 20_000):
                fast(content[start : start + 20_000])
                time.sleep(0.01)

        handler.wfile.write = write
        behave(handler, content)

    server = Server(files).__enter__()  # for as long as this process lives
    server.tricks.update((name, [slowly] * 100_000) for name in files)
    return server.url


def prepare(folder, good):
    """Fill a folder with what the scripts need: links, and clips of which some are bad, too few for an error."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "music").mkdir(parents=True)
    for path in good.music.iterdir():
        (folder / "music" / path.name).symlink_to(path)
    write_md5sums(folder / "md5sums.txt", good.downloads)
    (folder / "clip.mp3").write_bytes(good.mp3s[0][:50_000])
    (folder / "empty.mp3").touch()
    clips = sorted(f"music/{path.relative_to(good.music)}" for path in good.music.rglob("*.mp3"))
    paths = [*clips, "clip.mp3", "missing.mp3", *clips, "empty.mp3", "clip.mp3", *clips[:6]]
    rows = [f"{number}\t{number % 2}\t{path}\n" for number, path in enumerate(paths)]
    (folder / "tags.csv").write_text("clip_id\tguitar\tmp3_path\n" + "".join(rows))


def write_md5sums(path, files):
    files = files | {get_data.ARCHIVE: b"".join(files[part] for part in get_data.PARTS)}
    path.write_text("".join(f"{hashlib.md5(content).hexdigest()}  {name}\n" for name, content in files.items()))


def start(folder, command):
    """Start a script in `folder`, in a session of its own; its output goes to stdout.txt and stderr.txt there."""
    script, *options = command.split()
    with open(folder / "stdout.txt", "w") as stdout, open(folder / "stderr.txt", "w") as stderr:
        command = [sys.executable, str(ROOT / script), *options]
        return subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr, start_new_session=True)


def finish(process):
    """Return a script's exit status once it has ended by itself; None, and killed, if it hangs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(SCRIPT_SECONDS)
    end(living(process.pid))


def complete(folder, command):
    status = finish(start(folder, command))
    if status != 0:
        raise InputError(f"{command}, undisturbed, ended with {status}: {(folder / 'stderr.txt').read_text()}")


def living(session):
    """Return the processes of a session that have not ended."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                pids.append(int(path.parent.name))
    return pids


def end(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def frozen(tree):
    """Return dicts, lists, arrays and tensors, one in another, as what `==` compares to the last bit."""
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [frozen(value) for value in tree]
    if isinstance(tree, (np.ndarray, torch.Tensor)):
        return str(tree.dtype), tuple(tree.shape), np.asarray(tree).tobytes()
    return tree


# Kills


def kill_script(script, good, folder, settings):
    """Kill a script `settings.kills` times, comparing what there is whenever it gets to its end; return the tally."""
    rng, tally = random.Random(f"{settings.seed} {script}"), Counter()
    command = COMMANDS[script] + (f" {good.host}" if script == "get_data" else "")
    prepare(folder, good)
    began = time.monotonic()
    complete(folder, command)
    seconds, expected = time.monotonic() - began, left_in(folder)
    while tally["kills"] < settings.kills:
        prepare(folder, good)
        sessions, killed = [], True
        while killed:
            process = start(folder, command)
            sessions.append(process.pid)
            killed = tally["kills"] < settings.kills and kill_within(seconds, process, rng)
            tally["kills"] += killed
            if not killed and finish(process) is None or outlived(sessions):
                tally["hangs"] += complain(script, "it, or a worker that it left, does not end")
            printed = (folder / "stderr.txt").read_text(errors="replace")
            if "Traceback" in printed:
                tally["differences"] += complain(script, printed)
        found = left_in(folder)
        if names := [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]:
            tally["differences"] += complain(script, f"other than undisturbed: {', '.join(names)}")
    print(f"{script}: {tally['kills']} kills in {time.monotonic() - began:.0f} s", flush=True)
    return tally
