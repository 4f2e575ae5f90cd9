"""Measure speed and memory, each speed beside a plain baseline that takes its turns in the same run.

Run by hand, on a machine that does nothing else; prints a table in Markdown. --full-size PATH adds the rows that need
a dump of MagnaTagATune's size; --gpu measures 40 epochs on it instead.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gen_spectrograms
from lib.common import InputError, Range, run, settings_from_command_line
from lib.dump import N_FRAMES, N_MELS, ChunkWriter, Dump, crc_of_file, dump_lock
from tags import annotations_path, read_annotations

# torch and librosa are imported where they are used: no timed process is to start with what it does not need.

Row = Literal["spectrograms", "step", "evaluation", "song"]


@dataclass(frozen=True)
class Settings:
    only: tuple[Row, ...] = get_args(Row)  # rows to measure
    rounds: Annotated[int, Range(1)] = 7  # measured of each side in turn
    clips: Annotated[int, Range(1)] = 480  # of one run of gen_spectrograms.py and of its baseline
    full_size: Path | None = None  # folder of a full-size dump; random numbers (8.3 GB) if it is empty
    n_clips: Annotated[int, Range(1)] = 25863  # of that dump
    gpu: bool = False  # only measure 40 epochs on a CUDA GPU, on the dump of --full-size
    profile: bool = False  # only print what takes the time of a training step
    baseline_spectrograms: Path | None = None  # only make this folder's spectrograms by the original's recipe


SHARED = ROOT.parent / "shared"  # real clips, where they are beside the checkout
BATCH, EVALUATED = 32, 128  # clips of a step and of one round of evaluation


def main():
    settings = settings_from_command_line(Settings, __doc__)
    if settings.baseline_spectrograms:
        return original_spectrograms(settings.baseline_spectrograms)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        scratch = Path(scratch)
        if settings.profile:
            return profile_step(scratch)
        if settings.gpu:
            return print_table(gpu_rows(settings, scratch))
        measures = dict(zip(get_args(Row), (spectrogram_rows, step_rows, evaluation_rows, song_rows)))
        rows = [row for name in settings.only for row in measures[name](settings, scratch)]
        print_table(rows + (full_size_rows(settings, scratch) if settings.full_size else []))


# The table: rows of (what, baseline, ours, ratio, to reach)


def compare(what, unit, figures, to_reach):
    """Return the row of interleaved `figures`, (2, rounds): the baseline's and ours.

    The ratio is the median of the rounds' own, which a change of the machine's load from round to round does not bend.
    """
    baseline, ours = (f"{side:.3g} {unit}" for side in np.median(figures, axis=1))
    ratios = np.array(figures[1]) / figures[0]
    return what, baseline, ours, f"{np.median(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f})", to_reach


def print_table(rows):
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"\n{cpu[1] if cpu else os.uname().machine}, {os.cpu_count()} cores\n")
    print("| what | baseline | ours | ratio (of all rounds) | to reach |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def in_turn(sides, rounds, warm_up=2):
    """Return the seconds, (sides, rounds), that each of `sides` takes in turn, in a process of its own.

    A side is a function, which returns what is to be timed, and its arguments. Some sides tell the C library to keep
    freed memory, from which the others must not profit.
    """
    new = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, new, prepare, side)) for side in sides]
        seconds = [[pool.submit(measure).result() for pool in pools] for _ in range(warm_up + rounds)]
    return np.array(seconds)[warm_up:].T


def prepare(side, *arguments):
    global prepared
    sys.stdout = sys.stderr  # notes are no part of the table
    prepared = side(*arguments)


def measure():
    time.sleep(0.3)  # threads of another side may spin for a moment after their work
    return timed(prepared)


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


def spectrogram_rows(settings, scratch):
    # MagnaTagATune's 25,863 clips pay for the start only once. So the rate is that of the clips by which a long run
    # exceeds a short one of two clips a worker: on both sides alike, imports and each worker's first clips cancel out.
    commands = (__file__, "--baseline-spectrograms"), (ROOT / "gen_spectrograms.py", "--data")
    rates = []
    for _ in range(settings.rounds):
        for command in commands:
            short, long = (seconds_of_command(command, scratch, n) for n in (16, 16 + settings.clips))
            rates.append(settings.clips / (long - short))
    figures = np.reshape(rates, (settings.rounds, 2)).T
    return [compare("Spectrograms, 8 workers", "clips/s", figures, "at least 3.0x")]


def seconds_of_command(command, scratch, n_clips):
    """Return the seconds of a command on a data folder of `n_clips` clips: those there are, over and over."""
    folder, mp3_paths = find_clips(scratch)
    with tempfile.TemporaryDirectory(dir=scratch) as data:
        (Path(data) / "clips").symlink_to(folder)
        rows = [f"{clip}\t1\tclips/{path}" for clip, path in zip(range(n_clips), itertools.cycle(mp3_paths))]
        (Path(data) / "tags.csv").write_text("\n".join(["clip_id\tmusic\tmp3_path", *rows, ""]))
        return timed(subprocess.run, [sys.executable, *command, data], check=True, capture_output=True)


@functools.cache
def find_clips(scratch):
    """Return the folder and the paths of 60 clips: real music from beside the checkout, or the demo's."""
    folder = SHARED / "gtzan60"
    if not folder.is_dir():
        from lib.demo import render

        folder = scratch / "demo"
        render(folder, 60)
    return folder, read_annotations(annotations_path(folder)).mp3_paths


