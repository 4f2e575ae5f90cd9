"""lib/demo.py: MagnaTagATune's formats to the letter, repeatable files, and tags that can be heard."""

import csv
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile

import tags
from lib import demo
from lib.common import ROOT, InputError

N_CLIPS, SEED = 6, 7  # one album, on which every tag is both present and absent
INFO_COLUMNS = "clip_id track_number title artist album url segmentStart segmentEnd original_url mp3_path".split()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    demo.render(folder, N_CLIPS, SEED)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def rows(rendered):
    """The rows of tags.csv."""
    return rows_of(rendered / "tags.csv")


@pytest.fixture(scope="module")
def sounds(rendered, rows):
    return [soundfile.read(rendered / row["mp3_path"])[0] for row in rows]


def test_nothing_but_the_tables_the_marker_and_the_clips(rendered, rows):
    clips = {row["mp3_path"] for row in rows}
    assert len(clips) == N_CLIPS
    assert contents(rendered).keys() == {"SYNTHETIC.txt", "clip_info_final.csv", "tags.csv", *clips}
    marker = (rendered / "SYNTHETIC.txt").read_text()
    assert f"{N_CLIPS} clips" in marker and f"seed {SEED}" in marker


@pytest.mark.parametrize("table", ["tags.csv", "clip_info_final.csv"])
def test_tables_are_written_as_magnatagatunes(rendered, table):
    lines = (rendered / table).read_bytes().decode().split("\r\n")
    assert lines.pop() == "" and len(lines) == 1 + N_CLIPS
    n_columns = lines[0].count("\t") + 1
    for line in lines:
        assert re.fullmatch(r'"[^"\t\n]*"(\t"[^"\t\n]*")*', line) and line.count("\t") == n_columns - 1


def test_columns(rendered, rows):
    first_column, *_, last_column = rows[0]
    assert (first_column, last_column) == ("clip_id", "mp3_path")
    info = rows_of(rendered / "clip_info_final.csv")
    assert list(info[0]) == INFO_COLUMNS
    for annotation, origin in zip(rows, info, strict=True):
        assert (annotation["clip_id"], annotation["mp3_path"]) == (origin["clip_id"], origin["mp3_path"])
        assert set(list(annotation.values())[1:-1]) == {"0", "1"}
        name = f"-{origin['track_number']}-.*-{origin['segmentStart']}-{origin['segmentEnd']}.mp3"
        assert re.fullmatch("[0-9a-f]/synthetic_artist_1-synthetic_album_1" + name, origin["mp3_path"])
        assert int(origin["segmentEnd"]) - int(origin["segmentStart"]) == 29


def test_mp3s_are_encoded_as_magnatagatunes(rendered, rows):
    for row in rows:
        mp3 = (rendered / row["mp3_path"]).read_bytes()
        frames = [mp3[start : start + 144] for start in range(0, len(mp3), 144)]
        assert len(frames) == 809 and len(frames[-1]) == 144
        for frame in frames:
            # sync, MPEG-2, layer III; 32 kbit/s (4), 16 kHz (2), no padding; one channel (3)
            assert frame[:2] == b"\xff\xf3" and frame[2] >> 1 == 0b0100_100 and frame[3] >> 6 == 3
        decoded, rate = soundfile.read(rendered / row["mp3_path"])
        assert (decoded.shape, rate) == ((465_984,), 16000)  # as the real clips: 628 frames at 11,025 Hz


def test_goes_on_to_the_same_bytes(rendered, run_script, tmp_path):
    """A pipe in the last clip's place holds a thread there."""
    folder = tmp_path / "demo"
    demo.claim(folder, N_CLIPS, SEED)
    pipe = folder / f"{demo.list_clips(N_CLIPS, SEED)[-1].path}.partial"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    command = f"get_data.py --demo --data {tmp_path} --demo-clips {N_CLIPS} --demo-seed {SEED}".split()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(kept := list(folder.rglob("*.mp3"))) < N_CLIPS - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert kept and not (folder / "tags.csv").exists()
    written = kept[0].stat().st_mtime_ns
    pipe.unlink()
    assert run_script(*command).stdout == f"next: python gen_spectrograms.py --data {folder}\n"
    assert kept[0].stat().st_mtime_ns == written
    assert contents(folder) == contents(rendered)


