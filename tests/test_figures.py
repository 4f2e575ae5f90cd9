"""The pictures, by what matplotlib was told to draw and by the PNG files."""

import os
import subprocess
import sys

import librosa
import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from conftest import ROOT
from lib import figures
from lib.audio import N_FFT, SAMPLE_RATE

NAN = float("nan")


def epochs(n):
    """Return a history of `n` epochs whose learning rate falls after epochs 2 and 3 and whose best is epoch 3."""
    rates, scores = [1e-3, 1e-3, 1e-3, 1e-4, 1e-5, 1e-5], [0.5021, 0.81, 0.8, 0.8765, 0.85, 0.85]
    history = []
    for epoch in range(n + 1):
        row = {"epoch": epoch, "learning_rate": rates[epoch], "loss": 1 / epoch if epoch else None}
        history.append({**row, "validation_roc_auc": scores[epoch], "best": epoch in (0, 1, 3)})
    return history


def tag_row(tag, score, prevalence=0.1):
    row = {"tag": tag, "prevalence": prevalence, "roc_auc": score}
    return {**row, "roc_auc_low": score - 0.1, "roc_auc_high": score + 0.05}


def draw(name, path, **options):
    """Draw one of the four pictures from small data."""
    labels = np.random.default_rng(1).integers(0, 2, (40, 3))
    arguments = {
        "training_curves": (epochs(4),),
        "per_tag_roc_auc": ([tag_row("guitar", 0.9), tag_row("flute", 0.7)],),
        "tag_correlations": (["guitar", "flute", "slow"], labels, labels * 0.5),
        "taggram": (np.linspace(-9, 0, 128 * 50).reshape(128, 50), ["guitar"], [1.0], np.array([[0.5]]), "a $b$ c.mp3"),
    }
    return getattr(figures, name)(path, *arguments[name], **options)


every_picture = pytest.mark.parametrize("name", ["training_curves", "per_tag_roc_auc", "tag_correlations", "taggram"])


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def is_drawn(path):
    """Whether a PNG file opens and has ink on 2% to 98% of it."""
    picture = imread(path)[..., :3]
    return 0.02 < np.mean(picture.min(axis=2) < 0.9) < 0.98


