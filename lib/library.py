"""Tag files and folders of music: print a line for each, draw pictures, or write a table that can be resumed."""

import codecs
import contextlib
import csv
import io
import json
import os
import sys
from collections import defaultdict

import numpy as np
import torch
from joblib import cpu_count

from lib.audio import CLIP_SAMPLES, HOP_LENGTH, SAMPLE_RATE, load, log_mel
from lib.common import InputError, lock, naming, optional_picture, progress, reason, require_writable, whole_file
from lib.dump import hex_crc32
from lib.loader import load_ahead
from lib.page import write_song
from lib.tagger import Tagger, audio_files

LONGEST_NAME = 50  # characters of a file's name in its picture's: 200 bytes at most, of the usual 255
ELSEWHERE = "--output names another folder"
MOST_THREADS = 8  # files that are tagged at a time; each may be hours long


def tag_files(settings, checkpoint_path):
    """Print the tags of the music of --tag, or write a table of them; return the exit status, 1 after an error."""
    for path in settings.tag:
        if not os.path.exists(path):
            spaces = "; a name with spaces needs quotation marks" * (len(settings.tag) > 1)
            raise InputError(f"{path}: no such file or folder{spaces}")
    folder = settings.output or checkpoint_path.parent  # of pictures and pages
    tagger = Tagger(checkpoint_path, settings.device, settings.precision)
    for note in tagger.cautions:
        print(note, file=sys.stderr)
    if settings.taggram or settings.page:
        require_writable(folder, ELSEWHERE)
    files, n_others = audio_files(settings.tag)
    if n_others:
        print(f"note: {n_others:,} file(s) of other formats left out", file=sys.stderr)
    if settings.csv:
        # A word first: a spreadsheet would take some hexadecimal digits for a number
        checkpoint = f"CRC-32 {hex_crc32(checkpoint_path.read_bytes())}"
        return min(1, tag_library(settings.csv.resolve(), tagger, checkpoint, files))
    if not settings.json:
        print("note: * marks the scores that reach their tag's threshold", file=sys.stderr)
    try:
        return min(1, print_tags(settings, tagger, folder, files))
    except BrokenPipeError:  # the reader of the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tagged(tagger, files):
    """Yield (path, samples, {tag: score}, note) for each file; without tags, the note says why."""

    def tag(path):
        try:
            if os.path.isdir(path):
                raise InputError("a folder without audio files, or one that can't be listed")
            samples, note = load(path)
            return path, samples, tagger.tags(samples), note
        except Exception as error:  # one unreadable file, whatever is wrong with it, must not stop the others
            return path, None, {}, reason(error).removeprefix(f"{path}: ")

    if len(files) > 1:
        torch.set_num_threads(1)  # each thread has its own file
    n_threads = min(cpu_count(), MOST_THREADS)
    return load_ahead(tag, files, n_ahead=n_threads, n_threads=n_threads)


def print_tags(settings, tagger, folder, files):
    """Print the first tags of each file, draw what is asked for into `folder`; return the number of errors."""
    found, n_errors = {}, 0
    try:
        for path, samples, tags, note in tagged(tagger, files):
            if note:
                print(f"{'note' if tags else 'error'}: {path}: {note}", file=sys.stderr)
            if not tags:
                n_errors += 1
                continue
            found[str(path)] = tags = dict(list(tags.items())[: settings.top])
            if not settings.json:
                above = tagger.above(tags)
                listed = (f"{tag} {score:.2f}{'*' * (tag in above)}" for tag, score in tags.items())
                print(f"{path}: {', '.join(listed)}")
            if settings.taggram or settings.page:
                with optional_picture(path):
                    show_over_time(settings, tagger, samples, tags, path, picture_of(path, folder))
    finally:  # after Ctrl-C too
        if settings.json:
            print(json.dumps(found, indent=1, allow_nan=False))
    return n_errors


def tag_library(table, tagger, checkpoint, files):
    """Tag the files that the table lacks, appending a row after each; return how many got no tags."""
    # The last column is never empty: some spreadsheets leave out empty cells at the end of a row
    header = ["path", "seconds", "tags", "note", *tagger.tag_names, "bytes", "modified", "checkpoint"]
    stamps = {path: stamp_of(path) for path in map(place_of, files)}
    n_errors, encoding = 0, {"newline": "", "errors": "surrogateescape"}
    with lock(table):
        found = read_table(table, header, checkpoint) if table.exists() else []
        n_moved = follow_moved(found, stamps)
        rows = [row for row in found if row[-3:-1] == stamps.get(row[0], row[-3:-1])]
        with whole_file(table, "w", encoding="utf-8-sig", **encoding) as file:  # spreadsheets need the mark for UTF-8
            csv.writer(file).writerows([header, *rows])
        done = {row[0] for row in rows}
        missing, n_gone = [path for path in stamps if path not in done], sum(not os.path.exists(path) for path in done)
        counts = {"moved": n_moved, "changed": len(found) - len(rows), "in rows of files that are gone": n_gone}
        more = "".join(f"; {n_rows:,} {what}" for what, n_rows in counts.items() if n_rows)
        print(f"{table}: already has {len(stamps) - len(missing):,} of {len(stamps):,} files{more}")
        with naming(table), open(table, "a", encoding="utf-8", **encoding) as file:
            for path, samples, tags, note in progress(tagged(tagger, missing), "tagging", len(missing), unit="file"):
                n_errors += not tags
                columns = [f"{len(samples) / SAMPLE_RATE:.1f}", "; ".join(tagger.above(tags))] if tags else ["", ""]
                scores = [f"{tags[name]:.6f}" if tags else "" for name in tagger.tag_names]
                csv.writer(file).writerow([path, *columns, note, *scores, *stamps[path], checkpoint])
                file.flush()
    print(f"{table}: {len(missing):,} rows added, {n_errors:,} of them without tags (the column note says why)")
    return n_errors


