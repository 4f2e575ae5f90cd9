"""The dump of spectrograms on disk: written clip by clip, resumed, checked, memory-mapped and fed in batches.

A data folder's dump is spectrograms_<i>.npy (clips, 128, 628) float32, ids.npy (clips,) int64, tags.npy
(clips, tags) uint8, tag_names.npy, mp3_paths.npy, bad_clips.csv, and dump.json. The last says what the dump was
made from and, once every chunk is there, the CRC-32 of each file.
"""

import contextlib
import fcntl
import io
import json
import os
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from common import InputError, whole_file

# torch is imported where batches are made: writing a dump does not need it.

N_MELS, N_FRAMES = 128, 628
CLIP_BYTES = N_MELS * N_FRAMES * 4
MANIFEST = "dump.json"
LOCK_SECONDS = 10  # a killed run's last worker may take one clip's time to notice


# Writing


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

    def header(self):
        """Return the finished file's first bytes."""
        header = io.BytesIO()
        layout = {"descr": "<f4", "fortran_order": False, "shape": (self.n_clips, N_MELS, N_FRAMES)}
        np.lib.format.write_array_header_1_0(header, layout)
        return header.getvalue()

    def entries(self):
        """Return the journal's complete lines as (crc, outcome, reason)."""
        try:
            text = self.journal.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        entries = []
        for line in text.split("\n")[:-1]:  # what follows the last line end was cut off by a kill
            fields = line.split("\t")
            if len(fields) != 3:
                break
            entries.append(tuple(fields))
        return entries

    def crc(self):
        """Return the finished file's CRC-32, as the journal's last line has it."""
        entries = self.entries()
        return entries[-1][0] if entries else f"{zlib.crc32(self.header()):08x}"

    def is_complete(self):
        return self.file.exists() and len(self.entries()) == self.n_clips


@contextlib.contextmanager
def chunk_writer(chunk):
    """Open `chunk` after its last complete clip; yield (n_complete, append) and give the file its name at the end.

    `append(spectrogram, outcome, reason)` writes the next clip; a spectrogram of None is all zeros. Raises
    InputError if another process is at work on the chunk.
    """
    with open(chunk.partial, "a+b") as file, open(chunk.journal, "a+b", buffering=0) as journal:
        _lock(file, chunk.file)
        entries, crc = _verified_entries(chunk, file)
        file.truncate(len(chunk.header()) + len(entries) * CLIP_BYTES)
        journal.truncate(sum(len("\t".join(entry).encode()) + 1 for entry in entries))

        def append(spectrogram, outcome="", reason=""):
            nonlocal crc
            if spectrogram is None:
                crc = zlib.crc32(bytes(CLIP_BYTES), crc)
                file.truncate(file.seek(0, os.SEEK_END) + CLIP_BYTES)  # zeros that take no room on the disk
            else:
                clip = spectrogram.astype("<f4", copy=False).tobytes()
                crc = zlib.crc32(clip, crc)
                file.write(clip)
                file.flush()
            journal.write(f"{crc:08x}\t{outcome}\t{' '.join(reason.split())}\n".encode())

        yield len(entries), append
        os.fsync(file.fileno())
        os.fsync(journal.fileno())
        os.replace(chunk.partial, chunk.file)


def _verified_entries(chunk, file):
    """Return the journal's entries that agree with the partial file's bytes, and the CRC-32 after the last."""
    header = chunk.header()
    file.seek(0)
    if file.read(len(header)) != header:
        file.truncate(0)
        file.write(header)
        file.flush()
        return [], zlib.crc32(header)
    verified, crc = [], zlib.crc32(header)
    for entry in chunk.entries()[: chunk.n_clips]:
        clip = file.read(CLIP_BYTES)
        crc_here = zlib.crc32(clip, crc)
        if len(clip) < CLIP_BYTES or f"{crc_here:08x}" != entry[0]:
            break
        verified.append(entry)
        crc = crc_here
    return verified, crc


def _lock(file, name):
    """Hold `file` for this process until it is closed."""
    patience = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > patience:
                raise InputError(f"{name}: another process is making it; wait for that one, or stop it") from None
            time.sleep(0.05)


@contextlib.contextmanager
def dump_lock(data):
    """Let one process at a time begin, delete or complete the dump in folder `data`."""
    with open(data / "dump.lock", "ab") as file:
        _lock(file, data / MANIFEST)
        yield


def read_manifest(data):
    """Return the contents of dump.json, or None where there is none. Raises InputError if it is damaged."""
    path = data / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        intact = manifest.pop("checksum") == _checksum(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise InputError(f"{path}: damaged; delete it and start over with gen_spectrograms.py --overwrite")
    return manifest


def write_manifest(data, manifest):
    with whole_file(data / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**manifest, "checksum": _checksum(manifest)}, file, indent=1)


