"""Predictions as tables: of a dump's clips, of the clips that are worth a listen, of a library of songs."""

import contextlib
import csv
import io
import os

import numpy as np

from lib.common import InputError, lock, whole_file

WORTH_A_LISTEN = 10  # clips of each tag, in each direction


def write_predictions(path, clips, tag_names, probabilities):
    """Write a row for each of `clips`, (clip id, mp3 path), with its probabilities: (clips, tags).

    They have nine digits, more than any score needs.
    """
    rows = [(*clip, *(f"{value:.9g}" for value in values)) for clip, values in zip(clips, probabilities)]
    _write(path, [("clip_id", "mp3_path", *tag_names), *rows])


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
    _write(path, rows)


def _write(path, rows):
    with whole_file(path, "w", encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)


@contextlib.contextmanager
def continued_table(path, files, tag_names):
    """Open the table of a library; yield (files that it lacks, a function that adds the row of a file).

    Each row is in the table once it is added. A row that a kill cut off is dropped, and so is that of a file which has
    changed since. Raises InputError if `path` is another table, or another process is at work on it.
    """
    header = ["path", "seconds", *tag_names, "bytes", "modified", "error"]
    with lock(path.with_name(f".{path.name}.lock"), f"{path}: another process is at work on it; wait for its end"):
        text = ""
        if path.exists():
            with open(path, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
                text = file.read()
        rows = list(csv.reader(io.StringIO(text[: text.rfind("\r\n") + 2], newline="")))
        if text and rows[:1] != [header]:
            raise InputError(f"{path}: not a table of these tags; move it away, or give --csv another name")
        stamps = {str(file): _stamp(file) for file in files}
        rows = [row for row in rows[1:] if row[-3:-1] == stamps.get(row[0], row[-3:-1])]
        _write(path, [header, *rows])
        done = {row[0] for row in rows}
        with open(path, "a", encoding="utf-8", newline="", errors="surrogateescape") as file:
            table = csv.writer(file)

            def add(path, seconds, probabilities, error=""):
                values = [f"{value:.6f}" for value in probabilities] or [""] * len(tag_names)
                table.writerow([path, seconds, *values, *stamps[str(path)], error])
                file.flush()

            yield [file for file in files if str(file) not in done], add


def _stamp(file):
    """Return size and time of a file, by which a change is noticed, as the table has them."""
    try:
        facts = os.stat(file)
        return [str(facts.st_size), f"{facts.st_mtime:.3f}"]
    except OSError:
        return ["", ""]
