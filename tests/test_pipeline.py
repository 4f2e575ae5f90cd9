"""The whole experiment with the real scripts: download, spectrograms, training, evaluation."""

import json
import shutil

import numpy as np

import get_data
from http_server import Server
from lib.demo import render
from test_get_data import make_zip, stand_in_for

N_CLIPS = 12


def test_from_download_to_test_score(tmp_path, run_script, call_script, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a notebook leaves it
    rendered = tmp_path / "demo"
    render(rendered, n_clips=N_CLIPS, seed=1)
    clips = {str(clip.relative_to(rendered)): clip.read_bytes() for clip in rendered.glob("?/*.mp3")}
    files = {
        "annotations_final.csv": (rendered / "tags.csv").read_bytes(),
        "clip_info_final.csv": (rendered / "clip_info_final.csv").read_bytes(),
        "mp3.zip": make_zip(clips),
    }
    for name, value in stand_in_for(files).items():
        monkeypatch.setattr(get_data, name, value)
    data, experiments = tmp_path / "data", tmp_path / "experiments"
    data.mkdir()
    (data / "annotations_final.csv").write_bytes(files.pop("annotations_final.csv"))  # as other programs leave it

    with Server(files) as server:
        call_script("get_data.py", "--data", data, "--hosts", server.url)
    assert {name: (data / name).read_bytes() for name in clips} == clips

    shutil.copy(rendered / "SYNTHETIC.txt", data)  # as in the demo's folder
    done = run_script("gen_spectrograms.py", "--data", data)
    assert f"{N_CLIPS} spectrograms" in done.stdout and "0 bad (all zeros), 0 short" in done.stdout
    assert sum(len(np.load(data / f"spectrograms_{index}.npy")) for index in range(8)) == N_CLIPS

    assert f"{N_CLIPS} clips" in call_script("tags.py", "--data", data).stdout

    place = ["--data", data, "--experiments", experiments, "--name", "tiny"]
    done = run_script("trainer.py", *place, "--epochs", 1, "--batch-size", 4)
    assert "(synthetic)" in done.stdout and "SYNTHETIC" in done.stdout.splitlines()[-1]
    trained = next(line for line in done.stdout.splitlines() if line.startswith("best validation ROC-AUC"))
    done = run_script("evaluate.py", *place, "--resamples", 20)
    assert "SYNTHETIC" in done.stdout.splitlines()[-1]
    results = json.loads((experiments / "tiny/results.json").read_text())
    value = results["test"]["roc_auc"]["value"]
    shown = "undefined" if value is None else f"{value:.4f}"
    assert trained.endswith(f"test ROC-AUC {shown}"), "training and evaluation agree"
    assert results["test"]["leakage"] is not None and results["synthetic"] is True
    assert (experiments / "tiny/curves.png").exists() and (experiments / "tiny/per_tag.png").exists()
