"""The dump of spectrograms on disk: written clip by clip, resumed, verified, memory-mapped.

A data folder's dump is spectrograms_<i>.npy (clips, 128, 628) float32, the tables ids.npy (clips,) int64, tags.npy
(clips, tags) uint8, tag_names.npy, mp3_paths.npy and checksums.npy (clips,) uint32, bad_clips.csv, and dump.json, which
says what the dump was made from and, once it is complete, the CRC-32 of each table.
"""

import io
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
from joblib import cpu_count

from lib.audio import N_FRAMES, N_MELS
from lib.common import InputError, lock, progress, whole_file

CLIP_BYTES = N_MELS * N_FRAMES * 4
MANIFEST = "dump.json"


class Chunk:
    """One file of the dump, made by one process: the clips of `rows`, a range of the annotations' rows.

    Until the dump is complete, two files beside it hold a checksum for each clip, appended after the clip, and a line
    "row outcome reason" for each bad clip. The checksum is the clip's CRC-32, XOR that of its line if it has one.
    """

    def __init__(self, data, index, rows):
        self.rows, self.path = rows, data / f"spectrograms_{index}.npy"
        self.partial, self.crc32, self.bad = (self.path.with_suffix(end) for end in (".npy.partial", ".crc32", ".bad"))
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), N_MELS, N_FRAMES)}
        np.lib.format.write_array_header_1_0(header, layout)
        self.header = header.getvalue()

    def n_done(self):
        """Return how many clips are done."""
        return min(self.crc32.stat().st_size // 4, len(self.rows)) if self.crc32.exists() else 0

    def bad_clips(self):
        """Return {row: line} of the bad clips that are done."""
        content, done = self.bad.read_bytes() if self.bad.exists() else b"", self.rows[: self.n_done()]
        return {
            int(row): line for line, row in re.findall(rb"^((\d+)\t.*\n)", content, re.MULTILINE) if int(row) in done
        }

    def checksums(self):
        """Return the CRC-32 of each clip that is done: (clips,) uint32; another number if its line is damaged."""
        found = np.fromfile(self.crc32, "<u4", self.n_done()) if self.n_done() else np.empty(0, "<u4")
        for row, line in self.bad_clips().items():
            found[row - self.rows.start] ^= zlib.crc32(line)
        return found

    def has_all_bytes(self):
        return self.path.exists() and self.path.stat().st_size == len(self.header) + len(self.rows) * CLIP_BYTES

    def is_complete(self):
        return self.has_all_bytes() and self.n_done() == len(self.rows)

    def resume(self):
        """Open the unfinished files after the last clip that has its checksum; return how many clips there are.

        The caller holds the lock on the chunk's path.
        """
        paths, n_done = (self.partial, self.crc32, self.bad), 0
        for path in paths:
            path.touch()
        self.files = [open(path, "r+b") for path in paths]  # not "ab": that writes behind another process's bytes
        clips, crc32, bad = self.files
        clips.write(self.header)
        for checksum in self.checksums():
            if zlib.crc32(clips.read(CLIP_BYTES)) != checksum:  # a power cut may keep a checksum and lose its clip
                break
            n_done += 1
        clips.truncate(clips.seek(len(self.header) + n_done * CLIP_BYTES))
        crc32.truncate(crc32.seek(4 * n_done))
        bad.seek(0, os.SEEK_END)
        bad.write(b"\n")  # ends a line that was cut off
        return n_done

    def append(self, row, spectrogram, outcome="", reason=""):
        """Write the next clip: (128, 628) float32."""
        clips, crc32, bad = self.files
        clip = spectrogram.astype("<f4").tobytes()
        line = f"{row}\t{outcome}\t{' '.join(reason.split())}\n".encode(errors="replace") if outcome else b""
        checksum = zlib.crc32(clip) ^ zlib.crc32(line)
        for file, content in ((bad, line), (clips, clip), (crc32, checksum.to_bytes(4, "little"))):
            file.write(content)
            file.flush()

    def finish(self):
        """Give the file, which has all its clips, its name."""
        for file in self.files:
            os.fsync(file.fileno())
            file.close()
        os.replace(self.partial, self.path)


def divide(data, n_clips, n_chunks):
    """Return the Chunks of a dump. As in the original, each has (n_clips - 1) // n_chunks + 1 clips, the last fewer."""
    size = (n_clips - 1) // n_chunks + 1
    return [Chunk(data, index, range(n_clips)[index * size : (index + 1) * size]) for index in range(n_chunks)]


def chunk_files(data):
    """Return the paths of all chunks, finished or not, and of what belongs to them."""
    pattern = r"spectrograms_\d+\.(npy|npy\.partial|crc32|bad|journal)"  # journal: of earlier versions
    return [path for path in data.iterdir() if re.fullmatch(pattern, path.name)]


def delete_dump(data):
    """Delete a dump, once no process is at work on any part of it."""
    paths = chunk_files(data)
    with ExitStack() as held:
        for name in {path.name.split(".")[0] for path in paths}:
            held.enter_context(lock(data / f"{name}.npy"))
        for path in [data / MANIFEST, *paths]:
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
    with whole_file(data / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**manifest, "checksum": checksum_of(manifest)}, file, indent=1)


