"""Render a small stand-in for MagnaTagATune: computer-played music in MagnaTagATune's layout and formats.

As in MagnaTagATune, clips are 29-second cuts of tracks, tracks belong to albums and albums to artists; an album is in
one folder but an artist may be in two; and annotators have several names for one sound.
"""

import csv
import io
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
import soundfile
from joblib import cpu_count

from lib.common import InputError, progress, whole_file, write_table
from tags import SYNONYMS

SAMPLE_RATE = 16000  # Hz
N_SAMPLES = 464_640  # 29.04 s, which the encoder pads to MagnaTagATune's 809 frames of 576 samples
MP3 = dict(format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.85)  # 32 kbit/s

INFO_COLUMNS = "clip_id track_number title artist album url segmentStart segmentEnd original_url mp3_path".split()
CUTS = (30, 59), (59, 88)  # the clips of each track: from, to, in seconds
# Each album's folder, in this order: three albums suffice for the usual validation (c), test (d-f) and training (0-b)
# folders, and two artists are in both training and test.
FOLDERS = "cf258be147ad0369"
SOLOISTS = ["guitar", "harpsichord", "flute", "violin", "string", "synth"]
SOUNDS = [*SOLOISTS, "bass", "drum", "no beat", "slow", "fast", "quiet", "loud"]  # those that become tags
# All of MagnaTagATune's names for each; the first is the name that merging leaves.
SPELLINGS = [next((group for group in SYNONYMS if group[0] == sound), (sound,)) for sound in SOUNDS]

TEMPOS = {"slow": (44, 56), "moderate": (88, 104), "fast": (168, 192)}  # beats per minute, from and to
LEVELS = {"quiet": -36, "moderate": -25, "loud": -13}  # root mean square before the limiter, dB re full scale
SCALE = [0, 2, 4, 7, 9]  # pentatonic, in semitones above the key note: any two notes are consonant
HARMONIC = np.arange(1.0, 30)  # 1 is the fundamental


def render(folder, n_clips=192, seed=1337):
    """Render `n_clips` clips and their two tables into `folder`, resuming an interrupted call.

    The same `n_clips` and `seed` give the same files, byte for byte. Raises InputError if `folder` holds anything else.
    """
    text = (
        f"Everything in this folder is computer-generated: {n_clips} clips by lib/demo.py, seed {seed}.\n"
        "It has MagnaTagATune's formats, but none of its music and none of its annotations.\n"
        "Scores on it say nothing about MagnaTagATune.\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.suffix != ".partial")
    marker = folder / "SYNTHETIC.txt"
    if others and not (marker.exists() and marker.read_text(encoding="utf-8") == text):
        raise InputError(f"{folder} holds {others[0]}, no demo of this size and seed: choose another or delete it")
    with whole_file(marker, "w", encoding="utf-8") as file:
        file.write(text)
    clips = list_clips(n_clips, seed)
    missing = [clip for clip in clips if not (folder / clip.path).exists()]
    with ThreadPool(cpu_count()) as pool:  # threads, because NumPy and the encoder release the interpreter's lock
        list(progress(pool.imap(partial(write_clip, folder, seed), missing), "rendering", len(missing), unit="clip"))
    origins = [[clip.number, *clip.origin, clip.path] for clip in clips]
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_ALL}  # MagnaTagATune's
    write_table(folder / "clip_info_final.csv", [INFO_COLUMNS, *origins], **dialect)
    write_table(folder / "tags.csv", annotations(clips, seed), **dialect)  # last: its presence means all is there


def write_clip(folder, seed, clip):
    rng = np.random.default_rng([seed, 3, clip.number])
    mix = even(sum(even(INSTRUMENTS[name](clip, rng)) for name in clip.instruments))
    music = np.tanh(10 ** (clip.level / 20) * mix)  # a limiter that only loud clips reach
    encoded = io.BytesIO()  # because the encoder seeks and rewrites
    soundfile.write(encoded, music, SAMPLE_RATE, **MP3)
    (folder / clip.path).parent.mkdir(exist_ok=True)
    with whole_file(folder / clip.path) as file:
        file.write(encoded.getvalue())


@dataclass(frozen=True)
class Clip:
    number: int  # from 1
    origin: list  # its row in clip_info_final.csv between number and path
    path: str
    instruments: list[str]  # keys of INSTRUMENTS
    sounds: set[str]  # what there is to hear; those in SPELLINGS become tags
    level: float  # one of LEVELS
    beat: int  # samples from one beat to the next
    key: int  # semitones above C


