"""Scores and their intervals against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from lib import scores

SCIKIT_LEARNS = roc_auc_score, average_precision_score


@pytest.fixture
def predictions():
    """Labels and two predictions with ties, for 60 clips of 20 tracks and 4 tags, one of them never positive."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.4).astype(np.uint8)
    labels[:, 3] = 0
    ours, theirs = (np.round(labels * good + rng.random(labels.shape), 1) for good in (0.5, 0.2))
    return labels, ours, theirs, rng.integers(0, 20, 60)


def test_per_tag_scores_are_scikit_learns(predictions):
    labels, ours, _, _ = predictions
    for name, score in zip(scores.SCORES, SCIKIT_LEARNS):
        found = scores.of_each_tag(scores.SCORES[name], labels, ours)
        assert found[:3] == pytest.approx(score(labels[:, :3], ours[:, :3], average=None)) and np.isnan(found[3])
        assert scores.macro(found) == pytest.approx(score(labels[:, :3], ours[:, :3], average="macro"))


def test_intervals_are_those_of_a_loop_that_draws_whole_tracks(predictions):
    labels, ours, theirs, tracks = predictions
    rng, names, resampled = np.random.default_rng(3), np.unique(tracks), []
    for _ in range(60):
        drawn = names[rng.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(tracks == track) for track in drawn])
        resampled.append(
            [
                [score(labels[rows, :3], each[rows, :3], average=None) for score in SCIKIT_LEARNS]
                for each in (ours, theirs)
            ]
        )
    of_ours, of_theirs = np.moveaxis(resampled, 0, 2)  # of each (scores, resamples, tags)
    both = [scores.scores_of(labels, each, tracks, 60, seed=3) for each in (ours, theirs)]
    for found, expected in ((both[0], of_ours), (both[0].minus(both[1]), of_ours - of_theirs)):
        assert found.resampled[..., :3] == pytest.approx(expected) and np.isnan(found.resampled[..., 3]).all()
        for name, per_tag, values in zip(scores.SCORES, found.per_tag, expected):
            low, high = np.percentile(values.mean(axis=1), [2.5, 97.5])
            macro = {"value": np.mean(per_tag[:3]), "low": low, "high": high}
            assert found.macro()[name] == pytest.approx(macro)
        assert scores.interval(found.resampled[0])[:, :3] == pytest.approx(
            np.percentile(expected[0], [2.5, 97.5], axis=0)
        )


def test_a_resample_without_positives_has_no_score():
    found = scores.weighted_scores(np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1]), np.array([[1, 1, 2], [1, 0, 1]]))
    assert np.allclose(found, [[1 / 3, np.nan], [5 / 6, np.nan]], equal_nan=True), "by hand, in the docstring"


def test_what_a_listener_sees_by_hand():
    labels = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    probabilities = np.array([[0.9, 0.8, 0.1, 0.7], [0.5, 0.1, 0.2, 0.3], [0.4, 0.4, 0.1, 0.6]])
    auc = scores.clip_roc_auc(labels, probabilities)
    assert auc[0] == 0.75 and np.isnan(auc[1]) and auc[2] == 0.5
    assert scores.precision_at(1, labels, probabilities)[[0, 2]].tolist() == [1, 0]
    assert np.allclose(scores.precision_at(3, labels, probabilities)[[0, 2]], [2 / 3, 1 / 3])
    assert np.isnan(scores.precision_at(3, labels, probabilities)[1]), "a clip without tags has nothing to find"
    assert scores.precision_at(3, np.arange(50)[None] < 3, np.full((1, 50), 0.5)) == 1, "the first of equals"


def test_the_papers_figures_stand_alone_only_beside_its_own_experiment():
    sizes = {"train": 18000, "validation": 2000, "test": 5863}
    papers = {"split": "random", "n_tags": 50, "merge_tags": True}

    def line(synthetic=False, sizes=sizes, **others):
        clip_ids = {part: range(size) for part, size in sizes.items()}
        hyperparameters = {"seed": 1, **papers, **others}
        return scores.compare_with_paper(
            {"synthetic": synthetic, "clip_ids": clip_ids, "hyperparameters": hyperparameters}
        )

    figures = "the paper: validation 0.904, test 0.900 (MagnaTagATune)"
    assert line() == figures
    for change in ({"sizes": {**sizes, "test": 5862}}, {"split": "folder"}, {"n_tags": 20}, {"merge_tags": False}):
        assert line(**change).startswith(f"{figures}; not comparable"), change
    assert line(synthetic=True).startswith(f"{figures}; the scores above are on SYNTHETIC clips")
