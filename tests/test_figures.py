"""The pictures, by what matplotlib was told to draw and by the PNG files."""

import librosa
import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from lib import figures
from lib.audio import N_FFT, SAMPLE_RATE

NAN = float("nan")


RATES = [1e-3, 1e-3, 1e-3, 1e-4, 1e-5, 1e-5]
HISTORY = [
    {"epoch": n, "learning_rate": rate, "loss": 1 / n if n else None, "validation_roc_auc": auc, "best": n in (0, 1, 3)}
    for n, (rate, auc) in enumerate(zip(RATES, [0.5021, 0.81, 0.8, 0.8765, 0.85, 0.85]))
]


def tag_row(tag, score, prevalence=0.1):
    row = {"tag": tag, "prevalence": prevalence, "roc_auc": score}
    return {**row, "roc_auc_low": score - 0.1, "roc_auc_high": score + 0.05}


def draw(name, path, **options):
    """Draw one of the four pictures from small data."""
    labels = np.random.default_rng(1).integers(0, 2, (40, 3))
    log_mel = np.linspace(-9, 0, 128 * 50).reshape(128, 50)
    arguments = {
        "training_curves": (HISTORY,),
        "per_tag_roc_auc": ([tag_row("guitar", 0.9), tag_row("flute", 0.7)],),
        "tag_correlations": (["guitar", "flute", "slow"], labels, labels * 0.5),
        "taggram": (log_mel, ["guitar"], np.ones(1), np.full((1, 1), 0.5), "a $b$ c.mp3"),
    }
    return getattr(figures, name)(path, *arguments[name], **options)


every_picture = pytest.mark.parametrize("name", ["training_curves", "per_tag_roc_auc", "tag_correlations", "taggram"])


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def is_drawn(path):
    """Whether a PNG file opens and has ink on 2% to 98% of it."""
    picture = imread(path)[..., :3]
    return 0.02 < np.mean(picture.min(axis=2) < 0.9) < 0.98


@every_picture
def test_same_data_give_the_same_bytes_whatever_the_reader_s_own_style(name, tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert "synthetic" not in draw(name, a).get_suptitle()
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 50, "image.cmap": "jet"}):
        draw(name, b)
        assert matplotlib.rcParams["font.size"] == 20
    assert a.read_bytes() == b.read_bytes()
    assert b"Software" not in a.read_bytes()  # would name matplotlib's version
    assert sorted(tmp_path.iterdir()) == [a, b] and is_drawn(a)
    assert "synthetic demo data" in draw(name, b, synthetic=True).get_suptitle()


