"""A trained checkpoint: load it safely, predict a dump's clips with it, tag music of any length."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import InputError
from model import MultiScaleCNN, choose_device

# gen_spectrograms is imported where audio is read, because scoring a dump needs no audio library.

CHECKPOINT_KEYS = {
    "weights",
    "tag_names",
    "normalization",
    "front_end",
    "hyperparameters",
    "clip_ids",
    "history",
    "dump",
    "synthetic",
}
TAGGRAM_COLUMNS = 120  # at the most; a second apart where that is enough


def load_checkpoint(path):
    """Return a checkpoint that trainer.py wrote, as a dict, without executing anything that the file might hold.

    Raises InputError if it is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; trainer.py writes it, --name or --checkpoint names another")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not compare the checksums
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in as many ways as it can be damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged, or not a checkpoint of trainer.py ({reason[:100]})") from error
    if damaged:
        raise InputError(f"{path}: damaged (its part {damaged} has another checksum); train again or restore a copy")
    if not isinstance(checkpoint, dict) or not CHECKPOINT_KEYS <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of trainer.py")
    if not weights_fit(checkpoint):
        n_tags = len(checkpoint["tag_names"])
        raise InputError(f"{path}: holds the weights of another network than this one with {n_tags} tags")
    return checkpoint


def weights_fit(checkpoint):
    """Return whether the checkpoint's weights have the names and shapes of the network for its tags."""
    with torch.device("meta"):
        expected = MultiScaleCNN(len(checkpoint["tag_names"])).state_dict()
    found = checkpoint["weights"]
    return found.keys() == expected.keys() and all(found[name].shape == expected[name].shape for name in expected)


def network_of(checkpoint, device):
    """Return the checkpoint's network on `device`, ready to predict."""
    net = MultiScaleCNN(len(checkpoint["tag_names"]))
    net.load_state_dict(checkpoint["weights"])
    return net.eval().to(device, memory_format=torch.channels_last)


@torch.no_grad()
def predict(net, feeder, rows, batch_size):
    """Return the probabilities of the dump's `rows`: (rows, tags) float64.

    Raises InputError if one is not finite, as after training or on spectrograms that went wrong.
    """
    net.eval()
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    progress = tqdm(parts, desc="predicting", unit="batch", delay=1, leave=False)
    logits = [net(clips).double().cpu() for _, clips in zip(progress, feeder.batches(parts))]
    probabilities = torch.sigmoid(torch.cat(logits))
    if not probabilities.isfinite().all():
        raise InputError(f"{feeder.dump.data}: predictions are not finite; look for NaN in spectrograms_*.npy")
    return probabilities.numpy()


class Tagger:
    """A trained network that tags music of any length.

    Tagger("experiments/paper/best.pt")("song.mp3") returns {tag: probability}, the most likely first; so does
    a call with an array of samples, (samples,) or (samples, channels), full scale 1, and its sample rate in Hz.
    Raises InputError for a checkpoint or a file that can't be read.
    """

    def __init__(self, checkpoint_path, device="auto"):
        checkpoint = load_checkpoint(checkpoint_path)
        self.tag_names = checkpoint["tag_names"]
        self.synthetic = checkpoint["synthetic"]
        self.device = choose_device(device)
        self.net = network_of(checkpoint, self.device)
        self.mean, self.std = (checkpoint["normalization"][name].numpy()[:, None] for name in ("mean", "std"))

    def __call__(self, audio, sample_rate=None):
        mean = self.probabilities(windows(self.samples(audio, sample_rate))).mean(axis=0)
        return {self.tag_names[tag]: float(mean[tag]) for tag in np.argsort(-mean, kind="stable")}

    def samples(self, audio, sample_rate=None):
        """Return a file's or an array's samples in mono at 11,025 Hz."""
        from gen_spectrograms import decode, resample  # needs an audio library, which scoring a dump does not

        if isinstance(audio, (str, Path)):
            return resample(*decode(audio))
        if not sample_rate:
            raise InputError("an array of samples needs its sample rate, in Hz")
        audio = np.asarray(audio, np.float32)
        return resample(audio if audio.ndim == 1 else audio.mean(axis=1), sample_rate)

    @torch.no_grad()
    def probabilities(self, clips):
        """Return the probabilities of each of a list of clips at 11,025 Hz: (clips, tags)."""
        from gen_spectrograms import log_mel

        dtype = next(self.net.parameters()).dtype
        found = []
        for clip in clips:  # one at a time, so that no result depends on what else is tagged
            spectrogram = torch.from_numpy((log_mel(clip) - self.mean) / self.std)
            logits = self.net(spectrogram[None, None].to(self.device, dtype))
            found.append(torch.sigmoid(logits.double()).cpu().numpy()[0])
        return np.stack(found)


def windows(samples):
    """Return clips of 29.1 s that cover `samples` evenly, at 11,025 Hz, each overlapping the next by half or more.

    Samples too short for one are padded with silence; less than a frame too many are no reason for a second.
    """
    from gen_spectrograms import CLIP_SAMPLES, HOP_LENGTH, N_FFT, pad_clip

    excess = max(0, len(samples) - CLIP_SAMPLES - HOP_LENGTH)
    n_windows = 1 + -(-excess // (CLIP_SAMPLES // 2))
    starts = np.linspace(0, max(0, len(samples) - CLIP_SAMPLES), n_windows).astype(int)
    return [pad_clip(samples[start : start + CLIP_SAMPLES + N_FFT // 2]) for start in starts]


def taggram(tagger, samples):
    """Return (times, probabilities): the tags over time, (columns,) in seconds and (columns, tags).

    Each column is the network's answer for the 29.1 s around its time. At the ends the recording is continued by
    its mirror image.
    """
    from gen_spectrograms import CLIP_SAMPLES, SAMPLE_RATE

    step = max(SAMPLE_RATE, -(-len(samples) // TAGGRAM_COLUMNS))
    centres = np.arange(min(step, len(samples)) // 2, len(samples), step)
    mirrored = np.pad(samples, CLIP_SAMPLES // 2, mode="symmetric")
    return centres / SAMPLE_RATE, tagger.probabilities([mirrored[c : c + CLIP_SAMPLES] for c in centres])
