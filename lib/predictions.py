"""Predictions that are kept as tables: of each clip, and of the clips that are worth a listen."""

import numpy as np

from lib.common import write_table

WORTH_A_LISTEN = 10  # clips of each tag, in each direction


def write_predictions(path, clips, tag_names, probabilities):
    """Write a row for each of `clips`, (clip id, mp3 path), with its probabilities: (clips, tags).

    They have nine digits, more than any score needs.
    """
    rows = [(*clip, *(f"{value:.9g}" for value in values)) for clip, values in zip(clips, probabilities)]
    write_table(path, [("clip_id", "mp3_path", *tag_names), *rows])


def write_worth_a_listen(path, clips, tag_names, labels, probabilities):
    """Write the clips on which annotators and network disagree most about each tag, in both directions.

    MagnaTagATune's labels come from a game and miss much. `labels` and `probabilities` are (clips, tags).
    """
    rows = [("tag", "annotators", "network", "clip_id", "mp3_path")]
    for name, label, values in zip(tag_names, labels.T, probabilities.T):
        for annotated in (0, 1):
            candidates = np.flatnonzero(label == annotated)
            most = np.argsort(-np.abs(values[candidates] - annotated), kind="stable")[:WORTH_A_LISTEN]
            rows += [(name, annotated, f"{values[clip]:.4f}", *clips[clip]) for clip in candidates[most]]
    write_table(path, rows)
