"""Scores against scikit-learn and by hand, leakage, damaged checkpoints, and tagging music of any length."""

import csv
import json
import pickle
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import evaluate
import scores
from common import InputError
from conftest import write_dump
from gen_spectrograms import CLIP_SAMPLES, log_mel_spectrogram
from model import MultiScaleCNN, initialize
from tagger import Tagger, load_checkpoint, network_of, windows
from tags import ClipInfo
from trainer import save


@pytest.fixture
def predictions():
    """Labels and scores with ties, for 300 clips and 7 tags, one of them never positive."""
    rng = np.random.RandomState(0)
    labels = (rng.rand(300, 7) < 0.2).astype(np.uint8)
    labels[:, 3] = 0
    return labels, np.round(rng.rand(300, 7) + 0.2 * labels, 2)


def test_per_tag_scores_are_scikit_learns(predictions):
    labels, probabilities = predictions
    some = [0, 1, 2, 4, 5, 6]
    auc, ap = scores.roc_auc(labels, probabilities), scores.average_precision(labels, probabilities)
    assert np.isnan(auc[3]) and np.isnan(ap[3])
    assert abs(scores.macro(auc) - roc_auc_score(labels[:, some], probabilities[:, some], average="macro")) < 1e-12
    assert abs(scores.macro(ap) - average_precision_score(labels[:, some], probabilities[:, some])) < 1e-12


def test_bootstrap_scores_are_scikit_learns_on_each_resample(predictions):
    labels, probabilities = predictions
    tracks = np.arange(300) // 3
    found = scores.bootstrap(labels, probabilities, tracks, n_resamples=5, seed=2)
    weights = scores.resample_weights(tracks, 5, seed=2)
    for resample, times in enumerate(weights):
        assert (times.reshape(100, 3) == times[::3, None]).all(), "a track is drawn as a whole"
        clips = np.repeat(np.arange(300), times)
        for tag in (0, 6):
            label, score = labels[clips, tag], probabilities[clips, tag]
            assert abs(found.roc_auc[resample, tag] - roc_auc_score(label, score)) < 1e-12
            assert abs(found.average_precision[resample, tag] - average_precision_score(label, score)) < 1e-12
    assert np.isnan(found.roc_auc[:, 3]).all()
    assert not np.array_equal(found.roc_auc[0], found.roc_auc[1])


def test_interval_holds_95_percent_of_the_resamples():
    low, high = scores.interval(np.arange(1001.0)[:, None] * [[1.0, np.nan]])
    assert (low[0], high[0]) == (25, 975) and np.isnan(low[1])


def test_what_a_listener_sees_by_hand():
    labels = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    probabilities = np.array([[0.9, 0.8, 0.1, 0.7], [0.5, 0.1, 0.2, 0.3], [0.4, 0.4, 0.1, 0.6]])
    auc = scores.clip_roc_auc(labels, probabilities)
    assert auc[0] == 0.75 and np.isnan(auc[1]) and auc[2] == 0.5
    assert scores.precision_at(1, labels, probabilities)[[0, 2]].tolist() == [1, 0]
    assert np.allclose(scores.precision_at(3, labels, probabilities)[[0, 2]], [2 / 3, 1 / 3])
    assert np.isnan(scores.precision_at(3, labels, probabilities)[1]), "a clip without tags has nothing to find"


def test_leakage_by_hand():
    info = [
        ClipInfo(artist, (artist, album), (artist, album, "1", track))
        for artist, album, track in ("Aax", "Aay", "Abz", "Bcx", "Aax")
    ]
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 2, (3, 2))
    found = evaluate.leakage(labels, rng.rand(3, 2), info, rows=np.array([2, 3, 4]), training_rows=np.array([0, 1]))
    assert found["share_of_track"] == found["share_of_album"] == 1 / 3
    assert found["share_of_artist"] == 2 / 3
    assert found["clips_of_other_tracks"] == 2 and found["roc_auc_of_other_tracks"] is None


