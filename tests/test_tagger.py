"""Tagging music of any length: one clip, long files, arrays, odd files, folders, and the pictures of them."""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from conftest import ROOT
from evaluate import Tagger
from lib import figures, library
from lib.audio import log_mel_spectrogram
from lib.common import InputError
from lib.library import draw_taggram, picture_of
from lib.tagger import audio_files, windows
from test_evaluate import make_checkpoint


def music(seconds, sample_rate=11025, channels=1):
    time = np.arange(int(sample_rate * seconds)) / sample_rate
    wave = np.sin(2 * np.pi * (220 + 5 * time) * time) * (0.3 + 0.2 * np.sin(time / 3))
    return np.stack([wave] * channels, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return Tagger(make_checkpoint(tmp_path_factory.mktemp("tagger") / "best.pt"), device="cpu")


def by_hand(tagger, spectrogram):
    with torch.no_grad():
        logits = tagger.net(torch.from_numpy((spectrogram + 5) / 3)[None, None])
    return torch.sigmoid(logits.double()).numpy()[0]


def test_a_clip_is_tagged_as_it_is_evaluated(tagger, tmp_path):
    soundfile.write(tmp_path / "clip.flac", music(29.124), 11025)
    expected = by_hand(tagger, log_mel_spectrogram(tmp_path / "clip.flac"))
    found = tagger(str(tmp_path / "clip.flac"))
    assert sorted(found.values(), reverse=True) == list(found.values())
    assert np.allclose([found[name] for name in tagger.tag_names], expected, atol=1e-12)


def starts_of_windows(n_samples):
    return [clip[0] for clip in windows(np.arange(n_samples))]


def test_windows_are_as_few_as_cover_the_recording_at_even_distances():
    clip, hop, minute = 627 * 512, 512, 60 * 11025
    excess = minute - clip  # 31 s, more than one clip, so that two more windows have to cover it
    assert starts_of_windows(minute) == [0, excess // 2, excess]
    assert starts_of_windows(clip) == [0]
    assert starts_of_windows(clip + hop - 1) == [0]
    assert starts_of_windows(clip + hop + 1) == [0, hop + 1]


def test_a_short_recording_is_repeated_to_fill_a_window(tagger):
    samples = music(10)[:, 0]
    (window,) = windows(samples)
    assert np.array_equal(window, np.concatenate([samples, samples, samples])[: 627 * 512])
    assert tagger(samples, 11025) == pytest.approx(tagger(np.resize(samples, 627 * 512), 11025), abs=1e-9)


def test_a_folder_is_followed_through_links_once_and_its_hidden_folders_are_not(tmp_path):
    music, album, elsewhere = tmp_path / "music", tmp_path / "music/album", tmp_path / "elsewhere"
    for path in (
        album / "1.mp3",
        album / "cover.jpg",
        elsewhere / "2.M4A",
        music / ".AppleDouble/1.mp3",
        music / "3.wma",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (music / "linked").symlink_to(elsewhere)
    (music / "same").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(music)
    found, n_others = audio_files([music, album])
    assert found == [music / "3.wma", album / "1.mp3", music / "linked/2.M4A"] and n_others == 1
    assert audio_files([album, elsewhere, music])[0] == [album / "1.mp3", elsewhere / "2.M4A", elsewhere / "up/3.wma"]
    assert audio_files([album, tmp_path / "none"])[0] == [album / "1.mp3", tmp_path / "none"]


def test_a_picture_has_a_name_that_file_systems_allow(tmp_path):
    pictures, songs = {}, [tmp_path / folder / f"{'ä' * 120}.mp3" for folder in ("one", "two")]
    names = [picture_of(song, tmp_path, pictures).name for song in songs]
    assert names[0] != names[1] and max(len(os.fsencode(f"{name}.partial")) for name in names) <= 255


def test_as_many_files_are_tagged_at_a_time_as_there_are_cores_but_eight_at_most(tagger, monkeypatch):
    asked = []
    monkeypatch.setattr(library, "load_ahead", lambda *_, n_ahead, n_threads: asked.append((n_ahead, n_threads)))
    for n_cores in (3, 192):
        monkeypatch.setattr(library, "cpu_count", lambda: n_cores)
        library.tagged(tagger, [])
    assert asked == [(3, 3), (8, 8)]


def test_a_long_file_is_the_mean_of_its_windows(tagger, tmp_path):
    samples = music(60)[:, 0]
    excess, expected = len(samples) - 627 * 512, []
    for start in (0, excess // 2, excess):
        soundfile.write(tmp_path / "window.wav", samples[start : start + 627 * 512 + 1024], 11025, "FLOAT")
        expected.append(by_hand(tagger, log_mel_spectrogram(tmp_path / "window.wav")))
    found = tagger(samples, 11025)
    assert np.allclose([found[name] for name in tagger.tag_names], np.mean(expected, axis=0), atol=1e-6)


def test_a_column_of_a_taggram_is_the_answer_for_the_clip_around_it(tagger, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "taggram", lambda *arguments: drawn.append(arguments))
    samples, half = music(33)[:, 0], 627 * 512 // 2
    draw_taggram(tagger, samples, 2, tmp_path / "song.mp3", picture_of(tmp_path / "song.mp3", tmp_path, {}))
    ((picture, spectrogram, _, times, probabilities, _, n_tags, _),) = drawn
    assert picture == tmp_path / "taggram_song.mp3.png" and n_tags == 2
    assert times == pytest.approx(np.arange(0.5, 33), abs=1e-4) and spectrogram.shape == (128, 1 + len(samples) // 512)
    mirrored = np.concatenate([samples[half - 1 :: -1], samples, samples[: -half - 1 : -1]])
    for column in (0, 16, 32):
        centre = int(times[column] * 11025 + 0.5)
        expected = tagger.probabilities([mirrored[centre : centre + 2 * half]])
        assert probabilities[column] == pytest.approx(expected[0], abs=1e-6)


def test_an_array_is_tagged_as_its_file(tagger, tmp_path):
    soundfile.write(tmp_path / "stereo.wav", music(2, channels=2) * [1, 0.5], 11025, "PCM_16")
    samples, sample_rate = soundfile.read(tmp_path / "stereo.wav")
    expected = pytest.approx(tagger(tmp_path / "stereo.wav"), abs=1e-6)
    for array in (samples, samples.astype(np.float32), torch.from_numpy(samples), samples.mean(axis=1).tolist()):
        assert tagger(array, sample_rate) == expected


def test_what_is_no_recording_is_refused(tagger):
    for audio in ([], np.full(9000, np.nan), np.zeros((2, 9000)), np.zeros(9000, np.int16)):
        with pytest.raises(InputError):
            tagger(audio, 11025)
    for sample_rate in (None, 0):
        with pytest.raises(InputError, match="sample rate"):
            tagger(np.zeros(9000), sample_rate)


def test_no_device_is_asked_for_float64(tagger, monkeypatch):
    class OnApplesGpu(torch.Tensor):
        def double(self):
            raise TypeError("MPS has no float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    net = tagger.net
    monkeypatch.setattr(tagger, "net", lambda clips: net(clips).as_subclass(OnApplesGpu))
    assert len(tagger(music(1)[:, 0], 11025)) == 3


def test_whatever_one_file_does_costs_only_that_file(tagger, tmp_path, run_script):
    checkpoint = make_checkpoint(tmp_path / "best.pt")
    folder = tmp_path / "folder"
    for inner in ("CD1", "CD2", "empty"):
        (folder / inner).mkdir(parents=True)
    soundfile.write(tmp_path / "cut.mp3", music(20, 22050), 22050)
    content = (tmp_path / "cut.mp3").read_bytes()
    half = len(content) // 2
    (tmp_path / "cut.mp3").write_bytes(content[:half])
    (tmp_path / "damaged.mp3").write_bytes(content[:half] + bytes(8000) + content[half + 8000 :])
    (tmp_path / "broken.mp3").write_bytes(b"not music")
    soundfile.write(folder / "CD1/01.ogg", music(3, 48000), 48000)
    soundfile.write(folder / "CD2/01.ogg", music(551 / 11025), 11025)
    soundfile.write(folder / "low.wav", music(3, 8000), 8000)
    os.rename(folder / "low.wav", folder / "low \udce9.wav")  # a name that is not UTF-8
    (folder / "notes.txt").write_text("not music")
    partly = [tmp_path / "cut.mp3", tmp_path / "damaged.mp3"]
    good = [*partly, folder / "CD1/01.ogg", folder / "CD2/01.ogg", folder / "low \udce9.wav"]
    bad = [*(tmp_path / name for name in ("broken.mp3", "missing.wav")), folder / "empty"]

    arguments = ["--device", "cpu", "--checkpoint", checkpoint, "--taggram", "--json", "--top", 2]
    done = run_script("evaluate.py", *arguments, "--tag", *bad, *partly, folder, status=1)
    found = json.loads(done.stdout)
    assert list(found) == [str(path) for path in good]
    for path, tags in found.items():
        assert tags == pytest.approx(dict(list(tagger(path).items())[:2]), abs=1e-6), "alone it is tagged the same"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    synthetic, few_clips, untrained, others, note, damage = (line for line in lines if line.startswith("note: "))
    assert few_clips.startswith("note: 9 validation clips chose") and untrained.startswith("note: epoch 0 was best")
    assert "SYNTHETIC" in synthetic and others == "note: 1 file(s) of other formats left out"
    assert damage == f"note: {tmp_path}/damaged.mp3: 1 packet(s) left out: damaged, or no audio"
    assert re.fullmatch(rf"note: {tmp_path}/cut.mp3: only (9|10)\.\d s of 20.0 s could be read", note)
    errors = [line for line in lines if not line.startswith("note: ")]  # none of the decoder's
    assert len(errors) == len(bad) and all(any(f"error: {path}: " in line for line in errors) for path in bad)
    for picture in ("cut.mp3", "01.ogg", "CD2_01.ogg", "low \udce9.wav"):
        assert (tmp_path / f"taggram_{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    for number in range(9):
        soundfile.write(tmp_path / f"{number}.flac", music(1), 11025)
    checkpoint = make_checkpoint(tmp_path / "best.pt")
    command = f"{sys.executable} {ROOT}/evaluate.py --device cpu --checkpoint {checkpoint} --tag {tmp_path} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.endswith("note: 1 file(s) of other formats left out\n")
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
    assert done.stdout.startswith(f"{tmp_path}/0.flac: ")


def test_a_table_and_pictures_at_once_are_refused(call_script, tmp_path):
    error = call_script("evaluate.py", "--tag", tmp_path, "--csv", tmp_path / "a.csv", "--taggram", status=1).stderr
    assert "leave out --json and --taggram" in error and error.count("\n") == 1


def test_a_library_is_a_table_with_a_row_for_each_file(tmp_path, tagger, run_script):
    checkpoint = make_checkpoint(tmp_path / "best.pt")
    soundfile.write(tmp_path / "song.flac", music(32, 44100, 2), 44100)
    (tmp_path / "broken.mp3").write_bytes(b"not music")
    arguments = ["--device", "cpu", "--checkpoint", checkpoint, "--csv", tmp_path / "tags.csv", "--tag", tmp_path]
    assert "2 rows added, 1 of them without tags" in run_script("evaluate.py", *arguments, status=1).stdout
    with open(tmp_path / "tags.csv", encoding="utf-8-sig", newline="") as file:
        broken, song = csv.DictReader(file)
    assert broken["path"].endswith("broken.mp3") and "can't be decoded" in broken["note"]
    assert song["seconds"] == "32.0" and song["note"] == ""
    for tag, probability in tagger(tmp_path / "song.flac").items():
        assert float(song[tag]) == pytest.approx(probability, abs=1e-6)
