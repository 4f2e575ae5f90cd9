"""Kill the long scripts at random instants, and give every reader damaged files. Run by hand; pytest leaves it alone.

A script, or one of its workers, is killed and started anew with the same command until it is done; sometimes a second
run of the same command is at work meanwhile. What is left has to be what an undisturbed run leaves. A file with
flipped bits, lost or misplaced pieces, or zeros has to be refused in one line, or read as an independent reader reads
it. Whatever fails stays in the folder that the last line names.

    python tests/stress.py                                      everything, in about half an hour
    python tests/stress.py --kills 0 --damages 1 --first 417    damaged input 417 once more
"""

import contextlib
import csv
import hashlib
import io
import os
import random
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
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # one thread: the same sums in the same order

import numpy as np
import torch
from http_server import Server, stop_after
from librosa import load
from librosa.feature import melspectrogram

import get_data
from gen_spectrograms import read_clip
from lib.audio import log_mel
from lib.checkpoint import load_checkpoint
from lib.common import InputError, Range, run, settings_from_command_line
from lib.dump import Dump
from lib.tagger import network_of
from tags import read_annotations


@dataclass(frozen=True)
class Settings:
    kills: Annotated[int, Range(0)] = 100  # of each of the three long scripts
    damages: Annotated[int, Range(0)] = 1000  # damaged inputs, of all kinds together
    seed: Annotated[int, Range(0)] = 1337  # of the kills' instants and of the damage
    first: Annotated[int, Range(0)] = 0  # number of the first damaged input
    only: tuple[str, ...] = ()  # scripts and kinds of input, by the names that the last lines have; empty: all


KILLED = ("get_data", "gen_spectrograms", "trainer")
COMMANDS = {  # each runs in a copy of Good's folder "inputs"
    "get_data": "get_data.py --data got --md5sums md5sums.txt --attempts 1000 --pause 0 --hosts",  # and an address
    "gen_spectrograms": "gen_spectrograms.py --data . --n-chunks 4",
    "trainer": "trainer.py --data music --experiments . --name tiny --resume --train-size 8 --validation-size 4 "
    "--epochs 3 --batch-size 2 --super-batch-size 4",
}
REAL_MUSIC = ROOT.parent / "shared/gtzan60"  # used where it is there
SCRIPT_SECONDS, READER_SECONDS = 120, 30  # more is a hang
OUTCOMES = {0: "right", 1: "refused", 2: "silent wrong answers", -signal.SIGALRM: "hangs"}  # others are tracebacks


def main():
    settings = settings_from_command_line(Settings, __doc__)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    good = Good(folder / "good")
    killed = [script for script in KILLED if settings.kills and script in (settings.only or KILLED)]
    kills = {script: kill_script(script, good, folder / script, settings) for script in killed}
    damages = damage_inputs(good, folder, settings) if settings.damages else {}
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
        self.dump = all_of_dump(self.music)
        self.serve()
        self.fill_inputs()
        shutil.copytree(self.inputs, folder / "run", symlinks=True)
        complete(folder / "run", COMMANDS["trainer"])
        self.best = folder / "run/tiny/best.pt"
        self.checkpoint = frozen(torch.load(self.best))

    def serve(self):
        """Start a host, for as long as this process lives, that drops connections, so that a download takes a while."""
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for n in range(200):
                file.writestr(f"{n % 16:x}/clip{n}.mp3", random.Random(n).randbytes(20_000))
        content, cuts = archive.getvalue(), (0, 2_000_001, -30_000, None)  # half of the last part is the directory
        self.downloads = {part: content[cuts[n] : cuts[n + 1]] for n, part in enumerate(get_data.PARTS)}
        self.downloads["annotations_final.csv"] = (self.music / "tags.csv").read_bytes()
        self.downloads["clip_info_final.csv"] = (self.music / "clip_info_final.csv").read_bytes()
        server = Server(self.downloads).__enter__()
        server.tricks.update((name, [stop_after(100_000)] * 100_000) for name in self.downloads)
        COMMANDS["get_data"] += f" {server.url}"

    def fill_inputs(self):
        """Fill the folder of what the scripts need. Of its clips some are bad, too few for an error."""
        shutil.copytree(self.music, self.inputs / "music", copy_function=os.symlink)
        write_md5sums(self.inputs / "md5sums.txt", self.downloads)
        (self.inputs / "clip.mp3").write_bytes(self.mp3s[0].read_bytes()[:50_000])
        (self.inputs / "empty.mp3").touch()
        clips = sorted(str(path.relative_to(self.inputs)) for path in self.inputs.glob("music/?/*.mp3"))
        paths = [*clips, "clip.mp3", "missing.mp3", *clips, "empty.mp3", "clip.mp3", *clips[:6]]
        rows = [f"{number}\t{number % 2}\t{path}\n" for number, path in enumerate(paths)]
        (self.inputs / "tags.csv").write_text("clip_id\tguitar\tmp3_path\n" + "".join(rows))


