"""What the tests share: how a script is run, and where the optional real data lies."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before PyTorch comes: two tests at a time share two cores, and a thread that waits must not keep one busy
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cuda_on_cpu import played_gpus
from gen_spectrograms import finish, plan_dump, start_or_resume
from lib.audio import N_FRAMES, N_MELS
from lib.common import lock, run as run_main
from lib.dump import MANIFEST, divide
from tags import read_annotations

SHARED = ROOT.parent / "shared"


@pytest.fixture
def run_script():
    """Return a function that runs one of the scripts in a process of its own, as a person would."""

    def run(script, *arguments, status=0, timeout=120, **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
        assert done.returncode == status, f"{done.args}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def call_script(capsys, monkeypatch):
    """Return a function that runs a script's main() in this process, which spares it the start of another."""

    def call(script, *arguments, status=0):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(importlib.import_module(script.removesuffix(".py")).main)
        printed, returncode = capsys.readouterr(), stop.value.code or 0
        assert returncode in np.atleast_1d(status), f"{script} {arguments}\n{printed.out}\n{printed.err}"
        return SimpleNamespace(returncode=returncode, stdout=printed.out, stderr=printed.err)

    return call


@pytest.fixture
def gpus():
    """Let this test see a CUDA GPU, played by the CPU; return what played it."""
    with played_gpus() as gpus:
        yield gpus


@pytest.fixture
def shared():
    """Return the folder of real data beside the checkout, or skip."""
    if not SHARED.is_dir():
        pytest.skip("the real annotations and clips are not beside this checkout")
    return SHARED


class SmallNetwork(torch.nn.Module):
    """A network in place of the paper's, for what is the same with any."""

    def __init__(self, n_tags):
        super().__init__()
        self.head = torch.nn.Linear(N_FRAMES, n_tags)

    def forward(self, spectrograms):
        return self.head(spectrograms.mean(dim=(1, 2)))


def write_dump(
    data, n_clips, n_tags=3, seed=0, n_of_a_track=1, names=("guitar", "flute", "slow"), n_chunks=3, files={}
):
    """Write a complete dump of random spectrograms with at least three tags into folder `data`, and return it.

    Clips of one track, so many in a row, have the same tags. `names` are those of the first three tags, `files`
    {clip: name} those of files that are not called as usual.
    """
    rng = np.random.RandomState(seed)
    names = [*names, *(f"tag {tag}" for tag in range(4, n_tags + 1))]
    lines = ["\t".join(["clip_id", *names, "mp3_path"])]
    for clip in range(n_clips):
        track = clip // n_of_a_track
        tags = track % 2, track % 3 == 0, track % 5 > 0, *(track % tag == 0 for tag in range(4, n_tags + 1))
        file = files.get(clip, f"{'09cdf'[clip % 5]}/{clip}.mp3")
        lines.append("\t".join([str(101 + clip), *(str(int(tag)) for tag in tags), file]))
    (data / "tags.csv").write_text("\n".join(lines), encoding="utf-8")
    annotations = read_annotations(data / "tags.csv")
    plan = plan_dump(data, n_clips, n_chunks)
    chunks = divide(data, n_clips, n_chunks)
    with lock(data / MANIFEST):
        start_or_resume(data, plan)
        for chunk in chunks:
            chunk.resume()
            for place in range(len(chunk.rows)):
                chunk.write(place, rng.normal(-5, 3, (N_MELS, N_FRAMES)).astype(np.float32))
            chunk.finish()
        finish(data, plan, annotations, chunks)
    return data


def write_clip_info(data, n_of_a_track=2):
    """Write the origins of a dump's clips, so many in a row of a track; two tracks an album, two albums an artist."""
    lines = ["clip_id\ttrack_number\ttitle\tartist\talbum\tmp3_path"]
    for row, clip in enumerate(np.load(data / "ids.npy")):
        track = row // n_of_a_track
        lines.append(f"{clip}\t1\ttitle {track}\tartist {track // 4}\talbum {track // 2}\tp")
    (data / "clip_info_final.csv").write_text("\n".join(lines))
    return data
