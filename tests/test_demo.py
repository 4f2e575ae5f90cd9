"""lib/demo.py: MagnaTagATune's formats, repeatable files, and tags that can be heard."""

from collections import defaultdict

import numpy as np
import pytest
import soundfile

from lib import demo
from lib.common import InputError
from tags import SYNONYMS, clip_info_of, read_annotations

N_CLIPS, SEED = 6, 7  # one album, on which every tag is both present and absent


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    demo.render(folder, N_CLIPS, SEED)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_missing_is_rendered_again_to_the_same_bytes_and_nothing_else_is_touched(rendered, tmp_path):
    before, clips = contents(rendered), sorted(rendered.glob("?/*.mp3"))
    for lost in (rendered / "tags.csv", clips[2]):
        lost.unlink()
    kept = clips[0].stat().st_mtime_ns
    demo.render(rendered, N_CLIPS, SEED)
    assert contents(rendered) == before and clips[0].stat().st_mtime_ns == kept
    (tmp_path / "tags.csv").write_text("real")
    for folder, n_clips, seed in ((rendered, N_CLIPS, SEED + 1), (rendered, N_CLIPS + 1, SEED), (tmp_path, 6, 7)):
        with pytest.raises(InputError, match="no demo of this size and seed"):
            demo.render(folder, n_clips, seed)
    assert contents(rendered) == before and contents(tmp_path) == {"tags.csv": b"real"}


def test_an_album_lies_in_one_folder_an_artist_in_two_parts_and_a_track_has_two_cuts():
    clips, parts, folders, cuts = demo.list_clips(192, SEED), defaultdict(set), defaultdict(set), defaultdict(set)
    for clip in clips:
        track, _title, artist, album, _url, start, end, _ = clip.origin
        folders[album].add(clip.path[0])
        parts[artist].add("train" if clip.path[0] < "c" else "validation" if clip.path[0] == "c" else "test")
        cuts[album, track].add((start, end))
    assert all(len(some) == 1 for some in folders.values()) and all(len(some) == 2 for some in cuts.values())
    assert set.union(*parts.values()) == {"train", "validation", "test"} and {"train", "test"} in parts.values()


def test_annotators_use_every_spelling_of_what_is_heard_and_none_of_what_is_not():
    clips = demo.list_clips(192, SEED)
    header, *rows = demo.annotations(clips, SEED)
    for spellings in demo.SPELLINGS:
        assert len(spellings) == 1 or spellings in SYNONYMS
        used = [{tag for tag in spellings if row[header.index(tag)]} for row in rows]
        assert [bool(names) for names in used] == [spellings[0] in clip.sounds for clip in clips]
        assert set.union(*used) == set(spellings) and 0.15 < np.mean([bool(names) for names in used]) < 0.65


def test_the_tags_can_be_heard_in_clips_of_magnatagatunes_length(rendered):
    annotations = read_annotations(rendered / "tags.csv")
    assert len(clip_info_of(rendered, annotations.ids)) == N_CLIPS
    onsets, decibels = defaultdict(list), defaultdict(list)
    for path, labels in zip(annotations.mp3_paths, annotations.labels):
        sound, rate = soundfile.read(rendered / path)
        assert (sound.shape, rate) == ((465_984,), 16000)  # as the real clips: 628 frames at 11,025 Hz
        tags = {name for name, label in zip(annotations.tag_names, labels) if label}
        low = np.abs(np.fft.rfft(sound[: 455 * 1024].reshape(455, 1024) * np.hanning(1024)))[:, 1:4]  # 16 to 47 Hz
        rises = np.diff(low.sum(axis=1)).clip(0).sum()  # only a kick makes sudden ones
        onsets[bool(tags & {"drum", "drums"})].append(rises / np.abs(sound).sum())
        loudness = "loud" if "loud" in tags else "quiet" if tags & {"quiet", "silence"} else "neither"
        decibels[loudness].append(10 * np.log10(np.mean(sound**2)))
    assert min(onsets[True]) > 5 * max(onsets[False])
    assert min(decibels["loud"]) > max(decibels["neither"]) + 7 > max(decibels["quiet"]) + 14