def test_training_curves_mark_the_chosen_epoch_and_show_the_learning_rates(tmp_path):
    loss_axes, score_axes, rate_axes = figures.training_curves(tmp_path / "a.png", HISTORY).axes
    assert "nats" in loss_axes.get_ylabel() and "ROC-AUC" in score_axes.get_ylabel()
    assert rate_axes.lines[0].get_ydata().tolist() == RATES
    assert tick_labels(rate_axes.yaxis) == ["1e-05", "0.0001", "0.001"]
    star = next(line for line in score_axes.lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (3, 0.8765)
    assert score_axes.get_title() == "before training: 0.5021; chosen (star): epoch 3, ROC-AUC 0.8765"
    assert score_axes.get_ylim()[0] > 0.75


@pytest.mark.parametrize("n, score, shown", [(0, 0.5, "0.5000"), (1, 0.5, "0.5000"), (2, None, "undefined")])
def test_training_curves_of_hardly_any_epochs_or_scores(n, score, shown, tmp_path):
    history = [{**row, "validation_roc_auc": score, "best": True} for row in HISTORY[: n + 1]]
    _, score_axes, axes = figures.training_curves(tmp_path / "a.png", history).axes
    assert score_axes.get_title() == f"before training: {shown}; chosen (star): epoch {n}, ROC-AUC {shown}"
    low, high = axes.get_xlim()
    assert set(range(n + 1)) == {tick for tick in axes.get_xticks() if low < tick < high}


def test_each_tag_has_its_score_its_interval_and_its_prevalence(tmp_path):
    rows = [tag_row("flute", 0.7, 0.02), tag_row("choir", NAN, 0.0), tag_row("guitar", 0.9, 0.2), tag_row("bass", 0.3)]
    score_axes, bar_axes = figures.per_tag_roc_auc(tmp_path / "a.png", rows).axes
    assert tick_labels(score_axes.yaxis) == ["guitar", "flute", "bass", "choir"]
    assert score_axes.get_ylim()[0] > score_axes.get_ylim()[1]  # the first row is at the top
    *segments, undefined = score_axes.collections[0].get_segments()
    assert np.allclose(segments, [[[0.8, 0], [0.95, 0]], [[0.6, 1], [0.75, 1]], [[0.2, 2], [0.35, 2]]])
    assert not len(undefined) and [text.get_text() for text in score_axes.texts] == ["one class only"]
    assert legend(score_axes) == ["chance", "mean 0.6333"]
    assert score_axes.get_xlim()[0] < 0.2 and score_axes.get_xlim()[1] > 1
    assert "95% interval" in score_axes.get_xlabel() and "%" in bar_axes.get_xlabel()
    assert np.allclose([bar.get_width() for bar in bar_axes.patches], [20, 2, 10, 0])


@pytest.mark.filterwarnings("error")
def test_scores_that_are_all_undefined_and_letters_that_no_font_has_are_no_warning(tmp_path):
    axes = figures.per_tag_roc_auc(tmp_path / "a.png", [tag_row("琵琶", NAN), tag_row("bass", NAN)]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["one class only", "one class only"]
    assert legend(axes) == ["chance", "mean undefined"]


def test_correlations_are_pearson_s_in_an_order_that_groups_similar_tags(tmp_path):
    names = ["rock", "flute", "hard rock", "choir", "never", "hard"]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (200, 6))
    labels[:, [2, 5]] = labels[:, [0, 0]]  # the same column three times: the distance between them is 0
    labels[:10, 2] = 1
    labels[:, 4] = 0
    predictions = rng.random((200, 6))
    predictions[:, [1, 3]] = 0.1  # whose mean in binary is another number, so that they seem to vary together
    annotated, predicted, bar = figures.tag_correlations(tmp_path / "a.png", names, labels, predictions).axes
    order = tick_labels(annotated.yaxis)
    assert sorted(order) == sorted(names)
    assert order == tick_labels(annotated.xaxis) == tick_labels(predicted.xaxis)
    assert np.ptp([order.index(name) for name in ("rock", "hard rock", "hard")]) == 2
    for axes, columns, constants in ((annotated, labels, [4]), (predicted, predictions, [1, 3])):
        standardised = (columns - columns.mean(axis=0)) / np.maximum(columns.std(axis=0), 1e-9)
        standardised[:, constants] = 0
        expected = standardised.T @ standardised / len(columns)
        np.fill_diagonal(expected, 1)
        places = [names.index(name) for name in order]
        assert np.allclose(axes.images[0].get_array(), expected[np.ix_(places, places)], atol=1e-6)
        assert axes.images[0].get_clim() == (-1, 1)
    assert "correlation" in bar.get_ylabel()


@pytest.mark.parametrize("n_tags, n_negative", [(1, 0), (3, 4)])  # of the three, the last two are the same
def test_correlations_of_hardly_any_tags(n_tags, n_negative, tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 1]])[:, :n_tags]
    axes = figures.tag_correlations(tmp_path / "a.png", ["a", "b", "c"][:n_tags], labels, labels).axes[0]
    assert len(axes.lines[0].get_xdata()) == n_negative
    assert np.abs(axes.images[0].get_array()).max() <= 1


def test_taggram_has_seconds_hertz_and_the_likeliest_tags_on_top(tmp_path):
    probabilities = np.array([[0.2, 0.6, 0.1, 0], [0.4, 0.7, 0.9, 0], [0.3, 0.8, 0.8, 0]])
    log_mel = np.zeros((128, 628), np.float32)
    log_mel[:, 0] = -np.log(100)
    names, times = ["flute", "rock", "bass", "drum"], np.array([10, 12, 20])
    figure = figures.taggram(tmp_path / "a.png", log_mel, names, times, probabilities, "x.mp3", n_tags=3)
    top, bottom, *bars = figure.axes
    assert (bottom.get_xlabel(), top.get_ylabel()) == ("time (s)", "frequency (Hz)")
    assert "dB" in bars[0].get_ylabel() and bars[1].get_ylabel() == "probability"
    assert tick_labels(bottom.yaxis) == ["rock", "bass", "flute"]
    mesh = bottom.collections[0]
    assert np.allclose(mesh.get_array(), probabilities.T[[1, 2, 0]]) and mesh.get_clim() == (0, 1)
    assert np.allclose(mesh.get_coordinates()[0, :, 0], [0, 11, 16, 628 * 512 / 11025])
    assert np.allclose(top.images[0].get_array()[0, :2], [-20, 0])
    assert tuple(top.images[0].get_extent()[:2]) == top.get_xlim() == bottom.get_xlim() == (0, 628 * 512 / 11025)


def test_taggram_of_one_window_and_its_frequencies_where_the_front_end_s_filters_lie(tmp_path):
    axes, below, *_ = draw("taggram", tmp_path / "a.png").axes
    assert np.allclose(below.collections[0].get_coordinates()[0, :, 0], [0, 50 * 512 / 11025])
    ticks = [int(label) for label in tick_labels(axes.yaxis)]
    assert ticks == [128, 256, 512, 1024, 2048, 4096]
    filters = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT)
    centres = filters @ np.linspace(0, SAMPLE_RATE / 2, filters.shape[1]) / filters.sum(axis=1)
    assert np.allclose(np.interp(ticks, centres, np.arange(128)), axes.get_yticks(), atol=0.3)
