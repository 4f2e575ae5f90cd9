"""Music to tag: files and folders, one after another, into lines, pictures or a table that is continued."""

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path

import torch

from lib.audio import HOP_LENGTH, SAMPLE_RATE, log_mel, promised_seconds
from lib.common import InputError, lock, progress, reason, whole_file
from lib.dump import crc_of_file
from lib.feeder import load_ahead
from lib.tagger import Tagger, audio_files, silence_decoders, taggram, windows

THREADS = os.cpu_count() or 1  # decode as many files ahead of the network
INEXACT_SECONDS = 0.5  # by which an intact file may be shorter than its header promises, as some mp3 files are


def tag_files(settings, checkpoint_path):
    """Print the most likely tags of each file; return the exit status, 1 if one could not be tagged or drawn."""
    if not settings.tag:
        raise InputError("--tag: needs audio files, or folders of them, after it")
    silence_decoders()
    tagger = Tagger(checkpoint_path, settings.device, settings.precision)
    if tagger.synthetic and not settings.json:
        print("note: this checkpoint was trained on SYNTHETIC clips; its tags for music mean little")
    files, problems = audio_files(settings.tag)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)

    if settings.csv:
        return 1 if tag_library(settings.csv, tagger, crc_of_file(checkpoint_path), files) + len(problems) else 0

    found, pictures, n_errors = {}, {}, len(problems)
    try:
        for path, samples, tags in tagged(tagger, files):
            try:
                if isinstance(tags, Exception):
                    raise tags
                note = missing_end(path, samples)
                if note:
                    print(f"note: {path}: {note}", file=sys.stderr)
                found[str(path)] = tags = dict(list(tags.items())[: settings.top])
                if not settings.json:
                    print(f"{path}: {', '.join(f'{tag} {probability:.2f}' for tag, probability in tags.items())}")
                if settings.taggram:
                    draw_taggram(tagger, samples, settings.top, path, checkpoint_path.parent, pictures)
            except BrokenPipeError:  # nobody reads the results any more
                raise
            except Exception as error:
                n_errors += 1
                print(f"error: {path}: {reason(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    finally:  # after Ctrl-C too
        if settings.json:
            print(json.dumps(found, indent=1, allow_nan=False))
    return 1 if n_errors else 0


def tagged(tagger, files):
    """Yield (path, samples, {tag: probability}) for each file; an exception in place of the tags if it has none."""

    def tag(path):
        try:
            samples = tagger.samples(path)
            return samples, tagger.tags(tagger.spectrograms(windows(samples)))
        except Exception as error:  # whatever one file does never costs the others
            return None, error

    if len(files) > 1:
        torch.set_num_threads(1)  # each thread has a file of its own
    for path, (samples, tags) in zip(files, load_ahead(tag, files, THREADS, THREADS)):
        yield path, samples, tags


def tag_library(table, tagger, checkpoint, files):
    """Tag the files that are not in the table yet, one row for each as it is done; return how many got no tags."""
    n_errors = 0
    with continued_table(table, files, tagger.tag_names, checkpoint) as (missing, add):
        print(f"{table}: {len(files) - len(missing):,} of {len(files):,} files are in it already")
        for path, samples, tags in progress(tagged(tagger, missing), "tagging", len(missing), unit="file"):
            if isinstance(tags, Exception):
                n_errors += 1
                add(path, "", [], reason(tags).removeprefix(f"{path}: "))
            else:
                seconds = f"{len(samples) / SAMPLE_RATE:.1f}"
                add(path, seconds, [tags[name] for name in tagger.tag_names], missing_end(path, samples))
    print(f"{table}: {len(missing):,} rows added, {n_errors:,} of them without tags (the last column says why)")
    return n_errors


def missing_end(path, samples):
    """Return that an audio file is shorter than its header promises, if it is."""
    promised, read = promised_seconds(path), len(samples) / SAMPLE_RATE
    if read > promised - INEXACT_SECONDS:
        return ""
    return f"only the first {read:.1f} s of {promised:.1f} s could be read"


def draw_taggram(tagger, samples, n_tags, path, folder, pictures):
    """Draw the log-mel spectrogram of an audio file above its most likely tags over time, into `folder`.

    The picture has the file's name; with as many of the file's folders before it, if `pictures`, name -> file, has the
    name for another file.
    """
    from lib import figures

    file = Path(os.path.abspath(path))
    for n_parts in range(1, len(file.parts)):
        picture = folder / f"taggram_{'_'.join(file.parts[-n_parts:])}.png"
        if pictures.setdefault(picture, file) == file:
            break
    times, probabilities = taggram(tagger, samples)
    spectrogram = log_mel(samples, n_frames=1 + len(samples) // HOP_LENGTH)
    title = path.name.encode(errors="backslashreplace").decode()  # a file's name need not be UTF-8
    figures.taggram(picture, spectrogram, tagger.tag_names, times, probabilities, title, n_tags, tagger.synthetic)
    print(f"  {picture}", file=sys.stderr)


@contextlib.contextmanager
def continued_table(path, files, tag_names, checkpoint):
    """Open the table of a library; yield (files that it lacks, a function that adds the row of a file).

    Each row is in the table once it is added. A row that a kill cut off is dropped, and so is that of a file which has
    changed since. Raises InputError if `path` is another table, or has rows of another checkpoint than the one whose
    file has the CRC-32 `checkpoint`, or if another process is at work on it.
    """
    header = ["path", "seconds", *tag_names, "bytes", "modified", "checkpoint", "note"]
    with lock(path.with_name(f".{path.name}.lock"), f"{path}: another process is at work on it; wait for its end"):
        encoding = {"newline": "", "errors": "surrogateescape"}
        first_line = io.StringIO(newline="")
        csv.writer(first_line).writerow(header)
        text = first_line.getvalue()
        if path.exists():
            with open(path, encoding="utf-8-sig", **encoding) as file:
                text = file.read()
        if not text.startswith(first_line.getvalue()):
            raise InputError(f"{path}: not a table of these tags; move it away, or give --csv another name")
        stamps = {str(file): _stamp(file) for file in files}
        rows = csv.reader(io.StringIO(text[: text.rfind("\r\n") + 2], newline=""))
        rows = [row for row in rows if row[-4:-2] == stamps.get(row[0], row[-4:-2])][1:]
        if any(row[-2] != checkpoint for row in rows):
            raise InputError(f"{path}: has rows of another checkpoint; move it away, or give --csv another name")
        with whole_file(path, "w", encoding="utf-8-sig", **encoding) as file:  # by its mark a spreadsheet knows UTF-8
            csv.writer(file).writerows([header, *rows])
        done = {row[0] for row in rows}
        with open(path, "a", encoding="utf-8", **encoding) as file:
            table = csv.writer(file)

            def add(path, seconds, probabilities, note=""):
                values = [f"{value:.6f}" for value in probabilities] or [""] * len(tag_names)
                table.writerow([path, seconds, *values, *stamps[str(path)], checkpoint, note])
                file.flush()

            yield [file for file in files if str(file) not in done], add


def _stamp(file):
    """Return size and time of a file, by which a change is noticed, as the table has them."""
    try:
        facts = os.stat(file)
        return [str(facts.st_size), f"{facts.st_mtime:.3f}"]
    except OSError:
        return ["", ""]
