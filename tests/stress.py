"""Kill the long scripts at random instants. Run by hand; pytest leaves it alone.

A script, or one of its workers, is killed and started anew with the same command until it is done; sometimes a second
run of the same command is at work meanwhile. What is left has to be what an undisturbed run leaves. Whatever fails
stays in the folder that the last line names.

    python tests/stress.py                  everything, in about a quarter of an hour
    python tests/stress.py --only trainer
"""

import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # one thread: the same sums in the same order

import numpy as np
import torch
from http_server import Server, stop_after

import get_data
from lib.common import InputError, Range, run, settings_from_command_line


@dataclass(frozen=True)
class Settings:
    kills: Annotated[int, Range(0)] = 100  # of each of the three long scripts
    seed: Annotated[int, Range(0)] = 1337  # of the kills' instants
    only: tuple[Literal["get_data", "gen_spectrograms", "trainer"], ...] = ("get_data", "gen_spectrograms", "trainer")


COMMANDS = {  # each runs in a copy of Good's folder "inputs"
    "get_data": "get_data.py --data got --md5sums md5sums.txt --attempts 1000 --pause 0 --hosts",  # and an address
    "gen_spectrograms": "gen_spectrograms.py --data . --n-chunks 4",
    "trainer": "trainer.py --data music --experiments . --name tiny --resume --train-size 8 --validation-size 4 "
    "--epochs 3 --batch-size 2 --super-batch-size 4",
}
SCRIPT_SECONDS = 120  # more is a hang


def main():
    settings = settings_from_command_line(Settings, __doc__)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    good = Good(folder / "good")
    tallies = {script: kill_script(script, good, folder / script, settings) for script in settings.only}
    total = sum(tallies.values(), Counter())
    print(f"{total['kills']} kills, {total['differences']} differences, {total['hangs']} hangs")
    if total["differences"] or total["hangs"]:
        raise InputError(f"what failed is in {folder}")
    shutil.rmtree(folder)


class Good:
    """What the scripts get: a host that drops connections, and a folder of clips, some of them bad, and a dump."""

    def __init__(self, folder):
        folder.mkdir()
        complete(folder, "get_data.py --demo --demo-clips 16 --data .")
        complete(folder, "gen_spectrograms.py --data demo --n-chunks 2")
        self.music, self.inputs = folder / "demo", folder / "inputs"
        self.serve()
        self.fill_inputs()

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
        (self.inputs / "clip.mp3").write_bytes(next(self.music.glob("?/*.mp3")).read_bytes()[:50_000])
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


if __name__ == "__main__":
    run(main, "nothing is left to go on from")
