"""Training: the original's split and order, what is saved when, resuming, several processes."""

import csv
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import trainer
from common import InputError
from conftest import ROOT, write_dump
from dump import Dump, band_normalization
from model import MultiScaleCNN, initialize
from tagger import load_checkpoint
from trainer import (
    Settings,
    Training,
    divide_clips,
    epoch_batches,
    learning_rate_at,
    split_by_artist,
    split_clips,
    split_sizes,
)

RECORDED = json.loads((ROOT / "tests/original.json").read_text())
TINY = [
    "--epochs",
    3,
    "--train-size",
    8,
    "--validation-size",
    3,
    "--batch-size",
    2,
    "--super-batch-size",
    5,
    "--learning-rate",
    1e-4,
    "--drop-after",
    2,
]


def sha(rows):
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def test_split_and_orders_are_the_originals():
    rng = np.random.RandomState(1337)
    initialize(MultiScaleCNN(50), rng)
    train, validation, test = split_clips(25863, 18000, 2000, rng)
    expected = RECORDED["split"]["sha256_int64_le"]
    assert (sha(train), sha(validation), sha(test)) == (expected["train"], expected["val"], expected["test"])
    orders = {facts["epoch"]: facts["sha256_int64_le"] for facts in RECORDED["train_order_after_epoch"]}
    for epoch in range(1, 41):
        rng.shuffle(train)
        if epoch in orders:
            assert sha(train) == orders[epoch], f"after epoch {epoch}"


def test_an_epoch_at_full_size_is_564_batches_in_order():
    train = np.random.RandomState(0).permutation(25863)[:18000]
    batches = epoch_batches(train, batch_size=32, super_batch_size=3000)
    assert len(batches) == 564
    assert np.array_equal(np.concatenate(batches), train)
    sizes = [len(rows) for rows in batches]
    assert sizes == ([32] * 93 + [24]) * 6


def test_learning_rate_of_each_epoch():
    rates = [learning_rate_at(epoch, Settings()) for epoch in range(1, 41)]
    assert rates == [1e-3] * 20 + [1e-4] * 10 + [1e-5] * 5 + [1e-6] * 5


def test_the_defaults_are_the_originals():
    settings = Settings()
    assert (settings.train_size, settings.validation_size, settings.seed, settings.n_tags) == (18000, 2000, 1337, 50)
    assert (settings.epochs, settings.batch_size, settings.super_batch_size) == (40, 32, 3000)
    assert (settings.split, settings.normalize_on, settings.precision) == ("random", "all", "float32")


def test_a_smaller_data_set_is_divided_in_the_same_proportions(capsys):
    assert split_sizes(25863, 18000, 2000) == (18000, 2000)
    assert capsys.readouterr().out == ""
    assert split_sizes(2586, 18000, 2000) == (1800, 200)
    assert "same proportions" in capsys.readouterr().out
    assert split_sizes(3, 18000, 2000) == (1, 1)
    with pytest.raises(InputError):
        split_sizes(2, 18000, 2000)


def test_no_artist_is_in_two_parts_and_sizes_are_near():
    artists = np.random.RandomState(0).zipf(1.5, 2000) % 100
    parts = split_by_artist(artists, 1400, 150, np.random.RandomState(1))
    assert sorted(np.concatenate(parts)) == list(range(2000))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(artists[parts[one]]) & set(artists[parts[other]])
    assert abs(len(parts[1]) - 150) <= 5 and abs(len(parts[2]) - 450) <= 5
    again = split_by_artist(artists, 1400, 150, np.random.RandomState(1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again))


def test_the_real_tables_split_as_published(shared, real_tables):
    from tags import clip_info_of, read_annotations

    annotations = read_annotations(real_tables / "tags.csv")
    info = clip_info_of(real_tables, annotations.ids)

    class Clips:
        ids, mp3_paths = annotations.ids, annotations.mp3_paths

        def __len__(self):
            return len(self.ids)

    def shares(split):
        settings = Settings(data=real_tables, split=split)
        rng = np.random.RandomState(1337)
        initialize(MultiScaleCNN(50), rng)
        train, validation, test = trainer.divide_clips(settings, Clips(), rng)
        assert sorted(np.concatenate([train, validation, test])) == list(range(25863))
        in_training = {kind: {getattr(info[row], kind) for row in train} for kind in ("track", "album", "artist")}
        share = {
            kind: np.mean([getattr(info[row], kind) in trained for row in test])
            for kind, trained in in_training.items()
        }
        return (len(train), len(validation), len(test)), {kind: round(100 * value) for kind, value in share.items()}

    assert shares("random") == ((18000, 2000, 5863), {"track": 95, "album": 100, "artist": 100})
    assert shares("folder") == ((18709, 1825, 5329), {"track": 0, "album": 0, "artist": 62})
    sizes, share = shares("artist")
    assert share["artist"] == share["track"] == 0
    assert np.abs(np.subtract(sizes, (18000, 2000, 5863))).max() <= 20


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished dump of 20 random clips with three tags, one of them without positives in validation."""
    return write_dump(tmp_path_factory.mktemp("small"), n_clips=20)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A finished experiment on the small dump, and what it printed."""
    experiments = tmp_path_factory.mktemp("experiments")
    process = train(small, experiments)
    printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed[1]
    return experiments / "paper", printed[0]


