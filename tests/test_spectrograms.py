"""Spectrograms against librosa, the dump's files, bad clips, and going on after a kill."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr
import torch

from conftest import ROOT, write_dump
from gen_spectrograms import log_mel_spectrogram
from lib.audio import CLIP_SAMPLES, FRONT_END, load
from lib.common import InputError
from lib.dump import RECORD, Dump, band_normalization, read_manifest, write_manifest
from lib.loader import Loader

SECONDS = CLIP_SAMPLES / 11025


def tone(sample_rate, seconds, channels=1):
    """A rising tone over noise, with a level that falls from full scale to a whisper."""
    time = np.arange(int(sample_rate * seconds)) / sample_rate
    noise = np.random.RandomState(0).randn(len(time)) * 0.01
    wave = np.sin(2 * np.pi * (200 + 40 * time) * time) * 0.9 * 10 ** (-time / 10) + noise
    return np.stack([wave * (1 - 0.5 * channel) for channel in range(channels)], axis=1)


def exact_log_mel(samples):
    """The original's recipe in float64, from NumPy's FFT and librosa's filters."""
    padded = np.pad(samples.astype(np.float64), 1024, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2048)[::512]
    spectrum = np.fft.rfft(frames * np.hanning(2049)[:-1], axis=1)
    filters = librosa.filters.mel(sr=11025, n_fft=2048, n_mels=128, dtype=np.float64)
    return np.log(np.clip(filters @ (np.abs(spectrum) ** 2).T, 1e-20, np.inf))


def assert_as_exact_as_librosa(path):
    samples, _ = load(path)
    mel = librosa.feature.melspectrogram(y=samples, sr=11025, n_fft=2048, hop_length=512, pad_mode="reflect")
    exact = exact_log_mel(samples)[:, :628]
    ours = np.abs(log_mel_spectrogram(path) - exact)
    librosas = np.abs(np.log(np.clip(mel, 1e-20, np.inf))[:, :628] - exact)
    assert ours.mean() <= librosas.mean()
    # The last digit of float32 is all that is left to differ in
    assert ours.max() <= max(librosas.max(), np.spacing(np.float32(np.abs(exact).max())))


def test_synthetic_clip_is_as_exact_as_librosas(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(16000, 29.124), 16000)
    assert log_mel_spectrogram(tmp_path / "tone.wav").shape == (128, 628)
    assert_as_exact_as_librosa(tmp_path / "tone.wav")


def test_real_clips_are_as_exact_as_librosas(shared):
    clip = shared / "mtat/e/joram-moments_of_clarity-08-solipsism-59-88.mp3"
    spectrogram = log_mel_spectrogram(clip)
    assert spectrogram.shape == (128, 628) and spectrogram.dtype == np.float32
    for path in [clip, *sorted(shared.glob("gtzan60/*/*.mp3"))[::12]]:
        assert_as_exact_as_librosa(path)


@pytest.mark.parametrize("sample_rate, channels, subtype", [(44100, 2, "PCM_16"), (16000, 1, "FLOAT")])
def test_decoding_and_resampling_equal_librosas(tmp_path, sample_rate, channels, subtype):
    soundfile.write(tmp_path / "a.wav", tone(sample_rate, 3.000125, channels), sample_rate, subtype)
    expected, _ = librosa.load(tmp_path / "a.wav", sr=11025)
    found, note = load(tmp_path / "a.wav")
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-6 and note == ""
    assert np.array_equal(load(tmp_path / "a.wav", 9000)[0][:9000], found[:9000])


@pytest.mark.parametrize("sample_rate, seconds", [(16000, 40), (11025, 0.5)])
def test_samples_are_cut_or_padded_with_silence_before_the_transform(tmp_path, sample_rate, seconds):
    soundfile.write(tmp_path / "a.wav", tone(sample_rate, seconds), sample_rate, "FLOAT")
    samples, _ = load(tmp_path / "a.wav")
    expected = exact_log_mel(np.pad(samples, (0, max(CLIP_SAMPLES - len(samples), 0))))[:, :628]
    assert np.abs(log_mel_spectrogram(tmp_path / "a.wav") - expected).max() < 1e-5


