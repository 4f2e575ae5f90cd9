"""Batches of a dump on the training device, and predictions from them."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from lib.audio import N_FRAMES, N_MELS
from lib.common import progress
from lib.parallel import autocast

THREADS = 2  # gather batches; one reaches 19,000 clips/s from mapped files in the file cache
CLIPS_AHEAD = 512  # are read before they are needed: 160 MB


class Loader:
    """Normalised spectrograms and labels in batches, on the device.

    Threads gather them from the mapped files, into pinned memory if they go to a CUDA GPU, up to CLIPS_AHEAD clips
    before they are needed; so a GPU copies one batch while it computes on those before, and never waits for the host.
    """

    def __init__(self, dump, labels, normalization, device, precision):
        self.dump, self.normalization = dump, [normalization[name].numpy() for name in ("mean", "std")]
        self.device, self.precision, self.pinned = device, precision, device.type == "cuda"
        self.labels = torch.from_numpy(labels).to(torch.float64 if precision == "float64" else torch.float32)

    def batches(self, parts):
        """Yield ((rows, 1, 128, 628) spectrograms, (rows, tags) labels) for each array of rows in `parts`."""
        n_ahead = CLIPS_AHEAD // max(1, len(parts[0]))
        for spectrograms, labels in load_ahead(self._gather, parts, n_ahead, THREADS):
            spectrograms = spectrograms.to(
                self.device, non_blocking=True
            )  # first: with another dtype, this would block
            yield spectrograms.to(getattr(torch, self.precision)), labels.to(self.device, non_blocking=True)

    def _gather(self, rows):
        spectrograms = torch.empty((len(rows), 1, N_MELS, N_FRAMES), pin_memory=self.pinned)
        self.dump.gather(rows, self.normalization, spectrograms[:, 0].numpy())
        return spectrograms, self.labels[rows].pin_memory() if self.pinned else self.labels[rows]


def load_ahead(load, parts, n_ahead, n_threads):
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
def predict(net, loader, rows, batch_size):
    """Return the probabilities of the dump's `rows`: (rows, tags) float64."""
    net.eval()
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    bar = progress(loader.batches(parts), "predicting", len(parts), unit="batch", delay=1, leave=False)
    with autocast(loader.device, loader.precision):
        return to_probabilities(torch.cat([net(spectrograms) for spectrograms, _ in bar]))


def to_probabilities(logits):
    """Return the sigmoid of `logits` as a NumPy array of float64."""
    return torch.sigmoid(logits.cpu().double()).numpy()  # on the CPU: Apple's GPUs have no float64
