"""Render a small stand-in for MagnaTagATune: computer-played music in MagnaTagATune's layout and formats.

As in MagnaTagATune, clips are 29-second cuts of tracks, tracks belong to albums and albums to artists; an album is in
one folder but an artist may be in two; and annotators have several names for one sound. All tags but those of loudness
are about time: how a note changes, how long it lasts, how strokes follow each other. The average spectrum tells little.
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
# The three tracks of an album share out the entries of each line
LOW_NOTES = {"guitar": [-1], "violin": [1], "guitar and violin": [-1, 1]}  # their loudness falls or rises
HIGH_NOTES = {"birds": [1], "space": [-1], "birds and space": [-1, 1]}  # their pitch rises or falls
STROKES = {"beat": 0, "no beat": 0.7}  # how far they are scattered, from 0, even, to 1, wholly random
TEMPOS = {"slow": 1.5, "moderate": 1, "fast": 2 / 3}  # the length of a note, in pulses; there is one stroke a pulse
LEVELS = {"quiet": -36, "moderate": -25, "loud": -13}  # root mean square before the limiter, dB re full scale
# Those that become tags
SOUNDS = ["guitar", "violin", "birds", "space", "beat", "no beat", "slow", "fast", "quiet", "loud"]
# All of MagnaTagATune's names for each; the first is the name that merging leaves.
SPELLINGS = [next((group for group in SYNONYMS if group[0] == sound), (sound,)) for sound in SOUNDS]
SCALE = [0, 2, 4, 7, 9]  # pentatonic, in semitones above the key note: any two notes are consonant


def render(folder, n_clips=432, seed=1337):
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
    low = melody(clip, rng, 4, LOW_NOTES[clip.low], decibels=rng.uniform(20, 50))
    high = melody(clip, rng, 6, HIGH_NOTES[clip.high], semitones=rng.uniform(4, 12))
    mix = even(even(low) + 0.7 * even(high) + rng.uniform(0.2, 0.5) * even(strokes(clip, rng)))
    mix += 10 ** (rng.uniform(-60, -45) / 20) * rng.normal(size=N_SAMPLES)  # hiss
    music = np.tanh(10 ** (LEVELS[clip.level] / 20) * mix)  # a limiter that only loud clips reach
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
    low: str  # one of LOW_NOTES, and so on
    high: str
    rhythm: str
    tempo: str
    level: str
    pulse: int  # samples
    key: int  # semitones above C

    @property
    def sounds(self):
        """What there is to hear; those in SOUNDS become tags."""
        return {*self.low.split(" and "), *self.high.split(" and "), self.rhythm, self.tempo, self.level}


def list_clips(n_clips, seed):
    """Return the first `n_clips` clips of an endless catalogue of albums.

    What there is to hear is dealt out to the three tracks of an album: every tag is both present and absent on it.
    """
    rng = np.random.default_rng([seed, 1])
    clips = []
    for index in range(n_clips // 6 + 1):
        folder = FOLDERS[index % len(FOLDERS)]
        artist, album = f"Synthetic Artist {index // 2 + 1}", f"Synthetic Album {index + 1}"
        kinds = {"low": LOW_NOTES, "high": HIGH_NOTES, "rhythm": STROKES, "tempo": TEMPOS, "level": LEVELS}
        dealt = (rng.permutation(np.resize([*names], 3)).tolist() for names in kinds.values())  # resize: "beat" twice
        for track, chosen in zip(("01", "02", "03"), zip(*dealt)):
            music = dict(zip(kinds, chosen), pulse=int(SAMPLE_RATE * 60 / rng.uniform(64, 80)), key=rng.integers(12))
            title = "{low} and {high}".format_map(music).title()
            for start, end in CUTS:
                path = f"{folder}/{artist}-{album}-{track}-{title}-{start}-{end}.mp3".lower().replace(" ", "_")
                origin = [track, title, artist, album, "", start, end, ""]  # without URLs
                clips.append(Clip(len(clips) + 1, origin, path, **music))
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


def melody(clip, rng, octave, directions, decibels=0, semitones=0):
    """Return (N_SAMPLES,): notes of the clip's scale; each changes in loudness and pitch, in one of `directions`."""
    time = np.linspace(-0.5, 0.5, int(clip.pulse * TEMPOS[clip.tempo]))  # 1 is a note's length
    notes = []
    for _ in range(0, N_SAMPLES, len(time)):
        change = rng.choice(directions) * time
        semitone = clip.key + 12 * octave + rng.choice(SCALE) + semitones * change
        hertz = 440 * 2 ** ((semitone - 57) / 12)  # semitone 57, the A of octave 4, is 440 Hz
        cycles = 2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE
        tone = np.sin(cycles) + 0.3 * np.sin(2 * cycles) * (hertz < SAMPLE_RATE / 4)  # below half the sample rate
        notes.append(10 ** (decibels * change / 20) * tone * (10 - 20 * abs(time)).clip(0, 1))  # without clicks
    return np.concatenate(notes)[:N_SAMPLES]


def strokes(clip, rng):
    """Return (N_SAMPLES,): strokes of a brush, about one for each pulse, evenly spaced or scattered."""
    gaps = 1 + STROKES[clip.rhythm] * (rng.exponential(size=N_SAMPLES // clip.pulse + 2) - 1)  # in pulses
    samples = (clip.pulse * gaps / gaps.mean()).astype(int)
    loudness = np.concatenate([np.exp(-np.arange(length) / (0.06 * SAMPLE_RATE)) for length in samples])
    return loudness[:N_SAMPLES] * np.diff(rng.normal(size=N_SAMPLES + 3), 3)  # noise of high frequencies


def even(sound):
    """Return `sound` at a root mean square of 1."""
    return sound / np.sqrt(np.mean(sound**2))
