"""The project's pictures, as PNG files: training curves, the score of each tag, correlations of tags, a taggram.

Each function writes one picture and returns its matplotlib Figure. The same data give the same bytes. Colours are
Okabe and Ito's, or change in lightness; no information relies on colour alone.
"""

import contextlib
import io
import os
import textwrap
import warnings

os.environ.pop("MPLBACKEND", None)  # a notebook's does not exist outside of it, and a file needs none

import matplotlib.image
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from lib.audio import SAMPLE_RATE, import_librosa
from lib.common import whole_file
from lib.scores import format_score, macro

STYLE = {
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a dollar sign in a file's name begins no formula
}
POWER = {"cmap": "magma", "vmin": -80, "vmax": 0, "origin": "lower"}  # of a spectrogram in dB
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#767676"
ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "frameon": False}  # the axes: a legend's place


@contextlib.contextmanager
def _picture(path, title, width, height, synthetic):
    """Yield a figure to fill, `width` x `height` inches, and write it; its title says if the data are synthetic."""
    with matplotlib.style.context(["default", STYLE]):  # whatever the reader's own matplotlibrc says
        figure = Figure(figsize=(width, height), layout="compressed")
        figure.suptitle(textwrap.fill(f"{title} (synthetic demo data)" if synthetic else title, int(12 * width)))
        yield figure
        with whole_file(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # such letters are drawn as boxes
            figure.savefig(file, format="png", metadata={"Software": None})


def training_curves(path, history, synthetic=False):
    """Draw the loss, the validation score and the learning rate over the epochs, and mark the chosen epoch.

    `history` has a dict for each epoch from 0, which is before training: "epoch", "learning_rate", "loss" (nats; None
    for epoch 0), "validation_roc_auc" (None where undefined) and "best": the last best epoch is the chosen one.
    """
    names = ("epoch", "loss", "validation_roc_auc", "learning_rate")
    epochs, losses, scores, rates = (np.array([row[name] for row in history], dtype=float) for name in names)
    chosen = max(row["epoch"] for row in history if row["best"])
    with _picture(path, "Training", 6.4, 5.6, synthetic) as figure:
        loss_axes, score_axes, rate_axes = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1))
        loss_axes.plot(epochs, losses, "s-", color=GREY, markersize=3)
        loss_axes.set_ylabel("training loss (nats)")
        score_axes.plot(epochs[1:], scores[1:], "o-", color=BLUE, markersize=3)  # epoch 0's would dwarf the rest
        score_axes.plot(chosen, scores[chosen], "*", color=VERMILLION, markersize=13, mec="black")
        title = f"before training: {format_score(scores[0])}; chosen (star): epoch {chosen}, ROC-AUC "
        score_axes.set(ylabel="validation ROC-AUC", title=title + format_score(scores[chosen]))
        rate_axes.step(epochs, rates, where="mid", color=GREY)
        rate_axes.set(ylabel="learning rate", yscale="log", xlabel="epoch", xlim=(-0.5, epochs[-1] + 0.5))
        ticks = np.unique(rates if len({*rates}) <= 5 else [rates[rates > 0].min(), rates.max()])
        rate_axes.set_yticks(ticks, [f"{rate:.3g}" for rate in ticks])
        rate_axes.minorticks_off()
        rate_axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    return figure


