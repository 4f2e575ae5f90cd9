"""The pictures, by what matplotlib was told to draw and by the PNG files."""

import io

import numpy as np
import pytest
from librosa import mel_frequencies
from matplotlib.image import imread

from lib import figures
from lib.scores import correlations

pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)
BEST_FIRST = [  # the last is undefined
    {"tag": tag, "prevalence": prevalence, "roc_auc": score, "roc_auc_low": score - 0.1, "roc_auc_high": score + 0.05}
    for tag, prevalence, score in zip("bdca琵", (0.2, 0.02, 0.3, 0.1, 0), (0.3, 0.2, 0.02, -0.2, np.nan))
]


def axes_of(function, folder, *arguments):
    """Draw a picture, check what holds for each of them, and return its axes."""
    one, other = folder / "a.png", folder / "b.png"
    figure = function(one, *arguments)
    function(other, *arguments)
    assert one.read_bytes() == other.read_bytes() and np.ptp(imread(one)) > 0.5  # nor is it blank
    assert "synthetic" not in figure.get_suptitle()
    assert "synthetic" in function(other, *arguments, synthetic=True).get_suptitle()
    return figure.axes


def names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_training_curves_show_the_history_and_mark_the_chosen_epoch(tmp_path):
    losses, scores, rates = [None, 0.4, 0.3, 0.2], [0.5, 0.8, 0.9, 0.7], [1e-3, 1e-3, 1e-4, 1e-5]
    columns = ("epoch", "loss", "validation_roc_auc", "learning_rate", "best")
    history = [dict(zip(columns, row)) for row in zip(range(4), losses, scores, rates, (True, True, True, False))]
    top, middle, bottom = axes_of(figures.training_curves, tmp_path, history)
    assert top.lines[0].get_ydata()[1:].tolist() == losses[1:] and bottom.lines[0].get_ydata().tolist() == rates
    curve, star = middle.lines
    assert curve.get_xydata().tolist() == [[1, 0.8], [2, 0.9], [3, 0.7]] and star.get_xydata().tolist() == [[2, 0.9]]


def test_a_learning_rate_has_its_own_tick_if_there_are_few(tmp_path):
    for rates, own in (
        ([0.01, 0.01, 0.001], ["0.001", "0.01"]),
        ([0.3, 0.25, 0.2, 0.15, 0.1, 0.0200001, 0], ["0.02", "0.3"]),
    ):
        history = [
            dict(epoch=n, loss=1.0, validation_roc_auc=0.5, learning_rate=x, best=not n) for n, x in enumerate(rates)
        ]
        rate_axes = axes_of(figures.training_curves, tmp_path, history)[2]
        assert names(rate_axes.yaxis) == own and rate_axes.get_yticks().tolist() == pytest.approx(
            [*map(float, own)], rel=1e-4
        )


def test_each_tag_has_its_score_its_interval_and_its_prevalence_best_first(tmp_path):
    score_axes, bar_axes = axes_of(figures.per_tag_roc_auc, tmp_path, BEST_FIRST[::-1])
    assert names(score_axes.yaxis) == [row["tag"] for row in BEST_FIRST]
    assert np.allclose([bar.get_width() for bar in bar_axes.patches], [100 * row["prevalence"] for row in BEST_FIRST])
    points, segments = score_axes.lines[0].get_xydata(), score_axes.collections[0].get_segments()
    for place, row in enumerate(BEST_FIRST[:4]):
        assert points[place].tolist() == [row["roc_auc"], place]
        assert segments[place].tolist() == [[row["roc_auc_low"], place], [row["roc_auc_high"], place]]
    rows = [{**row, "roc_auc_of_baseline": 1 - row["roc_auc"]} for row in BEST_FIRST]
    _, baseline, *_ = axes_of(figures.per_tag_roc_auc, tmp_path, rows)[0].lines
    assert baseline.get_xydata()[:4].tolist() == [[1 - row["roc_auc"], place] for place, row in enumerate(rows[:4])]


