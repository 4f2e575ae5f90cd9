"""Render a small stand-in for MagnaTagATune: computer-played music in MagnaTagATune's layout and formats.

MagnaTagATune is 3 GB from a server that is not always there. A demo is a few megabytes made on the spot, and
a model learns its tags in minutes, so that every script can be tried end to end. Scores on it mean nothing.

As in MagnaTagATune, clips are 29-second cuts of tracks, tracks belong to albums and albums to artists; an album
lies in one folder, an artist may lie in two; and one sound has several spellings among the tags.

    get_data.py --demo    calls render()
"""

import csv
import functools
import io
import multiprocessing
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import lfilter
from tqdm import tqdm

from common import InputError, whole_file

N_CLIPS = 192
SEED = 1337

# The audio
SAMPLE_RATE = 16000  # Hz
N_SAMPLES = 464_640  # 29.04 s; the encoder pads it to 809 frames of 576, 465,984 samples, MagnaTagATune's length
MP3 = dict(format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.85)  # 32 kbit/s
CLIP_SECONDS = 29  # between the start and end in a clip's name

# The catalogue
CLIPS_PER_TRACK = 2
TRACKS_PER_ALBUM = 3
ALBUMS_PER_ARTIST = 2
# Every third folder, album by album: three albums reach the usual validation (c), test (d-f) and training (0-b)
# folders, and some artists come to lie in both training and test, as in MagnaTagATune.
FOLDERS = "cf258be147ad0369"

# The tags: what is to be heard, and the names MagnaTagATune's annotators have for it.
SPELLINGS = {
    "guitar": ("guitar", "guitars"),
    "harpsichord": ("harpsichord", "harpsicord"),
    "flute": ("flute", "flutes"),
    "violin": ("violin", "violins"),
    "string": ("string", "strings"),
    "synth": ("synth", "synthesizer"),
    "bass": ("bass",),
    "drum": ("drum", "drums"),
    "no beat": ("no beat", "no drums"),
    "slow": ("slow",),
    "fast": ("fast", "fast beat", "quick"),
    "quiet": ("quiet", "silence"),
    "loud": ("loud",),
}
TEMPOS = {"slow": (44, 56), "moderate": (88, 104), "fast": (168, 192)}  # beats per minute, from and to
LEVELS = {"quiet": -36, "moderate": -25, "loud": -13}  # dB below full scale, root mean square

# The music
KEYS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones above the key note
PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 0, 4))  # degrees of the scale, one chord a bar
STEPS_PER_BAR = 8  # a step is half a beat

SECONDS = np.arange(N_SAMPLES) / SAMPLE_RATE  # the time of each sample


@dataclass(frozen=True)
class Track:
    """A piece of music: all that its clips have in common."""

    album: int  # counted over all artists
    number: int  # on the album, from 1
    instruments: tuple[str, ...]
    bass: bool
    drums: bool
    tempo: str
    level: str
    beats_per_minute: float
    key: int  # semitones above C
    scale: str
    progression: tuple[int, ...]

    @property
    def names(self):
        """The artist's, the album's and the track's name."""
        artist, album = divmod(self.album, ALBUMS_PER_ARTIST)
        title = f"{' and '.join(self.instruments)} in {KEYS[self.key]} {self.scale}"
        return f"Synthetic Artist {artist + 1}", f"Album {album + 1}", title.capitalize()

    @property
    def sounds(self):
        """What is to be heard, as keys of SPELLINGS."""
        heard = {*self.instruments, self.tempo, self.level, "drum" if self.drums else "no beat"}
        if self.bass:
            heard.add("bass")
        if "violin" in heard:
            heard.add("string")
        return [sound for sound in SPELLINGS if sound in heard]


@dataclass(frozen=True)
class Clip:
    """29 seconds of a track."""

    number: int  # clip_id, from 1
    track: Track
    start: int  # seconds into the track

    @property
    def path(self):
        artist, album, title = (re.sub(r"\W+", "_", name.lower()) for name in self.track.names)
        folder = FOLDERS[self.track.album % len(FOLDERS)]
        end = self.start + CLIP_SECONDS
        return f"{folder}/{artist}-{album}-{self.track.number:02d}-{title}-{self.start}-{end}.mp3"


