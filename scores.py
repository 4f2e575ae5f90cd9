"""How good predictions are: ROC-AUC and average precision per tag, how sure they are, and what a listener sees.

A tag (or clip) whose labels are all of one class has no ROC-AUC: it is NaN here and left out of every mean.
"""

import warnings
from typing import NamedTuple

import numpy as np

# SciPy and scikit-learn are imported where they are used: they take a second, for which --help should not wait.

PAPER = {"validation": 0.904, "test": 0.900}  # macro ROC-AUC that the paper reports
PAPER_SIZES = {"train": 18000, "validation": 2000, "test": 5863}  # clips


def roc_auc(labels, probabilities):
    """Return each tag's ROC-AUC over all clips at once: (tags,), from (clips, tags) of 0/1 and of scores.

    It is Mann and Whitney's statistic: how often a positive ranks above a negative, where a tie counts half.
    """
    from scipy.stats import rankdata

    n_positive = labels.sum(axis=0, dtype=float)
    n_negative = len(labels) - n_positive
    rank_sum = (rankdata(probabilities, axis=0) * labels).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def clip_roc_auc(labels, probabilities):
    """Return each clip's ROC-AUC over its tags: (clips,)."""
    return roc_auc(labels.T, probabilities.T)


def average_precision(labels, probabilities):
    """Return each tag's average precision, the area under its precision-recall curve: (tags,)."""
    from sklearn.metrics import average_precision_score

    def of_one_tag(label, scores):
        return average_precision_score(label, scores) if 0 < label.sum() < len(label) else np.nan

    return np.array([of_one_tag(*column) for column in zip(labels.T, probabilities.T)])


def macro(per_tag):
    """Return the mean over the tags that have a score (the last axis); NaN if none has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        return np.nanmean(per_tag, axis=-1)


def shown(score):
    """Return a score as it is printed; None is one that no tag or clip has."""
    return "undefined" if score is None else f"{score:.4f}"


class Bootstrap(NamedTuple):
    """Scores of every resample: (resamples, tags) each."""

    roc_auc: np.ndarray
    average_precision: np.ndarray


def bootstrap(labels, probabilities, groups, n_resamples, seed):
    """Score resamples of the clips, drawn with replacement by whole groups: (clips,) integers from 0.

    With clips of one track in one group, the resamples differ as much as sets of other tracks would.
    """
    weights = resample_weights(groups, n_resamples, seed)
    scores = [weighted_scores(label, scores, weights) for label, scores in zip(labels.T, probabilities.T)]
    return Bootstrap(*(np.stack(of_all_tags, axis=1) for of_all_tags in zip(*scores)))


def resample_weights(groups, n_resamples, seed):
    """Return how often each clip is in each resample: (resamples, clips) int32."""
    n_groups = groups.max() + 1
    drawn = np.random.default_rng(seed).integers(0, n_groups, (n_resamples, n_groups))
    return np.stack([np.bincount(row, minlength=n_groups)[groups] for row in drawn]).astype(np.int32)


def weighted_scores(label, scores, weights):
    """Return (ROC-AUC, average precision) of one tag where clip i counts weights[r, i] times: (resamples,) each.

    Equal to scikit-learn's on the clips so repeated. Both are sums over the positives: of the weight of the
    negatives ranked below, and of the precision at the positive's score. So one cumulative sum over the ranked
    clips is enough; clips of equal score are taken together.
    """
    order = np.argsort(-scores, kind="stable")
    label, scores = label[order].astype(bool), scores[order]
    positive = np.flatnonzero(label)
    first = np.searchsorted(-scores, -scores[positive], side="left")  # of the clips that share the positive's score
    last = np.searchsorted(-scores, -scores[positive], side="right")  # one past them

    ranked = weights[:, order]
    positive_weight = ranked[:, positive].astype(np.float64)
    clips_above = _cumulative(ranked)
    positives_above = _cumulative(positive_weight)
    n_positives_above = np.searchsorted(positive, np.stack([first, last]))
    through_ties = clips_above[:, last]
    positives_before, positives_through = (
        positives_above[:, n_positives_above[0]],
        positives_above[:, n_positives_above[1]],
    )
    negatives_before = clips_above[:, first] - positives_before
    negatives_through = through_ties - positives_through

    n_positive = positives_above[:, -1]
    n_negative = clips_above[:, -1] - n_positive
    outranked = n_negative[:, None] - (negatives_before + negatives_through) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (positive_weight * outranked).sum(axis=1) / (n_positive * n_negative)
        precision = np.where(positive_weight > 0, positives_through / through_ties, 0)
        ap = (positive_weight * precision).sum(axis=1) / n_positive
    undefined = (n_positive == 0) | (n_negative == 0)
    return np.where(undefined, np.nan, auc), np.where(undefined, np.nan, ap)


def _cumulative(weights):
    """Return the sums of the first 0, 1, ... columns, in the weights' own type."""
    nothing = np.zeros((len(weights), 1), weights.dtype)
    return np.concatenate([nothing, np.cumsum(weights, axis=1, dtype=weights.dtype)], axis=1)


def interval(resampled):
    """Return the ends of the 95% percentile interval over resamples (the first axis); NaN where none has a score."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a tag without a score in any resample
        return np.nanpercentile(resampled, [2.5, 97.5], axis=0)


def precision_at(k, labels, probabilities):
    """Return the share of true tags among each clip's k most likely: (clips,), NaN for a clip without tags."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    precision = np.take_along_axis(labels, top, axis=1).mean(axis=1)
    return np.where(labels.any(axis=1), precision, np.nan)


def compare_with_paper(checkpoint):
    """Return the line that puts the paper's figures beside ours, and says if they can be compared."""
    figures = f"the paper: validation {PAPER['validation']:.3f}, test {PAPER['test']:.3f} (MagnaTagATune)"
    if checkpoint["synthetic"]:
        return f"{figures}; the scores above are on SYNTHETIC clips and say nothing about music"
    if not is_papers_experiment(checkpoint):
        return f"{figures}; not comparable: other clips, tags or split"
    return figures


def is_papers_experiment(checkpoint):
    """Return whether clips, tags and split are the paper's."""
    chosen = checkpoint["hyperparameters"]
    sizes = {part: len(ids) for part, ids in checkpoint["clip_ids"].items()}
    papers = {"split": "random", "n_tags": 50, "merge_tags": True}
    return sizes == PAPER_SIZES and all(chosen[name] == value for name, value in papers.items())
