"""The front end: audio file -> mono samples at 11,025 Hz -> log-mel spectrogram."""

import functools
import itertools
import math
import operator
import os
import stat
import tempfile

import numpy as np

from lib.common import InputError

# av, soxr and librosa are imported where they are used: scoring a dump needs none of them.

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
CLIP_SAMPLES_READ = CLIP_SAMPLES + N_FFT // 2  # as far as the last frame's window reaches
BLOCK_SAMPLES = 2**16  # of each channel: what `decode` holds in memory
# Names of audio files in a folder of music end in these; FFmpeg also reads others, if they are given one by one
AUDIO_EXTENSIONS = ".aac .ac3 .aif .aifc .aiff .amr .ape .au .caf .dsf .dts .flac .m4a .m4b .mka .mp2 .mp3 .mpa".split()
AUDIO_EXTENSIONS += ".mpc .oga .ogg .opus .ra .rf64 .snd .spx .tak .tta .voc .w64 .wav .wma .wv".split()
INEXACT_SECONDS = 0.5  # an intact file may be this much shorter than it says


def require_front_end(found, path, remedy):
    """Raise InputError, with the `remedy`, if the file `path` was made with another front end than this program's."""
    both = {key: (found.get(key), FRONT_END.get(key)) for key in {**found, **FRONT_END}}
    if differs := [f"{key} ({then} against {now})" for key, (then, now) in both.items() if then != now]:
        raise InputError(f"{path}: made with a different front end from lib/audio.py's: {', '.join(differs)}; {remedy}")


def log_mel_spectrogram(path):
    """Return the log-mel spectrogram of an audio file's first 29.1 s: (128, 628) float32, mel bands x frames.

    A shorter file is padded with silence before the transform. Raises InputError if it can't be decoded.
    """
    return log_mel(load(path, CLIP_SAMPLES_READ)[0])


def load(path, n_samples=math.inf):
    """Return (samples, note): an audio file, or at least its first `n_samples`, as `resample` returns them.

    The note says what of them could not be read; it is empty for an intact file. Raises InputError for a file that is
    missing, not audio, empty, or not finite.
    """
    notes = []
    try:
        blocks = decode(path, notes)
        samples = resample(blocks, next(blocks), n_samples)
        blocks.close()
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {error.strerror.lower() if isinstance(error, OSError) else error}") from error
    return samples, "; ".join(notes)


def decode(path, notes):
    """Yield an audio file's sample rate in Hz, then its samples in mono: blocks of (samples,) float32, full scale 1.

    Reads whatever FFmpeg does, of any length and number of channels. What is missing from a damaged file is appended to
    `notes`. Raises InputError if nothing can be decoded, and OSError if the file can't be read.
    """
    import av

    status, n_samples, faults = os.stat(path), 0, []
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise InputError("not a file")
    try:
        with open(path, "rb") as file:
            options = {"fd": str(file.fileno())}  # by number, because PyAV takes no name that is not UTF-8
            with av.open("fd:", container_options=options, metadata_errors="ignore") as container:
                streams = container.streams.best("audio"), *container.streams.audio
                stream = next((stream for stream in streams if stream and stream.codec_context), None)
                if not stream:
                    raise InputError("contains no audio that FFmpeg can decode")
                yield (rate := stream.rate)  # a stream's own may change on the way
                promised = promised_seconds(container, stream, status.st_size)
                for frame in gathered(frames_of(container, stream, faults), rate):
                    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
                    n_samples += len(samples)
                    yield sum(samples.T) / np.float32(samples.shape[1])  # five times as fast as samples.mean
                if (seconds := n_samples / rate) < promised - INEXACT_SECONDS:
                    notes.append(f"only {seconds:.1f} s of {promised:.1f} s could be read")
    except av.FFmpegError as error:
        faults.append(error.strerror)
    finally:
        if faults and n_samples:
            notes.append(f"{len(faults)} packet(s) left out: damaged, or no audio")
    if faults and not n_samples:
        raise InputError(f"can't be decoded ({faults[0].lower()})")


