"""The dump of spectrograms on disk: written clip by clip, resumed, verified, memory-mapped.

A data folder's dump is spectrograms_<i>.npy (clips, 128, 628) float32, the tables ids.npy (clips,) int64, tags.npy
(clips, tags) uint8, tag_names.npy, mp3_paths.npy and checksums.npy (clips,) uint32, bad_clips.csv, and dump.json, which
says what the dump was made from and, once it is complete, the CRC-32 of each table.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
from joblib import cpu_count

from lib.audio import N_FRAMES, N_MELS, require_front_end
from lib.common import InputError, lock, progress, whole_file, write_json
from tags import annotations_file

CLIP_BYTES = N_MELS * N_FRAMES * 4
MANIFEST = "dump.json"
# Kept of each clip while its chunk is made; only bad clips have texts
RECORD = np.dtype([("crc32", "<u4"), ("outcome", "S6"), ("reason", "S200")])


class Chunk:
    """One file of the dump, made by one process: the clips of `rows`, a range of the annotations' rows.

    Until the dump is complete, a file of RECORDs lies beside it. Each is written after its clip, so the file's length
    says how many clips are done.
    """

    def __init__(self, data, index, rows):
        self.rows, self.path = rows, data / f"spectrograms_{index}.npy"
        self.partial, self.log = self.path.with_suffix(".npy.partial"), self.path.with_suffix(".records")
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), N_MELS, N_FRAMES)}
        np.lib.format.write_array_header_1_0(header, layout)
        self.header = header.getvalue()

    def n_done(self):
        """Return how many clips are done."""
        with suppress(FileNotFoundError):
            return min(self.log.stat().st_size // RECORD.itemsize, len(self.rows))
        return 0

    def records(self):
        """Return the RECORDs of the clips that are done."""
        return np.fromfile(self.log, RECORD, n_done) if (n_done := self.n_done()) else np.empty(0, RECORD)

    def has_all_bytes(self):
        return self.path.exists() and self.path.stat().st_size == len(self.header) + len(self.rows) * CLIP_BYTES

    def is_complete(self):
        return self.n_done() == len(self.rows) and self.has_all_bytes() and not self.partial.exists()

    def resume(self):
        """Open the unfinished files, which the caller has locked; return the places of the clips that are missing."""
        expected = self.records()["crc32"]
        self.partial.touch()
        self.log.touch()
        self.clips, self.record = open(self.partial, "r+b"), open(self.log, "r+b")
        self.clips.write(self.header)
        # A power cut may keep a record and lose its clip
        lost = [place for place, crc in enumerate(expected) if zlib.crc32(self.clips.read(CLIP_BYTES)) != crc]
        self.clips.truncate(len(self.header) + len(expected) * CLIP_BYTES)
        return [*lost, *range(len(expected), len(self.rows))]

    def reopen(self, records, retry_bad):
        """Write the finished file's RECORDs again; if it has bad clips to retry, also make it an unfinished one."""
        with whole_file(self.log) as file:
            file.write(records.tobytes())
        if retry_bad and records["outcome"].any():
            shutil.copyfile(self.path, self.partial)  # a training may be reading the file itself

    def write(self, place, spectrogram, outcome="", reason=""):
        """Write the clip at `place`, the next one or one that is there: (128, 628) float32."""
        clip = spectrogram.astype("<f4").tobytes()
        record = np.zeros(1, RECORD)
        record[0] = zlib.crc32(clip), outcome.encode(), " ".join(reason.split()).encode(errors="replace")
        self.clips.seek(len(self.header) + place * CLIP_BYTES)
        self.record.seek(place * RECORD.itemsize)
        for file, content in ((self.clips, clip), (self.record, record.tobytes())):
            file.write(content)
            file.flush()

    def finish(self):
        """Rename the file, which has all its clips, to its final name."""
        for file in (self.clips, self.record):
            os.fsync(file.fileno())
            file.close()
        os.replace(self.partial, self.path)


def divide(data, n_clips, n_chunks):
    """Return the Chunks of a dump. As in the original, each has (n_clips - 1) // n_chunks + 1 clips, the last fewer."""
    size = (n_clips - 1) // n_chunks + 1
    return [Chunk(data, index, range(n_clips)[index * size : (index + 1) * size]) for index in range(n_chunks)]


def chunk_files(data):
    """Return the paths of all chunks, finished or not, and of what belongs to them."""
    pattern = r"spectrograms_\d+\.(npy|npy\.partial|records|crc32|bad|journal)"  # the last three: earlier versions'
    return [path for path in data.iterdir() if re.fullmatch(pattern, path.name)]


def delete_dump(data):
    """Delete a dump, once no process is at work on any part of it."""
    with ExitStack() as held:
        for name in {path.name.split(".")[0] for path in chunk_files(data)}:
            held.enter_context(lock(data / f"{name}.npy"))
        for path in [data / MANIFEST, *chunk_files(data)]:
            path.unlink(missing_ok=True)


