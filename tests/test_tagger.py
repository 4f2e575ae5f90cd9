"""Tagging music of any length: one clip, long files, arrays, odd files, folders, and the pictures of them."""

import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from conftest import ROOT
from evaluate import Tagger
from lib import library
from lib.audio import log_mel_spectrogram
from lib.common import InputError
from lib.library import picture_of, tags_over_time
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


def test_a_playlist_means_its_songs(tmp_path):
    lines = ["\ufeff#EXTM3U", "#EXTINF:9,One", " one ü.mp3 ", "", "/music/two.mp3", "file:///music/a%20song.mp3"]
    songs = [tmp_path / "one ü.mp3", Path("/music/two.mp3"), Path("/music/a song.mp3")]
    (tmp_path / "list.M3U").write_text("\r\n".join(lines), encoding="utf-8")
    (tmp_path / "none.m3u8").write_text("#EXTM3U\n")
    (tmp_path / "folder.m3u").mkdir()
    (tmp_path / "folder.m3u/three.mp3").touch()
    (tmp_path / "no text.m3u").write_bytes("one.mp3".encode("utf-16"))
    os.mkfifo(tmp_path / "pipe.m3u")
    others = [tmp_path / name for name in ("none.m3u8", "no text.m3u", "pipe.m3u")]
    found = audio_files([tmp_path / "list.M3U", *others, tmp_path / "folder.m3u"])
    assert found == ([*songs, *others, tmp_path / "folder.m3u/three.mp3"], 0)


def test_a_picture_has_a_name_of_its_own_that_file_systems_allow(tmp_path):
    folders, names = (tmp_path / "one", tmp_path / "two"), ("song.mp3", f"{'ä' * 120}.mp3")
    found = [picture_of(folder / name, tmp_path).name for folder in folders for name in names]
    assert len({*found}) == 4 and max(len(os.fsencode(f"{name}.partial")) for name in found) <= 255
    assert found[0].startswith("taggram_song.mp3_") and found[1].endswith(f"ä.mp3_{found[1][-12:]}")


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


