"""What all scripts promise: no setting ends in a traceback, one line for what goes wrong, logs that can be read."""

import dataclasses
import errno
import importlib
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from lib import common

SCRIPTS = ("get_data", "gen_spectrograms", "tags", "model", "trainer", "evaluate")
# A value that is allowed lets the script go on to what it lacks: hosts that answer, a dump, a checkpoint
NOTHING_THERE = {"get_data": ["--hosts", "http://127.0.0.1:9/", "--attempts", 1, "--md5sums", "none"]}


def settings():
    for script in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(script).Settings):
            if field.name == "tag":
                continue  # takes file descriptor 2 for itself, and has tests of its own
            yield pytest.param(script, f"--{field.name.replace('_', '-')}", id=f"{script} {field.name}")


@pytest.mark.parametrize("script, option", list(settings()))
def test_a_value_that_makes_no_sense_is_one_line(script, option, call_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("0", "-1", "1" + 30 * "0", "nan", "inf"):
        others = [] if script == "model" else ["--data", "nowhere", *NOTHING_THERE.get(script, [])]
        done = call_script(f"{script}.py", *others, option, value, status=(1, 2))
        assert "Traceback" not in done.stderr
        if done.returncode == 1:  # 2 is for a value of the wrong type, which tyro names in several lines
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".last.pt.lock"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_each_switch_does(script, run_script, tmp_path):
    wide = {**os.environ, "COLUMNS": "300"}
    help_text = " ".join(run_script(f"{script}.py", "--help", cwd=tmp_path, env=wide).stdout.split())
    assert script == "model" or f"(default: {ROOT / 'data'})" in help_text, "wherever it is started"
    for field in dataclasses.fields(importlib.import_module(script).Settings):
        name = field.name.replace("_", "-")
        assert f"--{name}, --no-{name}" in help_text if isinstance(field.default, bool) else f"--{name} " in help_text


def test_closed_outputs_are_no_traceback(tmp_path):
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} {ROOT}/tags.py --data {tmp_path} {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "Traceback" not in done.stderr, closed


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


def test_a_log_file_gets_no_progress_bar(capsys):
    assert list(common.progress(range(3), "reading", mininterval=0)) == [0, 1, 2] and capsys.readouterr().err == ""


def test_a_lock_is_for_one_process(tmp_path):
    code = "import pathlib, sys\nfrom lib.common import lock\nwith lock(pathlib.Path(sys.argv[1])): print('held')"
    command = [sys.executable, "-c", code, tmp_path / "table.csv"]
    with common.lock(tmp_path / "table.csv"):
        assert "table.csv: another process" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "held\n"
