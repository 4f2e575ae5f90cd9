"""What all scripts promise: no setting ends in a traceback, one line for what goes wrong, logs that can be read."""

import dataclasses
import errno
import fcntl
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import evaluate
import gen_spectrograms
import get_data
import tags
import trainer
from conftest import ROOT, SmallNetwork, write_dump
from lib import common
from lib.common import InputError
from lib.experiment import hyperparameters
from model import NETWORKS


@pytest.mark.parametrize(
    "script, option, value, said",
    [
        ("gen_spectrograms", "--n-chunks", "257", "--n-chunks: must be in the range 1 to 256"),
        ("trainer", "--learning-rate", "nan", "--learning-rate: must be in the range 1e-12 to 10"),
        ("trainer", "--drop-after", "0", "--drop-after: Could not find valid parse"),
    ],
)
def test_a_value_out_of_range_is_named(script, option, value, said, call_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in " ".join(call_script(f"{script}.py", option, value, status=2).stderr.split())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--n-tgas=3"], ["--epochs", "three"], ["--tf32", "maybe"], ["--split", "genre"]])
def test_an_option_that_is_none_and_a_value_of_another_type_are_named(option, call_script):
    assert option[-1].split("=")[0] in call_script("trainer.py", *option, status=2).stderr


@pytest.mark.parametrize("script", ["get_data", "gen_spectrograms", "tags", "trainer", "evaluate"])
def test_help_says_what_each_switch_does(script, call_script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    help_text = " ".join(call_script(f"{script}.py", "--help").stdout.split())
    if script != "evaluate":
        assert f"(default: {ROOT / 'data'})" in help_text, "wherever it is started"
    for field in dataclasses.fields(importlib.import_module(script).Settings):
        name = field.name.replace("_", "-")
        assert f"--{name}, --no-{name}" in help_text if isinstance(field.default, bool) else f"--{name} " in help_text


def test_a_closed_output_is_no_traceback(tmp_path):
    command = f"{sys.executable} {ROOT}/tags.py --data {tmp_path} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_settings_from_python_may_be_strings_and_lists():
    settings = evaluate.Settings(name="mine", tag=["a", Path("b")], csv="c")
    assert settings == evaluate.Settings(name=("mine",), tag=(Path("a"), Path("b")), csv=Path("c"))
    assert trainer.Settings(data="d", drop_after=[1, 2]) == trainer.Settings(data=Path("d"), drop_after=(1, 2))
    assert trainer.Settings().start_from is None
    settings = trainer.Settings(batch_size=np.int64(2), learning_rate=np.float64(0.1), drop_after=[np.int64(1)])
    assert hyperparameters(settings) == hyperparameters(
        trainer.Settings(batch_size=2, learning_rate=0.1, drop_after=[1])
    )
    with pytest.raises(InputError, match="^split='artists': must be one of .*'artist'"):
        trainer.Settings(split="artists")


def test_every_script_takes_settings_from_python(tmp_path, capsys, monkeypatch):
    """As in a notebook, whose own command line is something else."""
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    monkeypatch.setitem(NETWORKS, "MultiScaleCNN", SmallNetwork)
    write_dump(tmp_path, 40)
    place = dict(data=str(tmp_path), experiments=str(tmp_path), device="cpu")
    tags.main(tags.Settings(data=str(tmp_path), n_tags=2))
    assert "the 2 that training would use" in capsys.readouterr().out
    gen_spectrograms.main(gen_spectrograms.Settings(data=str(tmp_path), n_chunks=3))
    assert "40 spectrograms" in capsys.readouterr().out
    scores = trainer.train(trainer.Settings(**place, epochs=0))
    assert f"(epoch 0), test ROC-AUC {scores['test_roc_auc']:.4f}" in capsys.readouterr().out
    evaluate.main(evaluate.Settings(**place, resamples=9, baseline=False))
    assert "\ntest, 9 clips\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="begin with http"):
        get_data.main(get_data.Settings(data=str(tmp_path), hosts="nowhere"))


def test_a_notebooks_output_is_good_enough(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which has no reconfigure() either
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: None)
    assert stop.value.code is None


def test_a_lock_names_its_file_and_means_nothing_in_a_copy(tmp_path, monkeypatch):
    """On a file system without flock, a killed process on another machine leaves its lock for ever."""
    monkeypatch.setattr(common, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no flock")))
    folder = tmp_path / "experiment"
    folder.mkdir()
    with warnings.catch_warnings(action="ignore"), common.lock(folder / "last.pt"):
        (left,) = folder.iterdir()
        content = left.read_text()
    left.write_text(content.replace(socket.gethostname(), "another-machine"))
    with warnings.catch_warnings(action="ignore"):
        with (
            pytest.raises(common.InputError, match=f"last.pt: in use.* delete {left}$"),
            common.lock(folder / "last.pt"),
        ):
            pass
        copied = shutil.copytree(folder, tmp_path / "copy")
        with common.lock(copied / "last.pt"):
            pass


def test_a_locks_error_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks available")))
    with pytest.raises(OSError, match=r"\.last\.pt\..*lock"), common.lock(tmp_path / "last.pt"):
        pass


def test_a_picture_that_cannot_be_drawn_is_a_note(tmp_path, capsys):
    with common.optional_picture(tmp_path / "curves.png"):
        raise RuntimeError("no fonts")
    assert capsys.readouterr().err == f"note: {tmp_path}/curves.png: no picture drawn (RuntimeError: no fonts)\n"
    with pytest.raises(KeyboardInterrupt), common.optional_picture(tmp_path / "curves.png"):
        raise KeyboardInterrupt


def test_ctrl_c_says_what_goes_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        common.run(main, "the same command with --resume goes on")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command with --resume goes on\n"


def test_ctrl_c_during_the_imports_is_one_line():
    code = "import lib.common, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT and done.stderr == "\ninterrupted\n"


def test_a_full_disk_names_the_file_and_what_goes_on(tmp_path, monkeypatch, capsys):
    def main():
        with common.whole_file(tmp_path / "results.json") as file:
            file.write(b"{}")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        common.run(main, "the same command with --resume goes on")
    full = f"error: {tmp_path}/results.json: No space left on device; make room, then the same command with --resume"
    assert stop.value.code == 1 and capsys.readouterr().err.startswith(full)
    assert not list(tmp_path.iterdir())
