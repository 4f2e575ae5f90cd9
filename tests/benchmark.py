"""Measure speed and memory, each beside a plain baseline that takes its turns in the same run.

Run by hand, on a machine that does nothing else; prints a table in Markdown. Clips are real music from
../shared/gtzan60 where that is, else demo.py's. --full-size PATH adds the rows that need a dump of MagnaTagATune's
size, made of random numbers. --gpu measures 40 epochs on it, --profile shows where a training step's time goes.
"""

import contextlib
import gzip
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_args

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gen_spectrograms  # noqa: E402
from common import InputError, run, settings_from_command_line  # noqa: E402
from dump import CLIP_BYTES, N_FRAMES, N_MELS, Dump, chunk_writer, crc_of_file, read_manifest  # noqa: E402
from tags import annotations_path, read_annotations  # noqa: E402

# torch and librosa are imported where they are used: no timed process is to start with what it does not need.

RowName = Literal["spectrograms", "one-clip", "step", "evaluation", "memory", "full-size"]


@dataclass(frozen=True)
class Settings:
    only: tuple[RowName, ...] = get_args(RowName)  # rows to measure; full-size needs --full-size
    rounds: int = 7  # measured of each side in turn
    clips: int = 240  # of one run of gen_spectrograms.py and of its baseline
    full_size: Optional[Path] = None  # folder of the full-size dump; made there (8.3 GB) unless it is there
    n_clips: int = 25863  # of that dump
    n_steps: int = 120  # of training on it, for the memory; 94 batches are fetched ahead
    gpu: bool = False  # measure nothing but 40 epochs on a CUDA GPU, on the dump of --full-size
    profile: bool = False  # measure nothing; print what takes the time of a training step
    baseline_spectrograms: Optional[Path] = None  # measure nothing; make the folder's by the original's recipe


BATCH = 32  # clips
EVALUATED = 4 * BATCH  # clips of one round
FEW = 16  # clips of a run that is almost only start-up: two for each of the eight workers
SYNTHETIC = "Random spectrograms, written by tests/benchmark.py to measure time and memory. Scores on them mean nothing.\n"


def main():
    settings = settings_from_command_line(Settings, __doc__)
    if settings.baseline_spectrograms:
        return original_spectrograms(settings.baseline_spectrograms)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        if settings.profile:
            profile_step(Path(scratch))
        else:
            print_table((gpu_rows if settings.gpu else cpu_rows)(settings, Path(scratch)))


def cpu_rows(settings, scratch):
    measures = {
        "spectrograms": spectrogram_rows,
        "one-clip": one_clip_rows,
        "step": network_rows,
        "evaluation": network_rows,
        "memory": memory_rows,
        "full-size": full_size_rows,
    }
    chosen = dict.fromkeys(measures[name] for name in settings.only)  # the network's two rows are measured together
    if not settings.full_size and chosen.pop(full_size_rows, False):
        say("the full-size rows are left out: --full-size PATH names a folder for 8.3 GB")
    rows = []
    for measure in chosen:
        say(f"measuring {measure.__name__.replace('_', ' ')} ...")
        rows += measure(settings, scratch)
    return rows


# The table


class Row(NamedTuple):
    what: str
    baseline: str
    ours: str
    ratio: str
    to_reach: str
    reached: str


def interleave(baseline, ours, rounds, warm_up):
    """Return both sides' figures, (2, rounds, ...), measured in turn after `warm_up` rounds that don't count."""
    return np.array([(baseline(), ours()) for _ in range(warm_up + rounds)])[warm_up:].swapaxes(0, 1)


def compare(what, unit, figures, at_least=None, at_most=None):
    """Return the row of interleaved `figures`: (2, rounds). A limit applies to ours / baseline.

    The ratio is the median over rounds of each round's own, so that a change of the machine's load does not bend it.
    """
    baseline, ours = np.median(figures, axis=1)
    ratios = figures[1] / figures[0]
    ratio, limit = np.median(ratios), at_least or at_most
    reached = "" if not limit else "yes" if (ratio >= limit if at_least else ratio <= limit) else "NO"
    to_reach = f"{'at least' if at_least else 'at most'} {limit}x" if limit else ""
    spread = f"{ratio:.2f}x ({ratios.min():.2f}-{ratios.max():.2f})"
    return Row(what, f"{baseline:.3g} {unit}", f"{ours:.3g} {unit}", spread, to_reach, reached)


