"""Turn the annotated clips into log-mel spectrograms: one dump that training maps into memory.

Reads tags.csv and the mp3 files beside it. Writes spectrograms_0.npy ... spectrograms_7.npy, ids.npy, tags.npy,
tag_names.npy, mp3_paths.npy, bad_clips.csv and dump.json, which says what the dump was made from. Interrupted,
the same command goes on after the last complete clip.
"""

import csv
import errno
import functools
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import ROOT, InputError, keep_freed_memory, run, settings_from_command_line, whole_file
from dump import (
    CLIP_BYTES,
    MANIFEST,
    N_FRAMES,
    N_MELS,
    Chunk,
    chunk_writer,
    crc_of_file,
    dump_lock,
    read_manifest,
    write_manifest,
)
from tags import annotations_path, read_annotations

# soundfile, soxr and torch are imported where they are used, because --help does not need them.


@dataclass(frozen=True)
class Settings:
    data: Path = ROOT / "data"  # folder with tags.csv and the audio; the dump is written there
    n_chunks: int = 8  # files that the dump is divided into, and worker processes, one for each
    chunks: str = ""  # make only these, such as 0-3 or 0,5 (for several machines or a job array); empty: all
    overwrite: bool = False  # delete the dump in the folder and start over


# The original's front end: librosa.load(sr=11025), then melspectrogram with the defaults of its day, then the log.
FRONT_END = {
    "sample_rate": 11025,  # Hz
    "resampler": "soxr HQ",  # librosa's default today; the original's was kaiser_best
    "n_fft": 2048,  # samples; Hann window, centred
    "hop_length": 512,  # samples
    "pad_mode": "reflect",  # librosa's default before 0.10
    "n_mels": N_MELS,  # Slaney's scale and area normalisation, 0 Hz to half the sample rate, power spectrum
    "floor": 1e-20,  # of the power, before the natural logarithm
    "n_frames": N_FRAMES,
}
SAMPLE_RATE, N_FFT, HOP_LENGTH = FRONT_END["sample_rate"], FRONT_END["n_fft"], FRONT_END["hop_length"]
CLIP_SAMPLES = (N_FRAMES - 1) * HOP_LENGTH  # the fewest that give 628 centred frames: 321,024, 29.1 s
FRAMES_AT_ONCE = 64  # stay in the cache from the window to the mel bands
CLIPS_AT_ONCE = 8  # are decoded, then transformed: each step's code stays in the cache for several clips
READ_SECONDS = 31  # of a longer file: more than the 628 frames and the resampler reach
TOO_MANY_BAD = 0.05  # of the clips: a warning, and a non-zero exit status


def main():
    settings = settings_from_command_line(Settings, __doc__)
    annotations_file = annotations_path(settings.data)
    annotations = read_annotations(annotations_file)
    planned = plan(annotations_file, annotations, settings.n_chunks)
    chunks, rows = divide(settings.data, planned["n_clips"], settings.n_chunks)
    chosen = parse_chunks(settings.chunks, len(chunks))
    with dump_lock(settings.data):
        manifest = begin_or_continue(settings.data, planned, settings.overwrite)
    if not manifest["complete"]:
        unfinished = [index for index in chosen if not chunks[index].is_complete()]
        make_chunks([(chunks[index], [annotations.mp3_paths[row] for row in rows[index]]) for index in unfinished])
    with dump_lock(settings.data):
        manifest = finish(settings.data, annotations, chunks)
        return summarise(settings.data, manifest, chunks)


# The front end


def log_mel_spectrogram(path):
    """Return the log-mel spectrogram of an audio file's first 29.1 s: (128, 628) float32, mel bands x frames.

    A shorter file is padded with silence before the transform. Raises InputError if it can't be decoded.
    """
    return log_mel(pad_clip(resample(*decode(path, READ_SECONDS))))