# The network


def step_rows(settings, scratch):
    return network_rows("step", "Training step, 32 clips, CPU", BATCH, ("2.5x", "6x"), settings, scratch)


def evaluation_rows(settings, scratch):
    return network_rows("evaluation", "Evaluation, CPU", EVALUATED, ("4x", "7x"), settings, scratch)


def network_rows(what, title, n_clips, to_reach, settings, scratch):
    data = make_dump(scratch / "tiny", BATCH * 32)
    ours = {"step": trainers_step, "evaluation": trainers_evaluation}[what]
    sides = [(plain_side, what), *((ours, data, precision) for precision in ("float32", "bfloat16"))]
    plain, *rates = n_clips / in_turn(sides, settings.rounds)
    return [
        compare(f"{title}, {precision}", "clips/s", (plain, rate), f"at least {at_least}")
        for precision, rate, at_least in zip(("float32", "bfloat16"), rates, to_reach)
    ]


def trainers_step(data, precision):
    """Return a function that lets the trainer, which runs in a thread, take its next step."""
    import torch

    import trainer
    from lib.parallel import keep_freed_memory

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Stepwise(trainer.Losses):
        def append(self, loss):
            super().append(loss)
            done.release()
            go.acquire()

    keep_freed_memory()
    trainer.Losses = Stepwise
    settings = trainer.Settings(data=data, train_size=BATCH * 30, validation_size=2, precision=precision)
    experiment = settings, torch.device("cpu"), torch.float32, Path(tempfile.mkdtemp(dir=data)), None
    threading.Thread(target=trainer.train, args=experiment, daemon=True).start()
    done.acquire()
    return lambda: (go.release(), done.acquire())


def trainers_evaluation(data, precision):
    import torch

    from lib.feeder import Feeder, predict
    from lib.parallel import autocast, keep_freed_memory
    from model import MultiScaleCNN

    keep_freed_memory()
    device, dump, normalization = torch.device("cpu"), Dump(data), (np.full(N_MELS, -7.0), np.full(N_MELS, 3.0))
    net = MultiScaleCNN(50).to(memory_format=torch.channels_last)
    feeder = Feeder(dump, dump.labels, normalization, device, getattr(torch, precision))

    def evaluation():
        with autocast(device, precision):
            predict(net, feeder, np.arange(EVALUATED), BATCH)

    return evaluation


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


# A song