def limit(what, unit, figure, at_most):
    return Row(what, "", f"{figure:.3g} {unit}", "", f"at most {at_most} {unit}", "yes" if figure <= at_most else "NO")


def print_table(rows):
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    print(f"\n{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores; PyTorch {torch.__version__}\n")
    print("| what | baseline | ours | ratio (all rounds) | to reach | reached? |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def say(text):
    print(text, file=sys.stderr, flush=True)


def timed(function, *arguments, **options):
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - started


# Spectrograms


def original_spectrograms(data, n_processes=8):
    """Make the spectrograms of tags.csv in folder `data` as the original does, with today's librosa."""
    import librosa  # noqa: F401 - once, for all the processes that are forked below

    mp3_paths = read_annotations(annotations_path(data)).mp3_paths
    size = (len(mp3_paths) - 1) // n_processes + 1
    parts = [mp3_paths[start : start + size] for start in range(0, len(mp3_paths), size)]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=original_chunk, args=(data, index, part)) for index, part in enumerate(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return any(worker.exitcode for worker in workers)


def original_chunk(data, index, mp3_paths):
    import librosa

    spectrograms = []
    for mp3_path in mp3_paths:
        samples, _ = librosa.load(data / mp3_path, sr=11025)
        mel = librosa.feature.melspectrogram(
            y=samples, sr=11025, n_fft=2048, hop_length=512, n_mels=128, pad_mode="reflect"
        )
        spectrograms.append(np.log(np.clip(mel, 1e-20, None)).astype(np.float32)[:, :N_FRAMES])
    np.save(data / f"spectrograms_{index}.npy", np.array(spectrograms))


BASELINE_COMMAND = [sys.executable, __file__, "--baseline-spectrograms"]
OUR_COMMAND = [sys.executable, str(ROOT / "gen_spectrograms.py"), "--data"]


def spectrogram_rows(settings, scratch):
    # 25,863 clips pay for the start only once. So the rate is that of the clips by which a long run exceeds a short
    # one: on both sides alike, the start, the imports and each worker's first clips cancel out.
    few, many = FEW, FEW + settings.clips

    def seconds_of(command):
        return [timed_command(command, scratch, n_clips) for n_clips in (few, many)]

    seconds = interleave(lambda: seconds_of(BASELINE_COMMAND), lambda: seconds_of(OUR_COMMAND), settings.rounds, 0)
    rates = (many - few) / (seconds[..., 1] - seconds[..., 0])
    return [
        compare("Spectrograms, 8 workers", "clips/s", rates, at_least=4),
        compare(f"the same, a run of {many} clips with its start", "clips/s", many / seconds[..., 1]),
    ]


def timed_command(command, scratch, n_clips):
    with data_folder(scratch, n_clips) as data:
        return timed(subprocess.run, [*command, str(data)], check=True, capture_output=True)


@contextlib.contextmanager
def data_folder(scratch, n_clips):
    """Yield a data folder of `n_clips` clips: as many as there are, over and over, with ids of their own."""
    folder, mp3_paths = find_clips(scratch)
    data = Path(tempfile.mkdtemp(dir=scratch))
    (data / "clips").symlink_to(folder)
    rows = [f"{number}\t1\tclips/{path}" for number, path in zip(range(n_clips), itertools.cycle(mp3_paths))]
    (data / "tags.csv").write_text("\n".join(["clip_id\tmusic\tmp3_path", *rows]) + "\n")
    yield data
    shutil.rmtree(data)


def find_clips(scratch):
    """Return the folder and the paths of 60 clips: the real music beside the checkout, or the demo's."""
    folder = ROOT.parent / "shared" / "gtzan60"
    if not folder.is_dir():
        folder = scratch / "demo"
        if not folder.is_dir():
            from demo import render

            render(folder, 60)
    return folder, read_annotations(annotations_path(folder)).mp3_paths


def one_clip_rows(settings, scratch):
    import soundfile
    import torch

    torch.set_num_threads(1)
    folder, mp3_paths = find_clips(scratch)
    paths, same_paths = (itertools.cycle([folder / path for path in mp3_paths]) for _ in range(2))
    seconds = interleave(
        lambda: timed(soundfile.read, next(paths), dtype="float32"),
        lambda: timed(gen_spectrograms.log_mel_spectrogram, next(same_paths)),
        rounds=settings.rounds * len(mp3_paths),
        warm_up=2,
    )
    return [compare("One clip, one thread; decoding alone", "ms", 1000 * seconds, at_most=2.3)]


def memory_rows(settings, scratch):
    with data_folder(scratch, settings.clips) as data:
        with subprocess.Popen([*OUR_COMMAND, data], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            with peak_of(proportional_memory, process.pid) as peak:
                if process.wait():
                    raise InputError(f"gen_spectrograms.py ended with status {process.returncode}")
    what = "Peak memory of gen_spectrograms.py, its workers and libraries (PSS: shared pages once)"
    return [limit(what, "GB", max(peak) / 1e9, at_most=2)]


# The network: each side in a long-lived process of its own, because ours tells the C library to keep freed memory


def network_rows(settings, scratch):
    data = scratch / "tiny"
    make_dump(data, 2 * BATCH + EVALUATED)
    with side(plain_side, data) as plain, side(our_side, data) as ours:

        def rates(what, amount):
            figures = interleave(lambda: plain(what), lambda: ours(what), settings.rounds, warm_up=2)
            return amount / figures

        rows = {
            "step": lambda: compare("Training step, 32 clips, CPU, float32", "steps/s", rates("step", 1), at_least=2),
            "evaluation": lambda: compare("Evaluation, CPU", "clips/s", rates("evaluation", EVALUATED), at_least=2.5),
        }
        return [measure() for name, measure in rows.items() if name in settings.only]


@contextlib.contextmanager
def side(prepare, data):
    """Start a process that knows `prepare(data)`, {what: function}; yield a function of `what` that times it there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(prepare, data, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its death ends the waiting below

    def measure(what):
        time.sleep(0.3)  # the other side's idle threads may spin for a moment
        ours.send(what)
        return ours.recv()

    try:
        yield measure
    finally:
        process.terminate()
        process.join()


def serve(prepare, data, pipe):
    sys.stdout = open(os.devnull, "w")  # the trainer's notes on the tiny dump
    functions = prepare(data)
    while True:
        pipe.send(timed(functions[pipe.recv()]))


def our_side(data, device="cpu", precision="float32"):
    """The trainer's own step, and the tagger's own prediction with the clips read from the dump."""
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

    return {"step": step, "evaluation": lambda: predict(training.net, training.feeder, training.validation, BATCH)}


def plain_side(data):
    """The same network as anyone would first write it in PyTorch, with its clips ready in memory."""
    import torch
    import torch.nn.functional as F

    net = plain_network()
    optimizer = torch.optim.Adam(net.parameters(), 0.001, foreach=False, fused=False)
    clips, labels = torch.randn(BATCH, 1, N_MELS, N_FRAMES), (torch.rand(BATCH, 50) < 0.07).float()

    def step():
        net.train()
        loss = F.binary_cross_entropy_with_logits(net(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    @torch.no_grad()
    def evaluate():
        net.eval()
        for _ in range(EVALUATED // BATCH):
            torch.sigmoid(net(clips)).numpy()

    return {"step": step, "evaluation": evaluate}


def plain_network():
    import torch
    from torch import nn

    def conv(channels_in, channels_out, kernel, pool=None):
        padding = (kernel[0] // 2, kernel[1] // 2)
        layers = [nn.Conv2d(channels_in, channels_out, kernel, padding=padding), nn.ReLU()]
        return nn.Sequential(*layers, nn.MaxPool2d(pool)) if pool else nn.Sequential(*layers)

    class PlainCNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.subsample = nn.AvgPool2d((2, 4))
            self.branch1 = nn.Sequential(
                conv(1, 50, (3, 7), (2, 4)), conv(50, 100, (3, 5), (2, 4)), conv(100, 70, (3, 3), (2, 2))
            )
            self.branch2 = nn.Sequential(conv(1, 100, (3, 5), (2, 4)), conv(100, 70, (3, 3), (2, 2)))
            self.branch3 = conv(1, 70, (3, 3), (2, 2))
            self.joined = nn.Sequential(conv(210, 70, (3, 3)), conv(70, 70, (3, 3), (2, 2)), nn.Flatten())
            self.top = nn.Sequential(
                nn.BatchNorm1d(5040, eps=0.001, momentum=0.01),
                nn.Dropout(0.4),
                nn.Linear(5040, 500),
                nn.ReLU(),
                nn.Linear(500, 50),
            )

        def forward(self, clips):
            half = self.subsample(clips)
            quarter = self.subsample(half)
            branches = self.branch1(clips), self.branch2(half), self.branch3(quarter)
            return self.top(self.joined(torch.cat(branches, dim=1)))

    return PlainCNN()


def profile_step(scratch):
    """Print torch.profiler's table of the third training step on the CPU and, if there is one, on a CUDA GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    make_dump(scratch / "tiny", 2 * BATCH + EVALUATED)
    machines = [("cpu", "float32"), *([("cuda", "bfloat16")] if torch.cuda.is_available() else [])]
    for device, precision in machines:
        step = our_side(scratch / "tiny", device, precision)["step"]
        for _ in range(2):
            step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        with profile(activities=activities) as profiler:
            step()
        print(f"\none training step, {device}, {precision}")
        print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15, max_name_column_width=40))


