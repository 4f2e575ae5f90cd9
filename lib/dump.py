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
from contextlib import suppress

import numpy as np

from lib.audio import N_FRAMES, N_MELS
from lib.common import InputError, lock, progress, whole_file

CLIP_BYTES = N_MELS * N_FRAMES * 4
MANIFEST = "dump.json"
LOCK_SECONDS = 5  # a killed run's last worker may take eight clips' time to notice
ANEW = "gen_spectrograms.py --overwrite makes the dump anew"


class Chunk:
    """One file of the dump, made by one process: `n_clips` consecutive clips.

    Its journal has a line for each complete clip, written after the clip's spectrogram: the CRC-32 of the file
    up to the clip's end, an outcome and a reason, both empty for a good clip.
    """

    def __init__(self, data, index, n_clips):
        self.n_clips = n_clips
        self.file = data / f"spectrograms_{index}.npy"
        self.partial = data / f"spectrograms_{index}.npy.partial"
        self.journal = data / f"spectrograms_{index}.journal"
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (n_clips, N_MELS, N_FRAMES)}
        np.lib.format.write_array_header_1_0(header, layout)
        self.header = header.getvalue()

    def lock(self):
        """Return a context in which no other process writes or deletes the chunk."""
        busy = f"{self.file}: another process is making it; once that one has ended, the same command goes on"
        return lock(self.file.with_name(f".{self.file.stem}.lock"), busy, LOCK_SECONDS)

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

    def is_complete(self):
        n_bytes = len(self.header) + self.n_clips * CLIP_BYTES
        return self.file.exists() and self.file.stat().st_size == n_bytes and len(self.entries()) == self.n_clips


class ChunkWriter:
    """A chunk's unfinished file and its journal, opened after the last clip on which they agree.

    `n_done` clips are there already. The caller holds the chunk's lock.
    """

    def __init__(self, chunk):
        self.chunk = chunk
        chunk.partial.touch()
        self.file = open(chunk.partial, "r+b")
        self.file.write(chunk.header)
        self.crc = zlib.crc32(chunk.header)
        verified = []
        for entry in chunk.entries()[: chunk.n_clips]:
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
        """Write the next clip; a spectrogram of None is all zeros."""
        clip = bytes(CLIP_BYTES) if spectrogram is None else spectrogram.astype("<f4", copy=False).tobytes()
        self.crc = zlib.crc32(clip, self.crc)
        if spectrogram is None:
            self.file.truncate(self.file.seek(CLIP_BYTES, os.SEEK_CUR))  # zeros that take no room on the disk
        else:
            self.file.write(clip)
            self.file.flush()
        self.journal.write(f"{self.crc:08x}\t{outcome}\t{' '.join(reason.split())}\n".encode(errors="replace"))

    def finish(self):
        """Give the file, which has all its clips, its name."""
        for file in (self.file, self.journal):
            os.fsync(file.fileno())
            file.close()
        os.replace(self.chunk.partial, self.chunk.file)


