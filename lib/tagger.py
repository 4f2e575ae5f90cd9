"""Tag music with a trained network: audio files, or arrays of samples, of any length."""

import os
from pathlib import Path

import numpy as np
import torch

from lib.audio import AUDIO_EXTENSIONS, CLIP_SAMPLES, CLIP_SAMPLES_READ, HOP_LENGTH, load, log_mel, resample
from lib.checkpoint import cautions, load_checkpoint, load_network
from lib.common import InputError
from lib.loader import to_probabilities
from lib.parallel import autocast, choose_device

BATCH_SIZE = 3  # clips: more are no faster, and several files are tagged at a time


class Tagger:
    """A trained network: Tagger("experiments/paper/best.pt")("song.mp3") returns {tag: probability}, likeliest first.

    It can also be called with an array and its sample rate in Hz, as soundfile.read returns them: floating-point
    numbers of full scale 1, (samples,) or (samples, channels). `precision` is one of trainer.py's, or "checkpoint" for
    the one that it was trained in. Raises InputError for a checkpoint or audio that can't be used.
    """

    def __init__(self, checkpoint_path, device="auto", precision="checkpoint"):
        checkpoint = load_checkpoint(checkpoint_path)
        self.tag_names, self.synthetic = checkpoint["tag_names"], checkpoint["synthetic"]
        self.cautions = [*cautions(checkpoint)]
        self.device = choose_device(device)
        self.net, self.precision = load_network(checkpoint, self.device, precision)
        self.mean, self.std = (checkpoint["normalization"][name].numpy()[:, None] for name in ("mean", "std"))

    def __call__(self, audio, sample_rate=None):
        return self.tags(self.samples(audio, sample_rate))

    def samples(self, audio, sample_rate=None):
        """Return the samples of a file or an array in mono at 11,025 Hz: (samples,) float32, full scale 1."""
        if isinstance(audio, (str, os.PathLike)):
            return load(audio)[0]
        audio = np.asarray(audio)
        if audio.dtype.kind != "f" or audio.ndim not in (1, 2) or audio.shape[1:] > (8,) or sample_rate is None:
            wanted = "(samples,) or (samples, channels) in floating-point numbers, and a sample rate in Hz"
            raise InputError(f"an array of {audio.dtype} {audio.shape} at {sample_rate} Hz: must be {wanted}")
        audio = audio.astype(np.float32)
        return resample([audio if audio.ndim == 1 else audio.mean(axis=1)], sample_rate)

    def spectrograms(self, clips):
        """Return the normalised spectrograms of clips at 11,025 Hz, as the network takes them: (clips, 1, 128, 628)."""
        spectrograms = np.stack([log_mel(clip) for clip in clips])
        return torch.from_numpy((spectrograms - self.mean) / self.std)[:, None].to(getattr(torch, self.precision))

    @torch.no_grad()
    def probabilities(self, clips):
        """Return the probabilities for clips at 11,025 Hz: (clips, tags) float64."""
        batches = (self.spectrograms(clips[start : start + BATCH_SIZE]) for start in range(0, len(clips), BATCH_SIZE))
        with autocast(self.device, self.precision):
            return to_probabilities(torch.cat([self.net(batch.to(self.device)).cpu() for batch in batches]))

    def tags(self, samples):
        """Return {tag: probability}, the most likely first: the mean over the windows of samples at 11,025 Hz."""
        mean = self.probabilities(windows(samples)).mean(axis=0)
        return {self.tag_names[tag]: float(mean[tag]) for tag in np.argsort(-mean, kind="stable")}


def windows(samples):
    """Return clips of 29.1 s, as few as cover `samples`, evenly spaced, at 11,025 Hz.

    More windows give the same tags: on eight recordings of 4 minutes, the mean over windows 2 s apart differed by
    0.0019 on average. A clip extends as far as the window of its last frame. A shorter recording is repeated to fill
    one: with the silence that pads a training clip, music would get the tags of silence.
    """
    if len(samples) < CLIP_SAMPLES:
        samples = np.resize(samples, CLIP_SAMPLES)
    excess = len(samples) - CLIP_SAMPLES
    n_windows = 1 + -(-max(0, excess - HOP_LENGTH) // CLIP_SAMPLES)  # less than a frame adds none
    starts = np.linspace(0, excess, n_windows).astype(int)
    return [samples[start : start + CLIP_SAMPLES_READ] for start in starts]


def audio_files(paths):
    """Return `paths` with each folder replaced by its audio files, and how many other files the folders hold.

    Linked folders are followed, hidden ones are not, and each is read once. One that can't be listed, or without audio,
    stays in the list and becomes an error like that of a file.
    """
    files, n_others, seen = [], 0, set()
    for path in paths:
        if os.path.realpath(path) in seen:
            continue
        unlisted, audio, repeated = [], [], False  # `unlisted` is the path itself if it is a file
        walk = os.walk(path, onerror=lambda error: unlisted.append(Path(error.filename)), followlinks=True)
        for folder, folders, names in walk:
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                repeated = True
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = [Path(folder, name) for name in names if not name.startswith(".")]
            audio += (found := [file for file in inside if file.suffix.lower() in AUDIO_EXTENSIONS])
            n_others += len(inside) - len(found)
        files += [*sorted(audio), *unlisted] or [path] * (not repeated)
    return list(dict.fromkeys(files)), n_others