# A dump of MagnaTagATune's size


def make_dump(data, n_clips):
    """Make a dump of random clips in folder `data` through the project's own writer, unless it is there."""
    manifest = read_manifest(data)
    if manifest and manifest["complete"]:
        if manifest["n_clips"] != n_clips:
            raise InputError(f"{data}: holds a dump of {manifest['n_clips']:,} clips, not {n_clips:,}")
        return
    claim(data, n_clips)
    if not (data / "tags.csv").exists():
        write_tables(data, n_clips)
    annotations = read_annotations(data / "tags.csv")
    gen_spectrograms.begin_or_continue(data, gen_spectrograms.plan(data / "tags.csv", annotations, 8), overwrite=False)
    chunks, _ = gen_spectrograms.divide(data, n_clips, 8)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(write_random_chunk, [chunk for chunk in chunks if not chunk.is_complete()], chunksize=1)
    gen_spectrograms.finish(data, annotations, chunks)


def claim(data, n_clips):
    """Mark `data` as a folder of random numbers, after making sure that nothing else is in it and that they fit."""
    data.mkdir(parents=True, exist_ok=True)
    marker = data / "SYNTHETIC.txt"
    if marker.exists():
        ours = marker.read_text(encoding="utf-8") == SYNTHETIC
    else:
        ours = not any(data.iterdir())
    if not ours:
        raise InputError(f"{data}: holds other files and no complete dump; name an empty folder")
    there = sum(file.stat().st_size for file in data.glob("spectrograms_*"))
    needed, free = n_clips * CLIP_BYTES - there, shutil.disk_usage(data).free
    if needed > 1e9:
        say(f"{needed / 1e9:.1f} GB will be written to {data} ({free / 1e9:.0f} GB are free)")
    if needed > 0.95 * free:
        raise InputError(f"{data}: {needed / 1e9:.1f} GB are needed, and only {free / 1e9:.1f} GB are free")
    marker.write_text(SYNTHETIC, encoding="utf-8")