def test_differences_that_are_clear_are_marked(tmp_path):
    rows = [{**row, "differs_clearly": row["roc_auc"] > 0.1} for row in BEST_FIRST[::-1]]
    _, clear, unclear = axes_of(figures.tag_differences, tmp_path, rows, "one - other")[0].lines
    assert clear.get_xydata().tolist() == [[0.3, 0], [0.2, 1]]
    assert unclear.get_xydata().tolist() == [[0.02, 2], [-0.2, 3]]


def test_correlations_are_pearsons_in_one_order_that_groups_similar_tags(tmp_path):
    labels, predictions = RNG.integers(0, 2, (200, 5)), RNG.random((200, 5))
    labels[10:, 3], labels[:, 4], predictions[:, 4] = labels[10:, 1], 0, 0.1
    both = correlations(labels), correlations(predictions)
    annotated, predicted, _ = axes_of(figures.tag_correlations, tmp_path, list("01234"), *both)
    order = [int(name) for name in names(annotated.yaxis)]
    assert sorted(order) == [0, 1, 2, 3, 4] and abs(order.index(1) - order.index(3)) == 1
    for axes, columns in ((annotated, labels), (predicted, predictions)):
        expected = np.eye(5)  # 0 for the tag that never varies
        expected[:4, :4] = np.corrcoef(columns[:, :4], rowvar=False)
        assert np.allclose(axes.images[0].get_array(), expected[np.ix_(order, order)])


def test_one_clip_has_no_correlations(tmp_path):
    both = correlations(np.array([[0, 1, 1]])), correlations(RNG.random((1, 3)))
    annotated, *_ = axes_of(figures.tag_correlations, tmp_path, list("012"), *both)
    assert np.array_equal(annotated.images[0].get_array(), np.eye(3))


def test_a_taggram_has_seconds_hertz_and_the_first_tags_on_top(tmp_path):
    scores = np.array([[0.6, 0.1, 0.2], [0.7, 0.9, 0.4], [0.8, 0.8, 0.3]])
    thresholds = {"1": 0.7, "2": 1, "0": 0.2}
    edges = np.array([0, 11, 16, 628 * 512 / 11025])
    arguments = np.zeros((128, 628)), edges, scores, thresholds, r"$\no formula$.mp3"
    top, bottom, *_ = axes_of(figures.taggram, tmp_path, *arguments)
    assert names(bottom.yaxis) == ["1", "2", "0"]
    assert np.allclose(bottom.collections[0].get_array(), scores.T)
    assert np.allclose(bottom.collections[0].get_coordinates()[0, :, 0], edges)
    underlined = [(round(start[1]), start[0], end[0]) for start, end in bottom.collections[2].get_segments()]
    assert underlined == [(0, *edges[1:3]), (0, *edges[2:]), *((2, *edges[window : window + 2]) for window in range(3))]
    hertz = mel_frequencies(130, fmin=0, fmax=11025 / 2)[1:-1]  # of the bands' centres
    assert np.allclose(np.interp(top.get_yticks(), range(128), hertz), [int(name) for name in names(top.yaxis)])


def test_a_spectrogram_alone_has_high_bands_on_top_and_no_more_columns_than_a_screen():
    log_mel = np.full((128, 4000), -30.0)
    log_mel[127, 0], log_mel[0, 3] = 0, -2
    picture = imread(io.BytesIO(figures.spectrogram(log_mel)))[..., :3].sum(axis=2)
    assert picture.shape == (128, 1334), "each third frame"
    order = np.argsort(-picture, axis=None)
    assert [np.unravel_index(place, picture.shape) for place in order[:2]] == [(0, 0), (127, 1)]
    assert imread(io.BytesIO(figures.spectrogram(log_mel[:, :1]))).shape[:2] == (128, 1)
