"""The project's pictures, as PNG files: training curves, the score of each tag, correlations of tags, a taggram.

Each function writes one picture and returns its matplotlib Figure. The same data give the same bytes, and no
display is needed. Colours are Okabe and Ito's, or change in lightness, and nothing is told by colour alone.
"""

import textwrap
import warnings

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage

from lib.audio import HOP_LENGTH, SAMPLE_RATE
from lib.common import whole_file
from lib.scores import format_score

STYLE = {
    "savefig.dpi": 100,
    "savefig.bbox": "tight",
    "image.interpolation": "nearest",
    "legend.edgecolor": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar sign in a file's name begins no formula
}
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#767676"
NEGATIVE = -0.1  # correlations below this are marked, because in grey they look like positive ones
DYNAMIC_RANGE = 80  # dB that a spectrogram's colours span
LOUDNESS = matplotlib.colormaps["magma"].resampled(20)  # colours, 4 dB each: 256 nearly double the file
MAX_COLUMNS = 600  # of a spectrogram's picture: about one for a pixel

styled = matplotlib.style.context(["default", STYLE])  # whatever the reader's own matplotlibrc says


@styled
def training_curves(path, history, synthetic=False):
    """Draw the loss and the validation score over the epochs, the learning rate's steps and the chosen epoch.

    `history` has a dict for each epoch: "epoch" (0 is before training), "learning_rate", "loss" (nats; None for
    epoch 0), "validation_roc_auc" (None or NaN where undefined) and "best": the last best epoch is the chosen one.
    """
    epochs = np.array([row["epoch"] for row in history])
    losses = np.array([row["loss"] for row in history], dtype=float)
    scores = np.array([row["validation_roc_auc"] for row in history], dtype=float)
    figure = _figure("Training", synthetic, 6.4, 4.6)
    loss_axes, score_axes = figure.subplots(2, sharex=True)
    loss_axes.plot(epochs, losses, "s-", color=GREY, markersize=3)
    loss_axes.set_ylabel("training loss (nats)")
    score_axes.plot(epochs, np.where(epochs > 0, scores, np.nan), "o-", color=BLUE, markersize=3)
    if epochs[0] == 0 and np.isfinite(scores[0]):  # only in words: an axis from there would dwarf the rest
        score_axes.plot([], [], " ", label=f"before training: {format_score(scores[0])}")
    chosen = max(index for index, row in enumerate(history) if row["best"])
    label = f"chosen: epoch {epochs[chosen]}, ROC-AUC {format_score(scores[chosen])}"
    score_axes.plot(epochs[chosen], scores[chosen], "*", color=VERMILLION, markersize=13, mec="black", label=label)
    score_axes.legend(reverse=True)
    score_axes.set(ylabel="validation ROC-AUC", xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), ymargin=0.1)
    score_axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _mark_learning_rates(loss_axes, score_axes, [row for row in history if row["epoch"] > 0])
    return _save(figure, path)


def _mark_learning_rates(top, bottom, trained):
    """Write the learning rates above the panels, with a line through both where the rate changes."""
    top.text(-0.01, 1.05, "learning rate", transform=top.transAxes, ha="right", color=GREY)
    firsts = [row for i, row in enumerate(trained) if i == 0 or row["learning_rate"] != trained[i - 1]["learning_rate"]]
    for row in firsts:
        top.text(row["epoch"] - 0.5, 1.05, f"{row['learning_rate']:g}", transform=top.get_xaxis_transform(), color=GREY)
    for axes in (top, bottom):
        for row in firsts[1:]:
            axes.axvline(row["epoch"] - 0.5, color=GREY, linestyle="--", linewidth=0.8, zorder=0)


