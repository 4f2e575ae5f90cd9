"""MagnaTagATune's tags: read the annotations, merge synonyms, keep the most frequent.

Run as a script, prints the tags that training would use, with their counts.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from lib.common import ROOT, Count, FromPython, InputError, run


@dataclass(frozen=True)
class Settings(FromPython):
    data: Path = ROOT / "data"  # folder with tags.csv or annotations_final.csv
    n_tags: Count = 50  # how many of the most frequent tags to keep
    merge_tags: bool = True  # merge synonyms first


# The paper's groups. A merged tag is positive where any of its group is, and takes the group's first name.
# "female vocal" belongs to no group: the original left it out, and it stays a tag of its own.
SYNONYMS = (
    ("beat", "beats"),
    ("chant", "chanting"),
    ("choir", "choral"),
    ("classical", "clasical", "classic"),
    ("drum", "drums"),
    ("electro", "electronic", "electronica", "electric"),
    ("fast", "fast beat", "quick"),
    ("female", "female singer", "female singing", "female vocals", "female voice", "woman", "woman singing", "women"),
    ("flute", "flutes"),
    ("guitar", "guitars"),
    ("hard", "hard rock"),
    ("harpsichord", "harpsicord"),
    ("heavy", "heavy metal", "metal"),
    ("horn", "horns"),
    ("india", "indian"),
    ("jazz", "jazzy"),
    ("male", "male singer", "male vocal", "male vocals", "male voice", "man", "man singing", "men"),
    ("no beat", "no drums"),
    ("no singer", "no singing", "no vocal", "no vocals", "no voice", "no voices", "instrumental"),
    ("opera", "operatic"),
    ("orchestra", "orchestral"),
    ("quiet", "silence"),
    ("singer", "singing"),
    ("space", "spacey"),
    ("strange", "weird"),
    ("string", "strings"),
    ("synth", "synthesizer"),
    ("violin", "violins"),
    ("vocal", "vocals", "voice", "voices"),
)


class Annotations(NamedTuple):
    """One row per clip, in the table's order."""

    ids: np.ndarray  # (clips,) int64
    labels: np.ndarray  # (clips, tags) uint8, 0 or 1
    tag_names: list
    mp3_paths: list  # relative to the data folder


def main(settings=None):
    settings = settings or tyro.cli(Settings, description=__doc__)
    annotations = read_annotations(annotations_file(settings.data))
    labels, names = select_tags(annotations.labels, annotations.tag_names, settings.n_tags, settings.merge_tags)
    print(f"{len(labels):,} clips, {len(annotations.tag_names)} tags; the {len(names)} that training would use:")
    for rank, (name, count) in enumerate(zip(names, labels.sum(axis=0, dtype=int)), start=1):
        print(f"{rank:4}  {name:<24}{count:>8,}{count / len(labels):>8.1%}")
    print(f"{np.sum(~labels.any(axis=1)):,} clips have none of these tags")


def annotations_file(data):
    """Return the path of the annotations: tags.csv or, where that is missing, MagnaTagATune's annotations_final.csv."""
    tags, annotations_final = data / "tags.csv", data / "annotations_final.csv"
    return annotations_final if annotations_final.exists() and not tags.exists() else tags


def read_annotations(path):
    """Read a table in MagnaTagATune's format: tab separated, `clip_id`, one column per tag, `mp3_path`.

    Quotes and a byte-order mark are optional, and lines may end in LF or CR LF. Raises InputError with the line number
    of a row with the wrong number of columns, a value other than 0 or 1, or a repeated or non-integer clip id.
    """
    header, rows = _read_table(path)
    tag_names, labels = header[1:-1], np.zeros((len(rows), len(header) - 2), np.uint8)
    for row, (clip, (line, (_, *values, mp3_path))) in enumerate(rows.items()):
        for name, value in zip(tag_names, values):
            if value not in ("0", "1"):
                raise InputError(f"{path}, line {line}: {name!r} is {value!r}; it must be 0 or 1")
        if not mp3_path or "\0" in mp3_path:
            raise InputError(f"{path}, line {line}: clip {clip} has no mp3_path")
        labels[row] = [value == "1" for value in values]
    return Annotations(np.array(list(rows), np.int64), labels, tag_names, [fields[-1] for _, fields in rows.values()])


