"""The pictures, by what matplotlib was told to draw and by the PNG files."""

import matplotlib
import numpy as np
import pytest
from librosa import mel_frequencies
from matplotlib.image import imread

from lib import figures

RATES, LOSSES, SCORES = [1e-3, 1e-3, 1e-4, 1e-5], [None, 0.4, 0.3, 0.2], [0.5021, 0.81, 0.8765, 0.85]
HISTORY = [
    {"epoch": epoch, "learning_rate": rate, "loss": loss, "validation_roc_auc": score, "best": epoch in (0, 1, 2)}
    for epoch, (rate, loss, score) in enumerate(zip(RATES, LOSSES, SCORES))
]


def tag_row(tag, score, prevalence=0.1):
    row = {"tag": tag, "prevalence": prevalence, "roc_auc": score}
    return {**row, "roc_auc_low": score - 0.1, "roc_auc_high": score + 0.05}


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_training_curves_show_the_history_and_mark_the_chosen_epoch(tmp_path):
    one, other = tmp_path / "a.png", tmp_path / "b.png"
    figure = figures.training_curves(one, HISTORY)
    losses, scores, rates = figure.axes
    assert losses.lines[0].get_ydata()[1:].tolist() == LOSSES[1:]
    assert scores.lines[0].get_xydata().tolist() == [[1, 0.81], [2, 0.8765], [3, 0.85]]
    assert scores.lines[1].get_xydata().tolist() == [[2, 0.8765]], "the star"
    assert rates.lines[0].get_ydata().tolist() == RATES
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 50}):
        figures.training_curves(other, HISTORY)
    assert one.read_bytes() == other.read_bytes(), "whatever the reader's own style"
    assert 0.02 < np.mean(imread(one)[..., :3].min(axis=2) < 0.9) < 0.98, "there is ink on it, and paper"
    assert "synthetic" not in figure.get_suptitle()
    assert "synthetic" in figures.training_curves(other, HISTORY, synthetic=True).get_suptitle()


@pytest.mark.filterwarnings("error")
def test_each_tag_has_its_score_its_interval_and_its_prevalence(tmp_path):
    rows = [tag_row("flute", 0.7, 0.02), tag_row("琵琶", np.nan, 0.0), tag_row("guitar", 0.9, 0.2)]
    score_axes, bar_axes = figures.per_tag_roc_auc(tmp_path / "a.png", rows).axes
    assert tick_labels(score_axes.yaxis) == ["guitar", "flute", "琵琶"]
    *segments, undefined = score_axes.collections[0].get_segments()
    assert np.allclose(segments, [[[0.8, 0], [0.95, 0]], [[0.6, 1], [0.75, 1]]]) and not len(undefined)
    assert np.allclose(score_axes.lines[0].get_xydata()[:2], [[0.9, 0], [0.7, 1]])
    assert np.allclose([bar.get_width() for bar in bar_axes.patches], [20, 2, 0])
    figures.per_tag_roc_auc(tmp_path / "a.png", rows[1:2])


def test_a_difference_is_clear_where_its_interval_leaves_out_zero(tmp_path):
    rows = [tag_row("flute", 0.02), tag_row("guitar", 0.3), tag_row("bass", -0.2)]
    (axes,) = figures.tag_differences(tmp_path / "a.png", rows, "one - other").axes
    _, clear, unclear = axes.lines
    assert np.allclose(clear.get_xydata(), [[0.3, 0], [-0.2, 2]]) and np.allclose(unclear.get_xydata(), [[0.02, 1]])


@pytest.mark.parametrize("n_tags", [1, 5])
def test_correlations_are_pearsons_in_an_order_that_groups_similar_tags(tmp_path, n_tags):
    names = ["rock", "flute", "hard rock", "choir", "never"][:n_tags]
    labels = np.random.default_rng(0).integers(0, 2, (200, 5))
    labels[10:, 2], labels[:, 4] = labels[10:, 0], 0
    labels, predictions = labels[:, :n_tags], np.random.default_rng(1).random((200, n_tags))
    annotated, predicted, _ = figures.tag_correlations(tmp_path / "a.png", names, labels, predictions).axes
    order = [names.index(name) for name in tick_labels(annotated.yaxis)]
    assert sorted(order) == list(range(n_tags))
    for axes, columns in ((annotated, labels), (predicted, predictions)):
        with np.errstate(invalid="ignore"):
            expected = np.nan_to_num(np.atleast_2d(np.corrcoef(columns, rowvar=False)))  # 0 for the tag that never is
        np.fill_diagonal(expected, 1)
        assert np.allclose(axes.images[0].get_array(), expected[np.ix_(order, order)], atol=1e-6)
    assert n_tags == 1 or abs(order.index(0) - order.index(2)) == 1


def test_a_taggram_has_seconds_hertz_and_the_likeliest_tags_on_top(tmp_path):
    probabilities = np.array([[0.2, 0.6, 0.1, 0], [0.4, 0.7, 0.9, 0], [0.3, 0.8, 0.8, 0]])
    names, times, log_mel = ["flute", "rock", "bass", "drum"], np.array([10, 12, 20]), np.zeros((128, 628))
    log_mel[:, 0] = -np.log(100)
    figure = figures.taggram(tmp_path / "a.png", log_mel, names, times, probabilities, "a $b$ c.mp3", n_tags=3)
    top, bottom, *_ = figure.axes
    assert tick_labels(bottom.yaxis) == ["rock", "bass", "flute"]
    assert np.allclose(bottom.collections[0].get_array(), probabilities.T[[1, 2, 0]])
    assert np.allclose(bottom.collections[0].get_coordinates()[0, :, 0], [0, 11, 16, 628 * 512 / 11025])
    assert np.allclose(top.images[0].get_array()[0, :2], [-20, 0]), "in dB"
    hertz = mel_frequencies(130, fmin=0, fmax=11025 / 2)[1:-1]  # of the bands' centres
    assert np.allclose(np.interp(top.get_yticks(), range(128), hertz), [int(name) for name in tick_labels(top.yaxis)])
