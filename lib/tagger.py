"""Tag music with a trained network: audio files, or arrays of samples, of any length."""

import itertools
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch

from lib.audio import AUDIO_EXTENSIONS, CLIP_SAMPLES, CLIP_SAMPLES_READ, HOP_LENGTH, load, log_mel, resample
from lib.checkpoint import cautions, load_checkpoint, load_network
from lib.common import InputError
from lib.loader import hidden_values, network_scores
from lib.parallel import choose_device

BATCH_SIZE = 3  # clips: more are no faster, and several files are tagged at a time


class Tagger:
    """A trained network: Tagger("experiments/paper/best.pt")("song.mp3") returns {tag: score}, scores from 0 to 1.

    First comes the tag of the largest score / threshold. `thresholds`, {tag: score}, are those of best F1 on validation
    clips, 1 for a tag that none of them has. It can also be called with an array and its sample rate in Hz, as
    soundfile.read returns them: floating-point numbers of full scale 1, (samples,) or (samples, channels). `precision`
    is one of trainer.py's, or "checkpoint" for the one that it was trained in. Raises InputError for a checkpoint or
    audio that can't be used.
    """

    def __init__(self, checkpoint_path, device="auto", precision="checkpoint"):
        checkpoint = load_checkpoint(checkpoint_path)
        self.tag_names, self.synthetic = checkpoint["tag_names"], checkpoint["synthetic"]
        self.thresholds = dict(zip(self.tag_names, checkpoint["thresholds"].tolist()))
        toy = "note: this checkpoint was trained on SYNTHETIC clips; its tags for music mean little"
        self.cautions = [toy] * self.synthetic + [*cautions(checkpoint)]
        self.device = choose_device(device)
        self.net, self.precision = load_network(checkpoint, self.device, precision)
        self.mean, self.std = (checkpoint["normalization"][name].numpy()[:, None] for name in ("mean", "std"))

    def __call__(self, audio, sample_rate=None):
        return self.tags(self.samples(audio, sample_rate))

    def features(self, audio, sample_rate=None):
        """Return what the last layer is given, the mean over a recording's windows: (500,) float32."""
        clips = windows(self.samples(audio, sample_rate))
        return hidden_values(self.net, lambda: self.scores(clips)).mean(axis=0)

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

    def scores(self, clips):
        """Return the scores for clips at 11,025 Hz: (clips, tags) float64."""
        batches = (self.spectrograms(clips[start : start + BATCH_SIZE]) for start in range(0, len(clips), BATCH_SIZE))
        return network_scores(self.net, (batch.to(self.device) for batch in batches), self.device, self.precision)

    def tags(self, samples):
        """Return {tag: score}, the means over the windows of samples at 11,025 Hz, largest score / threshold first."""
        mean = self.scores(windows(samples)).mean(axis=0)
        order = foremost(mean, [*self.thresholds.values()])
        return {self.tag_names[tag]: float(mean[tag]) for tag in order}

    def above(self, tags):
        """Return those of `tags`, as a call returns them, whose scores reach their thresholds."""
        return [tag for tag, score in tags.items() if score >= self.thresholds[tag]]


def foremost(scores, thresholds):
    """Return the numbers of the tags, largest score / threshold first, for scores (tags,) or (clips, tags)."""
    return np.argsort(-scores / thresholds, axis=-1, kind="stable")


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
    """Return `paths` with the songs of playlists and the audio files of folders, and how many others the folders hold.

    Linked folders are followed, hidden ones are not, and each is read once. One that can't be listed, or without audio,
    stays in the list and becomes an error like that of a file.
    """
    files, n_others, seen = [], 0, set()
    for path in itertools.chain.from_iterable(map(songs_of, paths)):
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


def songs_of(path):
    """Return the paths in an M3U playlist, of which some programs make URLs, or else the `path` itself."""
    if path.suffix.lower() not in (".m3u", ".m3u8") or not path.is_file():
        return [path]
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if "\0" not in text]  # else it is no text
    songs = [unquote(line[7:]) if line.startswith("file://") else line for line in lines if line]
    return [path.parent / song for song in songs if not song.startswith("#")] or [path]