def place_of(path):
    """Return the absolute path of a file, the same through whichever links its folder is reached."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def stamp_of(path):
    """Return a file's size in bytes and the time of its last change, as text: they reveal one that has changed."""
    status = os.stat(path) if os.path.exists(path) else None
    return [str(status.st_size), f"{status.st_mtime_ns // 10**6} ms"] if status else ["", ""]


def read_table(table, header, checkpoint):
    """Return a table's rows, but a cut-off one, as written here or by a spreadsheet. Raises InputError for another."""
    content = table.read_bytes()
    with contextlib.suppress(csv.Error, ValueError):  # of a file that is no table, or an empty one
        # Our own may have file names that are not UTF-8
        text = content.decode("utf-8-sig", "surrogateescape" if content.startswith(codecs.BOM_UTF8) else "strict")
        for separator in ",;\t":
            found, *rows = filter(any, csv.reader(io.StringIO(text, newline=""), delimiter=separator))
            if rows and (not text.endswith(("\n", "\r")) or len(rows[-1]) != len(header)):
                rows.pop()
            if found == header and all(len(row) == len(header) and row[-1] == checkpoint for row in rows):
                return rows
    raise InputError(f"{table}: not a table of this checkpoint, in UTF-8; move it away, or give --csv another name")


def follow_moved(rows, stamps):
    """Give the rows of files that have moved their new paths; return how many.

    A file has moved if its row's path is gone, and one other file, without a row, has the same name and stamp.
    """
    gone, come = defaultdict(list), defaultdict(list)
    for row in rows:
        if not os.path.exists(row[0]):
            gone[os.path.basename(row[0]), *row[-3:-1]].append(row)
    for path in stamps.keys() - {row[0] for row in rows}:
        come[os.path.basename(path), *stamps[path]].append(path)
    moved = [(gone[file], come[file]) for file in gone if len(gone[file]) == len(come[file]) == 1]
    for (row,), (path,) in moved:
        row[0] = path
    return len(moved)


def picture_of(path, folder):
    """Return the path of a file's taggram: the end of its name, and digits that tell it from others of that name."""
    return folder / f"taggram_{path.name[-LONGEST_NAME:]}_{hex_crc32(os.fsencode(place_of(path)))}.png"


def show_over_time(settings, tagger, samples, tags, path, picture):
    """Show a file's spectrogram above its `tags`, {tag: score}, over time: in a picture, and in a page beside it."""
    from lib import figures  # matplotlib takes a while to import

    spectrogram, edges, scores = tags_over_time(tagger, samples, tags)
    thresholds = {tag: tagger.thresholds[tag] for tag in tags}
    if settings.taggram:
        title = path.name.encode(errors="backslashreplace").decode()  # a file name need not be UTF-8
        figures.taggram(picture, spectrogram, edges, scores, thresholds, title, tagger.synthetic)
        print(f"  {picture}", file=sys.stderr)
    if settings.page:
        page = picture.with_suffix(".html")
        write_song(page, path, tagger, tags, figures.spectrogram(spectrogram), edges, scores)
        print(f"  {page}", file=sys.stderr)


def tags_over_time(tagger, samples, tags):
    """Return (spectrogram (128, frames), edges (columns + 1,) in seconds, scores (columns, tags)) of a recording.

    Each column, 120 at most and at least a second apart, is the network's answer for the 29.1 s around it. For that,
    the first and the last 14.6 s of the recording are repeated; mirrored, notes that rise would fall.
    """
    step = max(SAMPLE_RATE, -(-len(samples) // 120))
    centres = np.arange(min(step, len(samples)) // 2, len(samples), step)
    half = CLIP_SAMPLES // 2
    extended = np.concatenate([np.resize(samples[:half], half), samples, np.resize(samples[-half:], half)])
    clips = [extended[centre : centre + CLIP_SAMPLES] for centre in centres]
    scores = tagger.scores(clips)[:, [tagger.tag_names.index(tag) for tag in tags]]
    spectrogram = log_mel(samples, n_frames=1 + len(samples) // HOP_LENGTH)
    ends = spectrogram.shape[1] * HOP_LENGTH / SAMPLE_RATE
    return spectrogram, np.array([0, *(centres[1:] + centres[:-1]) / 2 / SAMPLE_RATE, ends]), scores
