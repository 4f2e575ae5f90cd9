"""People's files: read whole, or with a note on what is missing, whatever is odd about them."""

import os
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile

from conftest import ROOT
from lib import audio
from lib.audio import BLOCK_SAMPLES, decode, frames_of, load
from lib.common import InputError

SECONDS, LOUD_SECONDS, RATE = 12, 3, 44100
DECODER_DELAY = 1105  # samples of silence before an mp3's first, which only a LAME header lets a player skip
KBPS = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]  # of MPEG-1 Layer III, by index


@pytest.fixture(scope="module")
def mp3s(tmp_path_factory):
    """The bytes of an mp3 of variable and of one of constant bit rate: loud noise, then a quiet sine; both headers."""
    folder = tmp_path_factory.mktemp("mp3s")
    time = np.arange(SECONDS * RATE) / RATE
    noise = np.random.RandomState(0).normal(0, 0.3, LOUD_SECONDS * RATE)
    music = np.append(noise, 0.01 * np.sin(2 * np.pi * 440 * time[len(noise) :]))
    for mode in ("VARIABLE", "CONSTANT"):
        soundfile.write(folder / mode, music, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return {mode: (folder / mode).read_bytes() for mode in ("VARIABLE", "CONSTANT")}


def without_header(mp3):
    """Return an mp3 without its first frame, which says how many there are."""
    n_bytes = 144_000 * KBPS[mp3[2] >> 4] // RATE + (mp3[2] >> 1 & 1)
    assert b"Xing" in mp3[:n_bytes] or b"Info" in mp3[:n_bytes]
    return mp3[n_bytes:]


def promising(mp3, n_frames):
    place = mp3.index(b"Xing") + 8
    return mp3[:place] + n_frames.to_bytes(4, "big") + mp3[place + 4 :]


def read(folder, content, name="song.mp3"):
    """Return (samples at the file's own rate, note) of a file with this content."""
    (folder / name).write_bytes(content)
    blocks = decode(folder / name, notes := [])
    rate = next(blocks)
    return np.concatenate(list(blocks)), "; ".join(notes), rate


def test_an_mp3_is_read_whole_whatever_its_header_promises(mp3s, tmp_path):
    """libsndfile stops at its own estimate, which for these is a third of them, or calls them cut off."""
    variable, constant = mp3s["VARIABLE"], mp3s["CONSTANT"]
    (tmp_path / "whole.mp3").write_bytes(variable)
    expected, _ = soundfile.read(tmp_path / "whole.mp3", dtype="float32")
    found, note, _ = read(tmp_path, variable)
    assert len(found) == len(expected) and np.abs(found - expected).max() < 1e-5 and note == ""

    art = b"ID3\x03\x00\x00\x00\x02\x00\x00" + bytes(2**15)  # a tag of 32,768 bytes before the music
    odd = [without_header(variable), promising(variable, 0), promising(variable, 20), art + without_header(variable)]
    for content in odd:
        found, note, _ = read(tmp_path, content)
        assert note == "" and len(expected) - 1152 <= len(found) <= len(expected) + 3 * 1152
        begins = [
            np.abs(found[delay : delay + RATE // 4] - expected[: RATE // 4]).max() for delay in (0, DECODER_DELAY)
        ]
        assert min(begins) < 1e-5 and np.std(found[-RATE:-2000]) == pytest.approx(np.std(expected[-RATE:]), rel=0.01)

    tag = b"APETAGEX\xd0\x07\x00\x00\x20\x00\x10\x00" + bytes(2**15)  # the same after it
    for content in (without_header(constant), art + without_header(constant), without_header(constant) + tag):
        found, note, _ = read(tmp_path, content)
        assert note == "" and len(found) / RATE == pytest.approx(SECONDS, abs=0.1)
    found, _, _ = read(tmp_path, variable + constant)
    assert len(found) / RATE == pytest.approx(2 * SECONDS, abs=0.1)


def test_what_is_missing_of_a_file_is_said(mp3s, tmp_path):
    for content in mp3s.values():
        half = len(content) // 2
        found, note, _ = read(tmp_path, content[:half])
        assert note == f"only {len(found) / RATE:.1f} s of 12.0 s could be read"
        found, note, _ = read(tmp_path, content[:half] + bytes(4000) + content[half + 4000 :])
        assert note.endswith("packet(s) left out: damaged, or no audio") and len(found) > (SECONDS - 2) * RATE
    for content in (b"", b"<html>404</html>" * 100):
        with pytest.raises(InputError, match="song.mp3: can't be decoded"):
            (tmp_path / "song.mp3").write_bytes(content)
            load(tmp_path / "song.mp3")


def test_a_flac_of_unknown_length_is_read_whole(tmp_path):
    """As an encoder writes it into a pipe."""
    noise = np.random.RandomState(0).uniform(-1, 1, (3 * RATE, 2))
    soundfile.write(tmp_path / "a.flac", noise, RATE)
    expected, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # the number of samples has the last 36 bits before the MD5 of STREAMINFO
    content[22:26] = bytes(4)
    found, note, rate = read(tmp_path, content, "piped.flac")
    assert note == "" and rate == RATE and np.array_equal(found, (expected[:, 0] + expected[:, 1]) / np.float32(2))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("n_channels", [1, 2, 6, 9, 24])
def test_all_channels_are_mixed_alike_in_blocks(subtype, n_channels, tmp_path, monkeypatch):
    decoded = []

    def counted(*arguments):
        for frame in frames_of(*arguments):
            decoded.append(frame.samples)
            yield frame

    monkeypatch.setattr(audio, "frames_of", counted)
    noise = np.random.RandomState(0).uniform(-0.9, 0.9, (3 * BLOCK_SAMPLES + 5, n_channels))
    soundfile.write(tmp_path / "a.wav", noise, 768_000, subtype)
    expected, _ = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    blocks = decode(tmp_path / "a.wav", [])
    assert next(blocks) == 768_000
    first = next(blocks)
    assert len(first) <= sum(decoded) < BLOCK_SAMPLES + 20_000, "a long file needs no memory"
    assert np.abs(np.concatenate([first, *blocks]) - expected.mean(axis=1, dtype=float)).max() < 1e-6


def test_joined_files_of_different_channels_and_rates_are_one_recording(mp3s, tmp_path):
    content = without_header(mp3s["CONSTANT"])
    for sample_rate in (RATE, RATE // 2):
        sine = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4 * sample_rate) / sample_rate)
        soundfile.write(tmp_path / "stereo.mp3", np.stack([sine, 0 * sine], axis=1), sample_rate)
        content += (tmp_path / "stereo.mp3").read_bytes()
    found, _, rate = read(tmp_path, content)
    assert rate == RATE and len(found) / RATE == pytest.approx(SECONDS + 8, abs=0.3)
    for end in (6 * RATE, 2 * RATE):
        assert np.abs(found[-end : RATE - end]).max() == pytest.approx(0.25, abs=0.02)


def test_a_film_whose_sound_ends_early_is_read_whole(tmp_path):
    with av.open(tmp_path / "film.mkv", "w") as film:
        picture, sound = film.add_stream("mpeg4", rate=1), film.add_stream("flac", rate=8000, layout="mono")
        picture.width = picture.height = 16
        for second in range(9):
            frame = av.VideoFrame(16, 16, "yuv420p")
            frame.pts = second
            film.mux(picture.encode(frame))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        film.mux([*sound.encode(frame), *sound.encode(None), *picture.encode(None)])
    found, note, rate = read(tmp_path, (tmp_path / "film.mkv").read_bytes(), "film.mkv")
    assert len(found) == 4000 and note == "" and rate == 8000


def test_a_stream_without_a_decoder_is_one_line(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(9000), 9000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[20:22] = b"\x09\x00"  # the format's number, of a codec that FFmpeg lacks
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match="a.wav: contains no audio that FFmpeg can decode"):
        load(tmp_path / "a.wav")


def test_a_playlist_reads_no_other_file(tmp_path):
    soundfile.write(tmp_path / "secret.wav", np.zeros(9000), 9000)
    (tmp_path / "song.mp3").write_text("ffconcat version 1.0\nfile secret.wav\n")
    with pytest.raises(InputError, match="can't be decoded"):
        load(tmp_path / "song.mp3")


def test_where_numba_can_write_nothing(tmp_path):
    """In a container with a numeric user, neither home nor the packages' folder can be written."""
    soundfile.write(tmp_path / "a.wav", np.zeros(9000), 9000)
    program = "import sys, lib.audio; print(lib.audio.log_mel_spectrogram(sys.argv[1]).shape)"
    command = [sys.executable, "-c", program, tmp_path / "a.wav"]
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert done.stdout == "(128, 628)\n", done.stderr
