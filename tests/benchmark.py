"""Measure speed and memory, each speed beside a plain baseline that takes its turns in the same run.

Run by hand, on a machine that does nothing else; prints a table in Markdown.
"""

import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import timeit
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import librosa
import numpy as np
import soundfile
import torch
import tyro
from joblib import cpu_count
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gen_spectrograms
import trainer
from conftest import write_dump
from lib.audio import N_FRAMES, N_MELS
from lib.common import Count, InputError, number, run
from lib.demo import render
from lib.dump import Dump, read_manifest
from lib.graph import Graphed
from lib.loader import Loader, predict
from lib.parallel import choose_device, prepare_device
from lib.tagger import BATCH_SIZE, Tagger, windows
from model import MultiScaleCNN
from tags import read_annotations

BATCH, EVALUATED, N_TAGS, SONG_SECONDS, TIMED_STEPS = 32, 128, 50, 240, 100
Row = Literal["spectrograms", "step", "evaluation", "song"]


@dataclass(frozen=True)
class Settings:
    only: tuple[Row, ...] = get_args(Row)  # rows to measure
    rounds: Count = 7  # measured of each side in turn
    clips: Count = 480  # of one run of gen_spectrograms.py and of its baseline
    gpu: Path | None = None  # only train on a CUDA GPU, with the dump in this folder; an empty one gets 8.3 GB
    epochs: number(int, 2) = 8  # of that training; scaled to the paper's 40


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if settings.gpu and not torch.cuda.is_available():
        raise InputError("--gpu: there is no CUDA GPU here")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        scratch = Path(scratch)
        rows = gpu_rows(settings, scratch) if settings.gpu else compared_rows(settings, scratch)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"\n{cpu[1] if cpu else os.uname().machine}, {cpu_count()} cores\n")
    print("| what | baseline | ours | ratio (of all rounds) | to reach |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def compared_rows(settings, scratch):
    """Return the rows of a baseline and our code, which take turns."""
    step, song = "Training step, 32 clips, CPU", "A song of 4 minutes, 44.1 kHz stereo"
    compared = {  # baseline and ours, each of which returns its rates row by row; what is done, ratio to reach
        "spectrograms": (plain_spectrograms, our_spectrograms, {"Spectrograms, 8 workers": ""}),
        "step": (plain_step, our_step, {f"{step}, float32": "at least 2.5x", f"{step}, bfloat16": "at least 6x"}),
        "evaluation": (
            plain_evaluation, our_evaluation,
            {"Evaluation, CPU, float32": "at least 4x", "Evaluation, CPU, bfloat16": "at least 7x"},
        ),
        "song": (plain_song, our_song, {f"{song}: decoding and spectrograms": "", f"{song}: network, float32": ""}),
    }  # fmt: skip
    make_inputs(scratch, settings.clips)
    rows = []
    for name in settings.only:
        *sides, goals = compared[name]
        rounds = [[in_new_process(side, scratch) for side in sides] for _ in range(settings.rounds)]
        unit = "songs/s" if name == "song" else "clips/s"
        for (what, to_reach), rates in zip(goals.items(), np.transpose(rounds)):
            ratios = rates[1] / rates[0]  # round by round, because the machine's load may change between them
            ratio = f"{np.median(ratios):.2f}x ({ratios.min():.2f} to {ratios.max():.2f})"
            rows.append((what, *(f"{rate:.3g} {unit}" for rate in np.median(rates, axis=1)), ratio, to_reach))
    return rows


def in_new_process(function, *arguments):
    """Return what the function does, which may tell the C library to keep freed memory, but only for itself."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rate(n_units, function):
    """Return how many units a second `function` does, which does `n_units`; its first call only warms it up."""
    return n_units / np.median(timeit.repeat(function, number=1, repeat=3)[1:])


def run_script(script, *options):
    """Run a script's main() in this process; what it prints is no part of the table."""
    sys.argv = [script.__name__, *map(str, options)]
    with contextlib.redirect_stdout(sys.stderr):
        script.main()


def make_inputs(scratch, n_clips):
    """Fill folder `scratch` with what the sides work on: two tables of clips, a dump, a checkpoint and a song."""
    clips, table = ROOT.parent / "shared/gtzan60", "annotations_final.csv"  # real music, if it is beside the checkout
    if not clips.is_dir():
        clips, table = scratch / "demo", "tags.csv"
        render(clips, 60)
    mp3_paths = read_annotations(clips / table).mp3_paths
    for name, n in (("short", 16), ("long", 16 + n_clips)):
        (scratch / name).mkdir()
        (scratch / name / "clips").symlink_to(clips)
        rows = [f"{clip}\t1\tclips/{mp3_paths[clip % len(mp3_paths)]}" for clip in range(n)]
        (scratch / name / "tags.csv").write_text("\n".join(["clip_id\tmusic\tmp3_path", *rows]))
    make_dump(scratch / "dump", 12 * BATCH)
    train(scratch, "--epochs", 0)
    samples = np.resize(soundfile.read(clips / mp3_paths[0])[0], SONG_SECONDS * 44100)
    soundfile.write(scratch / "song.mp3", np.stack([samples, samples[::-1]], axis=1), 44100)


def make_dump(data, n_clips, n_tags=3):
    """Make a dump of random spectrograms in folder `data`, unless there is a dump."""
    data.mkdir(parents=True, exist_ok=True)
    if not read_manifest(data):
        write_dump(data, n_clips, n_tags)


def spectrograms_rate(make, scratch):
    """Return the clips/s by which a long run of `make` exceeds a short one of two clips a worker.

    MagnaTagATune's 25,863 clips pay for the start only once; here it cancels out. The first run is a warm-up.
    """
    _, short, long = (timeit.timeit(lambda: make(scratch / name), number=1) for name in ("short", "short", "long"))
    return (len(read_annotations(scratch / "long/tags.csv").ids) - 16) / (long - short)


def our_spectrograms(scratch):
    return [spectrograms_rate(lambda data: run_script(gen_spectrograms, "--data", data, "--overwrite"), scratch)]


def plain_spectrograms(scratch):
    """The original's recipe, with today's librosa."""

    def make(data):
        parts = np.array_split(read_annotations(data / "tags.csv").mp3_paths, 8)
        with multiprocessing.get_context("fork").Pool(8) as pool:
            pool.starmap(plain_chunk, [(data, *part) for part in enumerate(parts)], chunksize=1)

    _ = librosa.load, librosa.feature.melspectrogram  # imported here, once, for all the processes that are forked
    return [spectrograms_rate(make, scratch)]


def plain_chunk(data, index, mp3_paths):
    spectrograms = [plain_log_mel(librosa.load(data / path, sr=11025)[0])[:, :N_FRAMES] for path in mp3_paths]
    np.save(data / f"spectrograms_{index}.npy", spectrograms)


def plain_log_mel(samples):
    mel = librosa.feature.melspectrogram(y=samples, sr=11025, n_fft=2048, hop_length=512, pad_mode="reflect")
    return np.log(np.clip(mel, 1e-20, None)).astype(np.float32)


def train(scratch, *options, after_step=lambda: None):
    """Train for `--epochs` of ten steps, with a call of `after_step` after each step."""

    step = trainer.training_step

    def watched_step(*arguments):
        loss = step(*arguments)
        after_step()
        return loss

    trainer.training_step = watched_step
    folders = "--data", scratch / "dump", "--experiments", scratch, "--name", "run", "--overwrite"
    run_script(trainer, *folders, "--train-size", 10 * BATCH, "--validation-size", BATCH, *options)
    trainer.training_step = step


def our_step(scratch):
    rates = []
    for precision in "float32", "bfloat16":
        options, ends = ("--epochs", 1, "--device", "cpu", "--precision", precision), []
        train(scratch, *options, after_step=lambda: ends.append(timeit.default_timer()))
        rates.append(BATCH / np.median(np.diff(ends)[2:]))
    return rates


def plain_step(_):
    net = PlainCNN()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001, foreach=False, fused=False)
    clips, labels = torch.randn(BATCH, 1, N_MELS, N_FRAMES), (torch.rand(BATCH, N_TAGS) < 0.07).float()

    def step():
        loss = nn.functional.binary_cross_entropy_with_logits(net(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return [rate(BATCH, step)] * 2  # for both precisions


def our_evaluation(scratch):
    rates, dump = [], Dump(scratch / "dump")
    for precision in "float32", "bfloat16":
        tagger = Tagger(scratch / "run/best.pt", "cpu", precision)
        normalization = {"mean": torch.from_numpy(tagger.mean[:, 0]), "std": torch.from_numpy(tagger.std[:, 0])}
        loader = Loader(dump, dump.labels, normalization, tagger.device, precision)
        rates.append(rate(EVALUATED, lambda: predict(tagger.net, loader, np.arange(EVALUATED), BATCH)))
    return rates


def plain_evaluation(_):
    return [plain_network_rate(EVALUATED, BATCH)] * 2  # for both precisions


@torch.no_grad()
def plain_network_rate(n_clips, batch_size):
    net, clips = PlainCNN().eval(), torch.randn(batch_size, 1, N_MELS, N_FRAMES)
    return rate(n_clips, lambda: [torch.sigmoid(net(clips)).numpy() for _ in range(0, n_clips, batch_size)])


class PlainCNN(nn.Module):
    """The network as anyone would first write it."""

    def __init__(self):
        def conv(channels_in, channels_out, kernel, *pool):
            return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, padding="same"), nn.ReLU(), *pool)

        super().__init__()
        self.subsample = nn.AvgPool2d((2, 4))
        wide, small = nn.MaxPool2d((2, 4)), nn.MaxPool2d((2, 2))
        self.branch1 = nn.Sequential(conv(1, 50, (3, 7), wide), conv(50, 100, (3, 5), wide), conv(100, 70, 3, small))
        self.branch2 = nn.Sequential(conv(1, 100, (3, 5), wide), conv(100, 70, 3, small))
        self.branch3 = conv(1, 70, 3, small)
        self.joined = nn.Sequential(conv(210, 70, 3), conv(70, 70, 3, small), nn.Flatten())
        self.regularized = nn.Sequential(nn.BatchNorm1d(5040, eps=0.001, momentum=0.01), nn.Dropout(0.4))
        self.top = nn.Sequential(nn.Linear(5040, 500), nn.ReLU(), nn.Linear(500, N_TAGS))

    def forward(self, clips):
        half = self.subsample(clips)
        branches = self.branch1(clips), self.branch2(half), self.branch3(self.subsample(half))
        return self.top(self.regularized(self.joined(torch.cat(branches, dim=1))))