def write_tables(data, n_clips):
    """Write the first rows of MagnaTagATune's own tables, where they lie beside the checkout; else random tags."""
    real = ROOT.parent / "shared" / "mtat"
    if real.is_dir():
        for name, source in (("clip_info_final.csv", "clip_info_final"), ("tags.csv", "annotations_final")):
            lines = gzip.decompress((real / f"{source}.csv.gz").read_bytes()).splitlines(keepends=True)
            (data / name).write_bytes(b"".join(lines[: n_clips + 1] if name == "tags.csv" else lines))
        return
    rng = np.random.default_rng(1337)
    prevalence = np.geomspace(0.19, 0.01, 50)  # of MagnaTagATune's most frequent tag and its fiftieth
    labels = (rng.random((n_clips, 50)) < prevalence).astype(int).astype(str)
    rows = [[f"{i + 1}", *tags, f"{i % 16:x}/{i + 1}.mp3"] for i, tags in enumerate(labels)]
    header = ["clip_id", *(f"tag {rank}" for rank in range(1, 51)), "mp3_path"]
    (data / "tags.csv").write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")


def write_random_chunk(chunk):
    """Write clips that fall from -2 to -12 over the mel bands, with noise of deviation 2: one block, rolled."""
    rng = np.random.default_rng(zlib.crc32(chunk.file.name.encode()))
    envelope = np.linspace(-2, -12, N_MELS)[:, None]
    block = rng.normal(envelope, 2, (N_MELS, N_FRAMES)).astype(np.float32)
    with chunk_writer(chunk) as (n_done, append):
        for _ in range(n_done, chunk.n_clips):
            append(np.roll(block, rng.integers(N_FRAMES), axis=1) + np.float32(rng.normal()))


