"""Turn the annotated clips into log-mel spectrograms: one dump that training maps into memory.

Reads tags.csv, or annotations_final.csv, and the mp3 files beside it. Writes spectrograms_0.npy ...
spectrograms_7.npy, ids.npy, tags.npy, tag_names.npy, mp3_paths.npy, checksums.npy, bad_clips.csv and dump.json, which
says what the dump was made from. Interrupted, the same command resumes after the last complete clip.
"""

import multiprocessing
import os
import shlex
import signal
import sys
import traceback
import unicodedata
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mode

import numpy as np
import tyro

from lib.audio import CLIP_SAMPLES, CLIP_SAMPLES_READ, FRONT_END, N_FRAMES, N_MELS, SAMPLE_RATE
from lib.audio import load, log_mel, log_mel_spectrogram, require_front_end, resample  # noqa: F401 - one is re-exported
from lib.common import ROOT, FromPython, InputError, keep_freed_memory, lock, naming, number, progress, reason
from lib.common import require_writable, run, whole_file, write_table
from lib.dump import CLIP_BYTES, MANIFEST, Dump, annotations_sha256, chunk_files, delete_dump, divide
from lib.dump import hex_crc32, read_manifest, write_manifest
from tags import annotations_file, read_annotations


@dataclass(frozen=True)
class Settings(FromPython):
    data: Path = ROOT / "data"  # folder with the annotations and the audio; the dump is written there
    n_chunks: number(int, 1, 256) = 8  # files that the dump is divided into, and worker processes
    chunks: tuple[int, ...] = ()  # make only these files, to divide the work; default: all
    overwrite: bool = False  # delete the folder's dump and start over
    retry_bad: bool = False  # try the bad clips of a complete dump again, such as some that have since arrived


TOO_MANY_BAD = 0.05  # of the clips: a warning, and a non-zero exit status
# What may be wrong with a clip, and how the summary calls that
OUTCOMES = {"zero": "bad (all zeros)", "padded": "short (padded with silence)", "gaps": "with gaps (damaged)"}


def main(settings=None):
    settings = settings or tyro.cli(Settings, description=__doc__)
    annotations = read_annotations(annotations_file(settings.data))
    links = f"mkdir dump && ln -s {shlex.quote(str(settings.data.resolve()))}/* dump"
    require_writable(settings.data, f"make a folder of links ({links}) and give it as --data")
    chunks = divide(settings.data, len(annotations.ids), settings.n_chunks)
    if wrong := set(settings.chunks) - set(range(settings.n_chunks)):
        raise InputError(f"--chunks {min(wrong)}: there are {settings.n_chunks}, numbered from 0")
    chosen = [chunk for index, chunk in enumerate(chunks) if not settings.chunks or index in settings.chunks]
    plan = plan_dump(settings.data, len(annotations.ids), settings.n_chunks)
    with lock(settings.data / MANIFEST):
        if settings.overwrite:
            delete_dump(settings.data)
        manifest = start_or_resume(settings.data, plan)
        if manifest["complete"]:
            manifest = reopen(settings, plan, annotations, chunks)
    if not manifest["complete"]:
        missing = [chunk for chunk in chosen if not chunk.is_complete()]
        make_chunks(missing, plan, annotations.mp3_paths, settings.retry_bad)
    with lock(settings.data / MANIFEST):
        manifest = finish(settings.data, plan, annotations, chunks)
        print_summary(settings.data, manifest, chunks)


def plan_dump(data, n_clips, n_chunks):
    """Return what a dump is made from; two dumps that differ in any of it are never mixed."""
    sha256 = annotations_sha256(data)
    return {"annotations_sha256": sha256, "n_clips": n_clips, "n_chunks": n_chunks, "front_end": FRONT_END}