def read_manifest(data):
    """Return the contents of dump.json, or {} where there is none. Raises InputError if it is damaged."""
    path = data / MANIFEST
    if not path.exists():
        return {}
    with suppress(ValueError, KeyError, AttributeError, TypeError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.pop("checksum") == checksum_of(manifest):
            return manifest
    raise InputError(f"{path}: damaged; delete it and start over with gen_spectrograms.py --overwrite")


def write_manifest(data, manifest):
    write_json(data / MANIFEST, {**manifest, "checksum": checksum_of(manifest)})


def checksum_of(manifest):
    return hex_crc32(json.dumps(manifest, sort_keys=True).encode())


def hex_crc32(content):
    """Return the CRC-32 of bytes as eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def annotations_sha256(data):
    """Return the SHA-256 of the table of annotations in folder `data` in hexadecimal digits, None if there is none."""
    table = annotations_file(data)
    return hashlib.sha256(table.read_bytes()).hexdigest() if table.exists() else None


class Dump:
    """A complete dump, memory-mapped: a Dataset of (128, 628) float32 spectrograms, with the tables of its clips.

    Two dumps of the same clips and tables have the same `fingerprint`. `n_bad` clips are all zeros. Raises InputError
    if a file is missing or a table is damaged; `verify` compares the spectrograms with their checksums.
    """

    def __init__(self, data):
        self.data, self.manifest = data, read_manifest(data)
        if not self.manifest.get("complete"):
            remedy = "name another folder with --data, or run gen_spectrograms.py"
            raise InputError(f"{data}: no complete dump here; {remedy}")
        self.front_end, self.synthetic = self.manifest["front_end"], self.manifest["synthetic"]
        require_front_end(self.front_end, data, "restore that, or remake the dump with gen_spectrograms.py --overwrite")
        self.n_bad = self.manifest["outcomes"]["zero"]
        self.made_with = self.manifest.get("made_with", "librosa and soxr unknown")  # in a dump of an earlier version
        self.fingerprint = ",".join(sorted(self.manifest["crc32"].values()))
        self.ids, self.labels = self._load("ids.npy"), self._load("tags.npy")
        self.tag_names, self.mp3_paths = self._load("tag_names.npy").tolist(), self._load("mp3_paths.npy").tolist()
        self.chunks = divide(data, self.manifest["n_clips"], self.manifest["n_chunks"])
        self.spectrograms = []
        for chunk in self.chunks:
            self._require(chunk.has_all_bytes(), chunk.path)
            shape = len(chunk.rows), N_MELS, N_FRAMES
            self.spectrograms.append(np.memmap(chunk.path, "<f4", "r", len(chunk.header), shape))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        chunk, place = divmod(row, len(self.spectrograms[0]))
        return self.spectrograms[chunk][place]

    def _load(self, name):
        path = self.data / name
        content = path.read_bytes() if path.exists() else b""
        self._require(hex_crc32(content) == self.manifest["crc32"].get(name), path)
        return np.load(io.BytesIO(content), allow_pickle=False)

    def _require(self, intact, path):
        if not intact:
            raise InputError(f"{path}: missing, damaged or of another dump; gen_spectrograms.py --overwrite remakes it")

    def verify(self, rows=None):
        """Compare the spectrograms, or those of `rows`, with their checksums. Raises InputError if a file is damaged.

        Returns, from the same pass, each clip's sums and sums of squares over frames: (2, clips, 128) float64.
        """
        rows = range(len(self)) if rows is None else rows
        expected = self._load("checksums.npy")

        def band_sums(row):
            clip = self[row]
            self._require(zlib.crc32(clip) == expected[row], self.chunks[row // len(self.spectrograms[0])].path)
            clip = clip.astype(np.float64)
            return clip.sum(axis=1), np.einsum("bt,bt->b", clip, clip)

        with ThreadPoolExecutor(cpu_count()) as pool:
            sums = pool.map(band_sums, rows)
            return np.swapaxes(list(progress(sums, "verifying", len(rows), unit="clip", delay=1, leave=False)), 0, 1)

    def records(self):
        """Return the RECORD of each clip, as it was before the dump was complete."""
        path, bad = self.data / "bad_clips.csv", {}
        with suppress(OSError, csv.Error), open(path, encoding="utf-8", errors="replace", newline="") as file:
            bad = {row[0]: row[2:] for row in csv.reader(file) if len(row) == 4}
        records = np.zeros(len(self), RECORD)
        records["crc32"] = self._load("checksums.npy")
        for record, clip in zip(records, self.ids.tolist()):
            record["outcome"], record["reason"] = (text.encode() for text in bad.get(str(clip), ("", "")))
        for outcome, n_clips in self.manifest["outcomes"].items():  # people edit tables
            self._require(np.sum(records["outcome"] == outcome.encode()) == n_clips, path)
        return records

    def note_on_table(self):
        """Return a note if the table of annotations is no longer that of the dump's tags, else ""."""
        changed = annotations_sha256(self.data) not in (None, self.manifest["annotations_sha256"])
        table = annotations_file(self.data)
        return f"note: {table} has changed; gen_spectrograms.py renews the dump's tags\n" if changed else ""


def same_clips(fingerprint, others):
    """Return whether a dump has the clips of one of `others`, whose labels or spectrograms may have been renewed.

    Of their fingerprints' CRC-32s, at least three are then equal: those of ids, paths, and tag names or checksums.
    """
    return any(fingerprint == one or len({*fingerprint.split(",")} & {*one.split(",")}) > 2 for one in others)


def band_normalization(sums, squares):
    """Return the mean and standard deviation per mel band over clips and frames, (128,) float32 each."""
    n_values = len(sums) * N_FRAMES
    mean = sums.sum(axis=0) / n_values
    std = np.sqrt(np.maximum(squares.sum(axis=0) / n_values - mean**2, 0))
    varies = std > 1e-5 * np.abs(mean)  # by rounding, a constant band has up to 1e-6: measured with 26,000 clips
    return mean.astype(np.float32), np.where(varies, std, 1).astype(np.float32)
