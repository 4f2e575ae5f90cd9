"""Measure speed and memory, each speed beside a plain baseline that takes its turns in the same run.

Run by hand, on a machine that does nothing else; prints a table in Markdown. --full-size PATH adds the rows that need
a dump of MagnaTagATune's size. --gpu measures 40 epochs on it instead.
"""

import contextlib
import gzip
import itertools
import multiprocessing
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gen_spectrograms  # noqa: E402
from common import InputError, keep_freed_memory, run, settings_from_command_line  # noqa: E402
from dump import CLIP_BYTES, N_FRAMES, N_MELS, Dump, chunk_writer, crc_of_file, read_manifest  # noqa: E402
from gen_spectrograms import CLIPS_AT_ONCE  # noqa: E402
from tags import annotations_path, read_annotations  # noqa: E402

# torch, librosa and demo are imported where they are used: no timed process is to start with what it does not need.

RowName = Literal["spectrograms", "one-clip", "step", "evaluation", "memory", "full-size"]


@dataclass(frozen=True)
class Settings:
    only: tuple[RowName, ...] = get_args(RowName)  # rows to measure; full-size needs --full-size
    rounds: int = 7  # measured of each side in turn
    clips: int = 480  # of one run of gen_spectrograms.py and of its baseline
    full_size: Path | None = None  # folder of the full-size dump; random numbers (8.3 GB) if it is empty
    n_clips: int = 25863  # of that dump
    n_steps: int = 100  # of training on it, for the memory; 94 batches are fetched ahead
    gpu: bool = False  # only measure 40 epochs on a CUDA GPU, on the dump of --full-size
    profile: bool = False  # only print what takes the time of a training step
    baseline_spectrograms: Path | None = None  # only make this folder's spectrograms by the original's recipe


SHARED = ROOT.parent / "shared"  # real clips and tags, where they are beside the checkout
BATCH, EVALUATED = 32, 128  # clips of a step and of one round of evaluation
SYNTHETIC = "Random spectrograms by tests/benchmark.py, to measure time and memory. Scores on them mean nothing.\n"


def main():
    settings = settings_from_command_line(Settings, __doc__)
    if settings.baseline_spectrograms:
        return original_spectrograms(settings.baseline_spectrograms)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        if settings.profile:
            return profile_step(Path(scratch))
        print_table((gpu_rows if settings.gpu else cpu_rows)(settings, Path(scratch)))


def cpu_rows(settings, scratch):
    measures = (spectrogram_row, one_clip_row, step_row, evaluation_row, memory_row, full_size_rows)
    rows = []
    for name, measure in zip(get_args(RowName), measures):
        if name == "full-size" in settings.only and not settings.full_size:
            say("full-size is left out: --full-size PATH names a folder for 8.3 GB")
        elif name in settings.only:
            say(f"measuring {name} ...")
            rows += measure(settings, scratch)
    return rows


# The table: rows of (what, baseline, ours, ratio, to reach, reached)


def interleave(baseline, ours, rounds, warm_up):
    """Return both sides' figures, (2, rounds, ...), measured in turn after `warm_up` rounds that don't count."""
    return np.array([(baseline(), ours()) for _ in range(warm_up + rounds)])[warm_up:].swapaxes(0, 1)


def compare(what, unit, figures, at_least=0, at_most=np.inf):
    """Return the row of interleaved `figures`, (2, rounds), with a limit to ours / baseline.

    The ratio is the median of the rounds' own, which a change of the machine's load from round to round does not bend.
    """
    baseline, ours = (f"{side:.3g} {unit}" for side in np.median(figures, axis=1))
    ratios = figures[1] / figures[0]
    ratio = np.median(ratios)
    to_reach = f"at least {at_least}x" if at_least else f"at most {at_most}x"
    reached = "yes" if at_least <= ratio <= at_most else "NO"
    return what, baseline, ours, f"{ratio:.2f}x ({ratios.min():.2f} to {ratios.max():.2f})", to_reach, reached


def limit(what, unit, figure, at_most):
    return what, "", f"{figure:.3g} {unit}", "", f"at most {at_most} {unit}", "yes" if figure <= at_most else "NO"