def our_song(scratch):
    tagger = Tagger(scratch / "run/best.pt", "cpu", "float32")

    def decode():
        return tagger.spectrograms(windows(tagger.samples(scratch / "song.mp3")))

    batches = decode().split(BATCH_SIZE)
    with torch.no_grad():
        return rate(1, decode), rate(1, lambda: [tagger.net(batch) for batch in batches])


def plain_song(scratch):
    """The windows go through the network one by one."""

    def decode():
        return [plain_log_mel(window) for window in windows(librosa.load(scratch / "song.mp3", sr=11025)[0])]

    n_windows = len(decode())
    return rate(1, decode), plain_network_rate(n_windows, 1) / n_windows


def gpu_rows(settings, scratch):
    """Return the rows of the paper's training on a GPU, in both precisions, from a few of its epochs."""
    make_dump(settings.gpu, 25863, N_TAGS)
    rows, options = [], ["--data", settings.gpu, "--epochs", settings.epochs]
    for precision, to_reach in (("bfloat16", "60 s"), ("float32", "120 s")):
        start, steps, validation, between, n_steps = time_epochs(scratch, *options, "--precision", precision)
        all_epochs = 40 * (steps + validation + between)
        ours = {
            f"40 epochs, {precision}, scaled from {settings.epochs}": f"{all_epochs:.1f} s",
            f"a step of {BATCH} clips, fed from the dump": f"{1000 * steps / n_steps:.2f} ms",
            "the same, its batch on the GPU already": f"{1000 * step_seconds(precision):.2f} ms",
            "an epoch's validation": f"{validation:.2f} s",
            "an epoch's rest: scores, checkpoints, picture": f"{between:.2f} s",
            "the start, not counted: checking the dump, first validation": f"{start:.1f} s",
        }
        rows += [(what, "", value, "", to_reach if "epochs" in what else "") for what, value in ours.items()]
    return [(torch.cuda.get_device_name(), "", "", "", ""), *rows]