def promised_seconds(container, stream, n_bytes):
    """Return how long a file says its audio is, or 0 if it is a film, or FFmpeg only estimates it from the bit rate."""
    from av.stream import Disposition

    is_film = any(not other.disposition & Disposition.attached_pic for other in container.streams.video)
    seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    bit_rate = stream.codec_context.bit_rate or math.inf
    return seconds if 8 * n_bytes / bit_rate + INEXACT_SECONDS < seconds < 1e7 and not is_film else 0


def frames_of(container, stream, faults):
    """Yield what FFmpeg can decode, short frames; append to `faults` an error for each part that it can't."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            yield from next(packets).decode()
        except StopIteration:
            return
        except (av.FFmpegError, IndexError) as error:  # the latter of a stream that was not there at the beginning
            faults.append(getattr(error, "strerror", str(error)))


def gathered(frames, sample_rate):
    """Yield long frames of packed 32-bit floating point, at one sample rate, from short frames in any format."""
    import av

    format_of = operator.attrgetter("format.name", "layout.name", "sample_rate")
    for _, alike in itertools.groupby(frames, format_of):  # files that were joined may differ
        fifo, converter = av.AudioFifo(), av.AudioResampler("flt", rate=sample_rate)
        for frame in alike:
            frame.pts = None  # the times do not match where a part is missing
            fifo.write(frame)
            if fifo.samples >= BLOCK_SAMPLES:
                yield from converter.resample(fifo.read())
        for frame in (*fifo.read_many(BLOCK_SAMPLES, partial=True), None):
            yield from converter.resample(frame)


def resample(blocks, sample_rate, n_samples=math.inf):
    """Return blocks of mono samples, (samples,) float32, as one array at 11,025 Hz, or at least its first `n_samples`.

    Raises InputError for no samples, for an implausible sample rate, and if the result is not finite.
    """
    import soxr

    if not 100 <= sample_rate <= 1e6:
        raise InputError(f"implausible sample rate ({sample_rate} Hz)")
    # Bit for bit what librosa.resample returns for all samples at once
    stream = soxr.ResampleStream(sample_rate, SAMPLE_RATE, num_channels=1, dtype="float32", quality="HQ")
    found, n_given = bytearray(), 0
    for block in blocks:
        n_given += len(block)
        found += stream.resample_chunk(block).data
        if len(found) >= 4 * n_samples:
            break
    else:
        found += stream.resample_chunk(np.empty(0, np.float32), last=True).data
        found += bytes(max(0, 4 * math.ceil(n_given * (SAMPLE_RATE / sample_rate)) - len(found)))
    if not n_given:
        raise InputError("contains no audio")
    samples = np.frombuffer(found, np.float32)
    if not np.isfinite(samples).all():  # loud samples can overflow in the resampler
        raise InputError("contains NaN or infinite samples")
    return samples


def log_mel(samples, n_frames=N_FRAMES):
    """Return the log-mel spectrogram of the first `n_frames` of samples at 11,025 Hz: (128, n_frames) float32.

    Too few samples are padded with silence. The spectrum is computed in float64: the strong low frequencies of music
    would leave too few digits for the weak high ones in float32.
    """
    n_samples = (n_frames - 1) * HOP_LENGTH
    samples = samples[: n_samples + N_FFT // 2].astype(np.float64)  # as far as the last frame's window reaches
    samples = np.pad(samples, (0, max(0, max(n_samples, N_FFT) - len(samples))))
    spectrum = import_librosa().stft(samples, n_fft=N_FFT, hop_length=HOP_LENGTH, pad_mode="reflect")[:, :n_frames]
    mel = mel_filters() @ (spectrum.real**2 + spectrum.imag**2)
    return np.log(np.maximum(mel, FRONT_END["floor"])).astype(np.float32)


@functools.cache
def mel_filters():
    """Return librosa's mel filters, (128, 1025), as a sparse matrix: most of their weights are 0."""
    from scipy.sparse import csr_array

    return csr_array(import_librosa().filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, dtype=np.float64))


@functools.cache
def import_librosa():
    """Return librosa; where Numba can't write to its usual folders, as in some containers, give it one first."""
    import librosa

    try:
        librosa.stft  # imports the part that we need
    except RuntimeError:
        import numba

        numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="numba-")
    return librosa