def print_table(rows):
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"\n{cpu[1] if cpu else os.uname().machine}, {os.cpu_count()} cores\n")
    print("| what | baseline | ours | ratio (of all rounds) | to reach | reached? |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def in_two_processes(baseline, ours, rounds):
    """Return the seconds, (2, rounds), that each side takes in turn, in a process of its own.

    A side is a function, which returns what is to be timed, and its arguments. Ours tells the C library to keep
    freed memory, from which the baseline must not profit.
    """
    new = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, new, prepare, baseline) as one, ProcessPoolExecutor(1, new, prepare, ours) as other:
        return interleave(lambda: one.submit(measure).result(), lambda: other.submit(measure).result(), rounds, 2)


def prepare(side, *arguments):
    global prepared
    sys.stdout = sys.stderr  # notes on a tiny dump are no part of the table
    prepared = side(*arguments)


def measure():
    time.sleep(0.3)  # threads of the other side may spin for a moment after their work
    return timed(prepared)


def say(text):
    print(text, file=sys.stderr, flush=True)


def timed(function, *arguments, **options):
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - started


# Spectrograms


def original_spectrograms(data, n_processes=8):
    """Make the spectrograms of folder `data` as the original does, with today's librosa."""
    import librosa

    _ = librosa.load, librosa.feature.melspectrogram  # imported here, once, for all the processes that are forked
    mp3_paths = read_annotations(annotations_path(data)).mp3_paths
    size = (len(mp3_paths) - 1) // n_processes + 1
    parts = [(data, start // size, mp3_paths[start : start + size]) for start in range(0, len(mp3_paths), size)]
    with multiprocessing.get_context("fork").Pool(n_processes) as pool:
        pool.starmap(original_chunk, parts, chunksize=1)


def original_chunk(data, index, mp3_paths):
    import librosa

    spectrograms, options = [], dict(n_fft=2048, hop_length=512, n_mels=128, pad_mode="reflect")
    for mp3_path in mp3_paths:
        samples, sample_rate = librosa.load(data / mp3_path, sr=11025)
        mel = librosa.feature.melspectrogram(y=samples, sr=sample_rate, **options)
        spectrograms.append(np.log(np.clip(mel, 1e-20, None)).astype(np.float32)[:, :N_FRAMES])
    np.save(data / f"spectrograms_{index}.npy", np.array(spectrograms))


OUR_COMMAND = [sys.executable, ROOT / "gen_spectrograms.py", "--data"]
PLAIN_COMMAND = [sys.executable, __file__, "--baseline-spectrograms"]


def spectrogram_row(settings, scratch):
    # MagnaTagATune's 25,863 clips pay for the start only once. So the rate is that of the clips by which a long run
    # exceeds a short one of two clips a worker: on both sides alike, imports and each worker's first clips cancel out.
    def seconds(command):
        for n_clips in (16, 16 + settings.clips):
            with data_folder(scratch, n_clips) as data:
                yield timed(subprocess.run, [*command, data], check=True, capture_output=True)

    sides = [lambda command=command: list(seconds(command)) for command in (PLAIN_COMMAND, OUR_COMMAND)]
    measured = interleave(*sides, settings.rounds, warm_up=0)
    start = np.median(measured[..., 0], axis=1)
    rates = settings.clips / (measured[..., 1] - start[:, None])
    what = f"Spectrograms, 8 workers (not counted: {start[0]:.1f} s, ours {start[1]:.1f} s, for a run of 16 clips)"
    return [compare(what, "clips/s", rates, at_least=4)]


@contextlib.contextmanager
def data_folder(scratch, n_clips):
    """Yield a data folder of `n_clips` clips: those there are, over and over, with ids of their own."""
    folder, mp3_paths = find_clips(scratch)
    with tempfile.TemporaryDirectory(dir=scratch) as data:
        (Path(data) / "clips").symlink_to(folder)
        rows = [f"{clip}\t1\tclips/{path}" for clip, path in zip(range(n_clips), itertools.cycle(mp3_paths))]
        (Path(data) / "tags.csv").write_text("\n".join(["clip_id\tmusic\tmp3_path", *rows, ""]))
        yield Path(data)


def find_clips(scratch):
    """Return the folder and the paths of 60 clips: real music from beside the checkout, or the demo's."""
    folder = SHARED / "gtzan60"
    if not folder.is_dir():
        folder = scratch / "demo"
        if not folder.is_dir():
            from demo import render

            render(folder, 60)
    return folder, read_annotations(annotations_path(folder)).mp3_paths


def one_clip_row(settings, scratch):
    folder, mp3_paths = find_clips(scratch)
    sides = [(side, folder, mp3_paths) for side in (plain_decoding, our_worker)]
    seconds = in_two_processes(*sides, settings.rounds * len(mp3_paths) // CLIPS_AT_ONCE)
    what = f"One clip, one thread, in groups of {CLIPS_AT_ONCE} as a worker makes them; baseline: its decoding"
    return [compare(what, "ms", 1000 * seconds / CLIPS_AT_ONCE, at_most=2.3)]


def plain_decoding(folder, mp3_paths):
    import soundfile

    paths = itertools.cycle(folder / path for path in mp3_paths)
    return lambda: [soundfile.read(path, dtype="float32") for path in itertools.islice(paths, CLIPS_AT_ONCE)]


def our_worker(folder, mp3_paths):
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    paths = itertools.cycle(mp3_paths)

    def make_clips():
        clips = [gen_spectrograms.read_clip(folder, path) for path in itertools.islice(paths, CLIPS_AT_ONCE)]
        return [gen_spectrograms.log_mel(samples) for samples, _, _ in clips]

    return make_clips


def memory_row(settings, scratch):
    with data_folder(scratch, settings.clips) as data:
        _, peak, _ = watch([*OUR_COMMAND, data], "smaps_rollup", "Pss")
    what = "Peak resident memory of gen_spectrograms.py and its workers (PSS: a page that they share counts once)"
    return [limit(what, "GB", peak / 1e9, at_most=2)]


# The network


def step_row(settings, scratch):
    seconds = seconds_of_network("step", settings.rounds, scratch)
    return [compare("Training step, 32 clips, CPU, float32", "steps/s", 1 / seconds, at_least=2)]


def evaluation_row(settings, scratch):
    seconds = seconds_of_network("evaluation", settings.rounds, scratch)
    return [compare("Evaluation, CPU, float32", "clips/s", EVALUATED / seconds, at_least=2.5)]


def seconds_of_network(what, rounds, scratch):
    data = make_dump(scratch / "tiny", 2 * BATCH + EVALUATED)
    return in_two_processes((plain_side, what), (our_side, what, data), rounds)


def our_side(what, data, device="cpu", precision="float32"):
    """Return the trainer's own step, or the tagger's own prediction, which reads its clips from the dump."""
    from model import choose_device
    from tagger import predict
    from trainer import Settings, Training

    dump = Dump(data)
    settings = Settings(data=data, train_size=BATCH, validation_size=EVALUATED, precision=precision)
    training = Training(settings, dump, choose_device(device))
    training.load_clips(dump)
    clips = next(training.feeder.batches([training.train]))

    def step():
        training.net.train()
        training.train_step(clips, training.train, BATCH).item()

    def evaluation():
        predict(training.net, training.feeder, training.validation, BATCH)

    return {"step": step, "evaluation": evaluation}[what]


def plain_side(what):
    """Return the same for the network as anyone would first write it, with its clips ready in memory."""
    import torch
    import torch.nn.functional as F

    net = plain_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001, foreach=False, fused=False)
    clips, labels = torch.randn(BATCH, 1, N_MELS, N_FRAMES), (torch.rand(BATCH, 50) < 0.07).float()

    def step():
        net.train()
        loss = F.binary_cross_entropy_with_logits(net(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    @torch.no_grad()
    def evaluation():
        net.eval()
        for _ in range(EVALUATED // BATCH):
            torch.sigmoid(net(clips)).numpy()

    return {"step": step, "evaluation": evaluation}[what]


def plain_network():
    import torch
    from torch import nn

    def conv(channels_in, channels_out, height, width, *pool):
        padding = (height // 2, width // 2)
        return nn.Sequential(nn.Conv2d(channels_in, channels_out, (height, width), padding=padding), nn.ReLU(), *pool)

    class PlainCNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.subsample = nn.AvgPool2d((2, 4))
            wide, small = nn.MaxPool2d((2, 4)), nn.MaxPool2d((2, 2))
            self.branch1 = nn.Sequential(conv(1, 50, 3, 7, wide), conv(50, 100, 3, 5, wide), conv(100, 70, 3, 3, small))
            self.branch2 = nn.Sequential(conv(1, 100, 3, 5, wide), conv(100, 70, 3, 3, small))
            self.branch3 = conv(1, 70, 3, 3, small)
            self.joined = nn.Sequential(conv(210, 70, 3, 3), conv(70, 70, 3, 3, small), nn.Flatten())
            self.regularized = nn.Sequential(nn.BatchNorm1d(5040, eps=0.001, momentum=0.01), nn.Dropout(0.4))
            self.top = nn.Sequential(nn.Linear(5040, 500), nn.ReLU(), nn.Linear(500, 50))

        def forward(self, clips):
            half = self.subsample(clips)
            quarter = self.subsample(half)
            branches = self.branch1(clips), self.branch2(half), self.branch3(quarter)
            return self.top(self.regularized(self.joined(torch.cat(branches, dim=1))))

    return PlainCNN()


def profile_step(scratch):
    """Print torch.profiler's table of the third training step, on the CPU and on a CUDA GPU if there is one."""
    import torch

    data = make_dump(scratch / "tiny", 2 * BATCH + EVALUATED)
    for device, precision in (("cpu", "float32"), ("cuda", "bfloat16"))[: 1 + torch.cuda.is_available()]:
        step = our_side("step", data, device, precision)
        for _ in range(2):
            step()
        with torch.profiler.profile() as profiler:  # of all there is, CPU and GPU
            step()
        print(profiler.key_averages().table(f"self_{device}_time_total", 15, max_name_column_width=40))


# The real trainer on a dump of MagnaTagATune's size


def full_size_rows(settings, scratch):
    moments = {
        "clips read": r"^schedule ",
        "validated": r"^epoch +0  ",
        "first step": r"^epoch 1: .*loss=",
        "enough": rf"^epoch 1: .* {settings.n_steps}/\d+ \[",
    }
    command = trainer_command(settings, scratch, "--device", "cpu")
    at, peak, _ = watch(command, "status", "RssAnon|RssShmem", moments, stop="enough")
    validation = at["validated"] - at["clips read"]
    start = f"Start of trainer.py on {settings.n_clips:,} clips in the file cache, until"
    last = f"{start} its first step is done, less the validation before it ({validation:.1f} s)"
    return [
        limit(f"{start} all are read and checked", "s", at["clips read"], at_most=20),
        limit(last, "s", at["first step"] - validation, at_most=20),
        limit(f"Its peak anonymous memory, up to step {settings.n_steps}", "GB", peak / 1e9, at_most=3),
    ]


def gpu_rows(settings, scratch):
    """40 epochs, validations included, in either precision, with and without --compile."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("--gpu: no CUDA GPU here, or a PyTorch that was built without CUDA")
    rows, moments = [], {"start": r"^epoch +0  ", "end": r"^epoch +40  ", "test": "^best "}
    for (precision, seconds), compiled in itertools.product((("bfloat16", 60), ("float32", 150)), ([], ["--compile"])):
        options = ["--precision", precision, *compiled]
        at, _, text = watch(trainer_command(settings, scratch, "--overwrite", *options), "status", "RssAnon", moments)
        say("\n".join([*options, *re.findall(r"^(?:epoch +\d+  |best).*", text, re.MULTILINE)]))
        what = f"40 epochs, {torch.cuda.get_device_name()}, {' '.join(options)}"
        not_counted = f"(not counted: start and first validation, {at['start']:.1f} s)"
        rows.append(limit(f"{what} {not_counted}", "s", at["end"] - at["start"], at_most=seconds))
    return rows


def trainer_command(settings, scratch, *options):
    """Return the command that trains on the full-size dump, whose files are then in the cache, if memory allows."""
    if not settings.full_size:
        raise InputError("--full-size PATH is missing: the folder of a full-size dump, or an empty one for 8.3 GB")
    for file in make_dump(settings.full_size, settings.n_clips).glob("*.npy"):
        crc_of_file(file)
    return [sys.executable, ROOT / "trainer.py", "--data", settings.full_size, "--experiments", scratch, *options]


def watch(command, file, fields, moments=(), stop=None):
    """Run `command`; return (seconds from its start to each moment, its peak memory in bytes, what it printed).

    `moments` are {name: regular expression}: a moment is when the output first matches. At the one called `stop`,
    the process is interrupted as by Ctrl-C. Memory is the sum of `fields` in /proc/<pid>/<file>, every 50 ms.
    """
    started, at, text, peak = time.perf_counter(), {}, "", 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while stop not in at:
            if select.select([process.stdout], [], [], 0.05)[0]:
                if not (block := os.read(process.stdout.fileno(), 1 << 16)):
                    break
                text += block.decode(errors="replace").replace("\r", "\n")  # a progress bar's updates become lines
                new = (name for name in moments if name not in at and re.search(moments[name], text, re.MULTILINE))
                at.update(dict.fromkeys(list(new), time.perf_counter() - started))
            peak = max(peak, memory(process.pid, file, fields))
        if stop in at:
            process.send_signal(signal.SIGINT)
    if len(at) < len(moments) or (process.returncode and not stop):
        raise InputError(f"{command[1]} ended too early: {text.strip().splitlines()[-1:]}")
    return at, peak, text


def memory(pid, file, fields):
    """Return the sum of `fields` over a process and its children, in bytes; 0 if one of them ends meanwhile."""
    with contextlib.suppress(OSError):
        pids = [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        texts = "".join(Path(f"/proc/{each}/{file}").read_text() for each in pids)
        return 1024 * sum(map(int, re.findall(rf"^(?:{fields}):\s+(\d+) kB", texts, re.MULTILINE)))
    return 0


def make_dump(data, n_clips):
    """Make a dump of random clips in folder `data` with the project's writer, unless one is there; return `data`."""
    manifest = read_manifest(data)
    if manifest and manifest["complete"]:
        if manifest["n_clips"] != n_clips:
            raise InputError(f"{data}: holds a dump of {manifest['n_clips']:,} clips, not {n_clips:,}")
        return data
    claim(data, n_clips)
    annotations = read_annotations(data / "tags.csv")
    gen_spectrograms.begin_or_continue(data, gen_spectrograms.plan(data / "tags.csv", annotations, 8), overwrite=False)
    chunks, _ = gen_spectrograms.divide(data, n_clips, 8)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(write_random_chunk, [chunk for chunk in chunks if not chunk.is_complete()], chunksize=1)
    with contextlib.redirect_stdout(sys.stderr):
        gen_spectrograms.summarise(data, gen_spectrograms.finish(data, annotations, chunks), chunks)
    return data


def claim(data, n_clips):
    """Write tags.csv and SYNTHETIC.txt to `data`, an empty folder or one that an interrupted call left."""
    data.mkdir(parents=True, exist_ok=True)
    marker, real = data / "SYNTHETIC.txt", SHARED / "mtat" / "annotations_final.csv.gz"
    if any(data.iterdir()) and not (marker.exists() and marker.read_text() == SYNTHETIC):
        raise InputError(f"{data}: holds something, and no complete dump; name an empty folder")
    needed, free = n_clips * CLIP_BYTES, shutil.disk_usage(data).free
    say(f"{needed / 1e9:.2f} GB of random spectrograms will be in {data} ({free / 1e9:.1f} GB are free)")
    if needed - sum(file.stat().st_size for file in data.glob("spectrograms_*")) > 0.95 * free:
        raise InputError(f"{data}: too little room; make some, or name a folder on another disk")
    marker.write_text(SYNTHETIC)
    if real.exists():
        (data / "tags.csv").write_bytes(b"".join(gzip.decompress(real.read_bytes()).splitlines(True)[: n_clips + 1]))
    else:  # tags as a demo of that size would have
        import demo

        demo.write_table(data / "tags.csv", demo.annotations(demo.list_clips(n_clips, seed=1337), seed=1337))


def write_random_chunk(chunk):
    """Write clips that fall from -2 to -12 over the mel bands, with noise of deviation 2: one block, rolled."""
    rng = np.random.default_rng(zlib.crc32(chunk.file.name.encode()))
    block = rng.normal(np.linspace(-2, -12, N_MELS)[:, None], 2, (N_MELS, N_FRAMES)).astype(np.float32)
    with chunk_writer(chunk) as (n_done, append):
        for _ in range(n_done, chunk.n_clips):
            append(np.roll(block, rng.integers(N_FRAMES), axis=1) + np.float32(rng.normal()))


if __name__ == "__main__":
    run(main, when_interrupted="the full-size dump is kept as far as it got, and the same command completes it")
