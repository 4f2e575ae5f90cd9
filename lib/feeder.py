"""Batches of a dump on the training device, and predictions from them."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lib.audio import N_FRAMES, N_MELS
from lib.common import progress


class Feeder:
    """Normalised spectrograms and labels in batches, on the device; the caller need not know where they come from.

    The whole dump lives on the device if `resident` is "yes", or "auto" and a CUDA GPU has room for it. Otherwise a
    thread gathers batches from the mapped files, into pinned memory if they go to a GPU, up to `n_ahead` batches
    before they are asked for.
    """

    def __init__(self, dump, labels, normalization, device, dtype=torch.float32, n_ahead=4, resident="auto"):
        self.dump, self.normalization = dump, normalization
        self.device, self.dtype, self.n_ahead = device, dtype, n_ahead
        self.labels = torch.from_numpy(labels).to(device, torch.promote_types(dtype, torch.float32))
        needed = len(dump) * N_MELS * N_FRAMES * dtype.itemsize  # bytes
        fits = device.type == "cuda" and needed < 0.7 * torch.cuda.mem_get_info(device)[0]  # beside the network
        self.resident = self._move_to_device() if resident == "yes" or (resident == "auto" and fits) else None

    def batches(self, parts):
        """Yield ((rows, 1, 128, 628) spectrograms, (rows, tags) labels) for each array of rows in `parts`."""
        rows_of_all = torch.from_numpy(np.concatenate(parts)).to(self.device)  # at once: a GPU waits for no copy later
        rows_of_each = rows_of_all.split([len(rows) for rows in parts])
        if self.resident is not None:
            for rows in rows_of_each:
                yield self.resident[rows], self.labels[rows]
        else:
            for batch, rows in zip(load_ahead(self._gather, parts, self.n_ahead), rows_of_each):
                yield batch.to(self.device, self.dtype, non_blocking=True), self.labels[rows]

    def _gather(self, rows):
        batch = torch.empty((len(rows), 1, N_MELS, N_FRAMES), pin_memory=self.device.type == "cuda")
        self.dump.gather(rows, self.normalization, batch[:, 0].numpy())
        return batch

    def _move_to_device(self):
        resident = torch.empty((len(self.dump), 1, N_MELS, N_FRAMES), device=self.device, dtype=self.dtype)
        parts = np.array_split(np.arange(len(self.dump)), -(-len(self.dump) // 256))
        bar = progress(parts, f"to {self.device}", delay=1, leave=False)
        for rows, batch in zip(bar, load_ahead(self._gather, parts, 4)):
            resident[rows[0] : rows[-1] + 1] = batch.to(self.device, non_blocking=True)
        return resident


def load_ahead(load, parts, n_ahead, n_threads=1):
    """Yield load(part) for each part, in order; `n_threads` threads are up to `n_ahead` parts ahead of the caller."""
    pool = ThreadPoolExecutor(n_threads)
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


@torch.no_grad()
def predict(net, feeder, rows, batch_size):
    """Return the probabilities of the dump's `rows`: (rows, tags) float64."""
    net.eval()
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    bar = progress(parts, "predicting", unit="batch", delay=1, leave=False)
    return to_probabilities(torch.cat([net(spectrograms) for _, (spectrograms, _) in zip(bar, feeder.batches(parts))]))


def to_probabilities(logits):
    """Return the sigmoid of `logits` as a NumPy array of float64."""
    return torch.sigmoid(logits.cpu().double()).numpy()  # on the CPU: Apple's GPUs have no float64
