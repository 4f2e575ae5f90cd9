"""Render a small stand-in for MagnaTagATune: computer-played music in MagnaTagATune's layout and formats.

MagnaTagATune is 3 GB from a server that is not always there. A demo takes half a minute and 22 MB, and a network
learns its tags from a hundred clips, so every script can be tried from end to end. Scores on it mean nothing.

As in MagnaTagATune, clips are 29-second cuts of tracks, tracks belong to albums and albums to artists; an album
lies in one folder but an artist may lie in two; and annotators have several names for one sound. get_data.py
--demo calls `render`.
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

# Audio
SAMPLE_RATE = 16000  # Hz
N_SAMPLES = 464_640  # 29.04 s, which the encoder pads to MagnaTagATune's 809 frames of 576 samples
MP3 = dict(format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.85)  # 32 kbit/s

# Catalogue
CLIP_SECONDS = 29  # as the tables and file names count them
CLIPS_PER_TRACK = 2
TRACKS_PER_ALBUM = 3
ALBUMS_PER_ARTIST = 2
# One folder an album, in this order: the first three albums already reach the usual validation (c), test (d-f) and
# training (0-b) folders, and two artists come to lie in both training and test.
FOLDERS = "cf258be147ad0369"

# Tags: all of MagnaTagATune's names for a sound, by the first, which is the name that merging leaves
SPELLINGS = {
    names[0]: names
    for names in (
        ("guitar", "guitars"), ("harpsichord", "harpsicord"), ("flute", "flutes"), ("violin", "violins"),
        ("string", "strings"), ("synth", "synthesizer"), ("bass",), ("drum", "drums"), ("no beat", "no drums"),
        ("slow",), ("fast", "fast beat", "quick"), ("quiet", "silence"), ("loud",),
    )
}  # fmt: skip

# Music
TEMPOS = {"slow": (44, 56), "moderate": (88, 104), "fast": (168, 192)}  # beats per minute, from and to
LEVELS = {"quiet": -36, "moderate": -25, "loud": -13}  # root mean square before the limiter, dB re full scale
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major and minor: semitones above the key note
PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 0, 4))  # each bar's chord, as a degree of the scale
STEPS_PER_BAR = 8  # a step is half a beat
HARMONIC = np.arange(1.0, 30)  # 1 is the fundamental
SECONDS = np.arange(N_SAMPLES) / SAMPLE_RATE  # when each sample sounds


def render(folder, n_clips=192, seed=1337):
    """Render `n_clips` clips and their two tables into `folder`, keeping what an interrupted call left there.

    The same `n_clips` and `seed` give the same files, byte for byte. Raises InputError if `folder` holds anything
    else.
    """
    if n_clips < 1 or seed < 0:
        raise InputError(f"a demo needs at least 1 clip and a seed from 0 up, not {n_clips} and {seed}")
    folder = Path(folder)
    claim(folder, n_clips, seed)
    clips = list_clips(n_clips, seed)
    missing = [clip for clip in clips if not (folder / clip.path).exists()]
    progress = tqdm(desc="rendering", total=n_clips, initial=n_clips - len(missing), unit="clip")
    only_the_parent_heeds_ctrl_c = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    with progress, multiprocessing.Pool(os.cpu_count(), *only_the_parent_heeds_ctrl_c) as pool:
        for _ in pool.imap_unordered(functools.partial(write_clip, folder, seed), missing):
            progress.update()
    write_table(folder / "clip_info_final.csv", clip_info(clips))
    write_table(folder / "tags.csv", annotations(clips, seed))  # last: where it is, everything is


def claim(folder, n_clips, seed):
    """Mark `folder` as this demo's by SYNTHETIC.txt, or raise InputError if it is anything else's."""
    marker = folder / "SYNTHETIC.txt"
    text = (
        f"Everything in this folder is computer-generated: {n_clips} clips by demo.py, seed {seed}.\n"
        "It has MagnaTagATune's formats, but none of its music and none of its annotations.\n"
        "Scores on it say nothing about MagnaTagATune.\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        strangers = sorted(path.name for path in folder.iterdir() if path.suffix != ".partial")
        if strangers:
            raise InputError(f"{folder} holds {strangers[0]} and is no demo; choose an empty folder")
        with whole_file(marker, "w", encoding="utf-8") as file:
            file.write(text)
    elif marker.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds a demo of another seed or number of clips; delete it and run again")


def write_clip(folder, seed, clip):
    """Play `clip` and write it as an mp3."""
    encoded = io.BytesIO()  # not the file: the encoder seeks and rewrites
    soundfile.write(encoded, play(clip, seed), SAMPLE_RATE, **MP3)
    (folder / clip.path).parent.mkdir(exist_ok=True)
    with whole_file(folder / clip.path) as file:
        file.write(encoded.getvalue())


def write_table(path, rows):
    """Write `rows` as MagnaTagATune does: tab-separated, every field quoted, lines ended by CRLF."""
    with whole_file(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(rows)


@dataclass(frozen=True)
class Track:
    """A piece of music: what all its clips have in common."""

    artist: str
    album: str
    number: int  # on the album, from 1
    folder: str
    instruments: tuple[str, ...]  # keys of INSTRUMENTS
    tempo: str
    level: str
    beats_per_minute: float
    key: int  # semitones above C
    scale: tuple[int, ...]
    progression: tuple[int, ...]

    @property
    def title(self):
        return ", ".join(self.instruments).title()

    @property
    def sounds(self):
        """What there is to hear, as keys of SPELLINGS."""
        heard = {*self.instruments, self.tempo, self.level}
        if "violin" in heard:
            heard.add("string")
        if "drum" not in heard:
            heard.add("no beat")
        return [sound for sound in SPELLINGS if sound in heard]


@dataclass(frozen=True)
class Clip:
    """29 seconds of a track, from `start` to `end` seconds into it."""

    number: int  # clip_id, from 1
    track: Track
    start: int

    @property
    def end(self):
        return self.start + CLIP_SECONDS

    @property
    def path(self):
        track = self.track
        artist, album, title = (re.sub(r"\W+", "_", name.lower()) for name in (track.artist, track.album, track.title))
        return f"{track.folder}/{artist}-{album}-{track.number:02d}-{title}-{self.start}-{self.end}.mp3"


def list_clips(n_clips, seed):
    """Return the first `n_clips` clips of an endless catalogue."""
    clips = []
    for index in range(n_clips):
        track, cut = divmod(index, CLIPS_PER_TRACK)
        album, place = divmod(track, TRACKS_PER_ALBUM)
        clips.append(Clip(index + 1, deal_album(album, seed)[place], start=30 + CLIP_SECONDS * cut))
    return clips


@functools.cache
def deal_album(index, seed):
    """Return the tracks of an album.

    They share out all soloists, a bass, drums for one or two of them, all tempos and all levels. So every tag is both
    present and absent on every album, and no folder lacks either.
    """
    rng = generator(seed, "album", index)
    bands = rng.permutation(list(SOLOISTS)).reshape(TRACKS_PER_ALBUM, -1).tolist()
    bands[rng.integers(TRACKS_PER_ALBUM)].append("bass")
    for place in rng.permutation(TRACKS_PER_ALBUM)[: rng.integers(1, TRACKS_PER_ALBUM)]:
        bands[place].append("drum")
    tempos, levels = rng.permutation(list(TEMPOS)).tolist(), rng.permutation(list(LEVELS)).tolist()
    return [
        Track(
            artist=f"Synthetic Artist {index // ALBUMS_PER_ARTIST + 1}",
            album=f"Synthetic Album {index + 1}",
            number=number,
            folder=FOLDERS[index % len(FOLDERS)],
            instruments=tuple(band),
            tempo=tempo,
            level=level,
            beats_per_minute=rng.uniform(*TEMPOS[tempo]),
            key=rng.integers(12),
            scale=SCALES[rng.integers(len(SCALES))],
            progression=PROGRESSIONS[rng.integers(len(PROGRESSIONS))],
        )
        for number, (band, tempo, level) in enumerate(zip(bands, tempos, levels), start=1)
    ]


def generator(seed, purpose, number):
    """Return the random generator of one clip or album for one purpose (a word), whatever was drawn before."""
    return np.random.default_rng([*purpose.encode(), number, seed])


def clip_info(clips):
    """Yield the rows of clip_info_final.csv; nothing here has an address on the web."""
    yield "clip_id track_number title artist album url segmentStart segmentEnd original_url mp3_path".split()
    for clip in clips:
        track = clip.track
        number = f"{track.number:02d}"
        yield clip.number, number, track.title, track.artist, track.album, "", clip.start, clip.end, "", clip.path


def annotations(clips, seed):
    """Yield the rows of tags.csv: for each sound in a clip, annotators use one or more of its names."""
    tags = [tag for spellings in SPELLINGS.values() for tag in spellings]
    yield ["clip_id", *tags, "mp3_path"]
    for clip in clips:
        rng = generator(seed, "annotators", clip.number)
        used = set()
        for spellings in (SPELLINGS[sound] for sound in clip.track.sounds):
            used.update(rng.choice(spellings, rng.integers(1, len(spellings), endpoint=True), replace=False))
        yield [clip.number, *(int(tag in used) for tag in tags), clip.path]


def play(clip, seed):
    """Return the music of a clip, (N_SAMPLES,), full scale 1."""
    rng = generator(seed, "music", clip.number)
    mix = sum(even(INSTRUMENTS[name](rng, clip.track)) for name in clip.track.instruments)
    return np.tanh(10 ** (LEVELS[clip.track.level] / 20) * even(mix))  # a limiter that only loud clips reach


# Each instrument takes the clip's random generator and its track, and returns (N_SAMPLES,).


def guitar(rng, track):
    """Strings plucked low and left to ring, whole chords with single notes between."""
    chord, line = chords(track, octave=3, every=2), melody(rng, track, octave=3, busy=0.5)
    return pluck(*chord, ring=2.5, damping=0.3) + pluck(*line, ring=2.5, damping=0.3)


def harpsichord(rng, track):
    """Bright strings plucked without pause, each note with its octave."""
    starts, hertz = melody(rng, track, octave=3, busy=1)
    return pluck(starts, np.outer(hertz, [1, 2]), ring=1.5, damping=0.01)


def flute(rng, track):
    """A tone of few harmonics that trembles in a stream of breath."""
    starts, hertz = melody(rng, track, octave=5, busy=0.5)
    breath = np.diff(rng.normal(size=N_SAMPLES), append=0)  # the difference keeps the treble
    tone = wave(hold(hertz, starts), [1, 0.2, 0.05]) * (1 + 0.3 * np.sin(2 * np.pi * 5 * SECONDS))
    return swell(starts, attack=0.08) * (tone + 0.2 * breath)


def violin(rng, track):
    """One bow: every harmonic, a soft start and a wide vibrato."""
    starts, hertz = melody(rng, track, octave=4, busy=0.5)
    vibrato = 1 + 0.02 * np.sin(2 * np.pi * 6 * SECONDS)
    return swell(starts, attack=0.12) * wave(hold(hertz, starts) * vibrato, HARMONIC**-0.6)


def section(rng, track):
    """Many bows: whole chords, two desks a little out of tune to each note, swelling on every beat."""
    starts, hertz = chords(track, octave=3, every=2)
    desks = np.concatenate([0.996 * hertz, 1.004 * hertz], axis=1).T
    return swell(starts, attack=0.3) * sum(wave(hold(desk, starts), HARMONIC**-1.5, rng.random()) for desk in desks)


def synth(rng, track):
    """Two oscillators, one bending the other (FM), from pure to metallic and back every three seconds."""
    starts, hertz = melody(rng, track, octave=3, busy=1)
    leaps = hold(hertz * np.resize([1, 2], len(hertz)), starts)
    phase = 2 * np.pi * np.cumsum(leaps) / SAMPLE_RATE
    bend = 2 + 2 * np.sin(2 * np.pi * (SECONDS / 3 + rng.random()))
    return swell(starts, attack=0.005) * np.sin(phase + bend * np.sin(3.5 * phase))


def bass(_rng, track):
    """The root of each chord, low and round."""
    starts, hertz = chords(track, octave=2, every=2)
    return swell(starts, attack=0.02) * wave(hold(hertz[:, 0], starts), [1, 0.5, 0.25, 0.1])


def drums(rng, track):
    """A kick on every beat, a snare on every other and a hi-hat on every step."""
    seconds = SECONDS[: SAMPLE_RATE // 2]
    noise = rng.normal(size=len(seconds))
    kick = 3 * np.sin(2 * np.pi * (45 * seconds - 3 * np.exp(-seconds / 0.03))) * np.exp(-seconds / 0.1)
    snare = noise * np.exp(-seconds / 0.1)
    hat = 0.5 * np.diff(noise, append=0) * np.exp(-seconds / 0.05)
    starts, _ = grid(track)
    return lay([(s, kick) for s in starts[::2]] + [(s, snare) for s in starts[2::4]] + [(s, hat) for s in starts])


SOLOISTS = dict(guitar=guitar, harpsichord=harpsichord, flute=flute, violin=violin, string=section, synth=synth)
INSTRUMENTS = {**SOLOISTS, "bass": bass, "drum": drums}


def grid(track):
    """Return, of each step, the sample at which it starts and the chord (a degree of the scale), both (n_steps,)."""
    starts = np.arange(0, N_SAMPLES, SAMPLE_RATE * 30 / track.beats_per_minute).astype(int)
    bars = np.arange(len(starts)) // STEPS_PER_BAR
    return starts, np.take(track.progression, bars, mode="wrap")


def chords(track, octave, every):
    """Return the starts (n,) in samples and pitches (n, 3) in Hz of the track's triads, one `every` so many steps."""
    starts, roots = grid(track)
    return starts[::every], pitches(track, roots[::every, None] + [0, 2, 4], octave)


