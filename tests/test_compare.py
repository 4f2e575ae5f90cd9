"""The baseline and the paired comparison against scikit-learn; predictions as tables."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluate import worth_a_listen
from lib.audio import load
from lib.baseline import BASELINE_C, band_features, baseline_predictions
from lib.common import InputError
from lib.library import tag_library
from lib.scores import SCORES, resample_weights, scores_of


def scored_clips(n_clips=40, n_tags=3):
    rng = np.random.default_rng(0)
    labels = (rng.random((n_clips, n_tags)) < 0.4).astype(np.uint8)
    ours, theirs = (np.clip(labels * good + rng.random(labels.shape), 0, 2) / 2 for good in (0.5, 0.2))
    return labels, ours, theirs, rng.integers(0, 15, n_clips)


def test_the_paired_interval_is_that_of_a_loop_over_scikit_learn():
    labels, ours, theirs, groups = scored_clips()
    found = scores_of(labels, ours, groups, 60, seed=3).minus(scores_of(labels, theirs, groups, 60, seed=3))
    for index, score in enumerate((roc_auc_score, average_precision_score)):
        differences = []
        for weights in resample_weights(groups, 60, seed=3):
            rows = np.repeat(np.arange(len(labels)), weights)
            both = [[score(labels[rows, tag], each[rows, tag]) for tag in range(3)] for each in (ours, theirs)]
            differences.append(np.subtract(*both))
        expected = score(labels, ours, average=None) - score(labels, theirs, average=None)
        assert found.per_tag[index] == pytest.approx(expected)
        assert found.resampled[index] == pytest.approx(np.array(differences))
        low, high = np.percentile(np.mean(differences, axis=1), [2.5, 97.5])
        assert found.macro()[SCORES[index]] == pytest.approx({"value": expected.mean(), "low": low, "high": high})


def test_the_baseline_is_scikit_learns_and_knows_the_training_clips_alone():
    rng = np.random.default_rng(0)
    spectrograms = rng.normal(size=(60, 4, 628))
    features = band_features(spectrograms.sum(axis=2), np.square(spectrograms).sum(axis=2))
    assert np.allclose(features, np.hstack([spectrograms.mean(axis=2), spectrograms.std(axis=2)]))
    labels = np.stack([features[:, 0] > 0, np.arange(60) >= 40], axis=1).astype(np.uint8)
    train = np.arange(40)
    found = baseline_predictions(features, labels, train)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=BASELINE_C, max_iter=1000))
    assert np.allclose(found[:, 0], model.fit(features[train], labels[train, 0]).predict_proba(features)[:, 1])
    assert (found[:, 1] == 0).all(), "a tag that no training clip has"
    labels[40:] = 0
    assert np.array_equal(found, baseline_predictions(features, labels, train))


def test_the_clips_that_are_worth_a_listen():
    labels = np.array([[0], [0], [1], [1], [0]])
    probabilities = np.array([[0.1], [0.9], [0.2], [0.7], [0.5]])
    clips = [(clip, f"{clip}.mp3") for clip in range(5)]
    header, *rows = worth_a_listen(clips, ["slow"], labels, probabilities)
    assert [row[3] for row in rows] == [1, 4, 0, 2, 3]
    assert dict(zip(header, rows[0])) == {
        "tag": "slow", "annotators": 0, "network": "0.9000", "clip_id": 1, "mp3_path": "1.mp3"
    }  # fmt: skip


def fill(table, files, tags=("slow",), checkpoint="0a1b2c3d"):
    """Complete the table of a library of files that are no music; return how many it lacked."""
    return tag_library(table, SimpleNamespace(tag_names=list(tags), samples=load), checkpoint, files)


def test_a_librarys_table_goes_on_wherever_it_was_cut_off(tmp_path):
    files = [tmp_path / f"song {number}, \n\udce9.mp3" for number in range(4)]
    for file in files:
        file.write_bytes(b"no music")
    table = tmp_path / "tags.csv"
    assert fill(table, files) == 4 and fill(table, files) == 0
    whole = table.read_bytes()
    header = whole.index(b"\r\n") + 2
    for length in np.linspace(header, len(whole) - 1, 10).astype(int):
        table.write_bytes(whole[:length])
        assert fill(table, files) == 5 - whole[:length].count(b"\r\n")
        assert table.read_bytes() == whole


def test_a_file_that_changed_is_tagged_again_and_another_table_is_refused(tmp_path):
    files = [tmp_path / "one.mp3", tmp_path / "two.mp3", tmp_path / "missing.mp3"]
    for file in files[:2]:
        file.write_bytes(b"no music")
    table = tmp_path / "tags.csv"
    assert fill(table, files) == 3
    files[0].write_bytes(b"other bytes")
    os.utime(files[1], (1, 1))
    assert fill(table, files) == 2
    before = table.read_bytes()
    for other in ({"tags": ["slow", "fast"]}, {"checkpoint": "4e5f6071"}):
        with pytest.raises(InputError, match="no table of this checkpoint's"):
            fill(table, files, **other)
    assert table.read_bytes() == before
    for content in (b"", b"no table", b"no table\r\n"):
        files[0].write_bytes(content)
        with pytest.raises(InputError, match="no table of this checkpoint's"):
            fill(files[0], files)
