"""What a network has to beat: a logistic regression on the loudness of the mel bands."""

import numpy as np

from lib.audio import N_FRAMES
from lib.common import progress

# Inverse strength of regularisation: best of 0.001, 0.003, 0.01, 0.03 and 0.1 on validation, 900 clips of real music
BASELINE_C = 0.03


def band_features(sums, squares):
    """Return the mean and the standard deviation of each clip's mel bands, (clips, 256), from Dump.verify."""
    mean = sums / N_FRAMES
    return np.hstack([mean, np.sqrt(np.maximum(squares / N_FRAMES - mean**2, 0))])


def baseline_predictions(features, labels, train):
    """Return the probabilities, (clips, tags), of logistic regressions that were trained on the rows `train` alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features = StandardScaler().fit(features[train]).transform(features)
    probabilities = np.tile(labels[train[0]].astype(float), (len(labels), 1))  # of a tag that never varies in training
    for column, label in enumerate(progress(labels.T, "baseline", unit="tag", leave=False)):
        if np.ptp(label[train]):
            model = LogisticRegression(C=BASELINE_C, max_iter=1000).fit(features[train], label[train])
            probabilities[:, column] = model.predict_proba(features)[:, 1]
    return probabilities
