"""The whole experiment with the real scripts: download, spectrograms, training, evaluation."""

import hashlib
import io
import json
import shutil
import zipfile

import numpy as np
import pytest

from lib.demo import render
from http_server import Server

N_CLIPS = 12


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A folder of rendered clips in MagnaTagATune's layout."""
    folder = tmp_path_factory.mktemp("rendered") / "demo"
    render(folder, n_clips=N_CLIPS, seed=1)
    return folder


def served_files(folder):
    """Return {name: content} as a MagnaTagATune host has it: the clips in one zip cut in three, and two tables."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        for clip in sorted(folder.glob("?/*.mp3")):
            writer.write(clip, clip.relative_to(folder))
    whole = archive.getvalue()
    third = len(whole) // 3
    parts = {
        f"mp3.zip.00{part + 1}": whole[part * third : (part + 1) * third if part < 2 else None] for part in range(3)
    }
    tables = {
        "annotations_final.csv": (folder / "tags.csv").read_bytes(),
        "clip_info_final.csv": (folder / "clip_info_final.csv").read_bytes(),
    }
    return parts | tables, whole


def test_from_download_to_test_score(rendered, tmp_path, run_script, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    files, whole = served_files(rendered)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in {**files, "mp3.zip": whole}.items()}
    (tmp_path / "md5sums").write_text("".join(f"{md5}  {name}\n" for name, md5 in sums.items()))
    data, experiments = tmp_path / "data", tmp_path / "experiments"

    with Server(files) as server:
        run_script("get_data.py", "--data", data, "--hosts", server.url, "--md5sums", tmp_path / "md5sums")
    for clip in rendered.glob("?/*.mp3"):
        assert (data / clip.relative_to(rendered)).read_bytes() == clip.read_bytes()

    shutil.copy(rendered / "SYNTHETIC.txt", data)  # as in the demo's folder
    done = run_script("gen_spectrograms.py", "--data", data)
    assert f"{N_CLIPS} spectrograms" in done.stdout and "0 bad clips" in done.stdout and "0 short" in done.stdout
    assert sum(len(np.load(data / f"spectrograms_{index}.npy")) for index in range(8)) == N_CLIPS

    assert f"{N_CLIPS} clips" in run_script("tags.py", "--data", data).stdout

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