@styled
def per_tag_roc_auc(path, rows, synthetic=False, interval="95% interval"):
    """Draw each tag's score with its interval, best first, and beside it how common the tag is.

    `rows` has a dict for each tag: "tag", "prevalence" (0 to 1), "roc_auc", "roc_auc_low" and "roc_auc_high", the
    last three NaN where the clips are all positive or all negative. `interval` says what low and high are.
    """
    rows = sorted(rows, key=lambda row: (np.isnan(row["roc_auc"]), -np.nan_to_num(row["roc_auc"]), row["tag"]))
    figure = _figure("ROC-AUC of each tag", synthetic, 6.4, 1.2 + 0.17 * len(rows))
    score_axes, bar_axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    score_axes.set(yticks=range(len(rows)), yticklabels=[row["tag"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    for axes in (score_axes, bar_axes):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color="0.9")
    _dots_and_intervals(score_axes, rows, interval)
    bar_axes.barh(range(len(rows)), [100 * row["prevalence"] for row in rows], height=0.6, color="0.6")
    bar_axes.set_xlabel("prevalence\n(% of clips)")
    return _save(figure, path)


def _dots_and_intervals(axes, rows, interval):
    scores, low, high = np.array([[row[key] for row in rows] for key in ("roc_auc", "roc_auc_low", "roc_auc_high")])
    places, defined = np.arange(len(rows)), np.isfinite(scores)
    axes.hlines(places[defined], low[defined], high[defined], color=BLUE, linewidth=1.5)
    axes.plot(scores[defined], places[defined], "o", color=BLUE, markersize=4)
    for place in places[~defined]:
        axes.text(0.51, place, "one class only", va="center", style="italic", color=GREY)
    lines = [(0.5, "chance", ":", "black")]
    if defined.any():
        mean = scores[defined].mean()
        lines.append((mean, f"mean {mean:.3f}", "--", VERMILLION))
    for (x, label, style, colour), side in zip(sorted(lines), ("right", "left")):  # labels that stay apart
        axes.axvline(x, color=colour, linestyle=style, linewidth=1, zorder=1)
        axes.text(x, 1.01, f" {label} ", transform=axes.get_xaxis_transform(), ha=side, color=colour)
    lowest = np.nanmin([*scores, *low, 0.47])
    axes.set(xlabel=f"ROC-AUC and its {interval}", xlim=(lowest - 0.02, 1.01))


@styled
def tag_differences(path, rows, title, synthetic=False):
    """Draw by how much the ROC-AUC of each tag differs between two networks, with its interval, the largest first.

    `rows` are like those of `per_tag_roc_auc`, of differences.
    """
    rows = sorted((row for row in rows if np.isfinite(row["roc_auc"])), key=lambda row: -row["roc_auc"])
    value, low, high = np.array([[row[key] for row in rows] for key in ("roc_auc", "roc_auc_low", "roc_auc_high")])
    places = np.arange(len(rows))
    figure = _figure(title, synthetic, 6.4, 1.2 + 0.17 * len(rows))
    axes = figure.subplots()
    axes.set(yticks=places, yticklabels=[row["tag"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="y", color="0.9")
    axes.axvline(0, color="black", linestyle=":", linewidth=1)
    axes.hlines(places, low, high, color=BLUE, linewidth=1.5)
    clear = (low > 0) | (high < 0)
    axes.plot(value[clear], places[clear], "o", color=VERMILLION, markersize=4, label="differs clearly")
    axes.plot(value[~clear], places[~clear], "o", color=BLUE, markersize=4, mfc="white", label="cannot tell")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # above the axes, where no interval reaches
    axes.set_xlabel("difference of ROC-AUC and its 95% interval")
    return _save(figure, path)


@styled
def tag_correlations(path, tag_names, labels, probabilities, synthetic=False):
    """Draw how tags go together in the annotations and in the predictions, both (clips, tags), similar ones adjacent.

    The values are Pearson correlations over the clips, 0 for a tag that is the same in all of them.
    """
    panels = {"annotations": _correlations(labels), "predictions": _correlations(probabilities)}
    distances = 1 - panels["annotations"][np.triu_indices(len(tag_names), 1)]
    order = leaves_list(linkage(distances, "average", optimal_ordering=True)) if len(distances) else [0]
    names = [tag_names[tag] for tag in order]
    side = max(2.6, 0.105 * len(names))
    figure = _figure("Correlation between tags", synthetic, 2 * side + 2.2, side + 1.5, layout="compressed")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (title, correlations) in zip(both, panels.items()):
        ordered = correlations[np.ix_(order, order)]
        image = axes.imshow(ordered, cmap=matplotlib.colormaps["PuOr"].resampled(41), vmin=-1, vmax=1)
        axes.plot(*np.nonzero(ordered < NEGATIVE), "_", color="black", markersize=3, markeredgewidth=0.6)
        axes.set(title=title, yticks=range(len(names)), yticklabels=names)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.tick_params(length=0, labelsize=9 if len(names) <= 20 else 6.5)
    figure.colorbar(image, ax=both, shrink=0.7, pad=0.02, label=f"Pearson correlation (dash: below {NEGATIVE})")
    return _save(figure, path)


def _correlations(columns):
    """Return the Pearson correlations of `columns` (clips, tags): (tags, tags), 1 on the diagonal, never NaN."""
    centred = columns - np.mean(columns, axis=0, dtype=np.float64)
    centred[:, np.ptp(columns, axis=0) == 0] = 0  # exactly: the mean of equal numbers may be a rounding error off
    lengths = np.linalg.norm(centred, axis=0)
    correlations = centred.T @ centred / np.maximum(np.outer(lengths, lengths), np.finfo(float).tiny)
    np.fill_diagonal(correlations, 1)
    return np.clip(correlations, -1, 1)  # linkage refuses a negative distance


@styled
def taggram(path, log_mel, tag_names, times, probabilities, title, synthetic=False):
    """Draw a recording's spectrogram and, below it, the tags over the same time, likeliest first.

    `log_mel` (128, frames) is the spectrogram as lib.audio.log_mel returns it, `times` (windows,) the windows' centres
    in seconds, `probabilities` (windows, tags). Each moment shows the window whose centre is nearest.
    """
    times, probabilities = np.asarray(times), np.asarray(probabilities)
    duration = log_mel.shape[1] * HOP_LENGTH / SAMPLE_RATE
    heights = 2.4, max(0.9, 0.2 * len(tag_names))  # inches
    figure = _figure(title, synthetic, 7, sum(heights) + 1)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=heights)
    _spectrogram(figure, top, log_mel, duration)
    order = np.argsort(-probabilities.mean(axis=0), kind="stable")
    edges = np.concatenate([[0], (times[1:] + times[:-1]) / 2, [duration]])
    rows = np.arange(len(order) + 1) - 0.5
    mesh = bottom.pcolormesh(edges, rows, probabilities.T[order], cmap="Blues", vmin=0, vmax=1)
    bottom.hlines(rows, 0, duration, color="white", linewidth=1)
    bottom.set_yticks(range(len(order)), [tag_names[tag] for tag in order])
    bottom.set(xlabel="time (s)", xlim=(0, duration), ylim=(len(order) - 0.5, -0.5))
    figure.colorbar(mesh, ax=bottom, label="probability", pad=0.01, aspect=10)
    return _save(figure, path)


def _spectrogram(figure, axes, log_mel, duration):
    from librosa import hz_to_mel  # takes a second to import

    n_bands, n_frames = log_mel.shape
    step = -(-n_frames // MAX_COLUMNS)
    starts = np.arange(0, n_frames, step)
    columns = np.add.reduceat(log_mel, starts, axis=1) / np.diff(np.append(starts, n_frames))  # means of `step` frames
    decibels = 10 * np.log10(np.e) * (columns - columns.max())
    extent = (0, duration * len(starts) * step / n_frames, -0.5, n_bands - 0.5)  # the last column may be short
    image = axes.imshow(decibels, cmap=LOUDNESS, vmin=-DYNAMIC_RANGE, vmax=0, extent=extent, origin="lower")
    ticks = [128, 256, 512, 1024, 2048, 4096]
    *mels, highest = hz_to_mel([*ticks, SAMPLE_RATE / 2])
    bands = (n_bands + 1) * np.array(mels) / highest - 1  # band 0 is centred one band above 0 Hz
    axes.set_yticks(bands, ticks, fontsize=7)
    axes.set(aspect="auto", ylabel="frequency (Hz)")
    figure.colorbar(image, ax=axes, label="power (dB, peak = 0)", pad=0.01, aspect=10)


def _figure(title, synthetic, width, height, layout="constrained"):
    """Return an empty figure, `width` x `height` inches, that says so if its data are synthetic."""
    figure = Figure(figsize=(width, height), layout=layout)
    note = " (synthetic demo data)" if synthetic else ""
    figure.suptitle(textwrap.fill(title + note, int(13 * width)))
    return figure


def _save(figure, path):
    """Write the figure and return it."""
    with whole_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes stand for letters that no font has
        figure.savefig(file, format="png", metadata={"Software": None})
    return figure
