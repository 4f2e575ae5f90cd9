"""Turn the annotated clips into log-mel spectrograms: one dump that training maps into memory.

Reads tags.csv, or annotations_final.csv, and the mp3 files beside it. Writes spectrograms_0.npy ...
spectrograms_7.npy, ids.npy, tags.npy, tag_names.npy, mp3_paths.npy, checksums.npy, bad_clips.csv and dump.json, which
says what the dump was made from. Interrupted, the same command resumes after the last complete clip.
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

import numpy as np
import tyro

from lib.audio import CLIP_SAMPLES, CLIP_SECONDS_READ, FRONT_END, N_FRAMES, N_MELS, SAMPLE_RATE
from lib.audio import decode, log_mel, log_mel_spectrogram, resample  # noqa: F401 - one is re-exported
from lib.common import ROOT, InputError, keep_freed_memory, lock, naming, number, progress, reason, run
from lib.common import whole_file, write_table
from lib.dump import CLIP_BYTES, MANIFEST, Dump, checksums, chunk_files, delete_dump, divide, hex_crc32
from lib.dump import read_manifest, write_manifest
from tags import annotations_file, read_annotations


@dataclass(frozen=True)
class Settings:
    data: Path = ROOT / "data"  # folder with the annotations and the audio; the dump is written there
    n_chunks: number(int, 1, 256) = 8  # files that the dump is divided into, and worker processes
    chunks: tuple[int, ...] = ()  # make only these files, to divide the work; default: all
    overwrite: bool = False  # delete the folder's dump and start over


TOO_MANY_BAD = 0.05  # of the clips: a warning, and a non-zero exit status


def main():
    settings = tyro.cli(Settings, description=__doc__)
    table = annotations_file(settings.data)
    annotations = read_annotations(table)
    chunks = divide(settings.data, len(annotations.ids), settings.n_chunks)
    if wrong := set(settings.chunks) - set(range(settings.n_chunks)):
        raise InputError(f"--chunks {min(wrong)}: there are {settings.n_chunks}, numbered from 0")
    chosen = [chunk for index, chunk in enumerate(chunks) if not settings.chunks or index in settings.chunks]
    plan = plan_dump(table, annotations, settings.n_chunks)
    with lock(settings.data / MANIFEST):
        if settings.overwrite:
            delete_dump(settings.data)
        manifest = start_or_resume(settings.data, plan)
    if manifest["complete"]:
        Dump(settings.data)  # raises InputError if a file is missing
    else:
        make_chunks([chunk for chunk in chosen if not chunk.is_complete()], plan, annotations.mp3_paths)
    with lock(settings.data / MANIFEST):
        manifest = finish(settings.data, plan, annotations, chunks)
        print_summary(settings.data, manifest, chunks)


def plan_dump(table, annotations, n_chunks):
    """Return what a dump is made from; two dumps that differ in any of it are never mixed."""
    sha256 = hashlib.sha256(table.read_bytes()).hexdigest()
    n_clips = len(annotations.ids)
    return {"annotations_sha256": sha256, "n_clips": n_clips, "n_chunks": n_chunks, "front_end": FRONT_END}


def start_or_resume(data, plan):
    """Return the manifest of the dump in folder `data`, written here if there is none. The caller holds its lock."""
    if not (data / MANIFEST).exists():
        if unexpected := chunk_files(data):
            raise InputError(f"{unexpected[0]}: of a dump without {MANIFEST}; move it away, or --overwrite deletes it")
        write_manifest(data, {**plan, "complete": False})
    return manifest_of(data, plan)


def manifest_of(data, plan):
    """Return the manifest of the dump in folder `data`. Raises InputError if that has another plan, or was deleted."""
    manifest = read_manifest(data)
    if differing := [key for key in plan if manifest.get(key) != plan[key]]:
        found = ", ".join(f"{key} ({manifest.get(key)} there, {plan[key]} now)" for key in differing)
        raise InputError(f"{data / MANIFEST}: made with other settings: {found}; --overwrite starts over")
    return manifest


def make_chunks(chunks, plan, mp3_paths):
    """Make each of `chunks` in a process of its own, showing a progress bar. `mp3_paths` are those of all clips.

    The first exception of a worker ends all of them and is raised here. Raises InputError if a worker was killed.
    """
    log_mel(resample(np.zeros(9, np.float32), 2 * SAMPLE_RATE))  # imports what the workers need before they fork

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    failures = context.SimpleQueue()
    tasks = [(chunk, plan, mp3_paths, failures) for chunk in chunks]
    workers = [context.Process(target=make_chunk, args=task, daemon=True) for task in tasks]
    with progress(total=sum(len(chunk.rows) for chunk in chunks), unit="clip", smoothing=0.05) as bar:
        for worker in workers:
            worker.start()
        running = True
        while running:
            running = [worker.sentinel for worker in workers if worker.is_alive()]
            if not failures.empty():
                raise failures.get()
            wait(running, timeout=0.5)
            bar.update(sum(chunk.n_done() for chunk in chunks) - bar.n)
    for worker, chunk in zip(workers, chunks):
        if worker.exitcode:
            near = [mp3_paths[row] for row in chunk.rows[chunk.n_done() :][:1]]
            died = f"its process died (exit status {worker.exitcode}) near {near}"
            raise InputError(f"{chunk.path}: {died}; the same command resumes there")


def make_chunk(chunk, plan, mp3_paths, failures):
    """Worker process: make one chunk, from its first missing clip."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends the workers
    keep_freed_memory()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the mp3 decoder warns about every damaged frame
    try:
        with naming(chunk.path), lock(chunk.path):
            if chunk.is_complete() or manifest_of(chunk.path.parent, plan)["complete"]:
                return  # another process has completed it while this one waited
            for row in chunk.rows[chunk.resume() :]:
                chunk.append(*make_spectrogram(chunk.path.parent / mp3_paths[row]))
                if os.getppid() != multiprocessing.parent_process().pid:
                    return  # the parent process was killed
            chunk.finish()
    except Exception as error:
        error.add_note(traceback.format_exc())  # the parent gets the error without its traceback
        failures.put(error)