def time_epochs(scratch, *options):
    """Train, and return the seconds of the start, and of an epoch's steps, validation and rest; and how many steps.

    They are means over all epochs but the first, in which libraries choose algorithms.
    """
    times, numbers_of_steps = [timeit.default_timer()], []

    def timed_epoch(net, optimizer, loader, batches, *more):
        numbers_of_steps.append(len(batches))
        times.append(timeit.default_timer())
        loss = train_epoch(net, optimizer, loader, batches, *more)  # waits for the GPU
        times.append(timeit.default_timer())
        return loss

    def timed_predict(*arguments):
        predictions = predict(*arguments)
        times.append(timeit.default_timer())
        return predictions

    train_epoch, trainer.train_epoch, trainer.predict = trainer.train_epoch, timed_epoch, timed_predict
    run_script(trainer, "--experiments", scratch, "--overwrite", *options)
    begun, _, *epochs, _ = times  # without the ends of the first validation and of the test
    begins, steps, validations = np.reshape(epochs, (-1, 3)).T
    parts = (steps - begins)[1:], (validations - steps)[1:], begins[1:] - validations[:-1]
    return begins[0] - begun, *(part.mean() for part in parts), numbers_of_steps[0]


def step_seconds(precision):
    """Return the seconds of a training step whose batch is on the GPU."""
    device = choose_device("cuda")
    torch.backends.cudnn.benchmark = True  # as in trainer.run_experiment
    net = MultiScaleCNN(N_TAGS).to(
        device, prepare_device(device, precision, tf32=True), memory_format=torch.channels_last
    )
    optimizer = torch.optim.Adam(net.train().parameters(), fused=True)
    clips = torch.randn(BATCH, 1, N_MELS, N_FRAMES, device=device).to(getattr(torch, precision))
    labels = (torch.rand(BATCH, N_TAGS, device=device) < 0.07).float()
    compute = Graphed(trainer.compute_gradients)

    def steps():
        for _ in range(TIMED_STEPS):
            trainer.training_step(net, optimizer, compute, clips, labels, BATCH, precision)
        torch.cuda.synchronize()

    return 1 / rate(TIMED_STEPS, steps)


if __name__ == "__main__":
    run(main, "delete what --gpu has made so far, and start again")