def train(data, experiments, *more):
    arguments = ["--data", data, "--experiments", experiments, *TINY, *more]
    command = [sys.executable, str(ROOT / "trainer.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_an_experiment_leaves(uninterrupted, small):
    folder, printed = uninterrupted
    history = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in history] == ["0", "1", "2", "3"]
    assert [float(row["learning_rate"]) for row in history[1:]] == [1e-4, 1e-4, 1e-5]
    assert json.loads((folder / "hyperparameters.json").read_text())["batch_size"] == 2
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = load_checkpoint(folder / "best.pt")
    scores = [float(row["validation_roc_auc"]) for row in history]
    chosen = scores.index(max(scores))
    assert best["history"][-1]["epoch"] == chosen
    assert f"best validation ROC-AUC {max(scores):.4f} (epoch {chosen}), test ROC-AUC" in printed
    assert "0.904" in printed and "0.900" in printed and "not comparable" in printed
    assert "all there are; 50 were asked for" in printed
    dump = Dump(small)
    mean, std = band_normalization(*dump.band_sums())
    assert np.array_equal(best["normalization"]["mean"].numpy(), mean)
    assert np.array_equal(best["normalization"]["std"].numpy(), std)
    assert sorted(torch.cat(list(best["clip_ids"].values())).tolist()) == sorted(dump.ids.tolist())
    assert best["front_end"] == dump.front_end and best["tag_names"] == ["slow", "guitar", "flute"]


def same_checkpoint(one, other):
    """Return whether two checkpoints hold the same values, bit for bit."""
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_checkpoint(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_checkpoint, one, other))
    return one == other


def without_paths(checkpoint):
    checkpoint["hyperparameters"] = {
        name: value for name, value in checkpoint["hyperparameters"].items() if name not in trainer.NOT_HYPERPARAMETERS
    }
    return checkpoint


def stop_after_epoch(process, folder, epoch, how):
    """Send `how` to a trainer in the epoch after `epoch`, and return what it wrote on stderr."""
    history = folder / "history.csv"
    while not history.exists() or f"\n{epoch}," not in history.read_text():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(how)
    return process.communicate(timeout=60)[1]


def test_killed_interrupted_and_resumed_is_bit_identical(uninterrupted, small, tmp_path):
    folder, printed = uninterrupted
    stop_after_epoch(train(small, tmp_path), tmp_path / "paper", 0, signal.SIGKILL)
    refused = train(small, tmp_path)
    assert "--resume" in refused.communicate(timeout=60)[1] and refused.returncode == 1
    interrupted = train(small, tmp_path, "--resume")
    error = stop_after_epoch(interrupted, tmp_path / "paper", 1, signal.SIGINT)
    assert interrupted.returncode == 130 and "--resume" in error and "Traceback" not in error
    resumed = train(small, tmp_path, "--resume")
    printed_then, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert printed_then.splitlines()[-2:] == printed.splitlines()[-2:]
    for name in ("best.pt", "last.pt"):
        one, other = (without_paths(load_checkpoint(where / name)) for where in (folder, tmp_path / "paper"))
        assert same_checkpoint(one, other), name
    for name in ("history.csv", "curves.png"):
        assert (folder / name).read_bytes() == (tmp_path / "paper" / name).read_bytes(), name


def test_resuming_with_other_hyperparameters_or_data_is_refused(uninterrupted, small, tmp_path, run_script):
    folder, _ = uninterrupted
    arguments = ["--experiments", folder.parent, *TINY, "--resume"]
    done = run_script("trainer.py", "--data", small, *arguments, "--seed", 1, "--n-tags", 2, status=1)
    assert "n_tags (50 there, 2 now), seed (1337 there, 1 now)" in done.stderr and done.stderr.count("\n") == 1
    other = write_dump(tmp_path, n_clips=20, seed=1)
    assert "not the dump" in run_script("trainer.py", "--data", other, *arguments, status=1).stderr


def training_on(data, **changes):
    dump = Dump(data)
    settings = Settings(data=data, train_size=8, validation_size=3)
    training = Training(dataclasses.replace(settings, **changes), dump, torch.device("cpu"))
    training.load_clips(dump)
    return training


