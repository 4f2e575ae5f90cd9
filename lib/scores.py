"""How good predictions are: ROC-AUC and average precision per tag, their intervals, and scores within a clip.

A tag (or clip) whose labels are all of one class has no ROC-AUC: it is NaN here and left out of every mean.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

SCORES = {"roc_auc": roc_auc_score, "average_precision": average_precision_score}
PAPER = {"validation": 0.904, "test": 0.900}  # macro ROC-AUC that the paper reports
PAPER_SIZES = {"train": 18000, "validation": 2000, "test": 5863}  # clips


def of_each_tag(score, labels, probabilities):
    """Return scikit-learn's function `score` of each tag over all clips at once: (tags,).

    `labels` are 0 or 1, (clips, tags), like the probabilities.
    """
    columns = zip(labels.T, probabilities.T)
    return np.array([score(label, column) if np.ptp(label) else np.nan for label, column in columns])


def roc_auc(labels, probabilities):
    """Return each tag's ROC-AUC: (tags,), from (clips, tags) of 0/1 and of probabilities."""
    return of_each_tag(roc_auc_score, labels, probabilities)


def clip_roc_auc(labels, probabilities):
    """Return each clip's ROC-AUC over its tags: (clips,), by the rank-sum formula of Mann and Whitney."""
    positives = labels.sum(axis=1, dtype=float)
    rank_sums = (rankdata(probabilities, axis=1) * labels).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (rank_sums - positives * (positives + 1) / 2) / (positives * (labels.shape[1] - positives))


def precision_at(k, labels, probabilities):
    """Return the share of true tags among each clip's k most likely: (clips,), NaN for a clip without tags."""
    likeliest = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    precision = np.take_along_axis(labels, likeliest, axis=1).mean(axis=1)
    return np.where(labels.any(axis=1), precision, np.nan)


def macro(per_tag):
    """Return the mean over the tags (or clips) that have a score, the last axis; NaN if none has."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the mean of nothing
        return np.nanmean(per_tag, axis=-1)


def interval(resampled):
    """Return the ends of the 95% percentile interval over resamples (the first axis); NaN where none has a score."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a tag without a score in any resample
        return np.nanpercentile(resampled, [2.5, 97.5], axis=0)


def format_score(score):
    """Return a score as it is printed; None and NaN are one that no tag or clip has."""
    return "undefined" if score is None or np.isnan(score) else f"{score:.4f}"


class Scores(NamedTuple):
    """Both SCORES of each tag, (2, tags), and those of resamples, (2, resamples, tags)."""

    per_tag: np.ndarray
    resampled: np.ndarray

    def macro(self):
        """Return {score: its mean over the tags, and the ends of the 95% interval of that}."""
        means = {}
        for name, per_tag, resampled in zip(SCORES, *self):
            low, high = interval(macro(resampled))
            means[name] = {"value": macro(per_tag), "low": low, "high": high}
        return means

    def minus(self, other):
        """Return the paired difference of two Scores of the same clips and seed."""
        return Scores(self.per_tag - other.per_tag, self.resampled - other.resampled)


def scores_of(labels, probabilities, groups, n_resamples, seed):
    """Return the Scores of (clips, tags) of probabilities, with resamples of whole groups, drawn with replacement.

    `groups` has the name or number of each clip's group. With one group per track, the resamples vary as much
    as new samples of tracks would.
    """
    weights = resample_weights(groups, n_resamples, seed)
    of_tags = [weighted_scores(label, column, weights) for label, column in zip(labels.T, probabilities.T)]
    per_tag = [of_each_tag(score, labels, probabilities) for score in SCORES.values()]
    return Scores(np.array(per_tag), np.moveaxis(of_tags, 0, 2))


def resample_weights(groups, n_resamples, seed):
    """Return how often each clip is in each resample: (resamples, clips) int32."""
    names, groups = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).integers(0, len(names), (n_resamples, len(names)))
    return np.stack([np.bincount(row, minlength=len(names))[groups] for row in drawn]).astype(np.int32)


def weighted_scores(label, scores, weights):
    """Return (ROC-AUC, average precision) of one tag where clip i counts weights[r, i] times: (2, resamples).

    The same as scikit-learn's on the clips so repeated, but sorted once for all resamples. With TP[t] and FP[t] the
    numbers of positive and negative clips of at least the t-th highest score, and P and N those of all,

        ROC-AUC = sum over t of (FP[t] - FP[t-1]) / N * (TP[t] + TP[t-1]) / 2P    (trapezoids under the ROC curve)
        average precision = sum over t of (TP[t] - TP[t-1]) / P * TP[t] / (TP[t] + FP[t])

    Three clips with labels 1, 0, 1 and scores 0.9, 0.5, 0.1, of which the last counts twice, have TP = 1, 1, 3 and
    FP = 0, 1, 1: ROC-AUC = 1 * (1 + 1) / 6 = 1/3, average precision = 1/3 * 1/1 + 2/3 * 3/4 = 5/6.
    """
    order = np.argsort(-scores, kind="stable")
    thresholds = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last clip of each distinct score
    label = label[order]
    found = np.full((2, len(weights)), np.nan)
    for resample, counts in enumerate(weights):
        counts = counts[order]
        positives = np.append(0, np.cumsum(counts * label)[thresholds])
        negatives = np.append(0, np.cumsum(counts)[thresholds]) - positives
        if positives[-1] and negatives[-1]:
            roc_auc = np.trapezoid(positives, negatives) / positives[-1] / negatives[-1]
            precision = positives / np.maximum(positives + negatives, 1)  # no clips yet: no positives either
            found[:, resample] = roc_auc, np.diff(positives) @ precision[1:] / positives[-1]
    return found


def compare_with_paper(checkpoint):
    """Return the line that puts the paper's figures beside ours, and says whether they can be compared."""
    figures = f"the paper: validation {PAPER['validation']:.3f}, test {PAPER['test']:.3f} (MagnaTagATune)"
    if checkpoint["synthetic"]:
        return f"{figures}; the scores above are on SYNTHETIC clips and say nothing about music"
    sizes = {part: len(ids) for part, ids in checkpoint["clip_ids"].items()}
    papers = {"split": "random", "n_tags": 50, "merge_tags": True}
    same = sizes == PAPER_SIZES and papers.items() <= checkpoint["hyperparameters"].items()
    return figures if same else f"{figures}; not comparable: other clips, tags or split"
