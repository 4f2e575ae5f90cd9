"""The dump of spectrograms on disk: written clip by clip, resumed, checked, memory-mapped.

A data folder's dump is spectrograms_<i>.npy (clips, 128, 628) float32, ids.npy (clips,) int64, tags.npy
(clips, tags) uint8, tag_names.npy, mp3_paths.npy, bad_clips.csv, and dump.json. The last says what the dump was
made from and, once every chunk is there, the CRC-32 of each file.
"""

import io
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np

from lib.audio import N_FRAMES, N_MELS
from lib.common import InputError, lock, n_cores, progress, whole_file

CLIP_BYTES = N_MELS * N_FRAMES * 4
MANIFEST = "dump.json"
FILES = "spectrograms_[0-9]*"  # of all chunks, with their journals, finished or not


class Chunk:
    """One file of the dump, made by one process: the clips of `rows`, a range of the annotations' rows.

    Its journal has a line for each complete clip, written after the clip's spectrogram: the CRC-32 of the file
    up to the clip's end, an outcome and a reason, both empty for a good clip.
    """

    def __init__(self, data, index, rows):
        self.rows = rows
        self.file = data / f"spectrograms_{index}.npy"
        self.partial = data / f"spectrograms_{index}.npy.partial"
        self.journal = data / f"spectrograms_{index}.journal"
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), N_MELS, N_FRAMES)}
        np.lib.format.write_array_header_1_0(header, layout)
        self.header = header.getvalue()

    def entries(self):
        """Return the journal's complete lines as (crc, outcome, reason); a kill may have cut off the last."""
        try:
            return re.findall("(.*)\t(.*)\t(.*)\n", self.journal.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            return []

    def crc(self):
        """Return the finished file's CRC-32, as the journal's last line has it."""
        entries = self.entries()
        return entries[-1][0] if entries else f"{zlib.crc32(self.header):08x}"

    def has_file(self):
        n_bytes = len(self.header) + len(self.rows) * CLIP_BYTES
        return self.file.exists() and self.file.stat().st_size == n_bytes

    def is_complete(self):
        return self.has_file() and len(self.entries()) == len(self.rows)


def divide(data, n_clips, n_chunks):
    """Return the Chunks of a dump. As in the original, each has (n_clips - 1) // n_chunks + 1 clips, the last fewer."""
    size = (n_clips - 1) // n_chunks + 1
    return [Chunk(data, index, range(n_clips)[index * size : (index + 1) * size]) for index in range(n_chunks)]


class ChunkWriter:
    """A chunk's unfinished file and its journal, opened after the last clip on which they agree.

    `n_done` clips are there already. The caller holds the lock on the chunk's file.
    """

    def __init__(self, chunk):
        self.chunk = chunk
        chunk.partial.touch()
        self.file = open(chunk.partial, "r+b")
        self.file.write(chunk.header)
        self.crc = zlib.crc32(chunk.header)
        verified = []
        for entry in chunk.entries()[: len(chunk.rows)]:
            crc = zlib.crc32(self.file.read(CLIP_BYTES), self.crc)
            if f"{crc:08x}" != entry[0]:
                break
            verified.append("\t".join(entry) + "\n")
            self.crc = crc
        self.n_done = len(verified)
        self.file.truncate(self.file.seek(len(chunk.header) + self.n_done * CLIP_BYTES))
        self.journal = open(chunk.journal, "ab", buffering=0)
        self.journal.truncate(len("".join(verified).encode()))

    def append(self, spectrogram, outcome="", reason=""):
        """Write the next clip."""
        clip = spectrogram.astype("<f4", copy=False).tobytes()
        self.crc = zlib.crc32(clip, self.crc)
        self.file.write(clip)
        self.file.flush()
        self.journal.write(f"{self.crc:08x}\t{outcome}\t{' '.join(reason.split())}\n".encode(errors="replace"))

    def finish(self):
        """Give the file, which has all its clips, its name."""
        for file in (self.file, self.journal):
            os.fsync(file.fileno())
            file.close()
        os.replace(self.chunk.partial, self.chunk.file)


def delete_dump(data):
    """Delete a dump once no process is at work on any part of it."""
    with ExitStack() as held:
        for index in {re.split("[_.]", path.name)[1] for path in data.glob(FILES)}:
            held.enter_context(lock(Chunk(data, index, range(0)).file))
        for path in [data / MANIFEST, *data.glob(FILES)]:
            path.unlink(missing_ok=True)


def read_manifest(data):
    """Return the contents of dump.json, or None where there is none. Raises InputError if it is damaged."""
    path = data / MANIFEST
    if not path.exists():
        return None
    with suppress(ValueError, KeyError, AttributeError, TypeError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.pop("checksum") == _checksum(manifest):
            return manifest
    raise InputError(f"{path}: damaged; delete it and start over with gen_spectrograms.py --overwrite")


def write_manifest(data, manifest):
    with whole_file(data / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**manifest, "checksum": _checksum(manifest)}, file, indent=1)


def _checksum(manifest):
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def crc_of_file(path):
    """Return a file's CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


class Dump:
    """A finished dump, memory-mapped: `ids`, `labels`, `tag_names` and `mp3_paths`, and spectrograms by row.

    `fingerprint` is equal for two dumps of the same bytes; `n_bad` clips are all zeros. Raises InputError if a file is
    missing or damaged; the spectrograms' own checksums are compared in `band_sums`.
    """

    def __init__(self, data):
        self.data = data
        self.manifest = read_manifest(data)
        if not self.manifest or not self.manifest["complete"]:
            raise InputError(f"{data}: no complete dump here; run gen_spectrograms.py --data {data}")
        self.front_end, self.synthetic = self.manifest["front_end"], self.manifest["synthetic"]
        self.n_bad = self.manifest["outcomes"]["zero"]
        self.fingerprint = ",".join(sorted(self.manifest["crc32"].values()))
        self.ids, self.labels = self._load("ids.npy"), self._load("tags.npy")
        self.tag_names, self.mp3_paths = self._load("tag_names.npy").tolist(), self._load("mp3_paths.npy").tolist()
        self.files = divide(data, self.manifest["n_clips"], self.manifest["n_chunks"])
        self.chunks = [self._map(chunk) for chunk in self.files]

    def __len__(self):
        return len(self.ids)

    def _load(self, name):
        path = self.data / name
        self._require(path, crc_of_file(path) if path.exists() else "")
        return np.load(path, allow_pickle=False)

    def _map(self, chunk):
        if not chunk.has_file():
            self._require(chunk.file, "")
        return np.memmap(chunk.file, "<f4", "r", len(chunk.header), (len(chunk.rows), N_MELS, N_FRAMES))

    def _require(self, file, crc):
        if crc != self.manifest["crc32"][file.name]:
            raise InputError(f"{file}: missing, damaged or of another dump; gen_spectrograms.py --overwrite renews it")

    def band_sums(self):
        """Return each clip's sum and sum of squares over frames, (2, clips, 128) float64, checking every byte.

        Raises InputError if a file of spectrograms is not the one that dump.json knows.
        """
        bar = progress(desc="normalization", total=len(self), unit="clip", delay=1, leave=False)
        with ThreadPoolExecutor(n_cores()) as pool, bar:
            sums = list(pool.map(self._band_sums_of_chunk, self.files, self.chunks, [bar] * len(self.files)))
        return np.concatenate(sums, axis=1)

    def _band_sums_of_chunk(self, chunk, spectrograms, bar):
        with open(chunk.file, "rb") as file:
            crc = zlib.crc32(file.read(len(chunk.header)))
        sums = np.empty((2, len(spectrograms), N_MELS))
        for start in range(0, len(spectrograms), 8):
            rows = slice(start, start + 8)  # so few stay in the cache
            clips = spectrograms[rows]
            crc = zlib.crc32(clips, crc)
            exact = clips.astype(np.float64)
            sums[0, rows] = exact.sum(axis=2)
            sums[1, rows] = np.einsum("cbt,cbt->cb", exact, exact)
            bar.update(len(clips))
        self._require(chunk.file, f"{crc:08x}")
        return sums

    def gather(self, rows, normalization, out):
        """Copy the spectrograms of `rows` into `out` (rows, 128, 628) float32, normalised per mel band."""
        mean, std = normalization
        for target, row in zip(out, rows):
            chunk, place = divmod(row, len(self.chunks[0]))
            np.subtract(self.chunks[chunk][place], mean[:, None], out=target)
            np.divide(target, std[:, None], out=target)


def band_normalization(sums, squares):
    """Return the mean and standard deviation per mel band over clips and frames, (128,) float32 each."""
    n_values = len(sums) * N_FRAMES
    mean = sums.sum(axis=0) / n_values
    variance = squares.sum(axis=0) / n_values - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