def decode(path, seconds=None):
    """Return (samples, sample_rate): the audio file, or its first `seconds`, in mono, float32, full scale 1.

    Raises InputError for a file that is missing, not audio, empty, or not finite.
    """
    import soundfile

    try:
        if os.path.isdir(path):
            raise InputError(f"{path}: is a directory")
        if not os.path.getsize(path):
            raise InputError(f"{path}: empty file")
        with soundfile.SoundFile(path) as file:
            n_left = sys.maxsize if seconds is None else int(seconds * file.samplerate)
            blocks = []
            while n_left > 0:  # in blocks, because a damaged header may promise any number of samples
                n_wanted = min(n_left, 1 << 19)
                block = file.read(n_wanted, dtype="float32", always_2d=True)
                blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
                n_left -= len(block)
                # Asking once more would make libsndfile search an mp3's end: slow, and in a damaged file it then
                # finds itself somewhere in the middle and repeats what was read
                if len(block) < n_wanted:
                    break
            sample_rate = file.samplerate
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}") from error
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".").lower()
        if "does not exist" in reason:  # libsndfile's words for an mp3 without a single frame
            reason = "format not recognised"
        raise InputError(f"{path}: can't be decoded ({reason})") from error
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if not len(samples):
        raise InputError(f"{path}: no audio in it")
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: samples that are not finite")
    return samples, sample_rate


def resample(samples, sample_rate):
    """Return mono `samples` at 11,025 Hz, as librosa.resample(res_type="soxr_hq") gives them."""
    import soxr

    if sample_rate == SAMPLE_RATE:
        return samples
    resampled = soxr.resample(samples, sample_rate, SAMPLE_RATE, quality="HQ")
    length = int(np.ceil(len(samples) * SAMPLE_RATE / sample_rate))  # librosa rounds up, soxr to the nearest
    return _padded(resampled[:length], length)


def pad_clip(samples):
    """Return samples at 11,025 Hz with silence after them if they are too short for 628 frames."""
    return _padded(samples, CLIP_SAMPLES)


def _padded(samples, length):
    missing = length - len(samples)
    return np.concatenate([samples, np.zeros(missing, np.float32)]) if missing > 0 else samples


def log_mel(samples, n_frames=N_FRAMES):
    """Return the log-mel spectrogram of the first `n_frames` of samples at 11,025 Hz: (128, n_frames) float32.

    The spectrum is computed in float64, as librosa does: the strong low frequencies of music would leave too
    few digits for the weak high ones in float32.
    """
    import torch

    window, filters = _window_and_filters()
    half = N_FFT // 2
    samples = samples[: (n_frames - 1) * HOP_LENGTH + half]  # what the last frame reaches
    reflected = np.concatenate([samples[half:0:-1], samples, samples[-2 : -half - 2 : -1]], dtype=np.float64)
    frames = torch.from_numpy(reflected).unfold(0, N_FFT, HOP_LENGTH)[:n_frames]
    mel = torch.empty(n_frames, N_MELS, dtype=torch.float64)
    with torch.inference_mode():
        for some_frames, their_mel in zip(frames.split(FRAMES_AT_ONCE), mel.split(FRAMES_AT_ONCE)):
            squares = torch.view_as_real(torch.fft.rfft(some_frames * window)).square_().flatten(1)
            for bands, columns, weights in filters:
                torch.mm(squares[:, columns], weights, out=their_mel[:, bands])
    return np.log(np.maximum(mel.numpy(), FRONT_END["floor"])).T.astype(np.float32, order="C")


@functools.cache
def _window_and_filters(bands_at_once=16):
    """Return the Hann window and the mel filters as (bands, columns, weights), a few neighbouring bands each.

    Neighbouring bands share a narrow range of frequencies, so the zeros of the full matrix are left out. A
    frequency has two columns, the real part's square and the imaginary's, and the same weight for both.
    """
    import torch

    window = torch.hann_window(N_FFT, dtype=torch.float64)
    mel = mel_filters()
    filters = []
    for start in range(0, N_MELS, bands_at_once):
        bands = slice(start, start + bands_at_once)
        used = np.flatnonzero(mel[bands].any(axis=0))
        columns = slice(2 * used[0], 2 * used[-1] + 2)
        weights = np.repeat(mel[bands, used[0] : used[-1] + 1], 2, axis=1).T
        filters.append((bands, columns, torch.from_numpy(weights).contiguous()))
    return window, filters


def mel_filters():
    """Return Slaney's mel filters (Auditory Toolbox, 1998) for the power spectrum: (128, 1025) float64.

    The scale is linear to 1000 Hz, 15 mels, and logarithmic above, 27 mels for a factor of 6.4. Each triangle has
    an area of 1 Hz.
    """
    frequencies = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, N_MELS + 2)
    corners = np.where(mels < 15, mels * 1000 / 15, 1000 * 6.4 ** ((mels - 15) / 27))
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