class ClipInfo(NamedTuple):
    """Where a clip was cut from. Several albums share titles, so a track is identified by all four values."""

    artist: str
    album: tuple  # (artist, album)
    track: tuple  # (artist, album, track number, title)


def clip_info_of(data, ids):
    """Return the ClipInfo of each clip id, from clip_info_final.csv in `data`. Raises InputError if that lacks one."""
    path = data / "clip_info_final.csv"
    header, rows = _read_table(path)
    columns = ("artist", "album", "track_number", "title")
    if not set(columns) <= set(header):
        raise InputError(f"{path}, line 1: must have the columns {', '.join(columns)}")
    if missing := [clip for clip in ids.tolist() if clip not in rows]:
        raise InputError(f"{path}: lacks {len(missing):,} of the {len(ids):,} clips, the first of them {missing[0]}")
    places = [header.index(name) for name in columns]
    tracks = (tuple(rows[clip][1][place] for place in places) for clip in ids.tolist())
    return [ClipInfo(artist=track[0], album=track[:2], track=track) for track in tracks]


def _read_table(path):
    """Return a tab-separated table's header, clip_id to mp3_path, and its rows, {clip id: (line number, fields)}."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            lines = [(reader.line_num, fields) for fields in reader if fields]
    except FileNotFoundError:
        either = f"{path}, or annotations_final.csv" if path.name == "tags.csv" else path
        remedy = "run get_data.py, write it as README.md says, or name another folder with --data"
        raise InputError(f"{either}: not found; {remedy}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a tab-separated text table ({error}); replace it") from error
    if len(lines) < 2:
        raise InputError(f"{path}: contains no clips")
    (_, header), *lines = lines
    if len(header) < 3 or header[0] != "clip_id" or header[-1] != "mp3_path":
        expected = "no header; it must begin with clip_id and end with mp3_path"
        raise InputError(f"{path}, line 1: {expected if header[1:] else 'no tabs between columns'}")
    if wrong := {name for name in header if not name or header.count(name) > 1}:
        raise InputError(f"{path}, line 1: every column needs a unique name ({', '.join(map(repr, wrong))})")
    rows = {}
    for line, fields in lines:
        if len(fields) != len(header):
            raise InputError(f"{path}, line {line}: {len(fields)} columns, but the header has {len(header)}")
        clip = fields[0]
        if not (clip.isascii() and clip.isdecimal() and len(clip) <= 18):  # 18 digits always fit an int64
            raise InputError(f"{path}, line {line}: clip_id is {clip!r}; it must be an integer, 0 or more")
        if int(clip) in rows:
            raise InputError(f"{path}, line {line}: clip {clip} already appears on line {rows[int(clip)][0]}")
        rows[int(clip)] = line, fields
    return header, rows


def synonyms_among(tag_names):
    """Return {merged tag: its names in a table} of those SYNONYMS of which it has two or more, as MagnaTagATune has."""
    found = {group[0]: [name for name in group if name in tag_names] for group in SYNONYMS}
    return {merged: names for merged, names in found.items() if len(names) > 1}


def merge_synonyms(labels, tag_names):
    """Return (labels, tag_names) with the tags of each group of synonyms_among them merged into one by OR.

    A merged tag takes the place of the first of its group in the table, and the group's first name.
    """
    group_name = {name: merged for merged, names in synonyms_among(tag_names).items() for name in names}
    columns = {}  # of each merged tag
    for column, name in enumerate(tag_names):
        columns.setdefault(group_name.get(name, name), []).append(column)
    return np.column_stack([labels[:, group].max(axis=1) for group in columns.values()]), list(columns)


def top_tags(labels, tag_names, n_tags):
    """Return (labels, tag_names) of the `n_tags` tags, or all, with the most positives; equal ones in column order."""
    order = np.argsort(-labels.sum(axis=0, dtype=np.int64), kind="stable")[:n_tags]
    return labels[:, order], [tag_names[column] for column in order]


def select_tags(labels, tag_names, n_tags, merge):
    """Return (labels, tag_names) that training uses: synonyms merged if `merge`, then the most frequent."""
    if merge:
        labels, tag_names = merge_synonyms(labels, tag_names)
    return top_tags(labels, tag_names, n_tags)


if __name__ == "__main__":
    run(main)