def test_refusals(rendered, tmp_path):
    before = contents(rendered)
    for other in ((N_CLIPS, SEED + 1), (N_CLIPS + 1, SEED)):
        with pytest.raises(InputError, match=f"^{re.escape(str(rendered))} .*delete"):
            demo.render(rendered, *other)
    assert contents(rendered) == before
    (tmp_path / "tags.csv").write_text("real")
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))} holds tags.csv, .*choose"):
        demo.render(tmp_path, N_CLIPS, SEED)
    assert contents(tmp_path) == {"tags.csv": b"real"}


def test_catalogue_has_magnatagatunes_structure():
    clips = demo.list_clips(192, SEED)
    assert len({clip.path for clip in clips}) == 192
    part_of_folder = {"c": "validation"} | dict.fromkeys("def", "test") | dict.fromkeys("0123456789ab", "training")
    parts = [part_of_folder[clip.path[0]] for clip in clips]
    assert Counter(parts) == {"training": 144, "validation": 12, "test": 36}
    assert len(set(parts[:18])) == 3
    folders_of_album, parts_of_artist, cuts_of_track = defaultdict(set), defaultdict(set), defaultdict(set)
    for clip, part in zip(clips, parts):
        track, _title, artist, album, _url, start, *_ = clip.origin
        folders_of_album[artist, album].add(clip.path[0])
        parts_of_artist[artist].add(part)
        cuts_of_track[artist, album, track].add(start)
    assert {len(folders) for folders in folders_of_album.values()} == {1}
    assert {len(cuts) for cuts in cuts_of_track.values()} == {2}
    assert any({"training", "test"} <= parts for parts in parts_of_artist.values())


def test_annotators_use_every_spelling_of_what_is_heard_and_none_of_what_is_not():
    clips = demo.list_clips(192, SEED)
    header, *rows = demo.annotations(clips, SEED)
    for spellings in demo.SPELLINGS:
        used = [tuple(tag for tag in spellings if row[header.index(tag)]) for row in rows]
        assert [bool(names) for names in used] == [spellings[0] in clip.sounds for clip in clips]
        assert 0.15 < np.mean([bool(names) for names in used]) < 0.65
        assert {(tag,) for tag in spellings} | {spellings} <= set(used)  # each alone, and all at once


def test_spellings_are_the_papers_synonyms():
    several = {spellings for spellings in demo.SPELLINGS if len(spellings) > 1}
    assert len(several) == 10 and several <= set(tags.SYNONYMS)


def test_loud_is_louder_than_quiet(rows, sounds):
    decibels = defaultdict(list)
    for row, sound in zip(rows, sounds):
        loudness = "loud" if row["loud"] == "1" else "quiet" if "1" in (row["quiet"], row["silence"]) else "neither"
        decibels[loudness].append(10 * np.log10(np.mean(sound**2)))
    assert min(decibels["loud"]) > max(decibels["neither"]) + 7 > max(decibels["quiet"]) + 14


def test_drums_are_heard(rows, sounds):
    """Only a kick makes sudden rises below 60 Hz."""
    onsets = {True: [], False: []}
    for row, sound in zip(rows, sounds):
        frames = sound[: 455 * 1024].reshape(455, 1024)  # of 64 ms
        low = np.abs(np.fft.rfft(frames * np.hanning(1024)))[:, 1:4]  # 16 to 47 Hz, and the window's skirts
        rises = np.diff(low.sum(axis=1)).clip(0)
        onsets["1" in (row["drum"], row["drums"])].append(rises.sum() / np.abs(frames).sum())
    assert min(onsets[True]) > 5 * max(onsets[False])
