"""Kill the long scripts at random instants. Run by hand; pytest leaves it alone.

A script, or one of its workers, is killed and started anew with the same command until it is done; sometimes a second
run of the same command is at work meanwhile, and get_data.py's files are damaged between a kill and the next start.
What is left has to be what an undisturbed run leaves. Whatever fails stays in the folder that the last line names.

    python tests/stress.py                  everything, in about 20 minutes
    python tests/stress.py --only trainer
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}  # one thread: the same sums in the same order

import numpy as np
import torch
import tyro
from http_server import Server, behave
from test_get_data import make_zip, stand_in_for

from get_data import ARCHIVE, UNPACKED
from lib.common import InputError, Seed, number, run
from lib.demo import render


@dataclass(frozen=True)
class Settings:
    kills: number(int, 0) = 100  # of each script
    seed: Seed = 1337  # of the kills' instants
    only: tuple[Literal["get_data", "gen_spectrograms", "trainer"], ...] = ("get_data", "gen_spectrograms", "trainer")


COMMANDS = {  # each runs in a copy of make_inputs' folder
    "get_data": "",  # see start_hosts
    "gen_spectrograms": "gen_spectrograms.py --data . --n-chunks 4",
    "trainer": "trainer.py --data music --experiments . --name tiny --resume --train-size 8 --validation-size 4 "
    "--epochs 3 --batch-size 2 --super-batch-size 4",
}
SCRIPT_SECONDS = 120  # more is a hang


def main():
    settings = tyro.cli(Settings, description=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    make_inputs(folder / "inputs")
    tallies = {script: kill_script(script, folder, settings) for script in settings.only}
    total = sum(tallies.values(), Counter())
    print(f"{total['kills']} kills, {total['differences']} differences, {total['hangs']} hangs")
    if total["differences"] or total["hangs"]:
        raise InputError(f"what failed is in {folder}")
    shutil.rmtree(folder)


def make_inputs(folder):
    """Make the folder of what the scripts need: a dump, and a table of clips; too few of them are bad for an error."""
    folder.mkdir()
    render(folder / "demo", n_clips=16)
    complete(folder, "gen_spectrograms.py --data demo --n-chunks 2")
    (folder / "demo").rename(folder / "music")
    clips = sorted(str(path.relative_to(folder)) for path in folder.glob("music/?/*.mp3"))
    (folder / "clip.mp3").write_bytes((folder / clips[0]).read_bytes()[:50_000])
    (folder / "empty.mp3").touch()
    paths = [*clips, "clip.mp3", "missing.mp3", *clips, "empty.mp3", "clip.mp3", *clips[:6]]
    rows = [f"{number}\t{number % 2}\t{path}\n" for number, path in enumerate(paths)]
    (folder / "tags.csv").write_text("clip_id\tguitar\tmp3_path\n" + "".join(rows))
    start_hosts(folder)


def start_hosts(folder):
    """Start two hosts that break off every connection: one has the archive whole, the other in parts.

    Writes the script that fetches their files, as get_data.py does MagnaTagATune's.
    """
    COMMANDS["get_data"] = f"{folder}/fetch.py --data got --hosts"
    tables = {"annotations_final.csv": b"clip_id", "clip_info_final.csv": bytes(300_000)}
    archive = make_zip({f"{n % 16:x}/{n}.mp3": random.Random(n).randbytes(20_000) for n in range(200)})
    cuts = (0, 2_000_001, len(archive) - 30_000, None)  # half of the last part is the directory
    parts = {f"{ARCHIVE.name}.00{n + 1}": archive[cuts[n] : cuts[n + 1]] for n in range(3)}
    whole = {ARCHIVE.name: archive}
    for files in (tables | whole, tables | parts):
        server = Server(files).__enter__()
        server.always = partial(behave, sent=100_000)
        COMMANDS["get_data"] += f" {server.url}"
    stand_in = stand_in_for(tables | whole | parts)
    lines = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "import get_data; from lib.download import Piece",
        f"vars(get_data).update({stand_in!r})",
        "get_data.run(get_data.main)",
    )
    (folder / "fetch.py").write_text("\n".join(lines))


def damage(folder, rng):
    """Spoil an unfinished file of get_data.py's, or cut or remove a finished one, which it would refuse if spoiled."""
    files = [path for path in folder.rglob("[!.]*") if path.is_file() and path.stat().st_size]
    unfinished = [path for path in files if path.suffix == ".partial" or path.name == UNPACKED]
    if not files:
        return
    path = rng.choice(rng.choice([unfinished or files, files]))
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if path in unfinished:
        flipped = content.copy()
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(rng.choice([flipped, content[:place], content + bytes(place)]))
    elif path.suffix == ".mp3":
        path.write_bytes(content[:place])
    else:
        path.unlink()


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


def kill_script(script, folder, settings):
    """Kill a script `settings.kills` times, comparing what there is whenever it gets to its end; return the tally."""
    rng, tally = random.Random(f"{settings.seed} {script}"), Counter()
    undisturbed = shutil.copytree(folder / "inputs", folder / script)
    began = time.monotonic()
    complete(undisturbed, COMMANDS[script])
    seconds, expected = time.monotonic() - began, left_in(undisturbed)
    while tally["kills"] < settings.kills:
        case = shutil.copytree(folder / "inputs", folder / f"{script}-{tally['kills']}")
        second = [start(case, COMMANDS[script], stdout=os.devnull)] if rng.random() < 0.3 else []
        processes = [*second, start(case, COMMANDS[script])]
        while tally["kills"] < settings.kills and kill_within(seconds, processes[-1], rng):
            tally["kills"] += 1
            if script == "get_data" and not second and rng.random() < 0.5:
                damage(case / "got", rng)
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
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    run(main, "nothing is left to go on from")