@every_picture
def test_same_data_give_the_same_bytes_whatever_the_reader_s_own_style(name, tmp_path):
    assert "synthetic" not in draw(name, tmp_path / "a.png").get_suptitle()
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 50, "image.cmap": "jet"}):
        draw(name, tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in (tmp_path / "a.png").read_bytes()  # would name matplotlib's version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    assert is_drawn(tmp_path / "a.png")


@every_picture
def test_synthetic_data_are_called_so(name, tmp_path):
    assert "synthetic demo data" in draw(name, tmp_path / "a.png", synthetic=True).get_suptitle()


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_no_warning(tmp_path):
    figures.per_tag_roc_auc(tmp_path / "a.png", [tag_row("琵琶", 0.7)])


def test_no_display_is_needed(tmp_path):
    script = """if True:
        import sys
        from lib import figures
        row = dict(epoch=0, learning_rate=1, loss=None, validation_roc_auc=0.6, best=True)
        figures.training_curves("a.png", [row, {**row, "epoch": 1, "loss": 0.5}])
        assert not {"matplotlib.pyplot", "librosa"} & set(sys.modules)
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert is_drawn(tmp_path / "a.png")


def test_training_curves_name_the_chosen_epoch_and_the_learning_rates(tmp_path):
    loss_axes, score_axes = figures.training_curves(tmp_path / "a.png", epochs(5)).axes
    assert "nats" in loss_axes.get_ylabel() and "ROC-AUC" in score_axes.get_ylabel()
    legend = [text.get_text() for text in score_axes.get_legend().get_texts()]
    assert legend == ["chosen: epoch 3, ROC-AUC 0.8765", "before training: 0.5021"]
    assert texts(loss_axes) == ["learning rate", "0.001", "0.0001", "1e-05"]
    steps = [line.get_xdata()[0] for line in score_axes.lines if line.get_linestyle() == "--"]
    assert steps == [2.5, 3.5]
    star = next(line for line in score_axes.lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (3, 0.8765)
    assert score_axes.get_ylim()[0] > 0.75


@pytest.mark.parametrize("n_epochs, chosen", [(0, "epoch 0, ROC-AUC 0.5021"), (1, "epoch 1, ROC-AUC 0.8100")])
def test_training_curves_of_hardly_any_epochs(n_epochs, chosen, tmp_path):
    _, axes = figures.training_curves(tmp_path / "a.png", epochs(n_epochs)).axes
    assert chosen in axes.get_legend().get_texts()[0].get_text()
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low < tick < high] == list(range(n_epochs + 1))


def test_training_curves_without_a_single_score(tmp_path):
    history = [{**row, "validation_roc_auc": None, "best": True} for row in epochs(2)]
    _, axes = figures.training_curves(tmp_path / "a.png", history).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen: epoch 2, ROC-AUC undefined"]


def test_each_tag_has_its_score_its_interval_and_its_prevalence(tmp_path):
    rows = [tag_row("flute", 0.7, 0.02), tag_row("choir", NAN, 0.0), tag_row("guitar", 0.9, 0.2), tag_row("bass", 0.7)]
    score_axes, bar_axes = figures.per_tag_roc_auc(tmp_path / "a.png", rows, interval="90% interval").axes
    assert tick_labels(score_axes.yaxis) == ["guitar", "bass", "flute", "choir"]
    assert score_axes.get_ylim()[0] > score_axes.get_ylim()[1]  # the first row is at the top
    segments = np.array(score_axes.collections[0].get_segments())
    assert np.allclose(segments[..., 0], [[0.8, 0.95], [0.6, 0.75], [0.6, 0.75]])
    assert texts(score_axes) == ["one class only", "chance", "mean 0.767"]
    assert "90% interval" in score_axes.get_xlabel() and "%" in bar_axes.get_xlabel()
    assert np.allclose([bar.get_width() for bar in bar_axes.patches], [20, 10, 2, 0])


def test_scores_below_chance_stay_on_the_axis(tmp_path):
    axes = figures.per_tag_roc_auc(tmp_path / "a.png", [tag_row("flute", 0.3)]).axes[0]
    assert axes.get_xlim()[0] < 0.2 and axes.get_xlim()[1] > 1
    sides = {text.get_text().strip(): text.get_ha() for text in axes.texts}
    assert sides == {"mean 0.300": "right", "chance": "left"}


def test_scores_that_are_all_undefined(tmp_path):
    axes = figures.per_tag_roc_auc(tmp_path / "a.png", [tag_row("flute", NAN), tag_row("bass", NAN)]).axes[0]
    assert texts(axes) == ["one class only", "one class only", "chance"]


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
    places = sorted(order.index(name) for name in ("rock", "hard rock", "hard"))
    assert places[2] - places[0] == 2
    for axes, columns, constants in ((annotated, labels, ["never"]), (predicted, predictions, ["flute", "choir"])):
        drawn = axes.images[0].get_array()
        with np.errstate(invalid="ignore"):
            expected = np.corrcoef(columns[:, [names.index(name) for name in order]].T)
        for row in (order.index(name) for name in constants):
            expected[row] = expected[:, row] = 0
            expected[row, row] = 1
        assert np.allclose(drawn, expected, atol=1e-6)
        assert axes.images[0].get_clim() == (-1, 1)
    assert "correlation" in bar.get_ylabel()


def test_correlations_of_hardly_any_tags(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 1]])
    for n_tags, n_negative in ((1, 0), (3, 4)):  # of the three, the last two are the same, rounded to more than 1
        names, columns = ["a", "b", "c"][:n_tags], labels[:, :n_tags]
        axes = figures.tag_correlations(tmp_path / "a.png", names, columns, columns).axes[0]
        assert len(axes.lines[0].get_xdata()) == n_negative
        assert np.abs(axes.images[0].get_array()).max() <= 1


def test_taggram_has_seconds_hertz_and_the_likeliest_tag_on_top(tmp_path):
    probabilities = np.array([[0.2, 0.6, 0.1], [0.4, 0.7, 0.9], [0.3, 0.8, 0.8]])
    log_mel = np.zeros((128, 628), np.float32)
    log_mel[:, 0] = -np.log(100)
    names, times = ["flute", "rock", "bass"], [10, 12, 20]
    top, bottom, *bars = figures.taggram(tmp_path / "a.png", log_mel, names, times, probabilities, "x.mp3").axes
    assert (bottom.get_xlabel(), top.get_ylabel()) == ("time (s)", "frequency (Hz)")
    assert "dB" in bars[0].get_ylabel() and bars[1].get_ylabel() == "probability"
    assert tick_labels(bottom.yaxis) == ["rock", "bass", "flute"]
    mesh = bottom.collections[0]
    assert np.allclose(mesh.get_array(), probabilities.T[[1, 2, 0]]) and mesh.get_clim() == (0, 1)
    assert np.allclose(mesh.get_coordinates()[0, :, 0], [0, 11, 16, 628 * 512 / 11025])
    assert np.isclose(top.images[0].get_array()[0, 0], -10)  # two frames share a column: 0 and -20 dB
    assert top.get_xlim() == bottom.get_xlim() == (0, 628 * 512 / 11025)


def test_taggram_of_one_window_and_its_frequencies_where_the_front_end_s_filters_lie(tmp_path):
    axes, below, *_ = draw("taggram", tmp_path / "a.png").axes
    assert np.allclose(below.collections[0].get_coordinates()[0, :, 0], [0, 50 * 512 / 11025])
    ticks = [int(label) for label in tick_labels(axes.yaxis)]
    assert ticks == [128, 256, 512, 1024, 2048, 4096]
    filters = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT)
    centres = filters @ np.linspace(0, SAMPLE_RATE / 2, filters.shape[1]) / filters.sum(axis=1)
    assert np.allclose(np.interp(ticks, centres, np.arange(128)), axes.get_yticks(), atol=0.3)


def test_a_long_spectrogram_keeps_its_times(tmp_path):
    log_mel = np.full((128, 13_001), -9, np.float32)
    log_mel[:, 6500:6600] = 0
    times = np.arange(14.5, 590, 1.0)
    probabilities = np.full((len(times), 2), 0.5)
    axes = figures.taggram(tmp_path / "a.png", log_mel, ["a", "b"], times, probabilities, "x").axes[0]
    picture = axes.images[0].get_array()
    left, right, _, _ = axes.images[0].get_extent()
    loud = left + (right - left) * (np.flatnonzero(picture[0] > -1) + 0.5) / picture.shape[1]
    assert picture.shape[1] <= figures.MAX_COLUMNS
    assert np.isclose(loud.mean(), 6550 * 512 / 11025, atol=1) and axes.get_xlim()[1] < right


def test_the_largest_picture_is_a_small_file(tmp_path):
    names = [f"tag {number}" for number in range(50)]
    labels = np.random.default_rng(2).random((300, 50)) < 0.1
    probabilities = 0.5 * labels + np.random.default_rng(3).random((300, 50))
    figures.tag_correlations(tmp_path / "a.png", names, labels.astype(np.uint8), probabilities)
    assert is_drawn(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 120_000