def test_tags_over_time_are_the_answers_for_the_clips_around_each_moment(tagger):
    samples, half = music(33)[:, 0], 627 * 512 // 2
    spectrogram, edges, scores = tags_over_time(tagger, samples, ["flute", "slow"])
    assert edges[:-1] == pytest.approx(np.arange(33), abs=1e-3) and spectrogram.shape == (128, 1 + len(samples) // 512)
    assert edges[-1] == spectrogram.shape[1] * 512 / 11025
    extended = np.concatenate([samples[:half], samples, samples[-half:]])
    for column in (0, 16, 32):
        centre = 11025 // 2 + 11025 * column
        expected = tagger.scores([extended[centre : centre + 2 * half]])
        assert scores[column] == pytest.approx(expected[0, [2, 0]], abs=1e-6)


def test_over_time_a_short_recording_is_repeated(tagger):
    _, _, scores = tags_over_time(tagger, samples := music(5)[:, 0], ["slow"])
    repeated = [np.resize(samples, 627 * 256), samples, np.resize(samples, 627 * 256)]
    expected = tagger.scores([np.concatenate(repeated)[5512 : 5512 + 627 * 512]])[0, 0]
    assert scores[0] == pytest.approx([expected], abs=1e-6)


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
    (tmp_path / "list.m3u").write_text("missing.wav")
    bad = [tmp_path / "broken.mp3", tmp_path / "missing.wav", folder / "empty"]
    named = [tmp_path / "broken.mp3", tmp_path / "list.m3u", folder / "empty", *partly, folder]

    arguments = ["--device", "cpu", "--checkpoint", checkpoint, "--taggram", "--json", "--top", 2]
    done = run_script("evaluate.py", *arguments, "--tag", *named, status=1)
    found = json.loads(done.stdout)
    assert list(found) == [str(path) for path in good]
    for path, tags in found.items():
        assert tags == pytest.approx(dict(list(tagger(path).items())[:2]), abs=1e-6), "alone it is tagged the same"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    synthetic, earlier, few_clips, untrained, others, note, damage = (
        line for line in lines if line.startswith("note: ")
    )
    assert earlier.startswith("note: of an earlier version, without thresholds: 0.5")
    assert few_clips.startswith("note: 9 validation clips chose") and untrained.startswith("note: epoch 0 was best")
    assert "SYNTHETIC" in synthetic and others == "note: 1 file(s) of other formats left out"
    assert damage == f"note: {tmp_path}/damaged.mp3: 1 packet(s) left out: damaged, or no audio"
    assert re.fullmatch(rf"note: {tmp_path}/cut.mp3: only (9|10)\.\d s of 20.0 s could be read", note)
    errors = [line for line in lines if not line.startswith("note: ")]  # none of the decoder's
    assert len(errors) == len(bad) and all(any(f"error: {path}: " in line for line in errors) for path in bad)
    assert all(picture_of(path, tmp_path).read_bytes().startswith(b"\x89PNG") for path in good)


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    for number in range(9):
        soundfile.write(tmp_path / f"{number}.flac", music(1), 11025)
    checkpoint = make_checkpoint(tmp_path / "best.pt")
    command = f"{sys.executable} {ROOT}/evaluate.py --device cpu --checkpoint {checkpoint} --tag {tmp_path} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "note: 1 file(s) of other formats left out\n" in done.stderr
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
    assert done.stdout.startswith(f"{tmp_path}/0.flac: ")


def test_what_does_not_go_together_or_is_not_there_is_one_line(call_script, tmp_path):
    for arguments, message in (
        (["--tag", tmp_path, "--csv", tmp_path / "a.csv", "--taggram", "--json"], "--csv: leave out --json and --tagg"),
        (["--tag", tmp_path, "--against", "other", "--other-data"], "--tag: leave out --against and --other-data"),
        (["--against", "other", "--probe", tmp_path], "--against: leave out --probe"),
        (["--tag"], "--tag: needs audio files"),
        (["--top", 3], "--tag: needs audio files"),
        ([tmp_path, "--top", 3], f"{tmp_path}: to tag music, put --tag before it"),
        (["--tag", tmp_path / "My", "Music"], f"{tmp_path}/My: no such file or folder; a name with spaces needs quot"),
        (["--tag", tmp_path / "None"], f"{tmp_path}/None: no such file or folder\n"),
        (["--tag", tmp_path, "--name", "none"], "none/best.pt: no such checkpoint, and none to download; README.md"),
    ):
        error = call_script("evaluate.py", *arguments, status=1).stderr
        assert message in error and error.count("\n") == 1, arguments
    assert not [*tmp_path.iterdir()]


def test_a_library_is_a_table_and_a_playlist_for_each_tag(tmp_path, run_script, monkeypatch):
    thresholds = torch.tensor([0.3, 1, 0.01], dtype=torch.float64)
    checkpoint = make_checkpoint(tmp_path / "best.pt", thresholds=thresholds)
    soundfile.write(tmp_path / "song.flac", music(32, 44100, 2), 44100)
    (tmp_path / "broken.mp3").write_bytes(b"not music")
    arguments = ["--device", "cpu", "--checkpoint", checkpoint, "--tag", tmp_path]
    assert (
        "2 rows added, 1 of them without"
        in run_script("evaluate.py", *arguments, "--csv", tmp_path / "music.csv", status=1).stdout
    )
    with open(tmp_path / "music.csv", encoding="utf-8-sig", newline="") as file:
        broken, song = csv.DictReader(file)
    assert broken["path"].endswith("broken.mp3") and "can't be decoded" in broken["note"] and broken["tags"] == ""
    assert song["seconds"] == "32.0" and song["note"] == ""
    tags = Tagger(checkpoint, device="cpu")(tmp_path / "song.flac")
    assert [*tags] == sorted(tags, key=lambda tag: -tags[tag] / {"slow": 0.3, "guitar": 1, "flute": 0.01}[tag])
    assert all(float(song[tag]) == pytest.approx(score, abs=1e-6) for tag, score in tags.items())
    above = [tag for tag in tags if tag != "guitar" and tags[tag] >= {"slow": 0.3, "flute": 0.01}[tag]]
    assert song["tags"] == "; ".join(above) and "flute" in above
    listed = ", ".join(f"{tag} {score:.2f}{'*' * (tag in above)}" for tag, score in tags.items())
    assert run_script("evaluate.py", *arguments, status=1).stdout == f"{tmp_path}/song.flac: {listed}\n"
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(
        r"```python\n(import csv\nfrom collections .*?)```", (ROOT / "experiments/README.md").read_text(), re.DOTALL
    )
    exec(program, {})
    assert {path.name for path in tmp_path.glob("*.m3u8")} == {f"{tag}.m3u8" for tag in above}
    assert audio_files([tmp_path / "flute.m3u8"]) == ([tmp_path / "song.flac"], 0)


def test_features_are_the_mean_of_what_the_head_is_given(tmp_path):
    path = make_checkpoint(tmp_path / "best.pt")
    samples, windows_of = (
        music(60)[:, 0],
        [music(60)[start : start + 627 * 512 + 1024, 0] for start in (0, 170238, 340476)],
    )
    for precision, tolerance in (("float64", 1e-6), ("bfloat16", 0.05)):
        tagger = Tagger(path, "cpu", precision)
        hidden, given = [], []
        hook = tagger.net.head.register_forward_hook(lambda head, inputs, outputs: given.append(inputs[0].double()))
        for window in windows_of:
            tagger.scores([window])
            hidden.append(given.pop()[0].numpy())
        hook.remove()
        with ThreadPoolExecutor(2) as pool:
            found, other = pool.map(tagger.features, (samples, samples[:9000]), (11025, 11025))
        assert found.shape == (500,) and found.dtype == np.float32
        assert found == pytest.approx(np.mean(hidden, axis=0), abs=tolerance) and np.ptp(found) > 0.1
        assert other == pytest.approx(tagger.features(samples[:9000], 11025), abs=1e-6), "each thread gets its own"
        assert not tagger.net.head._forward_pre_hooks