def make_checkpoint(path, n_tags=3, **changes):
    net = MultiScaleCNN(n_tags)
    initialize(net, np.random.RandomState(0))
    checkpoint = {
        "weights": net.state_dict(),
        "tag_names": ["slow", "guitar", "flute"][:n_tags],
        "normalization": {"mean": torch.full((128,), -5.0), "std": torch.full((128,), 3.0)},
        "front_end": {},
        "hyperparameters": {"split": "random", "n_tags": 50, "merge_tags": True},
        "clip_ids": {
            "train": torch.arange(101, 121),
            "validation": torch.arange(121, 130),
            "test": torch.arange(130, 141),
        },
        "history": [{"epoch": 0, "learning_rate": 0.1, "loss": None, "validation_roc_auc": 0.5, "best": True}],
        "dump": "",
        "synthetic": True,
    }
    save(path, {**checkpoint, **changes})
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with a dump, a clip table of two clips a track, and an untrained checkpoint for them."""
    folder = write_dump(tmp_path_factory.mktemp("evaluated"), n_clips=40)
    columns = "clip_id\ttrack_number\ttitle\tartist\talbum\turl\tsegmentStart\tsegmentEnd\toriginal_url\tmp3_path"
    rows = [
        f"{101 + clip}\t1\ttitle {clip // 2}\tartist {clip // 20}\talbum {clip // 4}\t\t0\t29\t\tp"
        for clip in range(40)
    ]
    (folder / "clip_info_final.csv").write_text("\n".join([columns, *rows]))
    front_end = json.loads((folder / "dump.json").read_text())["front_end"]
    make_checkpoint(folder / "best.pt", front_end=front_end)
    return folder


def test_the_script_scores_validation_and_test(evaluated, run_script):
    done = run_script("evaluate.py", "--data", evaluated, "--checkpoint", evaluated / "best.pt", "--resamples", 50)
    assert "validation, 9 clips" in done.stdout and "test, 11 clips" in done.stdout
    assert "SYNTHETIC" in done.stdout
    results = json.loads((evaluated / "results.json").read_text())
    table = list(csv.DictReader((evaluated / "per_tag.csv").open()))
    assert [row["part"] for row in table] == ["validation"] * 3 + ["test"] * 3
    labels = np.load(evaluated / "tags.npy")[29:]
    net = network_of(load_checkpoint(evaluated / "best.pt"), torch.device("cpu"))
    clips = np.concatenate([np.load(evaluated / f"spectrograms_{index}.npy") for index in range(3)])[29:]
    with torch.no_grad():
        logits = net(torch.from_numpy((clips[:, None] + 5) / 3)).numpy()
    expected = roc_auc_score(labels[:, 0], logits[:, 1])
    guitar = next(row for row in table if row["part"] == "test" and row["tag"] == "guitar")
    assert abs(float(guitar["roc_auc"]) - expected) < 1e-12
    assert float(guitar["roc_auc_low"]) <= expected <= float(guitar["roc_auc_high"])
    assert int(guitar["positives"]) == labels[:, 0].sum()
    test = results["test"]
    assert test["roc_auc"]["value"] == pytest.approx(np.mean([float(row["roc_auc"]) for row in table[3:]]))
    # rows 29-39 are tested, 0-19 trained on: no track or album is in both, nor is artist 1
    assert [test["leakage"][f"share_of_{kind}"] for kind in ("track", "album", "artist")] == [0, 0, 0]
    for picture in ("per_tag.png", "correlations.png"):
        assert (evaluated / picture).read_bytes().startswith(b"\x89PNG")


def test_data_that_lack_the_clips_or_tags_are_named(evaluated, run_script, tmp_path):
    write_dump(tmp_path, n_clips=38)
    done = run_script("evaluate.py", "--data", tmp_path, "--checkpoint", evaluated / "best.pt", status=1)
    assert done.stderr.strip().endswith("lacks 2 of the checkpoint's test clips: 139, 140")
    make_checkpoint(
        tmp_path / "best.pt",
        n_tags=2,
        tag_names=["slow", "harp"],
        front_end=load_checkpoint(evaluated / "best.pt")["front_end"],
    )
    done = run_script("evaluate.py", "--data", evaluated, "--checkpoint", tmp_path / "best.pt", status=1)
    assert "has no tag harp" in done.stderr


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_what_is_not_a_checkpoint_is_one_line_and_runs_nothing(tmp_path):
    good = make_checkpoint(tmp_path / "good.pt").read_bytes()
    assert load_checkpoint(tmp_path / "good.pt")["tag_names"] == ["slow", "guitar", "flute"]
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 1
    victim = tmp_path / "executed"
    torch.save({"weights": Payload(victim)}, tmp_path / "payload.pt")
    cases = {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "text": b"not a checkpoint",
        "pickle": pickle.dumps(Payload(victim)),
        "payload": (tmp_path / "payload.pt").read_bytes(),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: (damaged|not a checkpoint)") as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a checkpoint of trainer.py"):
        load_checkpoint(tmp_path / "other.pt")
    assert not victim.exists()
    with zipfile.ZipFile(tmp_path / "payload.pt") as archive:
        assert b"executed" in archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def test_weights_of_another_network_are_one_line(tmp_path, run_script, evaluated):
    make_checkpoint(tmp_path / "best.pt", tag_names=["slow", "guitar"])
    done = run_script("evaluate.py", "--checkpoint", tmp_path / "best.pt", "--tag", "a.wav", status=1)
    assert done.stderr.count("\n") == 1 and f"{tmp_path / 'best.pt'}: holds the weights of another" in done.stderr


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


def test_a_long_file_is_the_mean_of_its_windows(tagger, tmp_path):
    samples = music(60)[:, 0]
    # The 31 s beyond the first window take three steps of 14.6 s at most
    starts = np.linspace(0, len(samples) - CLIP_SAMPLES, 4).astype(int)
    clips = windows(samples)
    assert len(clips) == 4
    expected = []
    for start, clip in zip(starts, clips):
        assert np.array_equal(clip[:CLIP_SAMPLES], samples[start : start + CLIP_SAMPLES])
        soundfile.write(tmp_path / "window.wav", clip, 11025, "FLOAT")
        expected.append(by_hand(tagger, log_mel_spectrogram(tmp_path / "window.wav")))
    found = tagger(samples, 11025)
    assert np.allclose([found[name] for name in tagger.tag_names], np.mean(expected, axis=0), atol=1e-6)


def test_files_of_any_kind_in_any_order(tagger, tmp_path, run_script):
    checkpoint = make_checkpoint(tmp_path / "best.pt")
    folder = tmp_path / "more"
    folder.mkdir()
    soundfile.write(tmp_path / "long é.flac", music(32, 44100, 2), 44100)
    soundfile.write(folder / "short.ogg", music(3, 48000), 48000)
    soundfile.write(folder / "low.wav", music(30, 8000), 8000)
    (folder / "notes.txt").write_text("not music")
    (tmp_path / "broken.mp3").write_bytes(b"not music")

    arguments = ["--checkpoint", checkpoint, "--json", "--top", 3]
    files = [tmp_path / "long é.flac", tmp_path / "broken.mp3", folder]
    done = run_script("evaluate.py", *arguments, "--tag", *files, status=1)
    assert "broken.mp3" in done.stderr and "notes.txt" not in done.stderr
    together = json.loads(done.stdout)
    assert sorted(together) == sorted(map(str, [files[0], folder / "low.wav", folder / "short.ogg"]))
    for path, tags in together.items():
        assert tags == dict(list(tagger(path).items())[:3]), "alone it is tagged the same"
    stereo, _ = soundfile.read(files[0])
    assert tagger(stereo, 44100) == pytest.approx(together[str(files[0])], abs=1e-5)

    done = run_script("evaluate.py", "--checkpoint", checkpoint, "--taggram", "--top", 2, "--tag", folder / "short.ogg")
    assert "SYNTHETIC" in done.stdout and "short.ogg: " in done.stdout
    assert (tmp_path / "taggram_short.ogg.png").read_bytes().startswith(b"\x89PNG")
