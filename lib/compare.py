"""Two sets of predictions for the same clips: which is better, as far as these clips can tell; and a cheap baseline."""

from typing import NamedTuple

import numpy as np

from lib import scores
from lib.audio import N_FRAMES
from lib.common import progress


class Difference(NamedTuple):
    """How much better one set of predictions is, with the ends of its 95% interval; scalars, or (tags,) each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def is_clear(self):
        return (self.low > 0) | (self.high < 0)


def paired_differences(labels, one, other, groups, n_resamples, seed):
    """Return {"roc_auc": (macro, per tag), "average_precision": (macro, per tag)}: Differences of `one` from `other`.

    Both (clips, tags) of probabilities are scored on the same resamples of whole `groups` of clips, so what makes a
    resample easy or hard for both is no part of the difference.
    """
    resampled = [scores.bootstrap(labels, each, groups, n_resamples, seed) for each in (one, other)]
    differences = {}
    for name in ("roc_auc", "average_precision"):
        values = [getattr(scores, name)(labels, each) for each in (one, other)]
        resamples = [getattr(each, name) for each in resampled]
        per_tag = Difference(values[0] - values[1], *scores.interval(resamples[0] - resamples[1]))
        macro = scores.macro(values[0]) - scores.macro(values[1])
        macro_resamples = scores.macro(resamples[0]) - scores.macro(resamples[1])
        differences[name] = Difference(macro, *scores.interval(macro_resamples)), per_tag
    return differences


def band_statistics(dump):
    """Return the mean and standard deviation over time of each clip's mel bands: (clips, 256) float64."""
    sums, squares = dump.band_sums()
    mean = sums / N_FRAMES
    return np.concatenate([mean, np.sqrt(np.maximum(squares / N_FRAMES - mean**2, 0))], axis=1)


def baseline_predictions(statistics, labels, training_rows):
    """Return the probabilities of a logistic regression on each clip's `band_statistics`: (clips, tags).

    Trained on the training clips alone; a tag that all of those agree on is predicted as they have it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features = StandardScaler().fit(statistics[training_rows]).transform(statistics)
    probabilities = np.empty(labels.shape)
    bar = progress(range(labels.shape[1]), "baseline", unit="tag", delay=1, leave=False)
    for tag in bar:
        label = labels[training_rows, tag]
        if np.ptp(label) == 0:
            probabilities[:, tag] = label[0]
            continue
        model = LogisticRegression(C=0.01, max_iter=1000).fit(features[training_rows], label)
        probabilities[:, tag] = model.predict_proba(features)[:, 1]
    return probabilities
