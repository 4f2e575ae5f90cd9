"""Batches of a dump on the training device, and predictions from them."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lib.audio import N_FRAMES, N_MELS
from lib.common import InputError, progress
from lib.parallel import autocast

THREADS = 2  # threads that gather batches; one alone reaches 19,000 clips/s from files in the page cache
CLIPS_AHEAD = 512  # clips read in advance: 160 MB


class Loader:
    """Normalised spectrograms and labels in batches, on the device.

    Threads gather them from the memory-mapped files up to CLIPS_AHEAD clips in advance; in pinned memory for a CUDA
    GPU, so that the host need not wait until a batch is copied.
    """

    def __init__(self, dump, labels, normalization, device, precision):
        self.dump, self.device, self.precision, self.pinned = dump, device, precision, device.type == "cuda"
        self.mean, self.std = (normalization[name][:, None].to(device) for name in ("mean", "std"))
        self.labels = torch.from_numpy(labels).to(torch.float64 if precision == "float64" else torch.float32)

    def batches(self, batches):
        """Yield ((rows, 1, 128, 628) spectrograms, (rows, tags) labels) for each array of rows in `batches`."""
        dtype = getattr(torch, self.precision)
        for tensors in load_ahead(self._gather, batches, CLIPS_AHEAD // max(1, len(batches[0])), THREADS):
            spectrograms, labels = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
            spectrograms = (spectrograms - self.mean) / self.std
            yield spectrograms.to(dtype), labels  # converted on the device: a copy that converts is never asynchronous

    def _gather(self, rows):
        spectrograms = torch.empty((len(rows), 1, N_MELS, N_FRAMES), pin_memory=self.pinned)
        for target, row in zip(spectrograms[:, 0].numpy(), rows):
            target[:] = self.dump[row]
        return spectrograms, self.labels[rows].pin_memory() if self.pinned else self.labels[rows]


def load_ahead(load, items, n_ahead, n_threads):
    """Yield load(item) for each item, in order; `n_threads` threads work up to `n_ahead` items ahead of the caller."""
    pool = ThreadPoolExecutor(n_threads)
    try:
        loading = deque()
        for item in items:
            loading.append(pool.submit(load, item))
            if len(loading) > n_ahead:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def predict(net, loader, rows, batch_size):
    """Return the scores, from 0 to 1, of the dump's `rows`: (rows, tags) float64."""
    net.eval()
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    bar = progress(loader.batches(batches), "predicting", len(batches), unit="batch", delay=1, leave=False)
    return network_scores(net, (spectrograms for spectrograms, _ in bar), loader.device, loader.precision)


@torch.no_grad()
def network_scores(net, batches, device, precision):
    """Return the scores, from 0 to 1, of batches on `device`, (clips, tags) float64. Raises InputError for a NaN."""
    with autocast(device, precision):
        logits = torch.cat([net(spectrograms) for spectrograms in batches])
    scores = torch.sigmoid(logits.cpu().double()).numpy()  # on the CPU: Apple's GPUs have no float64
    if np.isnan(scores).any():
        raise InputError("the network's outputs are not finite; train again, with a lower --learning-rate")
    return scores


def hidden_values(net, compute):
    """Return what the head of `net` is given while `compute()` runs in this thread: (clips, 500) float32."""
    found, here = [], threading.get_ident()

    def keep(head, inputs):
        if threading.get_ident() == here:
            found.append(inputs[0].float().cpu())

    with net.head.register_forward_pre_hook(keep):
        compute()
    return torch.cat(found).numpy()
