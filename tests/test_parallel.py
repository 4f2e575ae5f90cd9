"""Cores, and torchrun's processes."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import trainer
from conftest import ROOT, write_dump
from cuda_on_cpu import played_gpus
from lib import parallel
from lib.checkpoint import load_checkpoint
from lib.dump import Dump
from test_trainer import TINY

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_dump(tmp_path_factory.mktemp("small"), n_clips=6)


@pytest.mark.parametrize("name, expected", [("cpu", ("gloo", None)), ("cuda:1", ("nccl", torch.device("cuda:1")))])
def test_the_backend_of_a_device(name, expected, monkeypatch):
    joined = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **options: joined.append((args, options))
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with parallel.joined_processes(torch.device(name)):
        (backend,), options = joined.pop()
    assert (backend, options["device_id"]) == expected, "without its device, NCCL's barrier warns"


def test_two_processes_train_as_one(small, tmp_path, call_script):
    """On two GPUs, played by the CPU; NCCL's part is gloo's."""
    sizes = ["--train-size", 4, "--validation-size", 1, "--batch-size", 3]  # 3 clips and then 1, for two processes
    options = ["--data", small, *TINY, *sizes, "--epochs", 2, "--device", "cuda", "--precision", "float64"]
    command = [*TORCHRUN, "tests/cuda_on_cpu.py", "trainer.py", *options, "--experiments", tmp_path / "pair"]
    pair = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert pair.returncode == 0, pair.stderr
    assert "float64, 2 process(es)" in pair.stdout and "Warning" not in pair.stderr
    with played_gpus(n_gpus=1):
        call_script("trainer.py", *options, "--experiments", tmp_path / "alone")
    one, two = (load_checkpoint(tmp_path / where / "paper/last.pt") for where in ("alone", "pair"))
    assert abs(one["history"][-1]["loss"] - two["history"][-1]["loss"]) < 1e-9
    for name, weights in one["weights"].items():
        assert (weights - two["weights"][name]).abs().max() < 1e-9, name


def test_only_rank_0_reads_the_whole_dump(small, tmp_path, monkeypatch):
    passed_on = np.full(128, -5, np.float32), np.full(128, 3, np.float32)
    monkeypatch.setattr(trainer, "from_rank_0", lambda compute: passed_on)  # as in the others
    monkeypatch.setattr(Dump, "verify", lambda dump: pytest.fail("it read the dump"))
    settings = trainer.Settings(
        data=small, train_size=2, validation_size=1, epochs=0, device="cpu", experiments=tmp_path
    )
    trainer.train(settings)
    normalization = load_checkpoint(tmp_path / "paper/best.pt")["normalization"]
    assert np.array_equal([normalization["mean"], normalization["std"]], passed_on)


def test_an_error_of_all_processes_is_printed_once(small, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(small, damaged)
    with open(damaged / "spectrograms_1.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"anything")
    sizes = ["--train-size", 4, "--validation-size", 1]
    command = [*TORCHRUN, "trainer.py", "--data", damaged, *TINY, *sizes, "--experiments", tmp_path / "experiments"]
    pair = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert pair.returncode == 1 and pair.stderr.count("error: ") == 1
    assert not (tmp_path / "experiments").exists()
    assert "spectrograms_1.npy: missing, damaged" in pair.stderr and 'trainer.py", line' not in pair.stderr


def test_a_process_that_torchrun_did_not_start_is_told(small, call_script, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = call_script("trainer.py", "--data", small, "--experiments", tmp_path, "--device", "cpu", status=1).stderr
    assert "start them with torchrun" in error and error.count("\n") == 1


def test_one_process_of_several_does_not_evaluate(call_script, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = call_script("evaluate.py", "--experiments", tmp_path, status=1).stderr
    assert error == "error: evaluate.py: runs in one process; start it with python instead of torchrun\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "no such checkpoint" in call_script("evaluate.py", "--experiments", tmp_path, status=1).stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_uses_the_cores_that_it_may_use():
    code = "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); from joblib import cpu_count"
    command = [sys.executable, "-c", f"{code}; print(cpu_count())"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "1\n"


def test_torch_gets_no_more_threads_than_there_are_cores(monkeypatch):
    threads = torch.get_num_threads()
    try:
        for cores, expected in ((3, 2), (1, 1)):
            torch.set_num_threads(2)
            monkeypatch.setattr(parallel, "cpu_count", lambda: cores)
            parallel.prepare_device(torch.device("cpu"), "float32", tf32=True)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)