def song_rows(settings, scratch):
    import soundfile

    song = scratch / "song.mp3"
    folder, mp3_paths = find_clips(scratch)
    samples = np.resize(soundfile.read(folder / mp3_paths[0])[0], 240 * 44100)
    soundfile.write(song, np.stack([samples, samples[::-1]], axis=1), 44100)
    options = ["--data", make_dump(scratch / "tiny", BATCH * 32), "--experiments", scratch, "--name", "song"]
    subprocess.run([sys.executable, ROOT / "trainer.py", *options, "--epochs", "0"], check=True, capture_output=True)
    rows = []
    for what in ("decoding and spectrograms", "network, float32"):
        figures = in_turn([(plain_song, song, what), (our_song, song, what)], settings.rounds)
        rows.append(compare(f"A song of 4 minutes, 44.1 kHz stereo: {what}", "songs/s", 1 / figures, ""))
    return rows


def plain_song(song, what):
    """Return a function that decodes a song with librosa, or sends its windows through the network one by one."""
    import librosa
    import torch

    from lib.tagger import windows

    def decode():
        samples, sample_rate = librosa.load(song, sr=11025)
        for window in windows(samples):
            mel = librosa.feature.melspectrogram(y=window, sr=sample_rate, n_fft=2048, hop_length=512, n_mels=128)
            np.log(np.clip(mel, 1e-20, None))

    net, clips = plain_network().eval(), torch.randn(len(windows(np.empty(240 * 11025))), 1, N_MELS, N_FRAMES)

    @torch.no_grad()
    def network():
        for clip in clips:
            torch.sigmoid(net(clip[None])).numpy()

    return network if what.startswith("network") else decode


def our_song(song, what):
    """Return a function that does the same as Tagger does it."""
    from lib.tagger import Tagger, windows

    tagger = Tagger(song.parent / "song/best.pt", "cpu")
    spectrograms = tagger.spectrograms(windows(tagger.samples(song)))
    if what.startswith("network"):
        return lambda: tagger.tags(spectrograms)
    return lambda: tagger.spectrograms(windows(tagger.samples(song)))


# What takes the time


def profile_step(scratch):
    """Print torch.profiler's table of the tenth training step, in bfloat16, on a CUDA GPU if there is one."""
    import torch

    import trainer
    from lib.parallel import choose_device

    profiler = torch.profiler.profile()  # of all there is, CPU and GPU

    class Profiled(trainer.Losses):
        def append(self, loss):
            super().append(loss)
            if self.n_steps == 9:
                profiler.start()
            if self.n_steps == 10:
                profiler.stop()
                order = f"self_{loss.device.type}_time_total"
                print(profiler.key_averages().table(order, 15, max_name_column_width=40))
                raise InputError("the profile is complete")

    trainer.Losses = Profiled
    data = make_dump(scratch / "tiny", BATCH * 32)
    settings = trainer.Settings(data=data, train_size=BATCH * 30, validation_size=2, precision="bfloat16")
    with contextlib.suppress(InputError):
        trainer.train(settings, choose_device("auto"), torch.float32, scratch, None)


# The real trainer on a dump of MagnaTagATune's size


def full_size_rows(settings, scratch):
    """How long trainer.py takes to start, and its memory up to step 100."""
    options = ["--device", "cpu", "--train-size", 100 * BATCH, "--validation-size", BATCH, "--epochs", 1]
    at, peak, _ = watch(trainer_command(settings, scratch, *options), ("schedule ", "epoch   0", "epoch   1"))
    start = f"Start of trainer.py on {settings.n_clips:,} clips in the file cache, until all are read and checked"
    return [
        (start, "", f"{at['schedule ']:.1f} s", "", "at most 20 s"),
        ("Its peak anonymous memory, up to step 100", "", f"{peak / 1e9:.2f} GB", "", "at most 3 GB"),
    ]