def dump_lock(data):
    """Return a context in which no other process begins, deletes or completes the dump in folder `data`."""
    busy = f"{data / MANIFEST}: another process is at work on the dump; once it has ended, the same command goes on"
    return lock(data / ".dump.lock", busy, LOCK_SECONDS)


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

    `front_end` is {} and `fingerprint` empty for another program's dump. Raises InputError if a file is missing,
    damaged or does not belong to the others; the spectrograms' own checksums are compared in `band_sums`.
    """

    def __init__(self, data):
        self.data = data
        self.manifest = read_manifest(data)
        if self.manifest is None:
            if not (data / "ids.npy").exists():
                raise InputError(f"{data}: no spectrograms here; run gen_spectrograms.py --data {data}")
            print(f"note: {data} has no {MANIFEST}: another program's dump, taken without checksums")
        elif not self.manifest["complete"]:
            raise InputError(f"{data / MANIFEST}: the dump is unfinished; run gen_spectrograms.py again to complete it")
        known = self.manifest or {"crc32": {}, "front_end": {}, "synthetic": False, "outcomes": {"zero": 0}}
        self.front_end, self.synthetic, self.n_bad = known["front_end"], known["synthetic"], known["outcomes"]["zero"]
        self.fingerprint = ",".join(sorted(known["crc32"].values()))  # equal for two dumps of the same bytes
        n_chunks = self.manifest["n_chunks"] if self.manifest else len(list(data.glob("spectrograms_*.npy")))
        self.files = [data / f"spectrograms_{index}.npy" for index in range(n_chunks)]
        self.chunks = [self._load(file.name, mapped=True) for file in self.files]
        self.ids = self._load("ids.npy")
        self.tag_names = [str(name) for name in self._load("tag_names.npy").ravel()]
        self.labels = self._load("tags.npy")
        self.mp3_paths = [str(path) for path in self._load("mp3_paths.npy")] if self.manifest else None
        self._check()
        self.labels = self.labels.astype(np.uint8)
        self.starts = np.cumsum([0] + [len(chunk) for chunk in self.chunks])

    def __len__(self):
        return len(self.ids)

    def _load(self, name, mapped=False):
        """Return an array; the checksum of one that is `mapped` into memory is compared where it is read."""
        path = self.data / name
        try:
            if not mapped:
                self._require(path, crc_of_file(path))
            array = np.lib.format.open_memmap(path, mode="r")  # which refuses pickles
            return array if mapped else np.array(array)
        except FileNotFoundError:
            raise InputError(f"{path}: missing; {ANEW}") from None
        except (InputError, OSError):
            raise
        except Exception as error:  # a damaged header can fail in as many ways as it can be damaged
            raise InputError(f"{path}: damaged ({error}); {ANEW}") from error

    def _check(self):
        """Raise InputError unless all arrays are what the docstring at the top says; another program wrote them."""
        for file, chunk in zip(self.files, self.chunks):
            order = "C order" if chunk.flags.c_contiguous else "Fortran order"
            if (chunk.dtype, chunk.shape[1:], order) != (np.float32, (N_MELS, N_FRAMES), "C order"):
                found = f"{chunk.dtype} {chunk.shape} in {order}"
                raise InputError(f"{file}: holds {found}, not float32 (clips, {N_MELS}, {N_FRAMES}) in C order")
        if self.ids.dtype.kind not in "iu" or self.ids.ndim != 1:
            raise InputError(f"{self.data / 'ids.npy'}: holds {self.ids.dtype} {self.ids.shape}, not integers (clips,)")
        n_clips, n_distinct = len(self.ids), len(np.unique(self.ids))
        n_spectrograms = sum(len(chunk) for chunk in self.chunks)
        if not n_spectrograms == n_clips == n_distinct or self.labels.shape != (n_clips, len(self.tag_names)):
            found = f"{n_spectrograms:,} spectrograms, {n_clips:,} ids ({n_distinct:,} distinct)"
            found += f", {len(self.tag_names)} tag names and labels {self.labels.shape}"
            raise InputError(f"{self.data}: files that don't belong together: {found}")
        if self.labels.dtype.kind not in "biuf" or not np.isin(self.labels, (0, 1)).all():
            raise InputError(f"{self.data / 'tags.npy'}: holds other values than 0 and 1")

    def _require(self, file, crc):
        if self.manifest and crc != self.manifest["crc32"].get(file.name):
            raise InputError(f"{file}: damaged or from another dump; {ANEW}")

    def band_sums(self):
        """Return each clip's sum and sum of squares over frames, (2, clips, 128) float64, checking every byte.

        Raises InputError if a file of spectrograms is not the one that dump.json knows, or holds NaN.
        """
        bar = progress(desc="normalization", total=len(self), unit="clip", delay=1, leave=False)
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            sums = list(pool.map(self._band_sums_of_chunk, self.files, self.chunks, [bar] * len(self.files)))
        return np.concatenate(sums, axis=1)

    def _band_sums_of_chunk(self, file, chunk, bar):
        with open(file, "rb") as opened:
            crc = zlib.crc32(opened.read(file.stat().st_size - chunk.nbytes))
        sums = np.empty((2, len(chunk), N_MELS))
        for start in range(0, len(chunk), 8):
            rows = slice(start, start + 8)  # so few stay in the cache
            clips = chunk[rows]
            crc = zlib.crc32(clips, crc)
            exact = clips.astype(np.float64)
            sums[0, rows] = exact.sum(axis=2)
            sums[1, rows] = np.einsum("cbt,cbt->cb", exact, exact)
            bar.update(len(clips))
        self._require(file, f"{crc:08x}")
        if not np.isfinite(sums[1]).all():
            raise InputError(f"{file}: holds values that are not finite; {ANEW}")
        return sums

    def path_of(self, row):
        """Return the audio file of a row, relative to the data folder; empty for another program's dump."""
        return self.mp3_paths[row] if self.mp3_paths else ""

    def gather(self, rows, normalization, out):
        """Copy the spectrograms of `rows` into `out` (rows, 128, 628) float32, normalised per mel band."""
        mean, std = normalization
        chunk_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        for target, row, chunk in zip(out, rows, chunk_of_row):
            np.subtract(self.chunks[chunk][row - self.starts[chunk]], mean[:, None], out=target)
            np.divide(target, std[:, None], out=target)


def band_normalization(sums, squares):
    """Return the mean and standard deviation per mel band over clips and frames, (128,) float32 each."""
    n_values = len(sums) * N_FRAMES
    mean = sums.sum(axis=0) / n_values
    variance = squares.sum(axis=0) / n_values - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
