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

import numpy as np
import torch
from http_server import Server, stop_after
from librosa import load
from librosa.feature import melspectrogram

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
    "get_data": "get_data.py --data got --md5sums md5sums.txt --attempts 1000 --pause 0 --hosts",  # and an address
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
        server = Server(self.downloads).__enter__()  # for as long as this process lives
        server.tricks.update((name, [stop_after(20_000)] * 100_000) for name in self.downloads)
        COMMANDS["get_data"] += f" {server.url}"
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
    prepare(folder, good)
    began = time.monotonic()
    complete(folder, COMMANDS[script])
    seconds, expected = time.monotonic() - began, left_in(folder)
    while tally["kills"] < settings.kills:
        prepare(folder, good)
        sessions, killed = [], True
        while killed:
            process = start(folder, COMMANDS[script])
            sessions.append(process.pid)
            killed = tally["kills"] < settings.kills and kill_within(seconds, process, rng)
            tally["kills"] += killed
            if not killed and (finish(process) is None or outlived(sessions)):
                tally["hangs"] += complain(script, "it, or a worker that it left, does not end")
            if "Traceback" in (printed := (folder / "stderr.txt").read_text(errors="replace")):
                tally["differences"] += complain(script, printed)
        found = left_in(folder)
        if names := [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]:
            tally["differences"] += complain(script, f"other than undisturbed: {', '.join(names)}")
    print(f"{script}: {tally['kills']} kills in {time.monotonic() - began:.0f} s", flush=True)
    return tally


def kill_within(seconds, process, rng):
    """Kill a script or one of its workers; return False if it was done before, or does not end for want of a worker."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        # The later of two instants: a script begins with its imports, where a kill can spoil little.
        process.wait(seconds * max(rng.random(), rng.random()))
        return False
    workers = [pid for pid in living(process.pid) if pid != process.pid]
    end([rng.choice(workers) if workers and rng.random() < 0.5 else process.pid])
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(SCRIPT_SECONDS) != 0
    return False


def outlived(sessions):
    """Return whether a worker goes on long after its script was killed; if so, kill it."""
    deadline = time.monotonic() + READER_SECONDS
    while (left := [pid for session in sessions for pid in living(session)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    end(left)
    return bool(left)


def left_in(folder):
    """Return all that a script left: {path: content}, and the last two lines that it printed."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "stderr.txt"]
    left = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    left |= {name: frozen(torch.load(folder / name)) for name in left if name.endswith(".pt")}
    return left | {"stdout.txt": left["stdout.txt"].splitlines()[-2:]}


def complain(where, what):
    print(f"FAILED {where}: {what}", flush=True)
    return 1


# Damage


def damage_inputs(good, folder, settings):
    """Return {kind: Counter} of `settings.damages` damaged inputs."""
    tallies = {kind: Counter() for kind in READERS if settings.damages and kind in (settings.only or READERS)}
    for number in range(settings.first, settings.first + settings.damages):
        kind = DAMAGED[number % len(DAMAGED)]
        if kind not in tallies:
            continue
        case = folder / f"{number}-{kind}"
        prepare(case, good)
        read, script = READERS[kind]
        outcome = outcome_of(read, good, case, random.Random(f"{settings.seed} {number}"))
        if outcome in ("refused", "right") and number % settings.script_every == 0:
            outcome = outcome_of_script(script, good, case)
        tallies[kind].update(["damaged inputs", outcome])
        if outcome in ("refused", "right"):
            shutil.rmtree(case)
        else:
            complain(case.name, f"{outcome}\n{(case / 'stderr.txt').read_text(errors='replace')}")
    for kind, tally in tallies.items():
        print(f"{kind}: {tally['refused']} refused, {tally['right']} right")
    return tallies


def outcome_of(read, good, case, rng):
    """Return the outcome of one damaged input, in a process of its own: a C library may hang or crash."""
    if not (child := os.fork()):
        signal.alarm(READER_SECONDS)  # ends the process
        resource.setrlimit(resource.RLIMIT_AS, (READER_MEMORY, READER_MEMORY))
        os.dup2(os.open(case / "stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        try:
            os._exit(0 if read(good, case, rng) else 2)
        except InputError:
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return OUTCOMES.get(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "tracebacks")


def outcome_of_script(script, good, case):
    """Return the outcome of a script that meets the damaged input."""
    status = finish(start(case, COMMANDS[script]))
    if status is None:
        return "hangs"
    if status not in (0, 1) or "Traceback" in (case / "stderr.txt").read_text(errors="replace"):
        return "tracebacks"
    if status == 0 and script == "evaluate" and (case / "per_tag.csv").read_bytes() != good.scores:
        return "silent wrong answers"
    return OUTCOMES[status]


def spoil(path, content, other, rng):
    """Write `content` to `path` after an accident on the way or on the disk; `other` is another such file."""

    def place(length):  # anywhere, or near an end, where headers and directories are
        near = int(length ** rng.random())
        return rng.choice([near, length - near, rng.randrange(length)])

    first, second = sorted((place(len(content)), place(len(content))))
    zeros = bytes(rng.choice([1, 16, 512, 4096, 65536]))
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 4, 32])):
        flipped[min(place(len(content)), len(content) - 1)] ^= 1 << rng.randrange(8)
    accidents = [
        flipped,
        flipped,
        content[:first],
        content[:first] + content[second:],
        content[:first] + other[place(len(other)) :],
        content[:first] + zeros + content[first:],
        content[:first] + zeros + content[first + len(zeros) :],
    ]
    path.unlink(missing_ok=True)  # it may be a link to the good file
    path.write_bytes(rng.choice(accidents))