def write_table(data, paths):
    rows = [f"{index}\t{index % 2}\t{1 - index % 2}\t{path}" for index, path in enumerate(paths, start=1)]
    (data / "tags.csv").write_text("\n".join(["clip_id\tguitar\tflute\tmp3_path", *rows]) + "\n")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of 21 clips, 20 of them good."""
    data = tmp_path_factory.mktemp("originals")
    for index in range(20):
        soundfile.write(data / f"{index}.flac", tone(11025, SECONDS + 0.01 * index)[:, 0] * 0.9**index, 11025)
    write_table(data, [f"{index}.flac" for index in range(20)] + ["missing.flac"])
    return data


@pytest.fixture
def clips(originals, tmp_path):
    return shutil.copytree(originals, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def undisturbed(originals, tmp_path_factory):
    """The contents of the dump, in two chunks, that an undisturbed run makes of those clips."""
    data = shutil.copytree(originals, tmp_path_factory.mktemp("undisturbed"), dirs_exist_ok=True)
    assert start(data, 2).wait(60) == 0
    return contents(data)


def contents(data):
    return {path.name: path.read_bytes() for path in data.iterdir() if path.suffix not in (".flac", ".lock")}


def test_the_dump(run_script, clips):
    done = run_script("gen_spectrograms.py", "--data", clips)
    assert "1 bad (all zeros), 0 short" in done.stdout and "21 spectrograms" in done.stdout
    assert (
        "--retry-bad tries them again; the commonest reason: no such file or directory: missing.flac\n" in done.stdout
    )
    n_longer = sum(int(11025 * (SECONDS + 0.01 * index)) > 627 * 512 + 1024 for index in range(20))
    assert 0 < n_longer < 20 and f"\n{n_longer} clips are longer: of these, the first 29.1 s count\n" in done.stdout
    arrays = [np.load(clips / f"spectrograms_{index}.npy") for index in range(8)]
    assert [len(array) for array in arrays] == [3, 3, 3, 3, 3, 3, 3, 0]  # (21 - 1) // 8 + 1 a chunk
    spectrograms = np.concatenate(arrays)
    assert spectrograms.dtype == np.float32 and spectrograms.shape == (21, 128, 628)
    assert np.array_equal(spectrograms[7], log_mel_spectrogram(clips / "7.flac"))
    assert not spectrograms[20].any()
    assert np.load(clips / "ids.npy").tolist() == list(range(1, 22))
    assert np.load(clips / "tags.npy")[:2].tolist() == [[1, 0], [0, 1]]
    assert np.load(clips / "tag_names.npy").tolist() == ["guitar", "flute"]
    assert (clips / "bad_clips.csv").read_text().splitlines()[1:] == ["21,missing.flac,zero,no such file or directory"]

    dump = Dump(clips)
    assert dump.front_end == FRONT_END
    assert dump.made_with == f"librosa {librosa.__version__}, soxr {soxr.__version__}"
    mean, std = band_normalization(*dump.verify())
    assert np.allclose(mean, spectrograms.mean(axis=(0, 2), dtype=np.float64), rtol=1e-6)
    assert np.allclose(std, spectrograms.std(axis=(0, 2), dtype=np.float64), rtol=1e-6)
    values = np.linspace(-46.1, 20, 128, dtype=np.float32).astype(float)  # each band is constant
    constant = (np.tile(628 * power, (999, 1)) for power in (values, values**2))
    assert np.ptp(values) and band_normalization(*constant)[1].tolist() == [1] * 128, "whatever the rounding"
    assert band_normalization(np.zeros((2, 128)), np.zeros((2, 128)))[1].tolist() == [1] * 128, "of silence"
    normalization = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
    loader, rows = Loader(dump, dump.labels, normalization, torch.device("cpu"), "float32"), np.array([20, 0, 13])
    ((batch, labels),) = loader.batches([rows])
    assert np.array_equal(batch[:, 0], (spectrograms[rows] - mean[:, None]) / std[:, None])
    assert np.array_equal(labels, dump.labels[rows])


BAD = {  # what is in the file, the clip's outcome, a part of the reason
    "missing.mp3": (None, "zero", "no such file"),
    "text.mp3": (b"<html>404</html>" * 100, "zero", "can't be decoded"),
    "pipe.mp3": (None, "zero", "not a file"),
    "cut.flac": (None, "padded", "s of 30.0 s could be read"),
    "overflows_in_the_resampler.wav": (np.resize([3.4e38, -3.4e38, -3.4e38], 16000 * 30), "zero", "NaN or infinite"),
    "no_samples.wav": (np.empty(0), "zero", "contains no audio"),
    "half_second.wav": (tone(16000, 0.5), "padded", "0.50 s long"),
}


def test_every_bad_clip_has_its_outcome_and_the_run_goes_on(run_script, tmp_path):
    for name, (content, _, _) in BAD.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            soundfile.write(tmp_path / name, content, 16000, "FLOAT")
    os.mkfifo(tmp_path / "pipe.mp3")
    on_disk = unicodedata.normalize("NFD", "Zoë's song é.wav")
    soundfile.write(tmp_path / on_disk, tone(16000, SECONDS, channels=2), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(11025 * 30), 11025)
    soundfile.write(tmp_path / "whole.flac", tone(11025, 30), 11025)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:200_000])
    good = [unicodedata.normalize("NFC", on_disk), "silent.wav", "whole.flac"]
    write_table(tmp_path, [*BAD, *good])

    done = run_script("gen_spectrograms.py", "--data", tmp_path, "--n-chunks", 2, status=1)
    assert "error: " in done.stderr and "5 of 10 clips are bad, more than 5%" in done.stderr
    rows = [line.split(",", 3) for line in (tmp_path / "bad_clips.csv").read_text().splitlines()[1:]]
    found = {path: (outcome, reason) for _, path, outcome, reason in rows}
    for name, (_, outcome, reason) in BAD.items():
        assert found[name][0] == outcome and reason in found[name][1], name
    assert not set(good) & set(found)
    spectrograms = np.concatenate([np.load(tmp_path / f"spectrograms_{index}.npy") for index in range(2)])
    assert np.allclose(spectrograms[-2], np.log(1e-20)), "silence is no bad clip"
    assert np.array_equal(spectrograms[-3], log_mel_spectrogram(tmp_path / on_disk))


def start(data, n_chunks, *arguments):
    command = [sys.executable, ROOT / "gen_spectrograms.py", "--data", data, "--n-chunks", str(n_chunks), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_clips(data, n_clips=1):
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size // RECORD.itemsize for path in data.glob("*.records")) < n_clips:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def workers(process):
    """Return the pids of the worker processes of a run that has made a clip."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc, or limits the size of files")


