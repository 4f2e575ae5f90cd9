"""lib/demo.py: MagnaTagATune's formats, repeatable files, and tags that can be heard."""

from collections import defaultdict

import numpy as np
import pytest
import soundfile

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
    for clip in demo.list_clips(192, seed=7):
        track, _title, artist, album, _url, start, end, _ = clip.origin
        albums[album].add(clip.path[0])
        artists[artist].add(clip.path[0])
        cuts[album, track].add((start, end))
    assert {len(folders) for folders in albums.values()} == {1} and {len(some) for some in cuts.values()} == {2}
    assert set.union(*artists.values()) == set("0123456789abcdef")  # training, c: validation, d to f: test
    assert any(min(folders) < "c" < max(folders) for folders in artists.values())


def test_annotators_use_every_spelling_of_what_is_heard_and_none_of_what_is_not():
    clips = demo.list_clips(192, seed=7)
    header, *rows = demo.annotations(clips, seed=7)
    for spellings in demo.SPELLINGS:
        assert len(spellings) == 1 or spellings in SYNONYMS
        used = [{tag for tag in spellings if row[header.index(tag)]} for row in rows]
        assert [bool(names) for names in used] == [spellings[0] in clip.sounds for clip in clips]
        assert set.union(*used) == set(spellings)


def test_loudness_and_drums_can_be_heard_in_clips_of_magnatagatunes_length(rendered):
    clips, annotations = demo.list_clips(6, seed=7), read_annotations(rendered / "tags.csv")
    assert list(annotations.mp3_paths) == [clip.path for clip in clips] and clip_info_of(rendered, annotations.ids)
    kicks, decibels = defaultdict(list), defaultdict(list)
    for clip in clips:
        sound, rate = soundfile.read(rendered / clip.path)
        assert (sound.shape, rate) == ((465_984,), 16000)  # as the real clips: 628 frames at 11,025 Hz
        power = np.abs(np.fft.rfft(sound)) ** 2
        kicks["drum" in clip.sounds].append(power[: 50 * 29].sum() / power.sum())  # below 50 Hz, where no note is
        for name in clip.sounds:
            decibels[name].append(10 * np.log10(np.mean(sound**2)))
    assert min(kicks[True]) > 5 * max(kicks[False]) and min(decibels["loud"]) > max(decibels["quiet"]) + 14
