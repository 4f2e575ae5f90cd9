"""Kill the long scripts at random instants, and give every reader damaged files. Run by hand; pytest leaves it alone.

Kills: get_data.py, gen_spectrograms.py and trainer.py --resume, or one of their workers, are killed and started anew
with the same command until they are done. What they leave has to be what an undisturbed run leaves.
Damage: a file with flipped bits, lost or foreign pieces, or zeros has to be refused in one line, or read as an
independent reader reads it. Whatever fails stays in the folder that the last line names.

    python tests/stress.py                                      everything, in about half an hour
    python tests/stress.py --kills 0 --damages 1 --first 417    damaged input 417 once more
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # one thread: the same sums in the same order

import numpy as np
import torch
from http_server import Server, stop_after
from librosa import load
from librosa.feature import melspectrogram

import get_data
from common import InputError, run, settings_from_command_line
from dump import Dump
from gen_spectrograms import make_clip
from tagger import load_checkpoint, network_of
from tags import read_annotations


@dataclass(frozen=True)
class Settings:
    kills: int = 100  # of each of the three long scripts
    damages: int = 1000  # damaged inputs, of all kinds together
    seed: int = 1337  # of the kills' instants and of the damage
    first: int = 0  # number of the first damaged input
    only: tuple[str, ...] = ()  # scripts and kinds of input, by the names that the last lines have; empty: all


KILLED = ("get_data", "gen_spectrograms", "trainer")
DAMAGED = 6 * ["mp3"] + 5 * ["tables"] + 3 * ["archives"] + 4 * ["checkpoints"] + 2 * ["dumps"]  # of twenty inputs
THROUGH_SCRIPT = 49  # one damaged input in so many goes through its script as well
COMMANDS = {  # each runs in a copy of Good's folder "inputs"
    "get_data": "get_data.py --data got --md5sums md5sums.txt --attempts 1000 --pause 0 --hosts",  # and an address
    "gen_spectrograms": "gen_spectrograms.py --data . --n-chunks 4",
    "trainer": "trainer.py --data music --experiments . --name tiny --resume --train-size 8 --validation-size 4 "
    "--epochs 3 --batch-size 2 --super-batch-size 4",
    "evaluate": "evaluate.py --data music --checkpoint best.pt --resamples 10",
}
REAL_MUSIC = ROOT.parent / "shared/gtzan60"  # used where it is there
SCRIPT_SECONDS, READER_SECONDS = 120, 30  # more is a hang
READER_MEMORY = 1 << 34  # bytes of address space: a damaged length must not take all there is
OUTCOMES = {0: "right", 1: "refused", 2: "silent wrong answers", -signal.SIGALRM: "hangs"}  # others are tracebacks


def main():
    settings = settings_from_command_line(Settings, __doc__)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    good = Good(folder / "good")
    killed = [script for script in KILLED if settings.kills and script in (settings.only or KILLED)]
    kills = {script: kill_script(script, good, folder / script, settings) for script in killed}
    damages = damage_inputs(good, folder, settings)
    n_failures = summarise("kills", kills, ("differences", "hangs"))
    n_failures += summarise("damaged inputs", damages, ("tracebacks", "hangs", "silent wrong answers"))
    if n_failures:
        raise InputError(f"what failed is in {folder}")
    shutil.rmtree(folder)


def summarise(what, tallies, failures):
    """Print a line on {part: Counter}; return the number of failures."""
    total = sum(tallies.values(), Counter())
    parts = ", ".join(f"{part} {tally[what]}" for part, tally in tallies.items()) or "none"
    print(f"{what}: {parts}: {total[what]} {what}, {', '.join(f'{total[kind]} {kind}' for kind in failures)}")
    return sum(total[kind] for kind in failures)


class Good:
    """Undamaged files of every kind, and what the scripts make of them undisturbed."""

    def __init__(self, folder):
        folder.mkdir()
        complete(folder, "get_data.py --demo --demo-clips 16 --data .")
        complete(folder, "gen_spectrograms.py --data demo --n-chunks 2")
        self.music, self.inputs = folder / "demo", folder / "inputs"
        self.mp3s = sorted([*self.music.rglob("*.mp3"), *REAL_MUSIC.rglob("*.mp3")])
        self.tables = [self.music / "tags.csv", *REAL_MUSIC.glob("annotations_final.csv")]
        self.dump, self.dump_files = all_of_dump(self.music), ["dump.json", *self.music.glob("*.npy")]
        self.members = {f"{n % 16:x}/clip{n}.mp3": random.Random(n).randbytes(20_000) for n in range(80)}
        self.downloads = cut_archive(self.members)
        self.downloads |= {name: (self.music / ours).read_bytes() for name, ours in get_data.STORED_AS.items()}
        server = Server(self.downloads).__enter__()  # for as long as this process lives
        server.tricks.update((name, [stop_after(100_000)] * 100_000) for name in self.downloads)
        COMMANDS["get_data"] += f" {server.url}"
        self.fill_inputs()
        shutil.copytree(self.inputs, folder / "run", symlinks=True)
        complete(folder / "run", COMMANDS["trainer"])
        self.best, self.last = (folder / "run/tiny" / name for name in ("best.pt", "last.pt"))
        self.checkpoint = frozen(torch.load(self.best))
        (self.inputs / "best.pt").symlink_to(self.best)
        complete(self.inputs, COMMANDS["evaluate"])

    def fill_inputs(self):
        """Fill the folder of what the scripts need. Of its clips some are bad, too few for an error."""
        (self.inputs / "music").mkdir(parents=True)
        for path in self.music.iterdir():
            (self.inputs / "music" / path.name).symlink_to(path)
        write_md5sums(self.inputs / "md5sums.txt", self.downloads)
        (self.inputs / "clip.mp3").write_bytes(self.mp3s[0].read_bytes()[:50_000])
        (self.inputs / "empty.mp3").touch()
        clips = sorted(f"music/{path.relative_to(self.music)}" for path in self.music.rglob("*.mp3"))
        paths = [*clips, "clip.mp3", "missing.mp3", *clips, "empty.mp3", "clip.mp3", *clips[:6]]
        rows = [f"{number}\t{number % 2}\t{path}\n" for number, path in enumerate(paths)]
        (self.inputs / "tags.csv").write_text("clip_id\tguitar\tmp3_path\n" + "".join(rows))