# The dump


def plan(annotations_file, annotations, n_chunks):
    """Return what a dump made now would be made from; dumps that differ in any of it are never mixed."""
    if n_chunks < 1:
        raise InputError(f"--n-chunks {n_chunks}: must be at least 1")
    return {
        "annotations_sha256": hashlib.sha256(annotations_file.read_bytes()).hexdigest(),
        "n_clips": len(annotations.ids),
        "n_chunks": n_chunks,
        "front_end": FRONT_END,
    }


def divide(data, n_clips, n_chunks):
    """Return (chunks, rows): the dump's files and, for each, the rows of the annotations it holds.

    As in the original, each holds (n_clips - 1) // n_chunks + 1 clips, and the last ones what remains.
    """
    size = (n_clips - 1) // n_chunks + 1
    rows = [range(min(start, n_clips), min(start + size, n_clips)) for start in range(0, size * n_chunks, size)]
    return [Chunk(data, index, len(its_rows)) for index, its_rows in enumerate(rows)], rows


def parse_chunks(text, n_chunks):
    """Return the chunk numbers that `text` names: "0-3" or "0,5" or, for all, nothing."""
    chosen = set()
    for part in filter(None, text.split(",")):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not numbers or int(numbers[2] or numbers[1]) >= n_chunks:
            raise InputError(f"--chunks {text}: must name chunks from 0 to {n_chunks - 1}, such as 0-3 or 0,5")
        chosen.update(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
    return sorted(chosen) if text else list(range(n_chunks))


def begin_or_continue(data, planned, overwrite):
    """Return the dump's manifest, a new one if there was none. Raises InputError if the dump was made otherwise."""
    if overwrite:
        for path in [data / MANIFEST, *data.glob("spectrograms_*")]:
            path.unlink(missing_ok=True)
    manifest = read_manifest(data)
    if manifest is None:
        foreign = next(data.glob("spectrograms_*"), None)
        if foreign:
            raise InputError(f"{foreign}: from a dump without {MANIFEST}; move it away, or start over with --overwrite")
        manifest = {**planned, "complete": False}
        write_manifest(data, manifest)
    differing = [key for key in planned if manifest.get(key) != planned[key]]
    if differing:
        found = ", ".join(f"{key} ({manifest.get(key)} there, {planned[key]} now)" for key in differing)
        raise InputError(f"{data / MANIFEST}: the dump was made otherwise: {found}; start over with --overwrite")
    return manifest


def make_chunks(tasks):
    """Make each (chunk, mp3 paths) of `tasks` in a process of its own, showing a progress bar."""
    import soundfile, soxr, torch  # noqa: E401, F401 - once, for all the processes that are forked below

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    n_read = context.RawArray("q", len(tasks))  # no locks: a killed worker can't leave one held
    workers, complaints = [], []
    for slot, (chunk, mp3_paths) in enumerate(tasks):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=make_chunk, args=(chunk, mp3_paths, n_read, slot, sender, os.getpid()))
        worker.start()
        sender.close()
        workers.append(worker)
        complaints.append(receiver)
    try:
        _watch(workers, n_read, sum(chunk.n_clips for chunk, _ in tasks))
    finally:
        for worker in workers:
            worker.terminate()
    for worker, complaint, (chunk, mp3_paths), n_done in zip(workers, complaints, tasks, n_read):
        worker.join()
        if worker.exitcode:
            try:
                reason = complaint.recv()
            except EOFError:
                reason = f"its process died (exit status {worker.exitcode})"
            at = f", near {mp3_paths[n_done]}" if n_done < len(mp3_paths) else ""
            raise InputError(f"{chunk.file}{at}: {reason}; the same command goes on from there")


def _watch(workers, n_read, n_clips):
    """Show progress until every worker has ended, however it ends."""
    running = {worker.sentinel for worker in workers}
    with tqdm(total=n_clips, unit="clip", mininterval=0.5, smoothing=0.05) as bar:
        while running:
            running -= set(wait(running, timeout=0.1))
            bar.update(sum(n_read) - bar.n)


