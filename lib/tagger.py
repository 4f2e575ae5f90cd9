"""A trained network at work on music: audio files, or arrays of samples, of any length."""

import numbers
import os
import sys
from pathlib import Path

import numpy as np
import torch

from lib.audio import CLIP_SAMPLES, FRONT_END, HOP_LENGTH, N_FFT, SAMPLE_RATE, load, log_mel, resample
from lib.checkpoint import load_checkpoint, network_of
from lib.common import InputError, reason
from lib.feeder import to_probabilities
from lib.parallel import autocast, choose_device, prepare_device

CLIPS_AT_ONCE = 32  # through the network
FULL_SCALE = {"int16": 2**15, "int32": 2**31}  # of the integers in which audio is stored
MAX_CHANNELS = 8  # of an array; a longer side holds its samples
TAGGRAM_COLUMNS = 120  # at the most; a second apart where that is enough


class Tagger:
    """A trained network that tags music of any length.

    Tagger("experiments/paper/best.pt")("song.mp3") returns {tag: probability}, the most likely first. So does a call
    with an array and its sample rate in Hz; the array is (samples,) or (samples, channels), and has floating-point
    numbers of full scale 1, or int16 or int32. The network computes in the precision it was trained in, unless
    `precision` is another one of trainer.py's. Raises InputError for a checkpoint or audio that can't be used.
    """

    def __init__(self, checkpoint_path, device="auto", precision="checkpoint"):
        checkpoint = load_checkpoint(checkpoint_path)
        if checkpoint["front_end"] not in ({}, FRONT_END):
            raise InputError(
                f"{checkpoint_path}: was trained on spectrograms of another front end than lib/audio.py's; train again"
            )
        self.tag_names = checkpoint["tag_names"]
        self.synthetic = checkpoint["synthetic"]
        self.device = choose_device(device)
        self.net, self.precision = network_in_precision(checkpoint, self.device, precision)
        self.mean, self.std = (checkpoint["normalization"][name].numpy()[:, None] for name in ("mean", "std"))

    def __call__(self, audio, sample_rate=None):
        return self.tags(self.spectrograms(windows(self.samples(audio, sample_rate))))

    def samples(self, audio, sample_rate=None):
        """Return the samples of a file or an array in mono at 11,025 Hz: (samples,) float32."""
        if isinstance(audio, (str, os.PathLike)):
            return load(audio)
        if not isinstance(sample_rate, numbers.Real):
            raise InputError(f"an array of samples needs its sample rate, a number in Hz, not {sample_rate!r}")
        return resample(mono(audio), float(sample_rate))

    def spectrograms(self, clips):
        """Return the normalised spectrograms of clips at 11,025 Hz, as the network takes them: (clips, 1, 128, 628)."""
        spectrograms = np.stack([log_mel(clip) for clip in clips])
        return torch.from_numpy((spectrograms - self.mean) / self.std)[:, None]

    @torch.no_grad()
    def probabilities(self, spectrograms):
        """Return the probabilities for (clips, 1, 128, 628) normalised spectrograms: (clips, tags) float64."""
        with autocast(self.device, self.precision):
            clips = spectrograms.to(getattr(torch, self.precision)).split(CLIPS_AT_ONCE)
            logits = [self.net(some_clips.to(self.device)).cpu() for some_clips in clips]
        return to_probabilities(torch.cat(logits), "the network's answers are not finite; train again")

    def tags(self, spectrograms):
        """Return {tag: probability}, the most likely first: the mean over the spectrograms of a recording."""
        mean = self.probabilities(spectrograms).mean(axis=0)
        return {self.tag_names[tag]: float(mean[tag]) for tag in np.argsort(-mean, kind="stable")}


def network_in_precision(checkpoint, device, precision):
    """Return (network, precision) for the checkpoint on `device`. The network's input has the precision's dtype.

    A `precision` of "checkpoint" is the one that it was trained in.
    """
    trained = checkpoint["hyperparameters"]
    if precision == "checkpoint":
        precision = trained.get("precision", "float32")
    dtype = prepare_device(device, precision, trained.get("tf32", True))
    return network_of(checkpoint, device).to(dtype), precision


