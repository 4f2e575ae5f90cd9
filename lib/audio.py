"""The front end: audio file -> mono samples at 11,025 Hz -> log-mel spectrogram."""

import functools
import os

import numpy as np

from lib.common import InputError, reason

# soundfile and librosa are imported where they are used: scoring a dump needs neither.

N_MELS, N_FRAMES = 128, 628
# The original's front end: librosa.load(sr=11025), then melspectrogram with the defaults of its day, then the log.
FRONT_END = {
    "sample_rate": 11025,  # Hz
    "resampler": "soxr HQ",  # librosa's default today; the original's was kaiser_best
    "n_fft": 2048,  # samples; Hann window, centred
    "hop_length": 512,  # samples
    "pad_mode": "reflect",  # librosa's default before 0.10
    "n_mels": N_MELS,  # Slaney's scale and area normalisation, 0 Hz to half the sample rate, power spectrum
    "floor": 1e-20,  # of the power, before the natural logarithm
    "n_frames": N_FRAMES,
}
SAMPLE_RATE, N_FFT, HOP_LENGTH = FRONT_END["sample_rate"], FRONT_END["n_fft"], FRONT_END["hop_length"]
CLIP_SAMPLES = (N_FRAMES - 1) * HOP_LENGTH  # the fewest that give 628 centred frames: 321,024, 29.1 s
CLIP_SECONDS_READ = CLIP_SAMPLES // SAMPLE_RATE + 2  # of a longer file: more than the frames and the resampler need


def log_mel_spectrogram(path):
    """Return the log-mel spectrogram of an audio file's first 29.1 s: (128, 628) float32, mel bands x frames.

    A shorter file is padded with silence before the transform. Raises InputError if it can't be decoded.
    """
    return log_mel(load(path, CLIP_SECONDS_READ))


def load(path, seconds=None):
    """Return the samples of an audio file, or of its first `seconds`: mono, 11,025 Hz, float32, full scale 1.

    Raises InputError for a file that is missing, not audio, empty, or not finite.
    """
    try:
        return resample(*decode(path, seconds))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def decode(path, seconds=None):
    """Return (samples, sample_rate): the audio file, or its first `seconds`, in mono, float32, full scale 1.

    Raises InputError if it can't be decoded; the message leaves out the path.
    """
    import soundfile

    try:
        open(path, "rb").close()  # its errors are clearer than the library's
    except OSError as error:
        raise InputError(error.strerror.lower()) from error
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            # In one call: between blocks soundfile seeks, after which some mp3 files decode to different last bits
            samples = file.read(-1 if seconds is None else int(seconds * file.samplerate), "float32", always_2d=True)
            return sum(samples.T) / np.float32(file.channels), file.samplerate  # five times as fast as samples.mean
    except Exception as error:  # headerless formats need parameters; a decoder may ask for any amount of memory
        message = getattr(error, "error_string", reason(error)).rstrip(".").lower()
        if "does not exist" in message:  # libsndfile's words for an mp3 without a single frame
            message = "format not recognised"
        raise InputError(f"can't be decoded ({message})") from error


def resample(samples, sample_rate):
    """Return mono `samples` at 11,025 Hz.

    Raises InputError for no samples, for an implausible sample rate, and if the result is not finite.
    """
    import librosa

    if not len(samples):
        raise InputError("contains no audio")
    if not 100 <= sample_rate <= 1e6:
        raise InputError(f"implausible sample rate ({sample_rate} Hz)")
    if np.isfinite(samples).all():
        samples = librosa.resample(samples, orig_sr=sample_rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")
    if not np.isfinite(samples).all():  # loud samples can overflow in the resampler
        raise InputError("contains NaN or infinite samples")
    return samples


def log_mel(samples, n_frames=N_FRAMES):
    """Return the log-mel spectrogram of the first `n_frames` of samples at 11,025 Hz: (128, n_frames) float32.

    Too few samples are padded with silence. The spectrum is computed in float64: the strong low frequencies of music
    would leave too few digits for the weak high ones in float32.
    """
    import librosa

    n_samples = (n_frames - 1) * HOP_LENGTH
    samples = samples[: n_samples + N_FFT // 2].astype(np.float64)  # as far as the last frame's window reaches
    samples = np.pad(samples, (0, max(0, max(n_samples, N_FFT) - len(samples))))
    spectrum = librosa.stft(samples, n_fft=N_FFT, hop_length=HOP_LENGTH, pad_mode="reflect")[:, :n_frames]
    mel = mel_filters() @ (spectrum.real**2 + spectrum.imag**2)
    return np.log(np.maximum(mel, FRONT_END["floor"])).astype(np.float32)


@functools.cache
def mel_filters():
    """Return librosa's mel filters, (128, 1025), as a sparse matrix: most of their weights are 0."""
    from librosa.filters import mel
    from scipy.sparse import csr_array

    return csr_array(mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, dtype=np.float64))