def test_only_a_strictly_better_score_is_saved(small, tmp_path, monkeypatch):
    training = training_on(small)
    scores = iter([0.5, 0.7, 0.7, 0.6, 0.71])
    monkeypatch.setattr(training, "score", lambda rows: next(scores))
    chosen = []
    for epoch in range(5):
        training.epoch = epoch
        training.validate_and_save(tmp_path, loss=None if epoch == 0 else 1.0)
        chosen.append(load_checkpoint(tmp_path / "best.pt")["history"][-1]["epoch"])
        assert load_checkpoint(tmp_path / "last.pt")["history"][-1]["epoch"] == epoch
    assert chosen == [0, 1, 1, 1, 4]


def test_the_loop_feeds_the_right_clips_in_the_right_order(small, monkeypatch):
    training = training_on(small, batch_size=2, super_batch_size=5)
    normalized = (
        np.concatenate(training.feeder.dump.chunks) - training.record["normalization"]["mean"].numpy()[:, None]
    ) / (training.record["normalization"]["std"].numpy()[:, None])
    fed = []

    def step(clips, rows, n_clips):
        assert torch.allclose(clips[:, 0], torch.from_numpy(normalized[rows]), atol=1e-5)
        fed.append(rows.copy())
        return torch.tensor(0.5)

    monkeypatch.setattr(training, "train_step", step)
    order = training.train.copy()
    training.run_epoch(1)
    assert [len(rows) for rows in fed] == [2, 2, 1, 2, 1]
    assert np.array_equal(np.concatenate(fed), order)
    assert not np.array_equal(training.train, order) and set(training.train) == set(order)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(small, monkeypatch):
    training = training_on(small, batch_size=2)
    losses = iter([1.0, 0.9, float("nan"), 0.8, 0.7])
    monkeypatch.setattr(training, "train_step", lambda *_: torch.tensor(next(losses)))
    with pytest.raises(InputError, match="epoch 1, step 3: the loss is nan"):
        training.run_epoch(1)


def test_a_tag_of_one_class_in_validation_is_named_once(small, uninterrupted):
    printed = uninterrupted[1]
    one_class = [line for line in printed.splitlines() if "left out of the validation mean" in line]
    labels = np.load(small / "tags.npy")
    ids = load_checkpoint(uninterrupted[0] / "best.pt")["clip_ids"]["validation"].tolist()
    rows = np.flatnonzero(np.isin(np.load(small / "ids.npy"), ids))
    expected = [name for name, column in zip(["guitar", "flute", "slow"], labels[rows].T) if len(set(column)) == 1]
    assert expected and len(one_class) == 1
    assert sorted(one_class[0].split(": ")[-1].split(", ")) == sorted(expected)


def test_a_validation_set_without_any_score_keeps_the_last_epoch(tmp_path, run_script):
    write_dump(tmp_path, n_clips=3)
    done = run_script("trainer.py", "--data", tmp_path, "--experiments", tmp_path, "--epochs", 1)
    assert "no score can choose" in done.stdout and "same proportions" in done.stdout
    assert "validation ROC-AUC undefined (epoch 1), test ROC-AUC undefined" in done.stdout
    done = run_script("evaluate.py", "--data", tmp_path, "--experiments", tmp_path)
    assert "ROC-AUC            undefined" in done.stdout and "nan" not in done.stdout


def copy_without_manifest(dump, folder):
    """Copy a dump as another program would have made it: without checksums and paths."""
    shutil.copytree(dump, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dump.json"))


def test_spectrograms_and_labels_that_do_not_belong_together(small, tmp_path, run_script):
    copy_without_manifest(small, tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(19))
    done = run_script("trainer.py", "--data", tmp_path, "--experiments", tmp_path / "e", status=1)
    assert "don't belong together" in done.stderr and "19 ids" in done.stderr


def test_a_dump_without_paths_is_not_divided_by_folder(small, tmp_path):
    copy_without_manifest(small, tmp_path)
    with pytest.raises(InputError, match="--split folder needs the clips' paths"):
        divide_clips(Settings(split="folder"), Dump(tmp_path), np.random.RandomState(1337))


def test_training_and_scoring_need_no_audio_library():
    code = "import trainer, evaluate, sys; assert not {'librosa', 'soundfile', 'soxr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_two_processes_train_as_one(small, tmp_path):
    settings = ["--precision", "float64", "--batch-size", 3, "--epochs", 1]  # 3 steps, of 3, 2 and 3 clips
    alone = train(small, tmp_path / "alone", *settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    arguments = ["--data", small, "--experiments", tmp_path / "pair", *TINY, *settings]
    together = subprocess.run(
        [*command, str(ROOT / "trainer.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert together.returncode == 0, together.stderr
    assert alone.wait(120) == 0, alone.stderr.read()
    one, two = (load_checkpoint(tmp_path / where / "paper/last.pt") for where in ("alone", "pair"))
    assert abs(one["history"][-1]["loss"] - two["history"][-1]["loss"]) < 1e-9
    for name, weights in one["weights"].items():
        assert (weights - two["weights"][name]).abs().max() < 1e-9, name
