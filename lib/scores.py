"""How good predictions are: ROC-AUC and average precision per tag, their intervals, and scores within a clip.

A tag (or clip) whose labels are all of one class has no ROC-AUC: it is NaN here and left out of every mean.
"""

import functools
import re
import warnings
from typing import NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_score
from sklearn.metrics import recall_score, roc_auc_score

SCORES = {"roc_auc": roc_auc_score, "average_precision": average_precision_score}


def of_each_tag(score, labels, predictions):
    """Return scikit-learn's `score` of each tag, (tags,), of (clips, tags) of labels, 0 or 1, and of predictions."""
    columns = zip(labels.T, predictions.T)
    return np.array([score(label, column) if np.ptp(label) else np.nan for label, column in columns])


def best_thresholds(labels, predictions):
    """Return each tag's score from which on its F1 is highest: (tags,); 1, which none reaches, if no clip has it."""
    found = np.ones(labels.shape[1])
    for tag in np.flatnonzero(labels.any(axis=0)):
        precision, recall, thresholds = precision_recall_curve(labels[:, tag], predictions[:, tag])
        f1 = precision * recall / np.maximum(precision + recall, 1e-12)  # half of F1, their harmonic mean
        found[tag] = thresholds[np.argmax(f1[:-1])]  # the curve's last point is above all predictions
    return found


roc_auc = functools.partial(of_each_tag, roc_auc_score)  # of (labels, predictions); transposed, of each clip
# Of (labels, whether each tag is given); a tag that no clip is given has no precision
precision = functools.partial(of_each_tag, functools.partial(precision_score, zero_division=np.nan))
OF_GIVEN_TAGS = {"precision": precision, "recall": functools.partial(of_each_tag, recall_score)}


def precision_at(k, labels, predictions):
    """Return the share of true tags among each clip's k most likely: (clips,), NaN for a clip without tags."""
    likeliest = np.argsort(-predictions, axis=1, kind="stable")[:, :k]
    precision = np.take_along_axis(labels, likeliest, axis=1).mean(axis=1)
    return np.where(labels.any(axis=1), precision, np.nan)


def macro(per_tag):
    """Return the mean over the tags (or clips) that have a score, the last axis; NaN if none has."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the mean of nothing
        return np.nanmean(per_tag, axis=-1)


def format_score(score):
    """Return a score as it is printed; None and NaN are one that no tag or clip has."""
    return "undefined" if score is None or np.isnan(score) else f"{score:.4f}"


class Scores(NamedTuple):
    """Both SCORES of each tag, (2, tags), and of resamples, (2, resamples, tags); differences may be `least` = -1."""

    per_tag: np.ndarray
    resampled: np.ndarray
    least: int = 0

    def macro(self):
        """Return {score: its mean over the tags, and the ends of the 95% interval of that}."""
        return {name: dict(zip(("value", "low", "high"), found)) for name, *found in self.intervals(macro)}

    def intervals(self, summary=np.asarray):
        """Yield (score, value, low, high) with the ends of 95% intervals, of each tag or of a `summary` such as macro.

        They are percentiles of the resamples. A clip that is drawn twice lifts its own precision: resamples exceed the
        average precision of these clips by about as much as that exceeds the one of ever more clips. So its percentiles
        are moved down by twice that: Efron's bias-corrected interval (1981), if resamples are normally distributed.
        """
        for name, per_tag, resampled in zip(SCORES, self.per_tag, self.resampled):
            value, resampled = summary(per_tag), summary(resampled)
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a tag that no resample has
                ends = np.nanpercentile(resampled, [2.5, 97.5], axis=0)
                if name == "average_precision":
                    ends -= 2 * (np.nanmean(resampled, axis=0) - value)
            yield name, value, *np.clip(ends, self.least, 1)

    def minus(self, other):
        """Return the paired difference of two Scores of the same clips and seed."""
        return Scores(self.per_tag - other.per_tag, self.resampled - other.resampled, least=-1)


def scores_of(labels, predictions, groups, n_resamples, seed):
    """Return the Scores of (clips, tags) of predictions, with resamples of whole groups, drawn with replacement.

    `groups` has the name or number of each clip's group. With one group per track, the resamples vary as much
    as new samples of tracks would.
    """
    names, groups = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).integers(0, len(names), (n_resamples, len(names)))
    weights = np.stack([np.bincount(row, minlength=len(names))[groups] for row in drawn]).astype(np.int32)
    of_tags = [weighted_scores(label, column, weights) for label, column in zip(labels.T, predictions.T)]
    per_tag = [of_each_tag(score, labels, predictions) for score in SCORES.values()]
    return Scores(np.array(per_tag), np.moveaxis(of_tags, 0, 2))


def weighted_scores(label, scores, weights):
    """Return (ROC-AUC, average precision) of one tag where clip i counts weights[r, i] times: (2, resamples).

    The same as scikit-learn's on the clips so repeated, but sorted once for all resamples. With TP[t] and FP[t] the
    numbers of positive and negative clips of at least the t-th highest score, and P and N those of all,

        ROC-AUC = sum over t of (FP[t] - FP[t-1]) / N * (TP[t] + TP[t-1]) / 2P    (trapezoids under the ROC curve)
        average precision = sum over t of (TP[t] - TP[t-1]) / P * TP[t] / (TP[t] + FP[t])
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


def correlations(columns):
    """Return the Pearson correlations of `columns` (clips, tags): (tags, tags), 0 for a tag that never varies."""
    varies = np.ptp(columns, axis=0) > 0
    found = np.eye(len(varies))
    found[np.ix_(varies, varies)] = np.corrcoef(columns[:, varies], rowvar=False)
    return found


def differs_clearly(labels, groups, difference):
    """Return which tags' ROC-AUCs differ, given Scores.minus, at a risk of 5% that chance alone has made any: (tags,).

    A difference, over its resamples' standard deviation, has to exceed the largest such error of any tag in 95% of the
    resamples (Westfall and Young's single-step maxT, 1993). That takes 10 groups with a tag, and 10 without.
    """
    n_groups = [[len({*groups[label == value]}) for value in (0, 1)] for label in labels.T]
    enough = np.min(n_groups, axis=1) >= 10
    errors = enough * np.nan_to_num(np.abs(difference.resampled[0] - difference.per_tag[0]))
    deviations = np.sqrt(np.mean(errors**2, axis=0)) + 1e-12
    limit = np.percentile(np.max(errors / deviations, axis=1), 95)
    return enough & (np.abs(difference.per_tag[0]) > limit * deviations)


def all_scores(results, path=""):
    """Return {path: value} of every score in what results.json holds, without the ends of intervals."""
    if path == "test tags":
        results = {row["tag"]: row for row in results}
    if isinstance(results, dict):
        return {name: x for key in results for name, x in all_scores(results[key], f"{path} {key}".lstrip()).items()}
    is_score = re.search(r"(roc_auc|average_precision| value|_at \d|roc_auc_of_other_\w+|at_thresholds \w+)$", path)
    return {path.removesuffix(" value"): results} if is_score else {}