def _checksum(manifest):
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def crc_of_file(path):
    """Return a file's CRC-32 as eight hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# Reading


class Dump:
    """A finished dump, memory-mapped: `ids`, `labels`, `tag_names` and `mp3_paths`, and spectrograms by row.

    Raises InputError if a file is missing, damaged or does not belong to the others. The spectrograms' own
    checksums are compared in `check_spectrograms`, and in `band_sums`, which reads them all anyway.
    """

    def __init__(self, data):
        self.data = data
        self.manifest = read_manifest(data)
        if self.manifest is None:
            self._warn_of_missing_manifest()
        elif not self.manifest["complete"]:
            raise InputError(f"{data / MANIFEST}: the dump is unfinished; run gen_spectrograms.py again to complete it")
        self.ids = self._load("ids.npy")
        self.labels = self._load("tags.npy")
        self.tag_names = [str(name) for name in self._load("tag_names.npy")]
        self.mp3_paths = [str(path) for path in self._load("mp3_paths.npy")] if self.manifest else None
        self.files = self._chunk_files()
        self.chunks = [self._load(file.name, mmap_mode="r") for file in self.files]
        self._check()
        self.starts = np.cumsum([0] + [len(chunk) for chunk in self.chunks])

    def __len__(self):
        return len(self.ids)

    @property
    def synthetic(self):
        return bool(self.manifest and self.manifest["synthetic"])

    @property
    def front_end(self):
        return self.manifest["front_end"] if self.manifest else {}

    @property
    def n_bad(self):
        return self.manifest["outcomes"]["zero"] if self.manifest else 0

    @property
    def fingerprint(self):
        """What two dumps of the same bytes share; nothing for another program's dump."""
        return ",".join(sorted(self.manifest["crc32"].values())) if self.manifest else ""

    def _warn_of_missing_manifest(self):
        if not (self.data / "ids.npy").exists():
            raise InputError(f"{self.data}: no spectrograms here; run gen_spectrograms.py --data {self.data}")
        tqdm.write(f"note: {self.data} has no {MANIFEST}: another program's dump, taken without checksums")

    def _chunk_files(self):
        files = sorted(self.data.glob("spectrograms_*.npy"), key=lambda file: (len(file.name), file.name))
        expected = self.manifest["n_chunks"] if self.manifest else max(len(files), 1)
        names = [f"spectrograms_{index}.npy" for index in range(expected)]
        if [file.name for file in files] != names:
            raise InputError(f"{self.data}: the dump needs {names[0]} to {names[-1]} and nothing else of that kind")
        return files

    def _load(self, name, **options):
        path = self.data / name
        try:
            if not options:  # the spectrograms, which are mapped, are checked where they are read
                self._require(path, crc_of_file(path))
            return np.load(path, allow_pickle=False, **options)
        except FileNotFoundError:
            raise InputError(f"{path}: missing; gen_spectrograms.py --overwrite makes the dump anew") from None
        except (InputError, OSError):
            raise
        except Exception as error:  # a damaged header can fail in as many ways as it can be damaged
            raise InputError(f"{path}: damaged ({error}); gen_spectrograms.py --overwrite makes it anew") from error

    def _check(self):
        n_clips = len(self.ids)
        for file, chunk in zip(self.files, self.chunks):
            if chunk.dtype != np.float32 or chunk.shape[1:] != (N_MELS, N_FRAMES):
                raise InputError(
                    f"{file}: holds {chunk.dtype} {chunk.shape}, not float32 (clips, {N_MELS}, {N_FRAMES})"
                )
        counts = {
            "spectrograms": sum(len(chunk) for chunk in self.chunks),
            "rows of tags.npy": len(self.labels),
            "ids": n_clips,
        }
        if len(set(counts.values())) > 1 or len(np.unique(self.ids)) != n_clips:
            found = ", ".join(f"{count:,} {what}" for what, count in counts.items())
            raise InputError(
                f"{self.data}: files that don't belong together: {found}, {len(np.unique(self.ids)):,} distinct"
            )
        if self.labels.ndim != 2 or self.labels.shape[1] != len(self.tag_names):
            raise InputError(
                f"{self.data}: tags.npy is {self.labels.shape}, but there are {len(self.tag_names)} tag names"
            )

    def check_spectrograms(self):
        """Compare every byte with the checksums. Raises InputError if a file is not the one that dump.json knows."""
        if self.manifest:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                crcs = tqdm(pool.map(crc_of_file, self.files), "checking", len(self.files), delay=1, leave=False)
                for file, crc in zip(self.files, crcs):
                    self._require(file, crc)

    def _require(self, file, crc):
        if self.manifest and crc != self.manifest["crc32"].get(file.name):
            raise InputError(f"{file}: damaged or from another dump; gen_spectrograms.py --overwrite makes it anew")

    def band_sums(self):
        """Return each clip's sum and sum of squares over frames, (clips, 128) float64 each, checking every byte.

        Raises InputError if a file of spectrograms is not the one that dump.json knows.
        """
        sums = np.empty((2, len(self), N_MELS))
        with ThreadPoolExecutor(os.cpu_count()) as pool, self._progress() as bar:
            tasks = [pool.submit(self._band_sums_of_chunk, index, sums, bar) for index in range(len(self.chunks))]
            for task in tasks:
                task.result()
        return sums[0], sums[1]

    def _band_sums_of_chunk(self, index, sums, bar, clips_at_once=8):
        chunk, file = self.chunks[index], self.files[index]
        crc = zlib.crc32(_header_bytes(file, chunk))
        for start in range(0, len(chunk), clips_at_once):
            clips = chunk[start : start + clips_at_once]
            crc = zlib.crc32(clips, crc)
            exact = clips.astype(np.float64)
            rows = slice(self.starts[index] + start, self.starts[index] + start + len(clips))
            sums[0, rows] = exact.sum(axis=2)
            sums[1, rows] = np.einsum("cbt,cbt->cb", exact, exact)
            bar.update(len(clips))
        self._require(file, f"{crc:08x}")

    def _progress(self):
        return tqdm(total=len(self), desc="normalization", unit="clip", delay=1, leave=False)

    def gather(self, rows, normalization, out):
        """Copy the spectrograms of `rows` into `out` (rows, 128, 628) float32, normalised per mel band."""
        mean, std = normalization
        chunk_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        for target, row, chunk in zip(out, rows, chunk_of_row):
            np.subtract(self.chunks[chunk][row - self.starts[chunk]], mean[:, None], out=target)
            np.divide(target, std[:, None], out=target)