def read_clip(good, case, rng):
    spoil(case / "clip.mp3", *rng.sample(good.mp3s, 2), rng)
    spectrogram, outcome, _ = gen_spectrograms.make_clip(case, "clip.mp3")
    if outcome == "zero":
        return True
    samples, _ = load(case / "clip.mp3", sr=11025, duration=31)
    samples = np.pad(samples, (0, max(0, 627 * 512 - len(samples))))
    mel = melspectrogram(y=samples, sr=11025, n_fft=2048, hop_length=512, pad_mode="reflect")
    return np.allclose(spectrogram, np.log(np.maximum(mel[:, :628], 1e-20)), rtol=0, atol=1e-4)


def read_table(good, case, rng):
    spoil(case / "tags.csv", rng.choice(good.tables), good.clip_info, rng)
    found = read_annotations(case / "tags.csv")
    for mp3_path in found.mp3_paths:
        gen_spectrograms.make_clip(case, mp3_path)  # whatever the path is
    text = io.StringIO((case / "tags.csv").read_bytes().decode("utf-8-sig"), newline="")
    header, *rows = filter(None, csv.reader(text, dialect="excel-tab"))
    expected = [(int(row[0]), [int(value) for value in row[1:-1]], row[-1]) for row in rows]
    return ["clip_id", *found.tag_names, "mp3_path"] == header and expected == list(
        zip(found.ids.tolist(), found.labels.tolist(), found.mp3_paths)
    )


def read_archive(good, case, rng):
    """Two thirds of the archives come with MD5 sums of after the damage."""
    data, (name, other) = case / "got", rng.sample(get_data.PARTS, 2)
    data.mkdir()
    for part in get_data.PARTS:
        (data / part).write_bytes(good.downloads[part])
    spoil(data / name, good.downloads[name], good.downloads[other], rng)
    files = good.downloads | {name: (data / name).read_bytes()}
    if adapted := rng.random() < 0.67:
        write_md5sums(case / "md5sums.txt", files)
    settings, refused = get_data.Settings(data=data, md5sums=case / "md5sums.txt"), None
    try:
        get_data.obtain_parts(settings, get_data.read_md5sums(settings.md5sums))
        get_data.unpack(data)
    except InputError as error:
        refused = error
    unpacked = {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    members = {name: content for name, content in unpacked.items() if name not in get_data.PARTS}
    if refused and members.items() <= good.members.items():
        raise refused
    return members == good.members and (adapted or files == good.downloads)


def read_checkpoint(good, case, rng):
    spoil(case / "best.pt", good.best, good.last, rng)
    checkpoint = load_checkpoint(case / "best.pt")
    network_of(checkpoint, torch.device("cpu"))
    return frozen(checkpoint) == good.checkpoint


def read_dump(good, case, rng):
    (case / "best.pt").write_bytes(good.best)  # for the script
    name, other = rng.sample(sorted(good.dump_files), 2)
    spoil(case / "music" / name, good.dump_files[name], good.dump_files[other], rng)
    return all_of_dump(case / "music") == good.dump


def all_of_dump(folder):
    dump = Dump(folder)
    tables = [dump.ids, dump.labels, dump.tag_names, dump.mp3_paths, dump.front_end, dump.synthetic, dump.n_bad]
    return frozen([*tables, dump.band_sums(), *map(np.array, dump.chunks)])


READERS = {  # of each kind of input: the function that reads it right or not, and the script
    "mp3": (read_clip, "gen_spectrograms"),
    "tables": (read_table, "gen_spectrograms"),
    "archives": (read_archive, "get_data"),
    "checkpoints": (read_checkpoint, "evaluate"),
    "dumps": (read_dump, "evaluate"),
}

if __name__ == "__main__":
    run(main, when_interrupted="nothing is left to go on from")
