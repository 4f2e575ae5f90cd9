"""Which clips train, validate and test, and the batches of an epoch."""

import numpy as np

from lib.common import InputError
from lib.published import PAPER_SIZES
from tags import clip_info_of


def divide_clips(settings, dump, labels, rng):
    """Return {"train": rows, "validation": rows, "test": rows} of the dump by `settings.split`.

    `rng`, a numpy.random.RandomState, draws what is random; with `settings.split_seed`, only the order of the training
    clips: which clips they are, that seed draws, after the weights of the paper's network. `settings.untagged` keeps
    rows of `labels`, (clips, tags), without a tag. Raises InputError if a part is empty.
    """
    if settings.split == "folder":
        split, given = split_by_folder, (dump.mp3_paths,)
    else:
        sizes = split_sizes(len(dump), settings.train_size, settings.validation_size)
        split, given = split_clips, (len(dump), *sizes)
        if settings.split == "artist":
            artists = [clip.artist for clip in clip_info_of(settings.data, dump.ids)]
            split, given = split_by_artist, (np.array(artists), *sizes)
    train, *held_out = split(*given, rng)
    if settings.split_seed is not None:
        order = np.concatenate([train, np.random.RandomState(settings.seed).permutation(np.concatenate(held_out))])
        split_rng = np.random.RandomState(settings.split_seed)
        split_rng.normal(size=2_925_580)  # the weights of the paper's network with 50 tags
        train, *held_out = split(*given, split_rng)
        train = order[np.isin(order, train)]
    kept = labels.any(axis=1) | settings.untagged
    parts = {name: rows[kept[rows]] for name, rows in zip(("train", "validation", "test"), (train, *held_out))}
    if empty := [name for name, rows in parts.items() if not len(rows)]:
        raise InputError(f"--split {settings.split}: leaves no clips for {' and '.join(empty)}")
    return parts


def split_sizes(n_clips, train_size, validation_size):
    """Return (train, validation) sizes; fewer clips keep the paper's proportions. Raises InputError for empty parts."""
    given, free, rest = [], sum(PAPER_SIZES), n_clips  # sizes in words; the paper's clips of the others, and ours
    for part, size, papers in zip(("train", "validation"), (train_size, validation_size), PAPER_SIZES):
        if size != papers:
            given.append(f"--{part}-size {size:,}")
            free, rest = free - papers, rest - size
    fits = n_clips > train_size + validation_size if given else n_clips >= sum(PAPER_SIZES)
    if not fits and len(given) < 2:
        print(f"note: {n_clips:,} clips are too few for the paper's sizes; those not given keep its proportions")
        if validation_size == PAPER_SIZES[1]:
            validation_size = max(1, round(rest * validation_size / free))
        if train_size == PAPER_SIZES[0]:
            train_size = min(round(rest * train_size / free), n_clips - validation_size - 1)
    if not 0 < train_size < n_clips - validation_size:
        raise InputError(f"{' and '.join(given) or 'the split'}: leaves too few of {n_clips:,} clips; choose fewer")
    return train_size, validation_size


def split_clips(n_clips, train_size, validation_size, rng):
    """Return (train, validation, test) rows, as the original draws them from `rng`, a numpy.random.RandomState."""
    rows = np.arange(n_clips)
    rng.shuffle(rows)
    test_end = n_clips - train_size
    return rows[test_end:], rows[:validation_size], rows[validation_size:test_end]


def split_by_folder(mp3_paths, rng):
    """Return (train, validation, test) rows: folders 0-b, c and d-f, as most other papers divide MagnaTagATune."""
    first = np.array([path.split("/")[0] for path in mp3_paths])
    if unexpected := sorted(set(first.tolist()) - set("0123456789abcdef")):
        raise InputError(f"--split folder: needs MagnaTagATune's folders 0 to f, but there is {unexpected[0]!r}")
    train = np.flatnonzero(first < "c")
    rng.shuffle(train)
    return train, np.flatnonzero(first == "c"), np.flatnonzero(first > "c")


def split_by_artist(artists, train_size, validation_size, rng):
    """Return (train, validation, test) rows such that no artist is in two of them.

    Artists are taken in an order drawn from `rng`; each goes to validation if it still fits there, else to the
    test if it fits there, else to training.
    """
    names, artist_of_clip, n_clips_of = np.unique(artists, return_inverse=True, return_counts=True)
    room = {"validation": validation_size, "test": len(artists) - train_size - validation_size, "train": np.inf}
    part_of = np.empty(len(names), object)
    for artist in rng.permutation(len(names)):
        part_of[artist] = next(part for part, free in room.items() if n_clips_of[artist] <= free)
        room[part_of[artist]] -= n_clips_of[artist]
    parts = [np.flatnonzero(part_of[artist_of_clip] == part) for part in ("train", "validation", "test")]
    rng.shuffle(parts[0])
    return parts


def epoch_batches(train, batch_size, super_batch_size):
    """Return the rows of each step of an epoch: `train` in its order, in batches that never cross super-batches."""
    super_batches = [train[first : first + super_batch_size] for first in range(0, len(train), super_batch_size)]
    return [rows[first : first + batch_size] for rows in super_batches for first in range(0, len(rows), batch_size)]