def checksum_of(manifest):
    return hex_crc32(json.dumps(manifest, sort_keys=True).encode())


def hex_crc32(content, start=0):
    """Return the CRC-32 of bytes, which may continue that of others, as eight hexadecimal digits."""
    return f"{zlib.crc32(content, start):08x}"


class Dump:
    """A finished dump, memory-mapped: a Dataset of (128, 628) float32 spectrograms, with the tables of its clips.

    `fingerprint` is equal for two dumps of the same clips and tables; `n_bad` clips are all zeros. Raises InputError if
    a file is missing, or a table damaged; `verify` compares the spectrograms with their checksums.
    """

    def __init__(self, data):
        self.data, self.manifest = data, read_manifest(data)
        if not self.manifest.get("complete"):
            raise InputError(f"{data}: no complete dump here; run gen_spectrograms.py --data {data}")
        self.front_end, self.synthetic = self.manifest["front_end"], self.manifest["synthetic"]
        self.n_bad = self.manifest["outcomes"]["zero"]
        self.fingerprint = ",".join(sorted(self.manifest["crc32"].values()))
        self.ids, self.labels = self._load("ids.npy"), self._load("tags.npy")
        self.tag_names, self.mp3_paths = self._load("tag_names.npy").tolist(), self._load("mp3_paths.npy").tolist()
        self.chunks = divide(data, self.manifest["n_clips"], self.manifest["n_chunks"])
        for chunk in self.chunks:
            self._require(chunk.has_all_bytes(), chunk.path)
        self.spectrograms = [
            np.memmap(chunk.path, "<f4", "r", len(chunk.header), (len(chunk.rows), N_MELS, N_FRAMES))
            for chunk in self.chunks
        ]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        chunk, place = divmod(row, len(self.spectrograms[0]))
        return self.spectrograms[chunk][place]

    def _load(self, name):
        path = self.data / name
        content = path.read_bytes() if path.exists() else b""
        self._require(hex_crc32(content) == self.manifest["crc32"][name], path)
        return np.load(io.BytesIO(content), allow_pickle=False)

    def _require(self, intact, path):
        if not intact:
            raise InputError(
                f"{path}: missing, damaged or from another dump; gen_spectrograms.py --overwrite remakes it"
            )

    def verify(self, rows=None):
        """Compare the spectrograms, or those of `rows`, with their checksums; return sums from the same pass.

        Each clip's sums and sums of squares over frames: (2, clips, 128) float64. Raises InputError at a damaged file.
        """
        rows = range(len(self)) if rows is None else rows
        has_checksums = "checksums.npy" in self.manifest["crc32"]
        checksums = self._load("checksums.npy") if has_checksums else None

        def band_sums(row):
            clip = self[row]
            if has_checksums:
                self._require(zlib.crc32(clip) == checksums[row], self.chunks[row // len(self.spectrograms[0])].path)
            clip = clip.astype(np.float64)
            return clip.sum(axis=1), np.einsum("bt,bt->b", clip, clip)

        if not has_checksums:  # a dump of an earlier version has a checksum for each file
            for chunk, clips in zip(self.chunks, self.spectrograms):
                crc = hex_crc32(clips, zlib.crc32(chunk.header))
                self._require(crc == self.manifest["crc32"][chunk.path.name], chunk.path)
        with ThreadPoolExecutor(cpu_count()) as pool:
            sums = pool.map(band_sums, rows)
            return np.swapaxes(list(progress(sums, "verifying", len(rows), unit="clip", delay=1, leave=False)), 0, 1)

    def gather(self, rows, normalization, out):
        """Copy the spectrograms of `rows` into `out` (rows, 128, 628) float32, normalised per mel band."""
        mean, std = normalization
        for target, row in zip(out, rows):
            np.subtract(self[row], mean[:, None], out=target)
            np.divide(target, std[:, None], out=target)


def band_normalization(sums, squares):
    """Return the mean and standard deviation per mel band over clips and frames, (128,) float32 each."""
    n_values = len(sums) * N_FRAMES
    mean = sums.sum(axis=0) / n_values
    variance = squares.sum(axis=0) / n_values - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