def start_or_resume(data, plan):
    """Return the manifest of the dump in folder `data`, written here if there is none. The caller holds its lock."""
    if not (data / MANIFEST).exists():
        if unexpected := chunk_files(data):
            raise InputError(f"{unexpected[0]}: of a dump without {MANIFEST}; move it away, or --overwrite deletes it")
        made_with = ", ".join(f"{name} {version(name)}" for name in ("librosa", "soxr"))
        write_manifest(data, {**plan, "complete": False, "made_with": made_with, "n_cut": 0})
    return manifest_of(data, plan)


def manifest_of(data, plan):
    """Return the manifest of the dump in folder `data`. Raises InputError if that has another plan, or was deleted."""
    manifest = read_manifest(data)
    require_front_end(manifest.get("front_end", FRONT_END), data / MANIFEST, "--overwrite starts over")
    renewed = {"annotations_sha256"} if manifest.get("complete") else set()  # see reopen
    if differing := [key for key in plan if manifest.get(key) != plan[key] and key not in renewed]:
        found = ", ".join(f"{key} ({manifest.get(key)} there, {plan[key]} now)" for key in differing)
        raise InputError(f"{data / MANIFEST}: made with other settings: {found}; --overwrite starts over")
    return manifest


def reopen(settings, plan, annotations, chunks):
    """Make a complete dump an incomplete one if its tags or, with --retry-bad, its bad clips are to be renewed.

    Returns its manifest, on which the caller holds the lock. Raises InputError if it has other clips, or is damaged.
    """
    dump = Dump(settings.data)
    if dump.ids.tolist() != annotations.ids.tolist() or dump.mp3_paths != annotations.mp3_paths:
        raise InputError(f"{settings.data}: the table has other clips than the dump; --overwrite starts over")
    if settings.retry_bad or dump.manifest["annotations_sha256"] != plan["annotations_sha256"]:
        records = dump.records()
        for chunk in chunks:
            chunk.reopen(records[chunk.rows.start : chunk.rows.stop], settings.retry_bad)
        kept = {"made_with": dump.made_with, "n_cut": dump.manifest.get("n_cut", 0)}
        write_manifest(settings.data, {**plan, "complete": False, **kept})
    return read_manifest(settings.data)


def make_chunks(chunks, plan, mp3_paths, retry_bad):
    """Make each of `chunks` in a process of its own, showing a progress bar. `mp3_paths` are those of all clips.

    The first exception of a worker ends all of them and is raised here. Raises InputError if a worker was killed.
    """
    import av  # noqa: F401 - what the workers need is imported before they fork

    log_mel(resample([np.zeros(9, np.float32)], 2 * SAMPLE_RATE))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    failures = context.SimpleQueue()
    tasks = [(chunk, plan, mp3_paths, retry_bad, failures) for chunk in chunks]
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


def make_chunk(chunk, plan, mp3_paths, retry_bad, failures):
    """Worker process: make the missing clips of one chunk and, if `retry_bad`, its bad ones again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends the workers
    keep_freed_memory()
    try:
        with naming(chunk.path), lock(chunk.path):
            if chunk.is_complete() or manifest_of(chunk.path.parent, plan)["complete"]:
                return  # another process has completed it while this one waited
            bad = np.flatnonzero(np.isin(chunk.records()["outcome"], [*map(str.encode, OUTCOMES)])) if retry_bad else []
            missing = {*chunk.resume()}
            for place in sorted({*bad, *missing}):
                made = make_spectrogram(clip_path(chunk.path.parent, mp3_paths[chunk.rows[place]]))
                if place in missing or made[1] != "zero":  # a clip in parts is better than none
                    chunk.write(place, *made)
                if os.getppid() != multiprocessing.parent_process().pid:
                    return  # the parent process was killed
            chunk.finish()
    except Exception as error:
        error.add_note(traceback.format_exc())  # the parent gets the error without its traceback
        failures.put(error)


def clip_path(data, mp3_path):
    """Return the path of a clip, whose name may compose its accents in another way than the table, as on a Mac."""
    names = mp3_path, *(unicodedata.normalize(form, mp3_path) for form in ("NFC", "NFD"))
    return next((data / name for name in names if (data / name).exists()), data / mp3_path)


def make_spectrogram(path):
    """Return (spectrogram, outcome, reason) of one clip: all zeros if its file can't be used."""
    try:
        samples, note = load(path, CLIP_SAMPLES_READ)
    except Exception as error:  # one unreadable file, whatever is wrong with it, must not stop the others
        return np.zeros((N_MELS, N_FRAMES), np.float32), "zero", reason(error).removeprefix(f"{path}: ")
    if len(samples) < CLIP_SAMPLES:
        return log_mel(samples), "padded", f"{len(samples) / SAMPLE_RATE:.2f} s long{note and '; '}{note}"
    return log_mel(samples), "gaps" if note else "cut" * (len(samples) > CLIP_SAMPLES_READ), note