def _header_bytes(file, chunk):
    with open(file, "rb") as opened:
        return opened.read(os.path.getsize(file) - len(chunk) * CLIP_BYTES)


def band_normalization(sums, squares):
    """Return the mean and standard deviation per mel band over clips and frames, (128,) float32 each."""
    n_values = len(sums) * N_FRAMES
    mean = sums.sum(axis=0) / n_values
    variance = squares.sum(axis=0) / n_values - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


class Feeder:
    """Normalised spectrograms in batches, on the training device; the caller need not know where they come from.

    Where a GPU's memory holds the whole dump, it lives there. Otherwise a thread gathers batches from the mapped
    files, into pinned memory if they go to a GPU, up to `n_ahead` batches before they are asked for.
    """

    def __init__(self, dump, normalization, device, dtype, n_ahead):
        self.dump, self.normalization = dump, normalization
        self.device, self.dtype, self.n_ahead = device, dtype, n_ahead
        self.resident = self._move_to_gpu() if self._fits_on_gpu() else None

    def batches(self, parts):
        """Yield a (rows, 1, 128, 628) tensor on the device for each array of rows in `parts`."""
        if self.resident is not None:
            for rows in parts:
                yield self.resident[_as_tensor(rows, self.device)]
            return
        for batch in _ahead(self._gather, parts, self.n_ahead):
            yield batch.to(self.device, self.dtype, non_blocking=True)

    def _gather(self, rows):
        import torch

        batch = torch.empty((len(rows), 1, N_MELS, N_FRAMES), pin_memory=self.device.type == "cuda")
        self.dump.gather(rows, self.normalization, batch[:, 0].numpy())
        return batch

    def _fits_on_gpu(self):
        if self.device.type != "cuda":
            return False
        import torch

        needed = len(self.dump) * N_MELS * N_FRAMES * self.dtype.itemsize
        return needed < 0.7 * torch.cuda.mem_get_info(self.device)[0]  # the rest is for the network

    def _move_to_gpu(self):
        import torch

        shape = (len(self.dump), 1, N_MELS, N_FRAMES)
        resident = torch.empty(shape, device=self.device, dtype=self.dtype)
        parts = np.array_split(np.arange(len(self.dump)), -(-len(self.dump) // 256))
        for rows, batch in zip(tqdm(parts, desc="to the GPU", delay=1, leave=False), _ahead(self._gather, parts, 4)):
            resident[rows[0] : rows[-1] + 1] = batch.to(self.device, non_blocking=True)
        return resident


def _as_tensor(rows, device):
    import torch

    return torch.from_numpy(rows).to(device, non_blocking=True)


def _ahead(load, parts, n_ahead):
    """Yield load(part) for each part; a thread is up to `n_ahead` parts ahead of the caller."""
    pool = ThreadPoolExecutor(1)
    try:
        loading = deque()
        for part in parts:
            loading.append(pool.submit(load, part))
            if len(loading) > n_ahead:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