def write_md5sums(path, files):
    path.write_text("".join(f"{hashlib.md5(content).hexdigest()}  {name}\n" for name, content in files.items()))


def frozen(tree):
    """Return dicts, lists, arrays and tensors, one in another, as what `==` compares to the last bit."""
    if isinstance(tree, (dict, list, tuple)):
        return [frozen(value) for value in (tree.items() if isinstance(tree, dict) else tree)]
    return (str(tree.dtype), tuple(tree.shape), np.asarray(tree).tobytes()) if hasattr(tree, "dtype") else tree


def start(folder, command, stdout="stdout.txt"):
    """Start a script in `folder`, in a session of its own, with its output in files there."""
    script, *options = command.split()
    with open(folder / stdout, "w") as stdout, open(folder / "stderr.txt", "a") as stderr:
        command = [sys.executable, str(ROOT / script), *options]
        return subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr, start_new_session=True)


def finish(*processes):
    """Return the last one's exit status once they and their workers have ended; None, and all killed, if one hangs."""
    deadline = time.monotonic() + SCRIPT_SECONDS
    while left := [pid for process in processes for pid in living(process)]:
        if time.monotonic() > deadline:
            subprocess.run(["kill", "-KILL", *map(str, left)])
            return None
        time.sleep(0.05)
    return processes[-1].wait()


def complete(folder, command):
    if finish(start(folder, command)) != 0:
        raise InputError(f"{command} fails undisturbed: {(folder / 'stderr.txt').read_text()}")


def living(leader):
    """Return the processes of a session that have not ended."""
    ps = subprocess.run(["ps", "-s", str(leader.pid), "-o", "pid=,stat="], capture_output=True, text=True)
    return [int(pid) for pid, state in map(str.split, ps.stdout.splitlines()) if state[0] not in "ZX"]


def kill_script(script, good, folder, settings):
    """Kill a script `settings.kills` times, comparing what there is whenever it gets to its end; return the tally."""
    rng, tally = random.Random(f"{settings.seed} {script}"), Counter()
    shutil.copytree(good.inputs, folder, symlinks=True)
    began = time.monotonic()
    complete(folder, COMMANDS[script])
    seconds, expected = time.monotonic() - began, left_in(folder)
    while tally["kills"] < settings.kills:
        case = folder.with_name(f"{script}-{tally['kills']}")
        shutil.copytree(good.inputs, case, symlinks=True)
        two_at_once = script != "get_data" and rng.random() < 0.3
        second = [start(case, COMMANDS[script], stdout=os.devnull)] if two_at_once else []
        processes = [*second, start(case, COMMANDS[script])]
        while tally["kills"] < settings.kills and kill_within(seconds, processes[-1], rng):
            tally["kills"] += 1
            processes.append(start(case, COMMANDS[script]))
        hang = finish(*processes) is None
        if second and not hang:  # the last of the others may have left the work to it
            hang = finish(start(case, COMMANDS[script])) is None
        found = left_in(case)
        differing = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        tally.update(hangs=hang, differences=bool(differing))
        if hang or differing:
            print(f"FAILED {case.name}: {'it, or a worker, does not end; ' * hang}differing: {differing}", flush=True)
        else:
            shutil.rmtree(case)
    print(f"{script}: {tally['kills']} kills in {time.monotonic() - began:.0f} s", flush=True)
    return tally