def mono(audio):
    """Return an array of samples, as Tagger takes it, in mono: (samples,) float32, full scale 1.

    (channels, samples) is taken too, where it can be told from (samples, channels). Raises InputError for any other
    shape or type, for no samples, and for samples that are not finite.
    """
    try:
        audio = np.asarray(audio)
    except Exception as error:  # ragged lists, tensors on a GPU, ...
        raise InputError(f"not an array of samples ({reason(error)})") from error
    if audio.dtype.kind != "f" and audio.dtype.name not in FULL_SCALE:
        raise InputError(f"an array of {audio.dtype}: samples must be floating-point numbers, int16 or int32")
    if not audio.size:
        raise InputError("an array without samples")
    sides = sorted(audio.shape)
    if audio.ndim != 1 and not (audio.ndim == 2 and sides[0] <= MAX_CHANNELS and sides[1] >= 10 * sides[0]):
        raise InputError(
            f"an array of shape {audio.shape}: must be (samples,) or (samples, channels), with at most {MAX_CHANNELS} "
            "channels and many more samples"
        )
    with np.errstate(over="ignore"):
        samples = audio.astype(np.float32) / np.float32(FULL_SCALE.get(audio.dtype.name, 1))
    if not np.isfinite(samples).all():
        raise InputError("an array with samples that are not finite")
    return samples.mean(axis=np.argmin(samples.shape)) if samples.ndim == 2 else samples


def windows(samples):
    """Return clips of 29.1 s that cover `samples` evenly, at 11,025 Hz, each overlapping the next by a quarter or more.

    More overlap gives the same tags: on five songs, the mean over windows 2 s apart differs from that over these by
    0.0007 on average, and from that over windows overlapping by half by 0.0005. An excess shorter than a frame adds no window. The clips have what the last frame's window reaches beyond them.
    """
    excess = max(0, len(samples) - CLIP_SAMPLES - HOP_LENGTH)
    n_windows = 1 + -(-excess // (CLIP_SAMPLES * 3 // 4))
    starts = np.linspace(0, max(0, len(samples) - CLIP_SAMPLES), n_windows).astype(int)
    return [samples[start : start + CLIP_SAMPLES + N_FFT // 2] for start in starts]


def taggram(tagger, samples):
    """Return (times, probabilities): the tags over time, (columns,) in seconds and (columns, tags).

    Each column is the network's answer for the 29.1 s around its time. At the ends the recording is continued by
    its mirror image.
    """
    step = max(SAMPLE_RATE, -(-len(samples) // TAGGRAM_COLUMNS))
    centres = np.arange(min(step, len(samples)) // 2, len(samples), step)
    mirrored = np.pad(samples, CLIP_SAMPLES // 2, mode="symmetric")
    spectrograms = tagger.spectrograms([mirrored[centre : centre + CLIP_SAMPLES] for centre in centres])
    return centres / SAMPLE_RATE, tagger.probabilities(spectrograms)


# For the script


def audio_files(paths):
    """Return (files, problems): `paths`, with the audio files in them for the folders, and a line for each bad folder.

    Audio files are those whose names are of a format that libsndfile decodes. A folder is bad if it can't be listed, or
    holds none.
    """
    import soundfile

    extensions = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".opus", ".oga"}
    files, problems = [], []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        errors = []
        inside = [Path(folder, name) for folder, _, names in os.walk(path, onerror=errors.append) for name in names]
        audio = sorted(file for file in inside if file.suffix.lower() in extensions)
        files += audio
        problems += [reason(error) for error in errors]
        if not audio and not errors:
            problems.append(f"{path}: holds no audio file")
    return files, problems


def silence_decoders():
    """Discard what the decoders' C libraries write to file descriptor 2, such as a line for each damaged frame.

    sys.stderr goes on with a copy of that descriptor.
    """
    sys.stderr.flush()
    sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
