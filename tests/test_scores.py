"""Scores against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from lib import scores


@pytest.fixture
def predictions():
    """Labels and scores with ties, for 300 clips and 7 tags, one of them never positive."""
    rng = np.random.RandomState(0)
    labels = (rng.rand(300, 7) < 0.2).astype(np.uint8)
    labels[:, 3] = 0
    return labels, np.round(rng.rand(300, 7) + 0.2 * labels, 2)


def test_per_tag_scores_are_scikit_learns(predictions):
    labels, probabilities = predictions
    some = [0, 1, 2, 4, 5, 6]
    auc, ap = (scores.of_each_tag(score, labels, probabilities) for score in scores.SCORES)
    assert np.isnan(auc[3]) and np.isnan(ap[3])
    assert abs(scores.macro(auc) - roc_auc_score(labels[:, some], probabilities[:, some], average="macro")) < 1e-12
    assert abs(scores.macro(ap) - average_precision_score(labels[:, some], probabilities[:, some])) < 1e-12


def test_bootstrap_scores_are_scikit_learns_on_each_resample(predictions):
    labels, probabilities = predictions
    tracks = np.arange(300) // 3
    roc_auc, average_precision = scores.scores_of(labels, probabilities, tracks, n_resamples=5, seed=2).resampled
    weights = scores.resample_weights(tracks, 5, seed=2)
    for resample, times in enumerate(weights):
        assert (times.reshape(100, 3) == times[::3, None]).all(), "a track is drawn as a whole"
        clips = np.repeat(np.arange(300), times)
        for tag in (0, 6):
            label, score = labels[clips, tag], probabilities[clips, tag]
            assert abs(roc_auc[resample, tag] - roc_auc_score(label, score)) < 1e-12
            assert abs(average_precision[resample, tag] - average_precision_score(label, score)) < 1e-12
    assert np.isnan(roc_auc[:, 3]).all()
    assert not np.array_equal(roc_auc[0], roc_auc[1])


def test_the_docstrings_three_clips():
    found = scores.weighted_scores(np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1]), np.array([[1, 1, 2], [1, 0, 1]]))
    assert np.allclose(found, [[1 / 3, np.nan], [5 / 6, np.nan]], equal_nan=True)


def test_interval_holds_95_percent_of_the_resamples():
    low, high = scores.interval(np.arange(1001.0)[:, None] * [[1.0, np.nan]])
    assert (low[0], high[0]) == (25, 975) and np.isnan(low[1])


def test_what_a_listener_sees_by_hand():
    labels = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    probabilities = np.array([[0.9, 0.8, 0.1, 0.7], [0.5, 0.1, 0.2, 0.3], [0.4, 0.4, 0.1, 0.6]])
    auc = scores.roc_auc(labels.T, probabilities.T)
    assert auc[0] == 0.75 and np.isnan(auc[1]) and auc[2] == 0.5
    assert scores.precision_at(1, labels, probabilities)[[0, 2]].tolist() == [1, 0]
    assert np.allclose(scores.precision_at(3, labels, probabilities)[[0, 2]], [2 / 3, 1 / 3])
    assert np.isnan(scores.precision_at(3, labels, probabilities)[1]), "a clip without tags has nothing to find"


def test_a_score_that_no_tag_has_is_undefined():
    assert [scores.format_score(score) for score in (0.5, None, np.nan)] == ["0.5000", "undefined", "undefined"]