def gpu_rows(settings, scratch):
    """40 epochs, validations included, in either precision."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("--gpu: no CUDA GPU here, or a PyTorch that was built without CUDA")
    rows = []
    for precision, graph, to_reach in (
        ("bfloat16", "--graph", "30 s"), ("float32", "--graph", "75 s"), ("bfloat16", "--no-graph", "")
    ):  # fmt: skip
        command = trainer_command(settings, scratch, "--overwrite", "--precision", precision, graph)
        at, _, text = watch(command, ("epoch   0", "epoch  40", "best validation"))
        print(text, file=sys.stderr)
        what = f"40 epochs, {torch.cuda.get_device_name()}, {precision} {graph}"
        not_counted = f"(not counted: start and first validation, {at['epoch   0']:.1f} s)"
        rows.append((f"{what} {not_counted}", "", f"{at['epoch  40'] - at['epoch   0']:.1f} s", "", to_reach))
    return rows


def trainer_command(settings, scratch, *options):
    """Return the command that trains on the full-size dump, whose files are then in the cache, if memory allows."""
    if not settings.full_size:
        raise InputError("--full-size PATH is missing: the folder of a full-size dump, or an empty one for 8.3 GB")
    for file in make_dump(settings.full_size, settings.n_clips).glob("*.npy"):
        crc_of_file(file)
    options = map(str, ["--data", settings.full_size, "--experiments", scratch, *options])
    return [sys.executable, ROOT / "trainer.py", *options]


def watch(command, moments):
    """Run `command`; return (seconds from its start to each moment, its peak anonymous memory in bytes, its output).

    A moment is when the output first has a line that begins so. At the last one the process is interrupted.
    """
    started, at, text, peak = time.perf_counter(), {}, "", 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            text += line
            at.update({moment: time.perf_counter() - started for moment in moments if line.startswith(moment)})
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.M))))
            if moments[-1] in at:
                process.send_signal(signal.SIGINT)
    if len(at) < len(moments):
        raise InputError(f"{command[1]} ended too early: {text.strip().splitlines()[-1:]}")
    return at, peak, text


def make_dump(data, n_clips):
    """Make a dump of random clips in folder `data` with the project's writer, unless one is there; return `data`."""
    data.mkdir(parents=True, exist_ok=True)
    if any(data.iterdir()) and not (data / "SYNTHETIC.txt").exists():
        raise InputError(f"{data}: holds something, and no random dump; name an empty folder")
    (data / "SYNTHETIC.txt").write_text("Random spectrograms, to measure time and memory. Scores on them mean nothing.")
    names = [f"tag {tag}" for tag in range(50)]
    labels = (np.random.default_rng(0).random((n_clips, 50)) < 0.07).astype(int).tolist()
    rows = [["clip_id", *names, "mp3_path"], *([clip, *row, f"{clip}.mp3"] for clip, row in enumerate(labels))]
    (data / "tags.csv").write_text("\n".join("\t".join(map(str, row)) for row in rows))
    annotations = read_annotations(data / "tags.csv")
    plan = gen_spectrograms.plan_dump(data / "tags.csv", annotations, n_chunks=8)
    chunks, _ = gen_spectrograms.divide(data, n_clips, 8)
    with dump_lock(data):
        manifest = gen_spectrograms.begin_or_continue(data, plan, chunks, overwrite=False)
        if not manifest["complete"]:
            with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
                pool.map(write_random_chunk, [chunk for chunk in chunks if not chunk.is_complete()], chunksize=1)
            gen_spectrograms.finish(data, plan, annotations, chunks)
    return data


def write_random_chunk(chunk):
    """Write clips that fall from -2 to -12 over the mel bands, with noise of deviation 2: one block, rolled."""
    rng = np.random.default_rng(zlib.crc32(chunk.file.name.encode()))
    block = rng.normal(np.linspace(-2, -12, N_MELS)[:, None], 2, (N_MELS, N_FRAMES)).astype(np.float32)
    writer = ChunkWriter(chunk)
    for _ in range(writer.n_done, chunk.n_clips):
        writer.append(np.roll(block, rng.integers(N_FRAMES), axis=1) + np.float32(rng.normal()))
    writer.finish()


if __name__ == "__main__":
    run(main, "the full-size dump is kept as far as it got, and the same command completes it")
