"""Turn the annotated clips into log-mel spectrograms: one dump that training maps into memory.

Reads tags.csv, or annotations_final.csv, and the mp3 files beside it. Writes spectrograms_0.npy ...
spectrograms_7.npy, ids.npy, tags.npy, tag_names.npy, mp3_paths.npy, bad_clips.csv and dump.json, which says what the
dump was made from. Interrupted, the same command goes on after the last complete clip.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated

import numpy as np

from lib.audio import CLIP_SAMPLES, CLIP_SECONDS_READ, FRONT_END, N_FRAMES, N_MELS, SAMPLE_RATE
from lib.audio import decode, log_mel, log_mel_spectrogram, resample  # noqa: F401 - one for other programs
from lib.common import ROOT, InputError, Range, lock, naming, progress, reason, run
from lib.common import settings_from_command_line, whole_file, write_table
from lib.dump import CLIP_BYTES, FILES, MANIFEST, ChunkWriter, Dump, crc_of_file
from lib.dump import delete_dump, divide, read_manifest, write_manifest
from tags import annotations_file, read_annotations


@dataclass(frozen=True)
class Settings:
    data: Path = ROOT / "data"  # folder with the annotations and the audio; the dump is written there
    n_chunks: Annotated[int, Range(1, 256)] = 8  # files that the dump is divided into, and worker processes
    chunks: Annotated[tuple[int, ...], Range(0, 255)] = ()  # make only these (several machines, a job array); none: all
    overwrite: bool = False  # delete the dump in the folder and start over


TOO_MANY_BAD = 0.05  # of the clips: a warning, and a non-zero exit status


def main():
    settings = settings_from_command_line(Settings, __doc__)
    table = annotations_file(settings.data)
    annotations = read_annotations(table)
    plan = plan_dump(table, annotations, settings.n_chunks)
    chunks = divide(settings.data, plan["n_clips"], settings.n_chunks)
    chosen = settings.chunks or range(settings.n_chunks)
    if max(chosen) >= settings.n_chunks:
        raise InputError(f"--chunks {max(chosen)}: there are {settings.n_chunks}, numbered from 0")
    with lock(settings.data / MANIFEST):
        manifest = begin_or_continue(settings.data, plan, settings.overwrite)
    if not manifest["complete"]:
        make_chunks([chunks[index] for index in chosen if not chunks[index].is_complete()], plan, annotations.mp3_paths)
    with lock(settings.data / MANIFEST):
        manifest = finish(settings.data, plan, annotations, chunks)
        print_summary(settings.data, manifest, chunks)


def plan_dump(table, annotations, n_chunks):
    """Return what a dump made now would be made from; dumps that differ in any of it are never mixed."""
    return {
        "annotations_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        "n_clips": len(annotations.ids),
        "n_chunks": n_chunks,
        "front_end": FRONT_END,
    }


def begin_or_continue(data, plan, overwrite):
    """Return the manifest: a new dump's, or that of a dump which can be completed or used.

    The caller holds the lock on it. Raises InputError if the dump was made with other settings, or is damaged.
    """
    if overwrite:
        delete_dump(data)
    if not (data / MANIFEST).exists():
        if unexpected := next(data.glob(FILES), None):
            raise InputError(f"{unexpected}: of a dump without {MANIFEST}; move it away or start over with --overwrite")
        write_manifest(data, {**plan, "complete": False})
    manifest = manifest_of(data, plan)
    if manifest["complete"]:
        Dump(data)  # compares the files with the manifest
    return manifest


def manifest_of(data, plan):
    """Return the dump's manifest. Raises InputError if it is of another plan: another process may have begun anew."""
    manifest = read_manifest(data) or {}
    if differing := [key for key in plan if manifest.get(key) != plan[key]]:
        found = ", ".join(f"{key} ({manifest.get(key)} there, {plan[key]} now)" for key in differing)
        raise InputError(f"{data / MANIFEST}: made with other settings: {found}; start over with --overwrite")
    return manifest


def make_chunks(chunks, plan, mp3_paths):
    """Make each of `chunks` in a process of its own, showing a progress bar. `mp3_paths` are those of all clips."""
    import soundfile, soxr, torch, librosa.filters  # noqa: E401, F401 - once, for all processes that are forked below

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    failures = context.SimpleQueue()
    tasks = [(chunk, plan, mp3_paths, failures) for chunk in chunks]
    workers = [context.Process(target=make_chunk, args=task, daemon=True) for task in tasks]
    with progress(total=sum(len(chunk.rows) for chunk in chunks), unit="clip", smoothing=0.05) as bar:
        for worker in workers:
            worker.start()
        while alive := [worker.sentinel for worker in workers if worker.is_alive()]:
            wait(alive, timeout=0.5)
            bar.update(sum(len(chunk.entries()) for chunk in chunks) - bar.n)
    if not failures.empty():
        raise failures.get()
    for worker, chunk in zip(workers, chunks):
        if worker.exitcode:
            near = [mp3_paths[row] for row in chunk.rows[len(chunk.entries()) :][:1]]
            died = f"its process died (exit status {worker.exitcode}) near {near}"
            raise InputError(f"{chunk.file}: {died}; the same command goes on from there")