def make_chunk(chunk, mp3_paths, n_read, slot, complain, parent):
    """Worker process: make one chunk, from its first missing clip."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    torch.set_num_threads(1)
    keep_freed_memory()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # mp3 decoding comments on every damaged frame
    try:
        with chunk_writer(chunk) as (n_done, append):
            n_read[slot] = n_done
            for start in range(n_done, len(mp3_paths), CLIPS_AT_ONCE):
                clips = []
                for mp3_path in mp3_paths[start : start + CLIPS_AT_ONCE]:
                    clips.append(read_clip(chunk.file.parent, mp3_path))
                    n_read[slot] += 1
                for samples, outcome, reason in clips:
                    append(None if samples is None else log_mel(samples), outcome, reason)
                    if os.getppid() != parent:
                        sys.exit("the parent process is gone")
    except InputError as error:
        complain.send(str(error))
        sys.exit(1)
    except OSError as error:
        remedy = "; make room" if error.errno == errno.ENOSPC else ""
        complain.send(f"{error.strerror}{remedy}")
        sys.exit(1)
    except Exception:
        complain.send(traceback.format_exc())
        raise


def read_clip(data, mp3_path):
    """Return (samples, outcome, reason) of one clip, whatever its file is; None for samples if it can't be used."""
    inside = os.path.normpath(mp3_path)
    if os.path.isabs(inside) or inside.startswith(".."):
        return None, "zero", "path outside the data folder"
    path = data / mp3_path
    try:
        samples = resample(*decode(path, READ_SECONDS))
    except InputError as error:
        return None, "zero", str(error).removeprefix(f"{path}: ")
    if len(samples) < CLIP_SAMPLES:
        return pad_clip(samples), "padded", f"{len(samples) / SAMPLE_RATE:.2f} s long"
    return samples, "", ""


def finish(data, annotations, chunks):
    """Complete the dump if every chunk is there, and return its manifest."""
    manifest = read_manifest(data)
    if manifest["complete"] or not all(chunk.is_complete() for chunk in chunks):
        return manifest
    entries = [entry for chunk in chunks for entry in chunk.entries()]
    with whole_file(data / "bad_clips.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("clip_id", "mp3_path", "outcome", "reason"))
        for clip, mp3_path, (_, outcome, reason) in zip(annotations.ids, annotations.mp3_paths, entries):
            if outcome:
                table.writerow((clip, mp3_path, outcome, reason))
    arrays = {
        "ids.npy": annotations.ids,
        "tags.npy": annotations.labels,
        "tag_names.npy": np.array(annotations.tag_names),
        "mp3_paths.npy": np.array(annotations.mp3_paths),
    }
    for name, array in arrays.items():
        with whole_file(data / name) as file:
            np.save(file, array, allow_pickle=False)
    manifest["outcomes"] = {kind: sum(entry[1] == kind for entry in entries) for kind in ("zero", "padded")}
    manifest["synthetic"] = (data / "SYNTHETIC.txt").exists()
    manifest["crc32"] = {name: crc_of_file(data / name) for name in arrays}
    manifest["crc32"].update((chunk.file.name, chunk.crc()) for chunk in chunks)
    manifest["complete"] = True
    write_manifest(data, manifest)
    return manifest


def summarise(data, manifest, chunks):
    """Say what the dump holds; return the exit status."""
    if not manifest["complete"]:
        missing = [chunk.file.name for chunk in chunks if not chunk.is_complete()]
        print(f"these chunks are done; the dump still needs {', '.join(missing)}")
        return 0
    for chunk in chunks:  # the manifest has taken over what the journals knew
        chunk.journal.unlink(missing_ok=True)
    n_clips, zero, padded = manifest["n_clips"], manifest["outcomes"]["zero"], manifest["outcomes"]["padded"]
    print(f"{data}: {n_clips:,} spectrograms, {n_clips * CLIP_BYTES / 1e9:.2f} GB in {len(chunks)} files")
    print(
        f"{zero:,} bad clips (all zeros) and {padded:,} short ones (padded with silence): see {data / 'bad_clips.csv'}"
    )
    if zero > TOO_MANY_BAD * n_clips:
        raise InputError(
            f"{data}: {zero:,} of {n_clips:,} clips are bad, more than {TOO_MANY_BAD:.0%}; the dump is kept, but check "
            "that the audio is there (bad_clips.csv has the reasons), then start over with --overwrite"
        )
    return 0


if __name__ == "__main__":
    run(main, when_interrupted="the same command goes on after the last complete clip")