def full_size_rows(settings, scratch):
    data = full_size_dump(settings)
    moments = {
        "clips read": r"^schedule ",
        "validated": r"^epoch   0  ",
        "first step": r"^epoch 1: .*loss=",
        "enough": rf"^epoch 1: .* {settings.n_steps}/\d+ \[",
    }
    arguments = ["--data", data, "--experiments", scratch, "--name", "full-size", "--device", "cpu"]
    at, peak, _ = watch_trainer(arguments, moments, stop="enough")
    validation = at["validated"] - at["clips read"]
    what = (
        f"Start of trainer.py to the end of its first step, without the validation in between ({validation:.1f} s); "
        f"dump of {settings.n_clips:,} clips, in the file cache"
    )
    memory = f"Peak memory of trainer.py on it (anonymous), up to step {settings.n_steps}"
    return [
        limit("of that, start to the first validation", "s", at["clips read"], at_most=20),
        limit(what, "s", at["first step"] - validation, at_most=20),
        limit(memory, "GB", peak / 1e9, at_most=3),
    ]


def full_size_dump(settings):
    """Return the folder of the full-size dump, which is then complete and, where memory allows, in the file cache."""
    if not settings.full_size:
        raise InputError("--full-size PATH is needed too: a folder for 8.3 GB of spectrograms, or with them")
    make_dump(settings.full_size, settings.n_clips)
    for file in settings.full_size.glob("*.npy"):
        crc_of_file(file)
    return settings.full_size


def gpu_rows(settings, scratch):
    """40 epochs in either precision, with and without --compile: training and validation, but not the start."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA GPU here (or a PyTorch that was built without CUDA)")
    data, gpu = full_size_dump(settings), torch.cuda.get_device_name()
    rows = []
    for precision, compiled in itertools.product(("bfloat16", "float32"), (False, True)):
        name = precision + ", compiled" * compiled
        say(f"40 epochs in {name} ...")
        arguments = ["--data", data, "--experiments", scratch, "--name", name, "--precision", precision]
        arguments += ["--compile"] * compiled
        moments = {"start": r"^epoch   0  ", "end": r"^epoch  40  "}
        at, _, text = watch_trainer(arguments, moments)
        say("\n".join(re.findall(r"^(?:epoch +\d+  |best).*", text, re.MULTILINE)))
        what = f"40 epochs on {gpu}, {name} (start-up and first validation, not counted: {at['start']:.1f} s)"
        rows.append(limit(what, "s", at["end"] - at["start"], at_most={"bfloat16": 60, "float32": 150}[precision]))
    return rows


def watch_trainer(arguments, moments, stop=None):
    """Run trainer.py; return (seconds from its start to each moment, its peak anonymous memory, what it printed).

    `moments` are {name: regular expression}; a moment is when the output first matches. At the one called `stop`
    the trainer is interrupted as by Ctrl-C.
    """
    started = time.perf_counter()
    command = [sys.executable, ROOT / "trainer.py", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    at, text = {}, ""
    with process, peak_of(anonymous_memory, process.pid) as peak:
        try:
            while stop not in at and (block := os.read(process.stdout.fileno(), 1 << 16)):
                text += block.decode(errors="replace").replace("\r", "\n")  # progress bars return to the line's start
                for name, pattern in moments.items():
                    if name not in at and re.search(pattern, text, re.MULTILINE):
                        at[name] = time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGINT)  # nothing happens if it has ended
    if at.keys() != moments.keys():
        raise InputError(f"trainer.py ended too early: {text.strip().splitlines()[-1]}")
    return at, max(peak), text


# Memory


@contextlib.contextmanager
def peak_of(measure, pid):
    """Sample `measure(pid)` every 50 ms meanwhile; yield the list that the samples go to."""
    samples, ended = [0], threading.Event()

    def sample():
        while not ended.wait(0.05):
            samples.append(measure(pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def proportional_memory(pid):
    """Return the bytes of memory of a process and its children; a page that n of them share counts 1/n in each."""
    with contextlib.suppress(OSError):  # it may end at any time
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(kilobytes(f"/proc/{each}/smaps_rollup", "Pss") for each in (pid, *children)) * 1024
    return 0


def anonymous_memory(pid):
    """Return the bytes of memory of a process that are no file's: its own, which the kernel can't drop at need."""
    return kilobytes(f"/proc/{pid}/status", "RssAnon|RssShmem") * 1024


def kilobytes(path, names):
    """Return the sum of the fields called `names` in a file of the kernel's; 0 if the process has ended."""
    try:
        return sum(map(int, re.findall(rf"^(?:{names}):\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)))
    except OSError:
        return 0


if __name__ == "__main__":
    run(main, when_interrupted="nothing was kept but the full-size dump, which the same command completes")