def list_clips(n_clips, seed):
    """Return the first `n_clips` clips of an endless catalogue of albums.

    The soloists, tempos, levels, a bass and one or two drums are dealt out to the three tracks of an album, so that
    every tag is both present and absent on it.
    """
    rng = np.random.default_rng([seed, 1])
    clips = []
    for index in range(n_clips // 6 + 1):
        folder = FOLDERS[index % len(FOLDERS)]
        artist, album = f"Synthetic Artist {index // 2 + 1}", f"Synthetic Album {index + 1}"
        bands = rng.permutation(SOLOISTS).reshape(3, -1).tolist()
        bands[rng.integers(3)].append("bass")
        for place in rng.permutation(3)[: rng.integers(1, 3)]:
            bands[place].append("drum")
        tempos, levels = rng.permutation(list(TEMPOS)), rng.permutation(list(LEVELS))
        for track, band, tempo, level in zip(("01", "02", "03"), bands, tempos, levels):
            title = " and ".join(band).title()
            sounds = {*band, tempo, level}
            if "violin" in band:
                sounds.add("string")
            if "drum" not in band:
                sounds.add("no beat")
            beat = int(SAMPLE_RATE * 60 / rng.uniform(*TEMPOS[tempo]))
            music = band, sounds, LEVELS[level], beat, rng.integers(12)
            for start, end in CUTS:
                path = f"{folder}/{artist}-{album}-{track}-{title}-{start}-{end}.mp3".lower().replace(" ", "_")
                origin = [track, title, artist, album, "", start, end, ""]  # without URLs
                clips.append(Clip(len(clips) + 1, origin, path, *music))
    return clips[:n_clips]


def annotations(clips, seed):
    """Yield the rows of tags.csv: for each sound in a clip, annotators use one or more of its names."""
    tags = sum(SPELLINGS, ())
    yield ["clip_id", *tags, "mp3_path"]
    rng = np.random.default_rng([seed, 2])
    for clip in clips:
        used = set()
        for names in SPELLINGS:
            if names[0] in clip.sounds:
                used.update(rng.choice(names, rng.integers(1, len(names) + 1), replace=False))
        yield [clip.number, *(int(tag in used) for tag in tags), clip.path]


def tune(clip, rng, beats, voices, octave, amplitudes, attack=0.005, decay=np.inf):
    """Return (N_SAMPLES,): every `beats` beats a note of the clip's scale, or several `voices` at once."""
    n_samples = int(beats * clip.beat)
    sounds = []
    for _ in range(0, N_SAMPLES, n_samples):
        semitones = clip.key + 12 * octave + rng.choice(SCALE, voices, replace=False)
        sounds.append(sum(note(semitone, n_samples, amplitudes, attack, decay) for semitone in semitones))
    return np.concatenate(sounds)[:N_SAMPLES]


def note(semitone, n_samples, amplitudes, attack, decay):
    """Return (n_samples,): a note that takes `attack` seconds to swell and `decay` to fall to 1/e of its loudness."""
    hertz = 440 * 2 ** ((semitone - 57) / 12)  # semitone 57, the A of octave 4, is 440 Hz
    seconds = np.arange(n_samples) / SAMPLE_RATE
    period = np.fft.irfft([0, *amplitudes[: int(0.47 * SAMPLE_RATE / hertz)]], 4096, norm="forward")
    loudness = np.minimum(seconds / attack, seconds[::-1] / 0.03).clip(0, 1) * np.exp(-seconds / decay)
    return loudness * period[(4096 * hertz * seconds).astype(int) % 4096]


def drums(clip, rng):
    """Return (N_SAMPLES,): a kick on every beat and a snare on every other."""
    seconds = np.arange(clip.beat) / SAMPLE_RATE
    kick = 3 * np.sin(2 * np.pi * (45 * seconds - 3 * np.exp(-seconds / 0.03))) * np.exp(-seconds / 0.1)
    snare = rng.normal(size=clip.beat) * np.exp(-seconds / 0.1)
    return np.resize([kick, kick + snare], N_SAMPLES)  # repeats them


INSTRUMENTS = {
    "guitar": partial(tune, beats=1, voices=3, octave=3, amplitudes=HARMONIC**-1.5, decay=0.4),
    "harpsichord": partial(tune, beats=0.5, voices=1, octave=4, amplitudes=HARMONIC**-0.2, decay=0.15),
    "flute": partial(tune, beats=1, voices=1, octave=5, amplitudes=HARMONIC**-3, attack=0.08),
    "violin": partial(tune, beats=1, voices=1, octave=4, amplitudes=HARMONIC**-0.6, attack=0.12),
    "string": partial(tune, beats=2, voices=3, octave=4, amplitudes=HARMONIC**-2, attack=0.3),
    "synth": partial(tune, beats=0.5, voices=1, octave=3, amplitudes=HARMONIC % 2 / HARMONIC),  # a square wave
    "bass": partial(tune, beats=2, voices=1, octave=2, amplitudes=HARMONIC**-2),
    "drum": drums,
}


def even(sound):
    """Return `sound` at a root mean square of 1."""
    return sound / np.sqrt(np.mean(sound**2))