def make_spectrogram(path):
    """Return (spectrogram, outcome, reason) of one clip: all zeros if its file can't be used."""
    try:
        samples = resample(*decode(path, CLIP_SECONDS_READ))
    except Exception as error:  # one unreadable file, whatever is wrong with it, must not stop the others
        return np.zeros((N_MELS, N_FRAMES), np.float32), "zero", reason(error)
    if len(samples) < CLIP_SAMPLES:
        return log_mel(samples), "padded", f"{len(samples) / SAMPLE_RATE:.2f} s long"
    return log_mel(samples), "", ""


def finish(data, plan, annotations, chunks):
    """Complete the dump if every chunk exists, and return its manifest. The caller holds the lock on that."""
    manifest = manifest_of(data, plan)
    if not manifest["complete"] and all(chunk.is_complete() for chunk in chunks):
        records = np.concatenate([chunk.records() for chunk in chunks])
        texts = [[text.decode(errors="replace") for text in records[name].tolist()] for name in ("outcome", "reason")]
        bad = [row for row in zip(annotations.ids, annotations.mp3_paths, *texts) if row[2]]
        write_table(data / "bad_clips.csv", [("clip_id", "mp3_path", "outcome", "reason"), *bad])
        tables = dict(zip(("ids", "tags", "tag_names", "mp3_paths"), annotations)) | {"checksums": checksums(records)}
        for name, values in tables.items():
            with whole_file(data / f"{name}.npy") as file:
                np.save(file, np.array(values), allow_pickle=False)
        manifest |= {
            "outcomes": {kind: texts[0].count(kind) for kind in ("zero", "padded")},
            "synthetic": (data / "SYNTHETIC.txt").exists(),
            "crc32": {f"{name}.npy": hex_crc32((data / f"{name}.npy").read_bytes()) for name in tables},
            "complete": True,
        }
        write_manifest(data, manifest)
    if manifest["complete"]:
        for chunk in chunks:
            chunk.log.unlink(missing_ok=True)
    return manifest


def print_summary(data, manifest, chunks):
    """Print what the dump holds. Raises InputError if too many clips are bad."""
    if not manifest["complete"]:
        missing = [chunk.path.name for chunk in chunks if not chunk.is_complete()]
        print(f"these chunks are done; the dump still needs {', '.join(missing)}")
        return
    n_clips, zero, padded = manifest["n_clips"], manifest["outcomes"]["zero"], manifest["outcomes"]["padded"]
    print(f"{data}: {n_clips:,} spectrograms, {n_clips * CLIP_BYTES / 1e9:.2f} GB in {len(chunks)} files")
    print(f"{zero:,} bad clips (all zeros) and {padded:,} short ones (padded with silence): see {data}/bad_clips.csv")
    if zero > TOO_MANY_BAD * n_clips:
        many = f"{zero:,} of {n_clips:,} clips are bad, more than {TOO_MANY_BAD:.0%}"
        raise InputError(f"{data}: {many}; the dump is kept, but if audio was missing, start over with --overwrite")


if __name__ == "__main__":
    run(main, "the same command, without --overwrite, resumes after the last complete clip")