def melody(rng, track, octave, busy):
    """Return the starts (n,) in samples and pitches (n,) in Hz of a line made up over the track's chords.

    Each beat has a note of the chord; with probability `busy` a neighbour of that note follows half a beat later.
    """
    starts, roots = grid(track)
    off_beat = np.arange(len(starts)) % 2
    chord_notes = np.repeat(rng.choice([0, 2, 4], len(starts)), 2)[: len(starts)]
    degrees = (roots + chord_notes) % 7 + off_beat * rng.choice([-1, 1], len(starts))
    played = rng.random(len(starts)) < np.where(off_beat, busy, 1)
    return starts[played], pitches(track, degrees[played], octave)


def pitches(track, degrees, octave):
    """Return the pitches in Hz of `degrees` (any shape) of the track's scale; 0 is the key note."""
    semitones = track.key + np.take(track.scale, degrees, mode="wrap") + 12 * (degrees // 7 + octave)
    return 440 * 2 ** ((semitones - 57) / 12)  # semitone 57, the A of octave 4, is 440 Hz


def hold(values, starts):
    """Return `values` (n,), each held from its start to the next: (N_SAMPLES,)."""
    return np.repeat(values, np.diff(starts, append=N_SAMPLES))


def swell(starts, attack):
    """Return the loudness (N_SAMPLES,) of notes that rise for `attack` seconds and end in the 0.03 before the next."""
    age = SECONDS - hold(SECONDS[starts], starts)
    left = hold(np.append(SECONDS[starts[1:]], SECONDS[-1]), starts) - SECONDS
    return np.minimum(age / attack, left / 0.03).clip(0, 1)


def wave(hertz, harmonics, phase=0):
    """Return a tone of pitch `hertz` (N_SAMPLES,) with these amplitudes of its harmonics, but for those too high."""
    audible = harmonics[: int(0.47 * SAMPLE_RATE / hertz.max())]
    period = np.fft.irfft([0, *audible], 4096, norm="forward")
    cycles = phase + np.cumsum(hertz) / SAMPLE_RATE
    return period[(4096 * cycles).astype(int) % 4096]


def pluck(starts, hertz, ring, damping):
    """Return strings plucked at `starts` (n,), in samples: one at a time, `hertz` (n,), or more, (n, strings)."""
    return lay(
        (start, plucked_string(pitch, ring, damping))
        for start, together in zip(starts, hertz)
        for pitch in np.ravel(together)
    )


@functools.cache
def plucked_string(hertz, ring, damping):
    """Return 1.5 s of a string (Karplus-Strong) that dies away by 60 dB in `ring` seconds, its overtones sooner.

    Noise runs round a delay line one period long. Each lap blends every sample with its neighbour, `damping` of it,
    which takes treble away; an all-pass filter adds the fraction of a sample that the period needs to be in tune.
    """
    delay = SAMPLE_RATE / hertz - damping  # the blending is a delay too
    lap = int(delay - 0.5)
    allpass = (1 - (delay - lap)) / (1 + (delay - lap))
    loop = 0.001 ** (1 / (hertz * ring)) * np.convolve([1 - damping, damping], [allpass, 1])
    noise = np.zeros(SAMPLE_RATE * 3 // 2)
    noise[:lap] = np.random.default_rng(lap).permutation(np.linspace(-1, 1, lap))  # sums to 0, or it would hum
    return lfilter([1, allpass], [1, allpass, *np.zeros(lap - 2), *-loop], noise)


def lay(sounds):
    """Return (N_SAMPLES,) the sum of (start, sound) pairs, each laid at its start and cut at the end."""
    tape = np.zeros(N_SAMPLES + 2 * SAMPLE_RATE)
    for start, sound in sounds:
        tape[start : start + len(sound)] += sound
    return tape[:N_SAMPLES]


def even(sound):
    """Return `sound` at a root mean square of 1."""
    return sound / np.sqrt(np.mean(sound**2))
