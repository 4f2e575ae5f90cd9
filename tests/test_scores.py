"""Scores and their intervals against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

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


def test_a_tags_threshold_is_the_one_of_best_f1_and_the_lowest_of_equals(predictions):
    labels, ours, _, _ = predictions
    found = scores.best_thresholds(labels, ours)
    for tag in range(3):
        of_f1 = {value: f1_score(labels[:, tag], ours[:, tag] >= value) for value in ours[:, tag]}
        best = max(of_f1.values())
        assert found[tag] == min(value for value, f1 in of_f1.items() if f1 == pytest.approx(best))
    assert found[3] == 1, "no clip has it"
    precision, recall = (score(labels, ours >= found) for score in scores.OF_GIVEN_TAGS.values())
    for tag in range(3):
        given = ours[:, tag] >= found[tag]
        assert precision[tag] == labels[given, tag].mean() and recall[tag] == given[labels[:, tag] == 1].mean()
    assert scores.best_thresholds(np.array([[0], [1], [0]]), np.array([[0.1], [0.1], [0.1]])) == [0.1]
    assert scores.best_thresholds(np.array([[1], [1]]), np.array([[0.3], [0.1]])) == [0.1]
    never_given = scores.OF_GIVEN_TAGS["precision"](labels, np.zeros_like(labels))
    assert np.isnan(never_given).all(), "there is none of a tag that no clip is given"


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
            means, twice = values.mean(axis=1), 2 * (name == "average_precision")
            ends = np.percentile(means, [2.5, 97.5]) - twice * (means.mean() - np.mean(per_tag[:3]))
            macro = dict(zip(("value", "low", "high"), (np.mean(per_tag[:3]), *ends)))
            assert found.macro()[name] == pytest.approx(macro)
            ends = np.percentile(values, [2.5, 97.5], axis=0) - twice * (values.mean(axis=0) - per_tag[:3])
            _, of_tags, low, high = next(row for row in found.intervals() if row[0] == name)
            assert [low[:3], high[:3]] == pytest.approx(np.clip(ends, found.least, 1)) and np.isnan(low[3])
            assert np.array_equal(of_tags, per_tag, equal_nan=True)


def test_the_interval_of_average_precision_from_few_clips_covers_that_of_many():
    """Of 200 clips each time, 5% of them with a tag; the truth is scikit-learn's, of four million such clips."""
    truth, rng, n_covered, n_uncorrected = 0.1731, np.random.default_rng(0), 0, 0
    for _ in range(20):
        labels = (rng.random((200, 15)) < 0.05).astype(np.uint8)
        found = scores.scores_of(labels, rng.normal(labels), np.arange(200), 60, seed=0)
        macro, resampled = found.macro()["average_precision"], scores.macro(found.resampled[1])
        n_covered += macro["low"] < truth < macro["high"]
        n_uncorrected += np.percentile(resampled, 2.5) < truth < np.percentile(resampled, 97.5)
    assert n_covered >= 13 and n_uncorrected <= 5


def test_the_interval_of_a_score_is_within_0_and_1_that_of_a_difference_need_not_be():
    per_tag, resampled = np.full((2, 2), [0.02, 0.98]), np.tile([[0.0, 0.8], [0.3, 1.0]], (2, 1, 1))
    for least, ends in ((0, [[0, 0.81 + 0.155], [0.0325, 1]]), (-1, [[0.0075 - 0.26, 0.965], [0.0325, 1]])):
        *_, (name, _, low, high) = scores.Scores(per_tag, resampled, least).intervals()
        assert name == "average_precision" and [low, high] == pytest.approx(np.array(ends))
    one = scores.Scores(per_tag, resampled)
    assert one.minus(one).least == -1