def _intervals(axes, rows):
    """Draw the 95% interval of each row's score, the first row at the top; return (places, scores)."""
    names = ("roc_auc", "roc_auc_low", "roc_auc_high")
    scores, low, high = np.array([[row[name] for row in rows] for name in names])
    places = np.arange(len(rows))
    axes.hlines(places, low, high, color=BLUE, linewidth=1.5)
    axes.set(yticks=places, yticklabels=[row["tag"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="y", color="0.9")
    return places, scores


def per_tag_roc_auc(path, rows, synthetic=False):
    """Draw each tag's score with its 95% interval and the baseline's, best first, and beside it how common the tag is.

    `rows` has a dict for each tag: "tag", "prevalence" (0 to 1), "roc_auc", "roc_auc_low" and "roc_auc_high", the
    last three NaN where the clips are all positive or all negative, and perhaps "roc_auc_of_baseline".
    """
    rows = sorted(rows, key=lambda row: (np.isnan(row["roc_auc"]), -np.nan_to_num(row["roc_auc"]), row["tag"]))
    with _picture(path, "ROC-AUC of each tag", 6.4, 1.2 + 0.17 * len(rows), synthetic) as figure:
        score_axes, bar_axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        places, scores = _intervals(score_axes, rows)
        score_axes.plot(scores, places, "o", color=BLUE, markersize=4)
        if "roc_auc_of_baseline" in rows[0]:
            baseline = [row["roc_auc_of_baseline"] for row in rows]
            score_axes.plot(baseline, places, "o", color=BLUE, markersize=4, mfc="white", label="baseline")
        score_axes.axvline(0.5, color="black", linestyle=":", linewidth=1, label="chance")
        mean = macro(scores)
        score_axes.axvline(mean, color=VERMILLION, linestyle="--", linewidth=1, label=f"mean {format_score(mean)}")
        for place in places[np.isnan(scores)]:
            score_axes.text(0.51, place, "one class only", va="center", style="italic", color=GREY)
        score_axes.legend(**ABOVE)
        score_axes.set(xlabel="ROC-AUC and its 95% interval", xlim=(None, 1.01))
        bar_axes.barh(places, [100 * row["prevalence"] for row in rows], height=0.6, color="0.6", zorder=2)
        bar_axes.set_xlabel("prevalence\n(% of clips)")
        bar_axes.grid(axis="y", color="0.9")
    return figure


def tag_differences(path, rows, title, synthetic=False):
    """Draw differences of ROC-AUC, in `rows` like those of `per_tag_roc_auc` with "differs_clearly", largest first."""
    rows = sorted((row for row in rows if np.isfinite(row["roc_auc"])), key=lambda row: -row["roc_auc"])
    with _picture(path, title, 6.4, 1.2 + 0.17 * len(rows), synthetic) as figure:
        axes = figure.subplots()
        axes.axvline(0, color="black", linestyle=":", linewidth=1)
        places, values = _intervals(axes, rows)
        clear = np.array([row["differs_clearly"] for row in rows], bool)
        axes.plot(values[clear], places[clear], "o", color=VERMILLION, markersize=4, label="differs clearly")
        axes.plot(values[~clear], places[~clear], "o", color=BLUE, markersize=4, mfc="white", label="may be chance")
        axes.legend(**ABOVE)
        axes.set_xlabel("difference of ROC-AUC and its 95% interval")
    return figure


def tag_correlations(path, tag_names, annotated, predicted, synthetic=False):
    """Draw how tags go together, with similar ones adjacent: the correlations of their labels and of their scores.

    Both are (tags, tags), as lib.scores.correlations returns them.
    """
    panels = {"annotations": annotated, "predictions": predicted}
    distances = 1 - annotated[np.triu_indices(len(tag_names), 1)]
    order = leaves_list(linkage(distances, "average", optimal_ordering=True)) if len(distances) else [0]
    places, names = range(len(order)), [tag_names[tag] for tag in order]
    side = max(2.6, 0.105 * len(names))
    with _picture(path, "Correlation between tags", 2 * side + 2.2, side + 1.5, synthetic) as figure:
        both = figure.subplots(1, 2, sharey=True)
        for axes, (title, correlations) in zip(both, panels.items()):
            ordered = correlations[np.ix_(order, order)]
            image = axes.imshow(ordered, "PuOr", vmin=-1, vmax=1, interpolation="nearest")
            axes.plot(*np.nonzero(ordered < -0.1), "_", color="black", markersize=3)  # in grey, they look positive
            axes.set(title=title, xticks=places, yticks=places, yticklabels=names)
            axes.set_xticklabels(names, rotation=90)
            axes.tick_params(length=0, labelsize=7)
        figure.colorbar(image, ax=both, shrink=0.7, pad=0.02, label="Pearson correlation (dash: below -0.1)")
    return figure


def spectrogram(log_mel):
    """Return a picture of a spectrogram (128, frames) alone, of at most 1,500 of its frames: a PNG file's bytes."""
    picture, step = io.BytesIO(), -(-log_mel.shape[1] // 1500)
    matplotlib.image.imsave(picture, _decibels(log_mel[:, ::step]), metadata={"Software": None}, **POWER)
    return picture.getvalue()


def _decibels(log_mel):
    """Return the power in dB, 0 at its peak, of a spectrogram as lib.audio.log_mel returns it."""
    return 10 * np.log10(np.e) * (log_mel - log_mel.max())


def taggram(path, log_mel, edges, scores, thresholds, title, synthetic=False):
    """Draw a recording's spectrogram and, below it, its tags over the same time, in the order of `thresholds`.

    `log_mel` (128, frames) is the spectrogram as lib.audio.log_mel returns it, `edges` (windows + 1,) says in seconds
    where each window's column begins and the last one ends, `scores` (windows, tags), `thresholds` {tag: score}. A line
    shows where the score reaches the tag's threshold.
    """
    n_bands, duration = len(log_mel), edges[-1]
    centres = import_librosa().mel_frequencies(n_bands + 2, fmin=0, fmax=SAMPLE_RATE / 2)[1:-1]  # of the bands, in Hz
    ticks = [128, 256, 512, 1024, 2048, 4096]
    rows = np.arange(len(thresholds) + 1) - 0.5
    heights = 2.4, max(0.9, 0.2 * len(thresholds))  # inches
    title += ", tagged by a network that knows synthetic clips only" if synthetic else ""
    with _picture(path, title, 7, sum(heights) + 1, synthetic=False) as figure:
        top, bottom = figure.subplots(2, sharex=True, height_ratios=heights)
        extent = (0, duration, -0.5, n_bands - 0.5)
        image = top.imshow(_decibels(log_mel), extent=extent, **POWER)
        top.set_yticks(np.interp(ticks, centres, np.arange(n_bands)), ticks, fontsize=7)
        top.set(aspect="auto", ylabel="frequency (Hz)")
        figure.colorbar(image, ax=top, label="power (dB, peak = 0)", pad=0.01, aspect=10)
        mesh = bottom.pcolormesh(edges, rows, scores.T, cmap="Blues", vmin=0, vmax=1)
        bottom.hlines(rows, 0, duration, color="white", linewidth=1)
        tags, windows = np.nonzero((scores >= [*thresholds.values()]).T)
        bottom.hlines(tags + 0.38, edges[windows], edges[windows + 1], color=VERMILLION, linewidth=2)
        bottom.set_yticks(range(len(thresholds)), thresholds)
        bottom.set(xlim=(0, duration), ylim=(len(thresholds) - 0.5, -0.5))
        bottom.set_xlabel("time (s); a tag is underlined where its score reaches its threshold")
        figure.colorbar(mesh, ax=bottom, label="score", pad=0.01, aspect=10)
    return figure