def render(folder, n_clips=N_CLIPS, seed=SEED):
    """Render `n_clips` clips and their tables into `folder`; what an interrupted call left is kept.

    The same `n_clips` and `seed` give the same files, byte for byte. Raises InputError if `folder` holds
    something else.
    """
    folder = Path(folder)
    claim(folder, n_clips, seed)
    clips = list_clips(n_clips, seed)
    missing = [clip for clip in clips if not (folder / clip.path).exists()]
    progress = tqdm(desc="rendering", total=n_clips, initial=n_clips - len(missing), unit="clip")
    with progress, multiprocessing.Pool(os.cpu_count(), initializer=leave_ctrl_c_to_the_parent) as pool:
        for _ in pool.imap_unordered(functools.partial(write_clip, folder, seed), missing):
            progress.update()
    write_table(folder / "clip_info_final.csv", clip_info(clips))
    write_table(folder / "tags.csv", annotations(clips, seed))  # last: where it is, all is


def claim(folder, n_clips, seed):
    """Mark `folder` as this demo's, or raise InputError if it is anything else's."""
    marker = folder / "SYNTHETIC.txt"
    text = (
        f"Everything in this folder is computer-generated: {n_clips} clips by demo.py, seed {seed}.\n"
        "It has MagnaTagATune's formats and none of its music or annotations.\n"
        "Scores on it say nothing about MagnaTagATune.\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if marker.exists():
        if marker.read_text(encoding="utf-8") != text:
            raise InputError(f"{folder} holds a demo of another seed or number of clips; delete it and run again")
        return
    strangers = sorted(path.name for path in folder.iterdir() if path.suffix != ".partial")
    if strangers:
        raise InputError(f"{folder} holds {strangers[0]} and is no demo; choose another folder or delete this one")
    with whole_file(marker, "w", encoding="utf-8") as file:
        file.write(text)


def leave_ctrl_c_to_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_clip(folder, seed, clip):
    """Play `clip` and write it as an mp3; any process may, in any order, to the same bytes."""
    encoded = io.BytesIO()  # soundfile must seek in what it writes; a whole file must come in one go
    soundfile.write(encoded, play(clip, seed), SAMPLE_RATE, **MP3)
    path = folder / clip.path
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        file.write(encoded.getvalue())


# --- Catalogue -------------------------------------------------------------------------------------------------------


def generator(seed, purpose, number):
    """Return the random generator of one purpose (a word) and one clip or album: no other draw can disturb it."""
    return np.random.default_rng([*purpose.encode(), number, seed])


def list_clips(n_clips, seed):
    """Return the first `n_clips` clips of an endless catalogue, track by track."""
    clips = []
    for number in range(n_clips):
        track, cut = divmod(number, CLIPS_PER_TRACK)
        album, place = divmod(track, TRACKS_PER_ALBUM)
        start = 30 + CLIP_SECONDS * cut
        clips.append(Clip(number + 1, deal_album(album, seed)[place], start))
    return clips


@functools.cache
def deal_album(album, seed):
    """Return an album's three tracks.

    Every instrument, tempo and level is dealt once, and some track has drums and some has none: so every tag is
    both present and absent in every folder, however small the demo.
    """
    rng = generator(seed, "album", album)
    hands = rng.permutation(list(INSTRUMENTS)).reshape(TRACKS_PER_ALBUM, -1).tolist()
    basses = rng.permutation([True, False, False]).tolist()
    drums = rng.permutation([True, False, rng.random() < 0.5]).tolist()
    tempos, levels = rng.permutation(list(TEMPOS)).tolist(), rng.permutation(list(LEVELS)).tolist()
    return [
        Track(
            album=album,
            number=place + 1,
            instruments=tuple(hands[place]),
            bass=basses[place],
            drums=drums[place],
            tempo=tempos[place],
            level=levels[place],
            beats_per_minute=rng.uniform(*TEMPOS[tempos[place]]),
            key=int(rng.integers(12)),
            scale=str(rng.choice(list(SCALES))),
            progression=PROGRESSIONS[rng.integers(len(PROGRESSIONS))],
        )
        for place in range(TRACKS_PER_ALBUM)
    ]


def clip_info(clips):
    """Yield the rows of MagnaTagATune's clip_info_final.csv; nothing here has an address on the web."""
    yield ("clip_id track_number title artist album url segmentStart segmentEnd original_url mp3_path").split()
    for clip in clips:
        artist, album, title = clip.track.names
        end = clip.start + CLIP_SECONDS
        yield clip.number, f"{clip.track.number:02d}", title, artist, album, "", clip.start, end, "", clip.path


def annotations(clips, seed):
    """Yield the rows of MagnaTagATune's annotations_final.csv: who hears a sound uses one or more of its names."""
    tags = [tag for spellings in SPELLINGS.values() for tag in spellings]
    yield ["clip_id", *tags, "mp3_path"]
    for clip in clips:
        rng = generator(seed, "annotators", clip.number)
        used = set()
        for sound in clip.track.sounds:
            spellings = SPELLINGS[sound]
            used.update(rng.choice(spellings, rng.integers(1, len(spellings) + 1), replace=False).tolist())
        yield [clip.number, *(int(tag in used) for tag in tags), clip.path]


def write_table(path, rows):
    """Write `rows` as MagnaTagATune does: tab-separated, every field quoted, CRLF."""
    with whole_file(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(rows)


# --- Music: each function returns (N_SAMPLES,) -----------------------------------------------------------------------


def play(clip, seed):
    """Return the clip's sound, full scale 1."""
    track = clip.track
    rng = generator(seed, "music", clip.number)
    music = sum(even(INSTRUMENTS[name](rng, track)) for name in track.instruments)
    if track.bass:
        music += even(bass(rng, track))
    if track.drums:
        music += 1.5 * even(drums(rng, track))
    return np.tanh(10 ** (LEVELS[track.level] / 20) * even(music))  # a limiter: only loud clips reach it


def guitar(rng, track):
    """Strummed chords on the beat, single notes between, all left to ring."""
    starts, hertz = melody(rng, track, octave=3)
    plucks = [(start, pluck(note, ring=2.5, damping=0.5)) for start, note in zip(starts, hertz)]
    for start, chord in zip(*chords(track, octave=3, every=4)):
        plucks += [(start + 300 * string, pluck(note, ring=2.5, damping=0.5)) for string, note in enumerate(chord)]
    return lay(plucks)


def harpsichord(rng, track):
    """Bright plucks, each doubled an octave above, that die away sooner than a guitar's."""
    starts, hertz = melody(rng, track, octave=3, busy=1.0)
    strings = [(start, octave * note) for start, note in zip(starts, hertz) for octave in (1, 2)]
    return lay((start, pluck(note, ring=1.5, damping=0.01)) for start, note in strings)


def flute(rng, track):
    """A nearly pure, trembling tone in a cloud of breath."""
    starts, hertz = melody(rng, track, octave=5)
    breath = np.diff(rng.normal(size=N_SAMPLES), append=0)  # the difference leaves the treble
    tremble = 1 + 0.3 * np.sin(2 * np.pi * 5 * SECONDS)
    return swell(starts, attack=0.04) * (tremble * tone(hold(starts, hertz), [1, 0.2, 0.05]) + 0.1 * breath)


def violin(rng, track):
    """One bowed string: every harmonic, a soft start, a wide vibrato."""
    starts, hertz = melody(rng, track, octave=4.5)
    vibrato = 1 + 0.012 * np.sin(2 * np.pi * 6 * SECONDS)
    return swell(starts, attack=0.08) * tone(hold(starts, hertz) * vibrato, 1 / np.arange(1, 30) ** 0.6)


def section(rng, track):
    """A string section: whole chords, two slightly mistuned desks to a note, that swell and fade."""
    starts, chord_hertz = chords(track, octave=3.5, every=2)
    desks = [
        tone(hold(starts, hertz * mistuning), 1 / np.arange(1, 30) ** 1.2, rng.random())
        for hertz in chord_hertz.T
        for mistuning in (0.996, 1.004)
    ]
    return swell(starts, attack=0.15) * sum(desks)


def synth(rng, track):
    """An arpeggio of octaves on a square wave, its filter opening and closing every few seconds."""
    starts, hertz = melody(rng, track, octave=3, busy=1.0)
    halves = np.append(starts, N_SAMPLES)
    starts = np.sort(np.append(starts, (halves[:-1] + halves[1:]) // 2))
    hertz = hold(starts, np.repeat(hertz, 2) * np.tile([1, 2], len(hertz)))
    odd = np.arange(1, 30) % 2 / np.arange(1, 30)
    opening = 0.5 + 0.5 * np.sin(2 * np.pi * (0.3 * SECONDS + rng.random()))
    return swell(starts, attack=0.003) * (opening * tone(hertz, odd**0.5) + (1 - opening) * tone(hertz, odd**2))


def bass(rng, track):
    """The root of each chord, round and low."""
    starts, chord_hertz = chords(track, octave=2, every=2)
    return swell(starts, attack=0.02) * tone(hold(starts, chord_hertz[:, 0]), [1, 0.5, 0.25, 0.1])


def drums(rng, track):
    """A kick on every beat, a snare on every other, a hi-hat on every step."""
    seconds = SECONDS[: SAMPLE_RATE // 2]
    noise = rng.normal(size=len(seconds))
    kick = 3 * np.sin(2 * np.pi * (45 * seconds - 3 * np.exp(-seconds / 0.03))) * np.exp(-seconds / 0.1)
    snare = noise * np.exp(-seconds / 0.1)
    hat = 0.5 * np.diff(noise, append=0) * np.exp(-seconds / 0.05)
    starts = grid(track)
    return lay((start, hit) for every, hit in ((starts[::2], kick), (starts[2::4], snare), (starts, hat)) for start in every)


INSTRUMENTS = {
    "guitar": guitar,
    "harpsichord": harpsichord,
    "flute": flute,
    "violin": violin,
    "string": section,
    "synth": synth,
}


def grid(track):
    """Return (n_steps,) where each step starts, in samples."""
    return np.arange(0, N_SAMPLES, SAMPLE_RATE * 60 / track.beats_per_minute / 2).astype(int)


def pitches(track, degrees, octave):
    """Return in Hz the `degrees` (any shape) of the track's scale, 0 being its key note."""
    semitones = track.key + np.array(SCALES[track.scale])[degrees % 7] + 12 * (degrees // 7 + octave)
    return 440 * 2 ** ((semitones - 57) / 12)  # the A of octave 4 is 440 Hz


def roots(track, steps):
    """Return (n_steps,) the degree of the chord that sounds at each of `steps`."""
    return np.array(track.progression)[steps // STEPS_PER_BAR % len(track.progression)]


def chords(track, octave, every):
    """Return the starts (n,) and pitches (n, 3), in samples and Hz, of a triad struck `every` so many steps."""
    starts = grid(track)[::every]
    degrees = roots(track, np.arange(len(starts)) * every)[:, None] + [0, 2, 4]
    return starts, pitches(track, degrees, octave)


def melody(rng, track, octave, busy=0.5):
    """Return the starts and pitches (n,), in samples and Hz, of a line made up on the track's chords.

    It has a note of the chord on every beat and, `busy` of the time, one beside it in between.
    """
    steps = np.arange(len(grid(track)))
    on_beat = steps % 2 == 0
    degrees = roots(track, steps) + np.repeat(rng.choice([0, 2, 4, 7], len(steps)), 2)[: len(steps)]
    degrees = np.where(on_beat, degrees, degrees + rng.choice([-1, 1], len(steps)))
    played = on_beat | (rng.random(len(steps)) < busy)
    return grid(track)[played], pitches(track, degrees[played], octave)


def hold(starts, values):
    """Return `values` (n,), each held from its start to the next."""
    return np.repeat(values, np.diff(starts, append=N_SAMPLES))


def swell(starts, attack, release=0.03):
    """Return the loudness of notes that rise in `attack` and end in `release` seconds."""
    age = np.arange(N_SAMPLES) - hold(starts, starts)
    left = hold(starts, np.append(starts[1:], N_SAMPLES)) - np.arange(N_SAMPLES)
    return (1 - np.exp(-age / SAMPLE_RATE / attack)) * np.minimum(1, left / SAMPLE_RATE / release)


def tone(hertz, harmonics, phase=0.0):
    """Return a steady tone of pitch `hertz` (N_SAMPLES,) with harmonics that loud, those above hearing left out."""
    harmonics = harmonics[: int(0.47 * SAMPLE_RATE / hertz.max())]
    period = np.fft.irfft([0, *harmonics], 4096, norm="forward")
    cycles = phase + np.cumsum(hertz) / SAMPLE_RATE
    return period[(len(period) * cycles).astype(int) % len(period)]


@functools.cache
def pluck(hertz, ring, damping):
    """Return a plucked string (Karplus-Strong) that falls by 60 dB in `ring` seconds, its overtones sooner.

    Noise runs round a delay line one period long. Every lap takes a little of its strength, and of its treble by
    averaging neighbours, `damping` to one side; an all-pass makes up the fraction of a sample that the period lacks.
    """
    lap = int(SAMPLE_RATE / hertz - damping - 0.5)
    fraction = SAMPLE_RATE / hertz - damping - lap  # 0.5 to 1.5, where the all-pass is at its best
    allpass = (1 - fraction) / (1 + fraction)
    strength = 0.001 ** (1 / (hertz * ring))
    loop = strength * np.convolve([1 - damping, damping], [allpass, 1])
    burst = np.zeros(int(1.5 * SAMPLE_RATE))
    burst[:lap] = np.random.default_rng(lap).permutation(np.linspace(-1, 1, lap))  # sums to 0: no hum
    return lfilter([1, allpass], [1, allpass, *np.zeros(lap - 2), *-loop], burst)


def lay(sounds):
    """Return the sum of (start, sound) pairs, each sound laid at its start and cut at the end of the clip."""
    music = np.zeros(N_SAMPLES + 3 * SAMPLE_RATE)
    for start, sound in sounds:
        music[start : start + len(sound)] += sound
    return music[:N_SAMPLES]


def even(sound):
    """Return `sound` at a root mean square of 1."""
    return sound / np.sqrt(np.mean(sound**2))