def finish(data, plan, annotations, chunks):
    """Complete the dump if every chunk exists, and return its manifest. The caller holds the lock on that."""
    manifest = manifest_of(data, plan)
    if not manifest["complete"] and all(chunk.is_complete() for chunk in chunks):
        records = np.concatenate([chunk.records() for chunk in chunks])
        texts = [[text.decode(errors="replace") for text in records[name].tolist()] for name in ("outcome", "reason")]
        bad = [row for row in zip(annotations.ids, annotations.mp3_paths, *texts) if row[2] in OUTCOMES]
        write_table(data / "bad_clips.csv", [("clip_id", "mp3_path", "outcome", "reason"), *bad])
        reasons = {path: text for _, path, outcome, text in bad if outcome == "zero"}
        commonest = mode(reasons.values()) if reasons else ""
        tables = dict(zip(("ids", "tags", "tag_names", "mp3_paths"), annotations)) | {"checksums": records["crc32"]}
        for name, values in tables.items():
            with whole_file(data / f"{name}.npy") as file:
                np.save(file, np.array(values), allow_pickle=False)
        manifest |= {
            "outcomes": {kind: texts[0].count(kind) for kind in OUTCOMES},
            "mostly": next((f"{text}: {path}" for path, text in reasons.items() if text == commonest), ""),
            "n_cut": manifest.get("n_cut", 0) + texts[0].count("cut"),
            "synthetic": (data / "SYNTHETIC.txt").exists(),
            "crc32": {f"{name}.npy": hex_crc32((data / f"{name}.npy").read_bytes()) for name in tables},
            "complete": True,
        }
        write_manifest(data, manifest)
    if manifest["complete"]:
        for path in (path for chunk in chunks for path in (chunk.log, chunk.partial)):
            path.unlink(missing_ok=True)
    return manifest


def print_summary(data, manifest, chunks):
    """Print what the dump holds. Raises InputError if too many clips are bad."""
    if not manifest["complete"]:
        missing = [chunk.path.name for chunk in chunks if not chunk.is_complete()]
        print(f"these chunks are done; the dump still needs {', '.join(missing)}")
        return
    n_clips, outcomes = manifest["n_clips"], manifest["outcomes"]
    print(f"{data}: {n_clips:,} spectrograms, {n_clips * CLIP_BYTES / 1e9:.2f} GB in {len(chunks)} files")
    kinds = ", ".join(f"{outcomes.get(kind, 0):,} {words}" for kind, words in OUTCOMES.items())
    mostly = f"; the commonest reason: {manifest['mostly']}" if manifest.get("mostly") else ""
    print(f"of these clips, {kinds}: see {data}/bad_clips.csv; --retry-bad tries them again{mostly}")
    if n_cut := manifest.get("n_cut"):
        print(f"{n_cut:,} clips are longer: of these, the first 29.1 s count")
    if outcomes["zero"] > TOO_MANY_BAD * n_clips:
        many = f"{outcomes['zero']:,} of {n_clips:,} clips are bad, more than {TOO_MANY_BAD:.0%}{mostly}"
        raise InputError(f"{data}: {many}; the dump is kept; if audio was missing, add it and use --retry-bad")


if __name__ == "__main__":
    run(main, "the same command, without --overwrite, resumes after the last complete clip")
