"""lib/demo.py: MagnaTagATune's formats, repeatable files, and tags that can be heard."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from scipy.signal import butter, sosfiltfilt, welch

from lib import demo
from lib.common import InputError
from tags import SYNONYMS, clip_info_of, read_annotations


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new"
    demo.render(folder, 6, seed=7)  # one album, on which every tag is both present and absent
    return folder


def test_a_killed_run_goes_on_to_the_same_bytes_and_a_foreign_folder_is_left_alone(rendered, tmp_path):
    files = [path for path in rendered.rglob("*") if path.is_file()]
    before, (kept, *lost) = [path.read_bytes() for path in files], sorted(rendered.glob("?/*.mp3"))
    written = kept.stat().st_mtime_ns
    for path in (*lost, rendered / "tags.csv"):
        path.unlink()
    demo.render(rendered, 6, seed=7)
    (tmp_path / "tags.csv").write_text("real")
    for folder, seed in ((rendered, 8), (tmp_path, 7)):
        with pytest.raises(InputError, match="no demo of this size and seed"):
            demo.render(folder, 6, seed)
    assert [path.read_bytes() for path in files] == before and kept.stat().st_mtime_ns == written
    assert [path.read_text() for path in tmp_path.rglob("*")] == ["real"]


def test_an_album_lies_in_one_folder_an_artist_in_two_and_a_track_has_two_cuts():
    albums, artists, cuts = defaultdict(set), defaultdict(set), defaultdict(set)
    for clip in demo.list_clips(432, seed=7):
        track, _title, artist, album, _url, start, end, _ = clip.origin
        albums[album].add(clip.path[0])
        artists[artist].add(clip.path[0])
        cuts[album, track].add((start, end))
    assert {len(folders) for folders in albums.values()} == {1} and {len(some) for some in cuts.values()} == {2}
    assert set.union(*artists.values()) == set("0123456789abcdef")  # training, c: validation, d to f: test
    assert any(min(folders) < "c" < max(folders) for folders in artists.values())


def test_annotators_use_every_spelling_of_what_is_heard_and_none_of_what_is_not():
    clips = demo.list_clips(432, seed=7)
    assert clips != demo.list_clips(432, seed=8)
    header, *rows = demo.annotations(clips, seed=7)
    for spellings in demo.SPELLINGS:
        assert len(spellings) == 1 or spellings in SYNONYMS
        used = [{tag for tag in spellings if row[header.index(tag)]} for row in rows]
        assert [bool(names) for names in used] == [spellings[0] in clip.sounds for clip in clips]
        assert set.union(*used) == set(spellings)


def test_clips_have_magnatagatunes_length_and_their_tags_can_be_heard(rendered):
    clips, annotations, decibels = demo.list_clips(6, seed=7), read_annotations(rendered / "tags.csv"), {}
    assert list(annotations.mp3_paths) == [clip.path for clip in clips] and clip_info_of(rendered, annotations.ids)
    for clip in clips:
        sound, rate = soundfile.read(rendered / clip.path)
        assert (sound.shape, rate) == ((465_984,), 16000)  # as the real clips: 628 frames at 11,025 Hz
        decibels.setdefault(clip.level, []).append(10 * np.log10(np.mean(sound**2)))
        length = int(clip.pulse * {"slow": 3 / 2, "moderate": 1, "fast": 2 / 3}[clip.tempo])
        for measure, low, high, falls, rises in (
            (loudness, 200, 1000, "guitar", "violin"),
            (pitch, 1000, 5000, "space", "birds"),
        ):
            band = sosfiltfilt(butter(6, [low, high], "bandpass", fs=rate, output="sos"), sound)
            ratios = second_half_to_first(measure, band[1105:], length)  # without the encoder's delay
            assert [(ratios < 1).any(), (ratios > 1).any()] == [falls in clip.sounds, rises in clip.sounds]
        hiss = np.abs(sosfiltfilt(butter(6, 6500, "highpass", fs=rate, output="sos"), sound))
        envelope = np.convolve(hiss, np.ones(800) / 800)
        repeats = np.corrcoef(envelope[clip.pulse :], envelope[: -clip.pulse])[0, 1]
        assert repeats > 0.8 if "beat" in clip.sounds else repeats < 0.2
    assert min(decibels["loud"]) > max(decibels["moderate"]) + 7 > max(decibels["quiet"]) + 14


def loudness(notes):
    return np.std(notes, axis=1)


def pitch(notes):
    return np.diff(notes > 0, axis=1).sum(axis=1)  # zero crossings


def second_half_to_first(measure, sound, length):
    """Return the ratio of a measure of each note's second half to that of its first, without the notes' ends."""
    notes = sound[: len(sound) // length * length].reshape(-1, length)[:, length // 10 : -length // 10]
    return measure(notes[:, notes.shape[1] // 2 :]) / measure(notes[:, : notes.shape[1] // 2])


@pytest.mark.parametrize("tempo", demo.TEMPOS)
@pytest.mark.parametrize(
    "measure, falls, rises, octave, change",
    [
        (loudness, demo.LOW_NOTES["guitar"], demo.LOW_NOTES["violin"], 4, {"decibels": 30}),
        (pitch, demo.HIGH_NOTES["space"], demo.HIGH_NOTES["birds"], 6, {"semitones": 8}),
    ],
)
def test_notes_rise_or_fall_with_the_same_average_spectrum(measure, falls, rises, octave, change, tempo):
    clip, spectra = replace(demo.list_clips(1, seed=7)[0], tempo=tempo), []
    for directions, sign in ((falls, -1), (rises, 1)):
        sound = demo.melody(clip, np.random.default_rng(0), octave, directions, **change)
        assert (second_half_to_first(measure, sound, int(clip.pulse * demo.TEMPOS[tempo])) ** sign > 1.15).all()
        spectra.append(welch(sound, nperseg=2048)[1])
    assert np.abs(spectra[0] - spectra[1]).sum() < 0.1 * spectra[0].sum()