def test_one_tag_of_many_differs_clearly_only_beyond_the_largest_error_of_all(predictions):
    labels, ours, theirs, tracks = predictions
    labels[:, 2] = tracks < 9  # too few tracks to tell
    ours[:, 2], theirs[:, 2] = labels[:, 2], -1.0 * labels[:, 2]
    difference = scores.scores_of(labels, ours, tracks, 200, 0).minus(scores.scores_of(labels, theirs, tracks, 200, 0))
    values, resampled = difference.per_tag[0, :2], difference.resampled[0, :, :2]
    deviations = np.sqrt([np.mean((column - value) ** 2) for column, value in zip(resampled.T, values)])
    largest = [max(abs(row - values) / deviations) for row in resampled]
    ratios = np.abs(values) / deviations / np.percentile(largest, 95)
    for factor in 0.99 / ratios.min(), 1.01 / ratios.min():  # the errors stay, the differences shrink or grow
        per_tag, moved = difference.per_tag.copy(), difference.resampled.copy()
        per_tag[0, :2] *= factor
        moved[0, :, :2] += per_tag[0, :2] - values
        found = scores.differs_clearly(labels, tracks, scores.Scores(per_tag, moved))
        assert found.tolist() == [*(ratios * factor > 1), False, False]
    same = difference.minus(difference)
    assert not scores.differs_clearly(labels, tracks, same).any()


def test_a_tag_of_fewer_than_ten_tracks_never_differs_clearly():
    labels = np.arange(30)[:, None] < [9, 10, 20, 21]
    per_tag = np.full((2, 4), 0.5)
    resampled = per_tag[:, None] + 0.01 * np.random.default_rng(0).normal(size=(2, 50, 4))
    found = scores.differs_clearly(labels, np.arange(30), scores.Scores(per_tag, resampled))
    assert found.tolist() == [False, True, True, False]


def test_equal_networks_rarely_have_a_tag_that_differs_clearly():
    """Of 12 pairs of equal networks, 1 may have one among 15 tags; by one interval for each tag, about half have."""
    rng, n_any, n_pointwise = np.random.default_rng(0), 0, 0
    for _ in range(12):
        labels = (rng.random((300, 15)) < 0.2).astype(np.uint8)
        ours, theirs = (scores.scores_of(labels, rng.normal(labels), np.arange(300), 80, seed=0) for _ in range(2))
        difference = ours.minus(theirs)
        n_any += scores.differs_clearly(labels, np.arange(300), difference).any()
        _, _, low, high = next(difference.intervals())
        n_pointwise += np.any((low > 0) | (high < 0))
    assert n_any <= 2 and n_pointwise >= 5


def test_a_resample_without_positives_has_no_score():
    """Three clips, of which the last counts twice, have TP = 1, 1, 3 and FP = 0, 1, 1 (see the docstring there):

    ROC-AUC = 1 * (1 + 1) / 6 = 1/3, average precision = 1/3 * 1/1 + 2/3 * 3/4 = 5/6.
    """
    found = scores.weighted_scores(np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1]), np.array([[1, 1, 2], [1, 0, 1]]))
    assert np.allclose(found, [[1 / 3, np.nan], [5 / 6, np.nan]], equal_nan=True), "by hand"


def test_what_a_listener_sees_by_hand():
    labels = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    probabilities = np.array([[0.9, 0.8, 0.1, 0.7], [0.5, 0.1, 0.2, 0.3], [0.4, 0.4, 0.1, 0.6]])
    auc = scores.roc_auc(labels.T, probabilities.T)
    assert auc[0] == 0.75 and np.isnan(auc[1]) and auc[2] == 0.5
    assert scores.precision_at(1, labels, probabilities)[[0, 2]].tolist() == [1, 0]
    assert np.allclose(scores.precision_at(3, labels, probabilities)[[0, 2]], [2 / 3, 1 / 3])
    assert np.isnan(scores.precision_at(3, labels, probabilities)[1]), "a clip without tags has nothing to find"
    assert scores.precision_at(3, np.arange(50)[None] < 3, np.full((1, 50), 0.5)) == 1, "the first of equals"
