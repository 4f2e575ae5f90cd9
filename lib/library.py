"""Tag files and folders of music: print a line for each, draw pictures, or write a table that can be resumed."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count

from lib.audio import CLIP_SAMPLES, HOP_LENGTH, SAMPLE_RATE, load, log_mel
from lib.common import InputError, lock, naming, optional_picture, progress, reason, require_writable, whole_file
from lib.dump import hex_crc32
from lib.loader import load_ahead
from lib.tagger import Tagger, audio_files

LONGEST_NAME = 200  # bytes of a file's name in its picture's; file systems allow 255 in all
ELSEWHERE = "--output names another folder"
MOST_THREADS = 8  # files that are tagged at a time; each may be hours long


def tag_files(settings, checkpoint_path):
    """Print the tags of the music of --tag, or write a table of them; return the exit status, 1 after an error."""
    if not settings.tag:
        raise InputError("--tag: needs audio files, or folders of them, after it")
    if settings.csv and (settings.json or settings.taggram):
        raise InputError("--csv: writes a table and nothing else; leave out --json and --taggram")
    folder = settings.output or checkpoint_path.parent  # of taggrams
    tagger = Tagger(checkpoint_path, settings.device, settings.precision)
    synthetic = "note: this checkpoint was trained on SYNTHETIC clips; its tags for music mean little"
    for note in [synthetic] * tagger.synthetic + tagger.cautions:
        print(note, file=sys.stderr)
    if settings.taggram:
        require_writable(folder, ELSEWHERE)
    files, n_others = audio_files(settings.tag)
    if n_others:
        print(f"note: {n_others:,} file(s) of other formats left out", file=sys.stderr)
    if settings.csv:
        return min(1, tag_library(settings.csv, tagger, hex_crc32(checkpoint_path.read_bytes()), files))
    try:
        return min(1, print_tags(settings, tagger, folder, files))
    except BrokenPipeError:  # the reader of the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tagged(tagger, files):
    """Yield (path, samples, {tag: probability}, note) for each file; without tags, the note says why."""

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
    """Print the most likely tags of each file, draw its taggram into `folder`; return the number of errors."""
    found, pictures, n_errors = {}, {}, 0
    try:
        for path, samples, tags, note in tagged(tagger, files):
            if note:
                print(f"{'note' if tags else 'error'}: {path}: {note}", file=sys.stderr)
            if not tags:
                n_errors += 1
                continue
            found[str(path)] = tags = dict(list(tags.items())[: settings.top])
            if not settings.json:
                print(f"{path}: {', '.join(f'{tag} {probability:.2f}' for tag, probability in tags.items())}")
            if settings.taggram:
                with optional_picture(picture := picture_of(path, folder, pictures)):
                    draw_taggram(tagger, samples, settings.top, path, picture)
    finally:  # after Ctrl-C too
        if settings.json:
            print(json.dumps(found, indent=1, allow_nan=False))
    return n_errors


def tag_library(table, tagger, checkpoint, files):
    """Tag the files that the table lacks, appending a row after each; return how many got no tags."""
    header = ["path", "seconds", *tagger.tag_names, "bytes", "modified", "checkpoint", "note"]
    stamps = dict.fromkeys(map(str, files), ["", ""])  # size and modification time reveal a changed file
    for file in filter(os.path.exists, files):
        stamps[str(file)] = [str(os.path.getsize(file)), f"{os.path.getmtime(file):.3f}"]
    n_errors, encoding = 0, {"newline": "", "errors": "surrogateescape"}
    with lock(table):
        rows = rows_to_keep(table, header, stamps, checkpoint) if table.exists() else []
        with whole_file(table, "w", encoding="utf-8-sig", **encoding) as file:  # spreadsheets need the mark for UTF-8
            csv.writer(file).writerows([header, *rows])
        done = {row[0] for row in rows}
        missing = [file for file in files if str(file) not in done]
        print(f"{table}: already has {len(files) - len(missing):,} of {len(files):,} files")
        with naming(table), open(table, "a", encoding="utf-8", **encoding) as file:
            for path, samples, tags, note in progress(tagged(tagger, missing), "tagging", len(missing), unit="file"):
                n_errors += not tags
                seconds = f"{len(samples) / SAMPLE_RATE:.1f}" if tags else ""
                probabilities = [f"{tags[name]:.6f}" if tags else "" for name in tagger.tag_names]
                csv.writer(file).writerow([path, seconds, *probabilities, *stamps[str(path)], checkpoint, note])
                file.flush()
    print(f"{table}: {len(missing):,} rows added, {n_errors:,} of them without tags (the last column says why)")
    return n_errors


def rows_to_keep(table, header, stamps, checkpoint):
    """Return a table's rows, but a cut-off one and those with other `stamps`. Raises InputError for another table."""
    text = table.read_bytes().decode("utf-8-sig", "surrogateescape")
    text = text[: text.rfind("\r\n") + 2] if text.startswith("path,seconds,") else "another file\n"
    found, *rows = filter(None, csv.reader(io.StringIO(text, newline="")))
    if found != header or any(len(row) != len(header) or row[-2] != checkpoint for row in rows):
        raise InputError(f"{table}: not a table of this checkpoint; move it away, or give --csv another name")
    return [row for row in rows if row[-4:-2] == stamps.get(row[0], row[-4:-2])]


def picture_of(path, folder, pictures):
    """Return the path of a file's taggram: its name, after as many folders as tell it from others in `pictures`."""
    file = Path(os.path.abspath(path))
    for n_parts in range(1, len(file.parts)):
        name = "_".join(file.parts[-n_parts:])
        if len(os.fsencode(name)) > LONGEST_NAME:
            name = f"{hex_crc32(bytes(file))}_{name[-LONGEST_NAME // 4 :]}"  # 4 bytes a character at most
        picture = folder / f"taggram_{name}.png"
        if pictures.setdefault(picture, file) == file:
            break
    return picture


def draw_taggram(tagger, samples, n_tags, path, picture):
    """Draw an audio file's spectrogram above its most likely tags over time.

    Each column, 120 at most and at least a second apart, is the network's answer for the 29.1 s around it; at both ends
    the recording is continued by its mirror image.
    """
    from lib import figures  # matplotlib takes a while to import

    step = max(SAMPLE_RATE, -(-len(samples) // 120))
    centres = np.arange(min(step, len(samples)) // 2, len(samples), step)
    mirrored = np.pad(samples, CLIP_SAMPLES // 2, mode="symmetric")
    clips = [mirrored[centre : centre + CLIP_SAMPLES] for centre in centres]
    times, probabilities = centres / SAMPLE_RATE, tagger.probabilities(clips)
    spectrogram = log_mel(samples, n_frames=1 + len(samples) // HOP_LENGTH)
    title = path.name.encode(errors="backslashreplace").decode()  # a file name need not be UTF-8
    figures.taggram(picture, spectrogram, tagger.tag_names, times, probabilities, title, n_tags, tagger.synthetic)
    print(f"  {picture}", file=sys.stderr)