def make_chunk(chunk, plan, mp3_paths, failures):
    """Worker process: make one chunk, from its first missing clip."""
    import torch

    from lib.parallel import keep_freed_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    torch.set_num_threads(1)
    keep_freed_memory()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the mp3 decoder comments on every damaged frame
    try:
        with naming(chunk.file), lock(chunk.file):
            if manifest_of(chunk.file.parent, plan)["complete"] or chunk.is_complete():
                return  # another process has completed it while this one waited
            writer = ChunkWriter(chunk)
            for row in chunk.rows[writer.n_done :]:
                samples, outcome, why = read_clip(chunk.file.parent / mp3_paths[row])
                writer.append(np.zeros((N_MELS, N_FRAMES)) if samples is None else log_mel(samples), outcome, why)
                if os.getppid() != multiprocessing.parent_process().pid:
                    return  # the parent process was killed
            writer.finish()
    except Exception as error:
        error.add_note(traceback.format_exc())  # for the parent, which gets the error without its traceback
        failures.put(error)


def read_clip(path):
    """Return (samples, outcome, reason) of one clip, whatever its file is; None for samples if it can't be used."""
    try:
        samples = resample(*decode(path, CLIP_SECONDS_READ))
    except Exception as error:  # whatever one file does is that clip's outcome, and never costs the others
        return None, "zero", reason(error)
    if len(samples) < CLIP_SAMPLES:
        return samples, "padded", f"{len(samples) / SAMPLE_RATE:.2f} s long"
    return samples, "", ""


def finish(data, plan, annotations, chunks):
    """Complete the dump if every chunk is there, and return its manifest. The caller holds the lock on that."""
    manifest = manifest_of(data, plan)
    if manifest["complete"] or not all(chunk.is_complete() for chunk in chunks):
        return manifest
    entries = [entry for chunk in chunks for entry in chunk.entries()]
    clips = zip(annotations.ids, annotations.mp3_paths, entries)
    bad = [(clip, mp3_path, outcome, why) for clip, mp3_path, (_, outcome, why) in clips if outcome]
    write_table(data / "bad_clips.csv", [("clip_id", "mp3_path", "outcome", "reason"), *bad])
    crcs = {chunk.file.name: chunk.crc() for chunk in chunks}
    for name, values in zip(("ids.npy", "tags.npy", "tag_names.npy", "mp3_paths.npy"), annotations):
        with whole_file(data / name) as file:
            np.save(file, np.array(values), allow_pickle=False)
        crcs[name] = crc_of_file(data / name)
    manifest |= {
        "outcomes": {kind: sum(entry[1] == kind for entry in entries) for kind in ("zero", "padded")},
        "synthetic": (data / "SYNTHETIC.txt").exists(),
        "crc32": crcs,
        "complete": True,
    }
    write_manifest(data, manifest)
    return manifest


def print_summary(data, manifest, chunks):
    """Print what the dump holds. Raises InputError if too many clips are bad."""
    if not manifest["complete"]:
        missing = [chunk.file.name for chunk in chunks if not chunk.is_complete()]
        print(f"these chunks are done; the dump still needs {', '.join(missing)}")
        return
    for chunk in chunks:  # the manifest has taken over what the journals knew
        chunk.journal.unlink(missing_ok=True)
    n_clips, zero, padded = manifest["n_clips"], manifest["outcomes"]["zero"], manifest["outcomes"]["padded"]
    print(f"{data}: {n_clips:,} spectrograms, {n_clips * CLIP_BYTES / 1e9:.2f} GB in {len(chunks)} files")
    print(f"{zero:,} bad clips (all zeros) and {padded:,} short ones (padded with silence): see {data}/bad_clips.csv")
    if zero > TOO_MANY_BAD * n_clips:
        many = f"{zero:,} of {n_clips:,} clips are bad, more than {TOO_MANY_BAD:.0%}"
        raise InputError(f"{data}: {many}; the dump is kept, but if audio was missing, start over with --overwrite")


if __name__ == "__main__":
    run(main, "the same command, without --overwrite, goes on after the last complete clip")
