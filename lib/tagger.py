"""Tag music with a trained network: audio files, or arrays of samples, of any length."""

import os
from pathlib import Path

import numpy as np
import torch

from lib.audio import CLIP_SAMPLES, FRONT_END, HOP_LENGTH, N_FFT, load, log_mel, resample
from lib.checkpoint import load_checkpoint, load_network
from lib.common import InputError
from lib.loader import to_probabilities
from lib.parallel import autocast, choose_device

BATCH_SIZE = 9  # clips: a song of four minutes; 0.2 GB in float32


class Tagger:
    """A trained network: Tagger("experiments/paper/best.pt")("song.mp3") returns {tag: probability}, likeliest first.

    It can also be called with an array and its sample rate in Hz, as soundfile.read returns them: floating-point
    numbers of full scale 1, (samples,) or (samples, channels). `precision` is one of trainer.py's, or "checkpoint" for
    the one that it was trained in. Raises InputError for a checkpoint or audio that can't be used.
    """

    def __init__(self, checkpoint_path, device="auto", precision="checkpoint"):
        checkpoint = load_checkpoint(checkpoint_path)
        if checkpoint["front_end"] != FRONT_END:
            raise InputError(f"{checkpoint_path}: trained on spectrograms of a different front end; train again")
        self.tag_names, self.synthetic = checkpoint["tag_names"], checkpoint["synthetic"]
        self.device = choose_device(device)
        self.net, self.precision = load_network(checkpoint, self.device, precision)
        self.mean, self.std = (checkpoint["normalization"][name].numpy()[:, None] for name in ("mean", "std"))

    def __call__(self, audio, sample_rate=None):
        return self.tags(self.spectrograms(windows(self.samples(audio, sample_rate))))

    def samples(self, audio, sample_rate=None):
        """Return the samples of a file or an array in mono at 11,025 Hz: (samples,) float32, full scale 1."""
        if isinstance(audio, (str, os.PathLike)):
            return load(audio)
        audio = np.asarray(audio)
        if audio.dtype.kind != "f" or audio.ndim not in (1, 2) or audio.shape[1:] > (8,) or sample_rate is None:
            wanted = "(samples,) or (samples, channels) in floating-point numbers, and a sample rate in Hz"
            raise InputError(f"an array of {audio.dtype} {audio.shape} at {sample_rate} Hz: must be {wanted}")
        audio = audio.astype(np.float32)
        return resample(audio if audio.ndim == 1 else audio.mean(axis=1), sample_rate)

    def spectrograms(self, clips):
        """Return the normalised spectrograms of clips at 11,025 Hz, as the network takes them: (clips, 1, 128, 628)."""
        spectrograms = np.stack([log_mel(clip) for clip in clips])
        return torch.from_numpy((spectrograms - self.mean) / self.std)[:, None]

    @torch.no_grad()
    def probabilities(self, spectrograms):
        """Return the probabilities for (clips, 1, 128, 628) normalised spectrograms: (clips, tags) float64."""
        with autocast(self.device, self.precision):
            batches = spectrograms.to(getattr(torch, self.precision)).split(BATCH_SIZE)
            logits = torch.cat([self.net(batch.to(self.device)).cpu() for batch in batches])
        return to_probabilities(logits)

    def tags(self, spectrograms):
        """Return {tag: probability}, the most likely first: the mean over the spectrograms of a recording."""
        mean = self.probabilities(spectrograms).mean(axis=0)
        return {self.tag_names[tag]: float(mean[tag]) for tag in np.argsort(-mean, kind="stable")}


def windows(samples):
    """Return clips of 29.1 s, as few as cover `samples`, evenly spaced, at 11,025 Hz.

    More windows give the same tags: on eight recordings of 4 minutes, the mean over windows 2 s apart differed by
    0.0019 on average. A clip extends as far as the window of its last frame.
    """
    excess = max(0, len(samples) - CLIP_SAMPLES)
    n_windows = 1 + -(-max(0, excess - HOP_LENGTH) // CLIP_SAMPLES)  # less than a frame adds none
    starts = np.linspace(0, excess, n_windows).astype(int)
    return [samples[start : start + CLIP_SAMPLES + N_FFT // 2] for start in starts]


def audio_files(paths):
    """Return `paths` with each folder replaced by its audio files: those whose extension libsndfile supports.

    A folder that can't be listed, or holds none, stays in the list and becomes an error like that of a file.
    """
    import soundfile

    extensions = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {".aif", ".opus", ".oga"}
    files = []
    for path in paths:
        unlisted = []  # folders, or `path` itself if it is a file
        walk = os.walk(path, onerror=lambda error: unlisted.append(Path(error.filename)))
        inside = [Path(folder, name) for folder, _, names in walk for name in names if not name.startswith(".")]
        audio = sorted(file for file in inside if file.suffix.lower() in extensions)
        files += [*audio, *unlisted] or [path]
    return list(dict.fromkeys(files))
