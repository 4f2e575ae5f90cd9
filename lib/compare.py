"""What a network is compared with: a logistic regression on the loudness of the mel bands, or another network."""

import numpy as np

from lib.audio import N_FRAMES
from lib.common import progress
from lib.scores import average_precision, bootstrap, interval, macro, roc_auc

# Strength of regularisation: on validation the best of 0.001, 0.003, 0.01, 0.03 and 0.1, on 900 clips of real music
BASELINE_C = 0.03


def band_features(sums, squares):
    """Return the mean and the standard deviation of each clip's mel bands, (clips, 256), from Dump.band_sums."""
    mean = sums / N_FRAMES
    return np.hstack([mean, np.sqrt(np.maximum(squares / N_FRAMES - mean**2, 0))])


def baseline_predictions(features, labels, train):
    """Return the probabilities, (clips, tags), of logistic regressions that were trained on the rows `train` alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features = StandardScaler().fit(features[train]).transform(features)
    probabilities = np.empty(labels.shape)
    for column, label in enumerate(progress(labels.T, "baseline", unit="tag", leave=False)):
        if np.ptp(label[train]):
            model = LogisticRegression(C=BASELINE_C, max_iter=1000).fit(features[train], label[train])
            probabilities[:, column] = model.predict_proba(features)[:, 1]
        else:
            probabilities[:, column] = label[train[0]]
    return probabilities


def paired_difference(labels, ours, theirs, groups, n_resamples, seed):
    """Return how much better the probabilities `ours` are than `theirs`, (clips, tags) both, on the same clips.

    For "roc_auc" and "average_precision": the macro difference and its 95% interval, and as "tags" those of each tag,
    (tags,) each. Both are scored on the same resamples of whole groups (lib.scores.bootstrap), so that what makes a
    resample hard for both cancels out.
    """
    resampled = [bootstrap(labels, each, groups, n_resamples, seed) for each in (ours, theirs)]
    differences = {}
    for name, score in (("roc_auc", roc_auc), ("average_precision", average_precision)):
        of_tags = score(labels, ours) - score(labels, theirs)
        of_resamples = getattr(resampled[0], name) - getattr(resampled[1], name)
        differences[name] = _with_interval(macro(of_tags), macro(of_resamples))
        differences[name]["tags"] = _with_interval(of_tags, of_resamples)
    return differences


def _with_interval(value, resampled):
    low, high = interval(resampled)
    return {"value": value, "low": low, "high": high}