def kill_within(seconds, process, rng):
    """Kill a script or one of its workers, which has to end it; return False if it was done before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        # The later of two instants: a script begins with its imports, where a kill can spoil little.
        process.wait(seconds * max(rng.random(), rng.random()))
        return False
    workers = [pid for pid in living(process) if pid != process.pid]
    victim = rng.choice(workers) if workers and rng.random() < 0.5 else process.pid
    subprocess.run(["kill", "-KILL", str(victim)], stderr=subprocess.DEVNULL)  # a worker may have ended just now
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SCRIPT_SECONDS)
    return process.returncode != 0


def left_in(folder):
    """Return all that a script left: files, the last two lines it printed, and whether it had a traceback."""
    left = files_in(folder)
    left |= {name: frozen(torch.load(folder / name)) for name in left if name.endswith(".pt")}
    return left | {"stdout.txt": left["stdout.txt"].splitlines()[-2:], "stderr.txt": b"Traceback" in left["stderr.txt"]}


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage_inputs(good, folder, settings):
    """Return {kind: Counter} of `settings.damages` damaged inputs."""
    kinds = [read.__name__ for read in DAMAGED]
    tallies = {kind: Counter() for kind in kinds if kind in (settings.only or kinds)}
    for number in range(settings.first, settings.first + settings.damages):
        read, kind = DAMAGED[number % len(DAMAGED)], kinds[number % len(DAMAGED)]
        if kind not in tallies:
            continue
        case = folder / f"{number}-{kind}"
        shutil.copytree(good.inputs, case, symlinks=True)
        outcome = outcome_of(read, good, case, random.Random(f"{settings.seed} {number}"))
        tallies[kind].update(["damaged inputs", outcome])
        if outcome in ("refused", "right"):
            shutil.rmtree(case)
        else:
            print(f"FAILED {case.name}: {outcome}", *(case / "stderr.txt").read_bytes().splitlines()[-1:], flush=True)
    for kind, tally in tallies.items():
        print(f"{kind}: {tally['refused']} refused, {tally['right']} read right")
    return tallies


def outcome_of(read, good, case, rng):
    """Return the outcome of one damaged input, in a process of its own, because a C library may hang or crash."""
    if child := os.fork():
        return OUTCOMES.get(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "tracebacks")
    signal.alarm(READER_SECONDS)  # ends the process
    os.dup2(os.open(case / "stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    try:
        os._exit(0 if read(good, case, rng) else 2)
    except InputError:
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def spoil(path, content, other, rng):
    """Give `path` the `content` of a file after an accident on the way or on the disk; `other` is another such file."""

    def place(length):  # anywhere, or near an end, where headers and directories are
        near = int(length ** rng.random())
        return rng.choice([near, length - near, rng.randrange(length)])

    content, other = content.read_bytes(), other.read_bytes()
    first, second = sorted((place(len(content)), place(len(content))))
    zeros = bytes(rng.choice([1, 16, 512, 4096, 65536]))
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 4, 32])):
        flipped[min(place(len(content)), len(content) - 1)] ^= 1 << rng.randrange(8)
    foreign, rest, zeroed = other[place(len(other)) :], content[first:], content[first + len(zeros) :]
    tails = b"", content[second:], foreign, zeros + rest, zeros + zeroed
    path.unlink(missing_ok=True)  # it may be a link to the good file
    path.write_bytes(rng.choice([flipped, flipped, *(content[:first] + tail for tail in tails)]))


def mp3(good, case, rng):
    spoil(case / "clip.mp3", *rng.sample(good.mp3s, 2), rng)
    samples, outcome, reason = read_clip(case / "clip.mp3")
    if outcome == "zero":
        raise InputError(reason)
    spectrogram = log_mel(samples)
    samples, _ = load(case / "clip.mp3", sr=11025, duration=31)
    samples = np.pad(samples, (0, max(0, 627 * 512 - len(samples))))
    mel = melspectrogram(y=samples, sr=11025, n_fft=2048, hop_length=512, pad_mode="reflect")
    return np.allclose(spectrogram, np.log(np.maximum(mel[:, :628], 1e-20)), rtol=0, atol=1e-4)


def tables(good, case, rng):
    spoil(case / "tags.csv", rng.choice(good.tables), good.music / "clip_info_final.csv", rng)
    found = read_annotations(case / "tags.csv")
    for mp3_path in found.mp3_paths:
        read_clip(case / mp3_path)  # whatever the path is
    text = io.StringIO((case / "tags.csv").read_bytes().decode("utf-8-sig"), newline="")
    header, *rows = filter(None, csv.reader(text, dialect="excel-tab"))
    found_rows = list(zip(found.ids.tolist(), found.labels.astype(str).tolist(), found.mp3_paths))
    return header[1:-1] == found.tag_names and [(int(row[0]), row[1:-1], row[-1]) for row in rows] == found_rows


def checkpoints(good, case, rng):
    spoil(case / "best.pt", good.best, good.best, rng)
    checkpoint = load_checkpoint(case / "best.pt")
    network_of(checkpoint, torch.device("cpu"))
    return frozen(checkpoint) == good.checkpoint


def dumps(good, case, rng):
    spectrograms = sorted(good.music.glob("spectrograms_*.npy"))
    damaged, other = rng.sample([*sorted(good.music.glob("*.npy")), good.music / "dump.json", *spectrograms * 2], 2)
    spoil(case / "music" / damaged.name, damaged, other, rng)
    return all_of_dump(case / "music") == good.dump


def all_of_dump(folder):
    dump = Dump(folder)
    tables = [dump.ids, dump.labels, dump.tag_names, dump.mp3_paths, dump.front_end, dump.synthetic, dump.n_bad]
    return frozen([*tables, dump.band_sums(), *map(np.array, dump.chunks)])


DAMAGED = 6 * [mp3] + 5 * [tables] + 4 * [checkpoints] + 2 * [dumps]  # in turn

if __name__ == "__main__":
    run(main, "nothing is left to go on from")
