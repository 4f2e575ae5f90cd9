"""What to hold a network's scores against: loudness alone, the names of artists and albums alone, repeated labels."""

import numpy as np

from lib.audio import N_FRAMES
from lib.common import progress
from lib.scores import macro

# Inverse strength of regularisation: best of 0.001, 0.003, 0.01, 0.03 and 0.1 on validation, 900 clips of real music
BASELINE_C = 0.03


def band_features(sums, squares):
    """Return the mean and the standard deviation of each clip's mel bands, (clips, 256), from Dump.verify."""
    mean = sums / N_FRAMES
    return np.hstack([mean, np.sqrt(np.maximum(squares / N_FRAMES - mean**2, 0))])


def baseline_predictions(features, labels, train):
    """Return the predictions, (clips, tags), of logistic regressions that were trained on the rows `train` alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features = StandardScaler().fit(features[train]).transform(features)
    predictions = np.tile(labels[train[0]].astype(float), (len(labels), 1))  # of a tag that never varies in training
    for column, label in enumerate(progress(labels.T, "baseline", unit="tag", leave=False)):
        if np.ptp(label[train]):
            model = LogisticRegression(C=BASELINE_C, max_iter=1000).fit(features[train], label[train])
            predictions[:, column] = model.predict_proba(features)[:, 1]
    return predictions


def origins_of(info):
    """Return {"track": each clip's as text, (clips,), "album": ..., "artist": ...} from its tags.ClipInfo."""
    return {kind: np.array([str(getattr(clip, kind)) for clip in info]) for kind in ("track", "album", "artist")}


def names_only_predictions(labels, train, origins):
    """Return the predictions, (clips, tags), that nothing but the labels of the rows `train` gives to all clips.

    They are the means over a clip's album, shrunk towards those over its artist, and these towards those over all: the
    mean above weighs like one more clip. (With 0.3 to 10 such clips, MagnaTagATune's ROC-AUC stays within 0.001.)
    """
    predictions = np.tile(labels[train].mean(axis=0), (len(labels), 1))
    for kind in ("artist", "album"):
        sums, n_clips = sums_of_same(origins[kind], labels, train)
        predictions = (sums + predictions) / (n_clips + 1)
    return predictions


def repeatability(labels, tracks):
    """Return, over the clips with a tag, the mean share of their track's other clips that have it too: (tags,)."""
    sums, n_clips = sums_of_same(tracks, labels, slice(None))
    with np.errstate(invalid="ignore"):  # a track of one clip has no others: NaN
        return macro(np.where(labels, (sums - labels) / (n_clips - 1), np.nan).T)


def sums_of_same(names, labels, rows):
    """Return the sums of the labels, (clips, tags), and the number, (clips, 1), of the `rows` with a clip's name."""
    groups, group = np.unique(names, return_inverse=True)
    sums, n_clips = np.zeros((len(groups), labels.shape[1])), np.bincount(group[rows], minlength=len(groups))
    np.add.at(sums, group[rows], labels[rows])
    return sums[group], n_clips[group, None]