@on_linux
def test_a_run_that_finds_another_at_work_says_so(clips):
    first = start(clips, 1)
    wait_for_clips(clips)
    (writing,) = workers(first)
    os.kill(writing, signal.SIGSTOP)
    second = start(clips, 1, "--overwrite")
    error = second.communicate(timeout=60)[1].decode()
    assert second.returncode == 1 and "spectrograms_0.npy: in use by another process" in error
    os.kill(writing, signal.SIGCONT)
    assert first.wait(60) == 0
    Dump(clips).verify()


@on_linux
@pytest.mark.parametrize("victim", ["parent", "worker", "all"])
def test_killed_and_started_again_the_dump_is_the_same(run_script, clips, undisturbed, victim):
    process = start(clips, 2)
    wait_for_clips(clips, 5)
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid if victim == "parent" else workers(process)[0], signal.SIGKILL)
    error = process.communicate(timeout=60)[1].decode()
    if victim == "worker":
        assert process.returncode == 1 and "the same command resumes" in error and "Traceback" not in error
    with pytest.raises(InputError, match="no complete dump"):
        Dump(clips)
    for records in clips.glob("*.records"):
        content = bytearray(records.read_bytes())
        if victim == "parent" and content:
            content[RECORD.fields["crc32"][1]] ^= 1  # of the first clip
        records.write_bytes(content + b"half a record")
    half_written = max(clips.glob("*.partial"), key=os.path.getsize)
    with open(half_written, "r+b") as file:
        # The middle is a clip that has been damaged, the end one that was cut off
        file.seek(half_written.stat().st_size // (2 if victim == "all" else 1))
        file.write(b"anything")
    run_script("gen_spectrograms.py", "--data", clips, "--n-chunks", 2)
    assert contents(clips) == undisturbed


def test_several_machines_divide_the_chunks(run_script, clips, undisturbed):
    common = "--data", clips, "--n-chunks", 2, "--chunks"
    assert "still needs spectrograms_0.npy" in run_script("gen_spectrograms.py", *common, 1).stdout
    assert "21 spectrograms" in run_script("gen_spectrograms.py", *common, 0).stdout
    assert contents(clips) == undisturbed


def test_a_dump_made_with_other_settings_is_never_mixed(run_script, clips):
    run_script("gen_spectrograms.py", "--data", clips)
    before = contents(clips)
    done = run_script("gen_spectrograms.py", "--data", clips, "--n-chunks", 4, status=1)
    assert "n_chunks (8 there, 4 now)" in done.stderr
    table = (clips / "tags.csv").read_text()
    (clips / "tags.csv").write_text(table.replace("0.flac", "other.flac"))
    done = run_script("gen_spectrograms.py", "--data", clips, status=1)
    assert "other clips" in done.stderr and "--overwrite" in done.stderr
    (clips / "tags.csv").write_text(table)
    assert contents(clips) == before
    manifest = read_manifest(clips)
    write_manifest(clips, {**manifest, "front_end": FRONT_END | {"hop_length": 256}})
    differs = "made with a different front end from lib/audio.py's: hop_length \\(256 against 512\\); "
    with pytest.raises(InputError, match=f"{differs}restore that, or remake the dump"):
        Dump(clips)
    assert re.search(f"{differs}--overwrite", run_script("gen_spectrograms.py", "--data", clips, status=1).stderr)
    write_manifest(clips, manifest)
    (clips / "spectrograms_3.npy").rename(clips / "elsewhere.npy")
    assert "spectrograms_3.npy: missing" in run_script("gen_spectrograms.py", "--data", clips, status=1).stderr
    (clips / "dump.json").unlink()
    assert "without dump.json" in run_script("gen_spectrograms.py", "--data", clips, status=1).stderr


def test_a_corrected_label_renews_the_tags_alone(run_script, clips):
    run_script("gen_spectrograms.py", "--data", clips)
    write_manifest(clips, {**read_manifest(clips), "made_with": "librosa 0.9"})
    before, spectrograms = contents(clips), {path: path.stat().st_mtime_ns for path in clips.glob("spectrograms_*")}
    table = (clips / "tags.csv").read_text()
    (clips / "tags.csv").write_text(table.replace("1\t1\t0", "1\t0\t0").replace("flute", "horn"))
    assert "tags.csv has changed; gen_spectrograms.py renews" in Dump(clips).note_on_table()
    run_script("gen_spectrograms.py", "--data", clips)
    dump = Dump(clips)
    assert dump.note_on_table() == "" and dump.labels[0].tolist() == [0, 0] and dump.tag_names == ["guitar", "horn"]
    assert {path: path.stat().st_mtime_ns for path in spectrograms} == spectrograms
    (clips / "tags.csv").write_text(table)
    run_script("gen_spectrograms.py", "--data", clips)
    assert contents(clips) == before


@on_linux
def test_bad_clips_are_tried_again_alone(run_script, clips, originals, tmp_path_factory):
    """One was missing, one cut off, and a run that tries them again is killed at once."""
    first, last, other = clips / "0.flac", clips / "missing.flac", clips / "19.flac"
    whole, common = first.read_bytes(), ("--data", clips, "--n-chunks", 2)
    first.write_bytes(whole[:200_000])
    done = run_script("gen_spectrograms.py", *common).stdout
    assert "--retry-bad tries them again; the commonest reason: no such file or directory: missing.flac\n" in done
    before, in_use = contents(clips), Dump(clips)
    assert in_use.manifest["outcomes"] == {"zero": 1, "padded": 1, "gaps": 0}
    run_script("gen_spectrograms.py", *common, "--retry-bad")
    assert contents(clips) == before, "nothing has arrived"

    table = (clips / "bad_clips.csv").read_text()
    (clips / "bad_clips.csv").write_text(table.replace(",", ";"))  # as a spreadsheet may
    assert (
        "bad_clips.csv: missing, damaged" in run_script("gen_spectrograms.py", *common, "--retry-bad", status=1).stderr
    )
    (clips / "bad_clips.csv").write_text(table)
    first.unlink()
    run_script("gen_spectrograms.py", *common, "--retry-bad")
    assert contents(clips) == before, "a clip in parts is better than none"

    first.write_bytes(whole)
    shutil.copy(other, last)
    for path in clips.glob("*.flac"):
        if path not in (first, last):
            path.unlink()
    process = start(clips, 2, "--retry-bad")
    while process.poll() is None and read_manifest(clips)["complete"]:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    record = np.fromfile(clips / "spectrograms_1.records", RECORD)
    record["crc32"][-1] ^= 1  # as if killed between the clip and its record
    record.tofile(clips / "spectrograms_1.records")
    run_script("gen_spectrograms.py", *common, "--retry-bad")
    assert not in_use[20].any(), "a training that began before is not disturbed"
    remade = shutil.copytree(originals, tmp_path_factory.mktemp("remade"), dirs_exist_ok=True)
    shutil.copy(last, remade)
    run_script("gen_spectrograms.py", "--data", remade, "--n-chunks", 2)
    assert contents(clips) == contents(remade) and Dump(clips)[20].any()


def test_a_folder_that_cannot_be_written_has_a_remedy(call_script, clips, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    error = call_script("gen_spectrograms.py", "--data", clips, status=1).stderr
    assert error.count("\n") == 1 and f"{clips}: not writable" in error
    monkeypatch.undo()
    (clips.parent / "links").mkdir()
    (remedy,) = re.findall(r"\((.*)\)", error)
    subprocess.run(remedy.replace("dump", "links/dump"), shell=True, check=True, cwd=clips.parent)
    assert "21 spectrograms" in call_script("gen_spectrograms.py", "--data", clips.parent / "links/dump").stdout


def test_a_dump_is_the_same_in_any_number_of_files(tmp_path):
    for n_chunks in (1, 4):
        (tmp_path / str(n_chunks)).mkdir()
        write_dump(tmp_path / str(n_chunks), n_clips=6, n_chunks=n_chunks)
    one, four = Dump(tmp_path / "1"), Dump(tmp_path / "4")
    assert one.fingerprint == four.fingerprint and np.array_equal(one.verify(), four.verify())
    assert all(np.array_equal(*clips) for clips in zip(one, four, strict=True))
    assert np.array_equal(one.verify([4, 1]), one.verify()[:, [4, 1]])
    (tmp_path / "other").mkdir()
    assert Dump(write_dump(tmp_path / "other", n_clips=6, seed=1)).fingerprint != one.fingerprint


def test_overwriting_deletes_what_is_the_dumps_and_nothing_else(run_script, clips, undisturbed):
    run_script("gen_spectrograms.py", "--data", clips, "--n-chunks", 2, "--chunks", 1)
    mine = ["spectrograms_0_backup.npy", "spectrograms_2019_notes.csv", "spectrograms_0.txt"]
    for name in mine:
        (clips / name).write_text("mine")
    run_script("gen_spectrograms.py", "--data", clips, "--n-chunks", 2, "--overwrite", "--chunks", 0, 0)
    run_script("gen_spectrograms.py", "--data", clips, "--n-chunks", 2)
    assert {(clips / name).read_text() for name in mine} == {"mine"}
    for name in mine:
        (clips / name).unlink()
    assert contents(clips) == undisturbed


def test_a_damaged_dump_is_named(tmp_path):
    clips = write_dump(tmp_path, n_clips=6)
    for name in ("ids.npy", "tag_names.npy", "checksums.npy", "spectrograms_1.npy", "dump.json"):
        original = (clips / name).read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 16
        for damaged in (bytes(flipped), original[:-1], b""):
            (clips / name).write_bytes(damaged)
            with pytest.raises(InputError, match=name):
                Dump(clips).verify()
        (clips / name).write_bytes(original)
    Dump(clips).verify()


@on_linux
@pytest.mark.parametrize("n_chunks, blocks", [(1, 2000), (200, 100)])  # one failure, or more than fit into a pipe
def test_a_full_disk_is_one_line_and_the_next_start_resumes(run_script, tmp_path, n_chunks, blocks):
    soundfile.write(tmp_path / "a.flac", tone(11025, 1), 11025)
    write_table(tmp_path, ["a.flac"] * 200)
    # A limit on the size of files makes write() fail as a full disk does, with another error number
    command = f"{sys.executable} {ROOT}/gen_spectrograms.py --data {tmp_path} --n-chunks {n_chunks}"
    limited = ["bash", "-c", f"trap '' XFSZ; ulimit -f {blocks}; exec {command}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"error: .*/spectrograms_\d+.npy: File too large", done.stderr)
    if n_chunks == 1:
        run_script("gen_spectrograms.py", "--data", tmp_path, "--n-chunks", n_chunks)
        Dump(tmp_path).verify()
