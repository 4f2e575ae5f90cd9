"""The script's scores, leakage, what it refuses and what it prints first; damaged checkpoints."""

import csv
import json
import pickle
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_score, recall_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import evaluate
from conftest import SmallNetwork, write_clip_info, write_dump
from lib import scores
from lib.audio import FRONT_END
from lib.baseline import baseline_predictions, names_only_predictions, origins_of, repeatability
from lib.checkpoint import cautions, load_checkpoint, load_network
from lib.common import InputError
from lib.dump import Dump
from lib.parallel import autocast
from model import NETWORKS, FeatureBatchNorm, MultiScaleCNN, initialize
from tags import ClipInfo


def ids_of(**parts):
    return {part: torch.arange(*ends) for part, ends in parts.items()}


HYPERPARAMETERS = {"split": "random", "n_tags": 50, "merge_tags": True, "batch_size": 32, "super_batch_size": 3000}


def make_checkpoint(path, n_tags=3, seed=0, **changes):
    name = changes.get("hyperparameters", {}).get("network", "MultiScaleCNN")
    net = NETWORKS.get(name, MultiScaleCNN)(n_tags)
    initialize(net, np.random.RandomState(seed))
    checkpoint = {
        "weights": net.state_dict(),
        "tag_names": ["slow", "guitar", "flute"][:n_tags],
        "normalization": {"mean": torch.full((128,), -5.0), "std": torch.full((128,), 3.0)},
        "front_end": FRONT_END,
        "hyperparameters": HYPERPARAMETERS,
        "clip_ids": ids_of(train=(101, 121), validation=(121, 130), test=(130, 141)),
        "history": [{"epoch": 0, "learning_rate": 0.1, "loss": None, "validation_roc_auc": 0.5, "best": True}],
        "dump": "",
        "synthetic": True,
    }
    torch.save({**checkpoint, **changes}, path)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with a dump, a clip table of two clips a track, and an untrained checkpoint for them."""
    folder = write_dump(tmp_path_factory.mktemp("evaluated"), n_clips=40)
    write_clip_info(folder)
    make_checkpoint(folder / "best.pt", dump=Dump(folder).fingerprint)
    return folder


def test_the_script_scores_validation_and_test(evaluated, call_script, tmp_path):
    arguments = ["--device", "cpu", "--data", evaluated, "--checkpoint", evaluated / "best.pt", "--resamples", 50]
    (evaluated / "results.json").mkdir()
    done = call_script("evaluate.py", *arguments, status=1)
    assert "test, 11 clips" in done.stdout, "the scores are printed although they can't be written"
    assert done.stderr.startswith("error: ") and "results.json" in done.stderr and done.stderr.count("\n") == 1
    (evaluated / "results.json").rmdir()

    done = call_script("evaluate.py", *arguments)
    assert "validation, 9 clips" in done.stdout and "test, 11 clips" in done.stdout
    assert "SYNTHETIC" in done.stdout and "--other-data" not in done.stdout
    assert "\nnote: 9 validation clips chose" in done.stdout and "\nnote: epoch 0 was best" in done.stdout
    results = json.loads((evaluated / "results.json").read_text())
    labels = np.load(evaluated / "tags.npy")[29:, [2, 0, 1]]
    net = load_network(load_checkpoint(evaluated / "best.pt"), torch.device("cpu"))[0]
    clips = np.concatenate([np.load(evaluated / f"spectrograms_{index}.npy") for index in range(3)])[29:]
    with torch.no_grad():
        predictions = torch.sigmoid(net(torch.from_numpy((clips[:, None] + 5) / 3)).double()).numpy()

    test = results["test"]
    for name, score in (("roc_auc", roc_auc_score), ("average_precision", average_precision_score)):
        of_tags = score(labels, predictions, average=None)
        assert [row[name] for row in test["tags"]] == pytest.approx(of_tags)
        assert test[name]["value"] == pytest.approx(np.mean(of_tags))
        assert all(row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] for row in test["tags"])
    assert [row["positives"] for row in test["tags"]] == labels.sum(axis=0).tolist()
    assert [row["prevalence"] for row in test["tags"]] == pytest.approx(labels.mean(axis=0))
    of_clips = [roc_auc_score(*clip) for clip in zip(labels, predictions) if 0 < sum(clip[0]) < 3]
    assert test["clip_roc_auc"] == pytest.approx(np.mean(of_clips))
    tagged = [clip for clip in zip(labels, predictions) if any(clip[0])]
    assert set(test["precision_at"]) == {"1", "3", "5"}
    assert test["precision_at"]["1"] == pytest.approx(np.mean([label[np.argmax(values)] for label, values in tagged]))
    assert test["precision_at"]["3"] == pytest.approx(np.mean([label.mean() for label, _ in tagged]))

    of, baseline = "{value:.4f} [{low:.4f}, {high:.4f}]".format_map, test["baseline"]
    printed = re.sub(" +", " ", done.stdout.partition("\ntest, 11 clips")[2])
    for line in (
        f"\n ROC-AUC {of(test['roc_auc'])} macro over tags\n",
        f"\n average precision {of(test['average_precision'])} macro over tags\n",
        f" within a clip ROC-AUC {test['clip_roc_auc']:.4f}; precision {test['precision_at']['1']:.4f} at 1, ",
        f" baseline ROC-AUC {of(baseline['roc_auc'])}, average precision {of(baseline['average_precision'])}\n",
        f" network - baseline ROC-AUC {of(baseline['network_minus_baseline']['roc_auc'])}",
    ):
        assert line in printed
    for name, expected in (("predictions", predictions), ("labels", labels)):
        header, *rows = csv.reader((evaluated / f"{name}_test.csv").open())
        assert header == ["clip_id", "mp3_path", "slow", "guitar", "flute"]
        assert [row[:2] for row in rows] == [
            [str(clip), f"{'09cdf'[clip % 5 - 1]}/{clip - 101}.mp3"] for clip in range(130, 141)
        ]
        assert np.allclose([[float(value) for value in row[2:]] for row in rows], expected, atol=1e-6)
    found = re.findall(r"^(slow|guitar|flute) +(\d+) \(.*?%\) +([\d.]+) .*?\] +([\d.]+) ", done.stdout, re.MULTILINE)
    best_first = sorted(test["tags"], key=lambda row: -row["roc_auc"])
    shown = ("{tag} {positives} {roc_auc:.3f} {average_precision:.3f}".format_map(row) for row in best_first)
    assert found == [tuple(row.split()) for row in shown]

    table = list(csv.DictReader((evaluated / "per_tag.csv").open()))
    assert [(row["part"], row["tag"]) for row in table[3:]] == [("test", tag) for tag in ("slow", "guitar", "flute")]
    assert [float(row["roc_auc"]) for row in table[3:]] == [row["roc_auc"] for row in test["tags"]]
    of_baseline = [float(row["roc_auc_of_baseline"]) for row in table[3:]]
    assert np.mean(of_baseline) == pytest.approx(baseline["roc_auc"]["value"]) and np.ptp(of_baseline) > 0
    with open(evaluated / "predictions_test.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["clip_id", "mp3_path", "slow", "guitar", "flute"]
    assert [row[:2] for row in rows] == [[str(101 + clip), f"{'09cdf'[clip % 5]}/{clip}.mp3"] for clip in range(29, 40)]
    assert np.allclose(np.array([row[2:] for row in rows], float), predictions, atol=1e-6)
    thresholds = [*np.sort(predictions, axis=0)[[5, 2], [0, 1]], 1]
    made = {"dump": Dump(evaluated).fingerprint, "thresholds": torch.tensor(thresholds)}
    arguments[arguments.index("--checkpoint") + 1] = make_checkpoint(tmp_path / "best.pt", **made)
    printed = call_script("evaluate.py", *arguments, "--no-baseline").stdout
    assert "baseline" not in printed
    table = list(csv.DictReader((tmp_path / "per_tag.csv").open()))[3:]
    for row, label, values, threshold in zip(table, labels.T, predictions.T, thresholds):
        given = values >= threshold
        recall, precision = recall_score(label, given), precision_score(label, given) if any(given) else np.nan
        expected = pytest.approx([threshold, precision, recall], nan_ok=True)
        assert [float(row[name]) for name in ("threshold", "precision", "recall")] == expected
        shown = f"{threshold:.3f} {'-' if np.isnan(precision) else f'{precision:.3f}'} {recall:.3f}"
        assert re.search(f"^{row['tag']} .* {shown}$", re.sub(" +(?=[ \n])", "", printed), re.MULTILINE)
    assert all((evaluated / picture).exists() for picture in ("per_tag.png", "correlations.png"))


@pytest.fixture
def call_evaluate(call_script, monkeypatch):
    """Return a function that runs evaluate.py on a folder's best.pt, with given predictions of all clips.

    It returns the contents of results.json, and what was "printed".
    """

    def call(folder, predictions, *options):
        monkeypatch.setattr(evaluate.Evaluation, "predict", lambda self, rows: predictions[rows])
        arguments = ["--data", folder, "--checkpoint", folder / "best.pt", "--device", "cpu"]
        printed = call_script("evaluate.py", *arguments, *options).stdout
        return {**json.loads((folder / "results.json").read_text()), "printed": printed}

    return call


def test_intervals_group_by_track_and_leakage_is_what_sets_say(tmp_path, call_evaluate):
    """Four clips of a track that are all alike are worth one, and make the interval twice as wide."""
    write_dump(tmp_path, n_clips=128, n_of_a_track=4)
    test = [row for row in range(40, 128) if row not in (40, 44, 60)]
    rows = {"train": [*range(32), 40, 44, 60], "validation": [*range(32, 40)], "test": test}
    clip_ids = {part: torch.tensor(some) + 101 for part, some in rows.items()}
    make_checkpoint(tmp_path / "best.pt", dump=Dump(tmp_path).fingerprint, clip_ids=clip_ids)
    predictions = np.random.default_rng(0).random((32, 3)).repeat(4, axis=0)

    def evaluated(n_of_a_track, *options):
        write_clip_info(tmp_path, n_of_a_track)
        results = call_evaluate(tmp_path, predictions, "--no-baseline", "--resamples", 400, *options)["test"]
        return results, results["roc_auc"]["high"] - results["roc_auc"]["low"]

    by_track, width = evaluated(4)
    by_clip, narrow = evaluated(1)
    assert 1.7 < width / narrow < 2.3
    assert evaluated(4)[1] == width != evaluated(4, "--seed", 2)[1], "the seed draws the resamples"
    labels = np.load(tmp_path / "tags.npy")[:, [2, 0, 1]]
    for found, sizes in ((by_track, (4, 8, 16)), (by_clip, (1, 2, 4))):
        for kind, size in zip(("track", "album", "artist"), sizes):
            trained_on = {row // size for row in rows["train"]}
            fresh = [row for row in test if row // size not in trained_on]
            assert found["leakage"][f"share_of_{kind}"] == np.mean([row // size in trained_on for row in test])
            assert found["leakage"][f"clips_of_other_{kind}s"] == len(fresh)
            auc = roc_auc_score(labels[fresh], predictions[fresh])
            assert found["leakage"][f"roc_auc_of_other_{kind}s"] == pytest.approx(auc)


def test_the_baseline_is_trained_on_the_training_clips_alone(evaluated, call_evaluate, monkeypatch):
    predicted, clips_of = [], evaluate.clips_of

    def remembered(*arguments):
        predicted.append(baseline_predictions(*arguments))
        return predicted[-1]

    def with_other_test_labels(*arguments):
        labels, rows_of = clips_of(*arguments)
        labels[rows_of["test"]] ^= 1
        return labels, rows_of

    monkeypatch.setattr(evaluate, "baseline_predictions", remembered)
    predictions = np.random.default_rng(0).random((40, 3))
    results = call_evaluate(evaluated, predictions)
    clips = np.concatenate([np.load(evaluated / f"spectrograms_{index}.npy") for index in range(3)])
    features = np.hstack([clips.mean(axis=2, dtype=float), clips.std(axis=2, dtype=float)])
    labels = np.load(evaluated / "tags.npy")[:, [2, 0, 1]]
    for tag, label in enumerate(labels.T):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000)).fit(
            features[:20], label[:20]
        )
        assert predicted[0][:, tag] == pytest.approx(model.predict_proba(features)[:, 1], abs=1e-4)
    for part, rows in (("validation", slice(20, 29)), ("test", slice(29, 40))):
        its, ours = (roc_auc_score(labels[rows], each[rows]) for each in (predicted[0], predictions))
        found = results[part]["baseline"]
        assert found["roc_auc"]["value"] == pytest.approx(its)
        assert found["network_minus_baseline"]["roc_auc"]["value"] == pytest.approx(ours - its)
    monkeypatch.setattr(evaluate, "clips_of", with_other_test_labels)
    assert call_evaluate(evaluated, predictions)["test"]["roc_auc"] != results["test"]["roc_auc"]
    assert np.array_equal(*predicted)


def test_a_probe_is_trained_on_another_networks_features(evaluated, call_evaluate, tmp_path):
    """A network of two other tags, another normalisation and three of the test clips."""
    normalization = {"mean": torch.full((128,), -4.0), "std": torch.full((128,), 2.0)}
    parts = {"clip_ids": ids_of(train=(132, 135), validation=(1, 2), test=(2, 3)), "dump": Dump(evaluated).fingerprint}
    other = make_checkpoint(tmp_path / "other.pt", n_tags=2, seed=1, normalization=normalization, **parts)
    predictions = np.random.default_rng(0).random((40, 3))
    found = call_evaluate(evaluated, predictions, "--probe", other)
    assert found["printed"].startswith(
        "note: of the test set, that checkpoint, or one before it, has seen 3 clips for cer"
    )
    net = MultiScaleCNN(2)
    net.load_state_dict(load_checkpoint(other)["weights"])
    net.head = torch.nn.Identity()
    net.head.weight = torch.zeros(1)  # which says the precision
    clips = np.concatenate([np.load(evaluated / f"spectrograms_{index}.npy") for index in range(3)])
    with torch.no_grad():
        hidden = net.eval()(torch.from_numpy((clips[:, None] + 4) / 2)).numpy()
    labels, expected = np.load(evaluated / "tags.npy")[:, [2, 0, 1]], np.empty((40, 3))
    for tag, label in enumerate(labels.T):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000)).fit(hidden[:20], label[:20])
        expected[:, tag] = model.predict_proba(hidden)[:, 1]
    for part, rows in (("validation", slice(20, 29)), ("test", slice(29, 40))):
        its, ours = (roc_auc_score(labels[rows], each[rows]) for each in (expected, predictions))
        assert found[part]["probe"]["roc_auc"]["value"] == pytest.approx(its)
        assert found[part]["probe"]["network_minus_probe"]["roc_auc"]["value"] == pytest.approx(ours - its)
    interval = "{value:.4f} [{low:.4f}, {high:.4f}]".format_map(
        found["test"]["probe"]["network_minus_probe"]["roc_auc"]
    )
    assert f"\n  network - probe    ROC-AUC {interval}" in found["printed"]
    assert call_evaluate(evaluated, predictions)["test"]["probe"] is None


def test_names_alone_by_hand():
    """Two albums of an artist have labels 1 0 and 1; then a new album of theirs, and a new artist; the mean is 1/2."""
    origins = ("A", 1), ("A", 1), ("A", 2), ("C", 1), ("A", 2), ("A", 3), ("B", 1)
    info = [ClipInfo(artist, (artist, album), track) for track, (artist, album) in enumerate(origins)]
    labels = np.array([[1], [0], [1], [0], [0], [0], [0]], np.uint8)
    of_artist = (2 + 1 / 2) / 4
    expected = (
        (1 + of_artist) / 3,
        (1 + of_artist) / 3,
        (1 + of_artist) / 2,
        1 / 8,
        (1 + of_artist) / 2,
        of_artist,
        1 / 2,
    )
    assert names_only_predictions(labels, np.arange(4), origins_of(info))[:, 0] == pytest.approx(expected)


def test_how_well_labels_repeat_by_hand():
    """Of three clips of a track, two have the first tag; a track of one clip says nothing."""
    info = [ClipInfo("A", ("A", 1), track) for track in (0, 0, 0, 1, 1, 2)]
    labels = np.array([[1, 0], [1, 0], [0, 0], [1, 0], [0, 0], [1, 1]], np.uint8)
    assert repeatability(labels, origins_of(info)["track"]) == pytest.approx(
        [(1 / 2 + 1 / 2 + 0) / 3, np.nan], nan_ok=True
    )


def test_what_names_alone_predict_stands_beside_the_networks_scores(evaluated, call_evaluate, capsys, tmp_path):
    """Tracks are pairs of clips, albums four, artists eight; the split by artist leaves names nothing to go by."""
    predictions = np.random.default_rng(0).random((40, 3))
    labels, found = np.load(evaluated / "tags.npy")[:, [2, 0, 1]], call_evaluate(evaluated, predictions)
    expected = np.empty((40, 3))
    for clip in range(40):
        p = labels[:20].mean(axis=0)
        for size in (8, 4):
            same = [row for row in range(20) if row // size == clip // size]
            p = (labels[same].sum(axis=0) + p) / (len(same) + 1)
        expected[clip] = p
    for part, rows in (("validation", slice(20, 29)), ("test", slice(29, 40))):
        row, differences = found[part]["names_only"], []
        for name, score in (("roc_auc", roc_auc_score), ("average_precision", average_precision_score)):
            assert row[name]["value"] == pytest.approx(score(labels[rows], expected[rows]))
            differences.append(score(labels[rows], predictions[rows]) - score(labels[rows], expected[rows]))
        its = [row["network_minus_names_only"][name]["value"] for name in scores.SCORES]
        assert its == pytest.approx(differences)
    words, of = evaluate.summary(found["test"]), "{value:.4f} [{low:.4f}, {high:.4f}]".format_map
    precision = of(found["test"]["names_only"]["average_precision"])
    roc_auc = of(found["test"]["names_only"]["roc_auc"])
    assert words["names only"] == f"ROC-AUC {roc_auc}, average precision {precision}"
    gain = found["test"]["names_only"]["network_minus_names_only"]["roc_auc"]
    assert words["network - names"].startswith(f"ROC-AUC {of(gain)}")
    of_tracks = [np.mean([labels[clip ^ 1, tag] for clip in range(40) if labels[clip, tag]]) for tag in range(3)]
    with (evaluated / "per_tag.csv").open() as file:
        assert [float(row["repeatability"]) for row in csv.DictReader(file)] == pytest.approx(2 * of_tracks)

    by_artist = make_checkpoint(
        tmp_path / "best.pt",
        dump=Dump(evaluated).fingerprint,
        clip_ids=ids_of(train=(101, 117), validation=(117, 125), test=(125, 141)),
    )
    settings = evaluate.Settings(data=evaluated, resamples=9, device="cpu")
    one = evaluate.Evaluation(settings, by_artist)
    names_only = names_only_predictions(one.labels, one.rows["train"], one.origins)
    result = evaluate.score_part(one, one.rows["test"], predictions[one.rows["test"]], (None, names_only, None))
    assert result["names_only"]["roc_auc"] == {"value": 0.5, "low": 0.5, "high": 0.5} and result["baseline"] is None
    assert result["leakage"]["share_of_artist"] == 0
    other = evaluate.Evaluation(settings, by_artist)
    other.origins = None
    assert (
        "repeatability"
        not in evaluate.per_tag_rows(other, one.rows["test"], one.scores(one.rows["test"], names_only[24:]))[0]
    )


def test_a_tag_that_never_varies_in_training_has_a_constant_baseline():
    labels = np.stack([np.arange(60) % 2, np.arange(60) >= 40], axis=1).astype(np.uint8)
    found = baseline_predictions(np.random.default_rng(0).normal(size=(60, 8)), labels, np.arange(40))
    assert np.ptp(found[:, 0]) > 0 and (found[:, 1] == 0).all()


def test_two_networks_are_compared_each_as_it_was_trained(evaluated, call_script, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "small", SmallNetwork)
    scores = {}
    for name, network in (("one", "MultiScaleCNN"), ("two", "small")):
        (tmp_path / name).mkdir()
        made = {"dump": Dump(evaluated).fingerprint, "hyperparameters": HYPERPARAMETERS | {"network": network}}
        path = make_checkpoint(tmp_path / name / "best.pt", **made)
        evaluation = evaluate.Evaluation(evaluate.Settings(data=evaluated, device="cpu"), path)
        rows = evaluation.rows["test"]
        scores[name] = roc_auc_score(evaluation.labels[rows], evaluation.predict(rows))
    assert isinstance(load_network(load_checkpoint(path), torch.device("cpu"))[0], SmallNetwork)
    arguments = ["--device", "cpu", "--experiments", tmp_path, "--data", evaluated, "--resamples", 9]
    printed = call_script("evaluate.py", *arguments, "--name", "one", "--against", "two").stdout
    assert f"one - two, 11 test clips of both\n  ROC-AUC            {scores['one'] - scores['two']:.4f} [" in printed


def test_two_experiments_are_compared_on_clips_that_both_held_out(evaluated, call_script, tmp_path):
    fingerprint = Dump(evaluated).fingerprint
    for name in ("one", "same", "seen"):
        (tmp_path / name).mkdir()
        make_checkpoint(tmp_path / name / "best.pt", dump=fingerprint)
    clip_ids = ids_of(train=(110, 133), validation=(104, 110), test=(102, 104))  # 3 of one's test, 2 of its training
    make_checkpoint(tmp_path / "seen/best.pt", dump=fingerprint, clip_ids=clip_ids)
    arguments = ["--device", "cpu", "--data", evaluated, "--experiments", tmp_path, "--resamples", 20, "--name", "one"]
    done = call_script("evaluate.py", *arguments, "--against", "same")
    assert "these clips cannot tell which of one and same is better" in done.stdout
    comparison = json.loads((tmp_path / "one/comparison.json").read_text())
    assert comparison["clips"] == 11 and comparison["roc_auc"] == {"value": 0, "low": 0, "high": 0}
    assert comparison["notes"] == [] and not any(row["differs_clearly"] for row in comparison["tags"])
    weights = load_checkpoint(tmp_path / "one/best.pt")["weights"]
    weights["head.weight"] *= -1
    make_checkpoint(tmp_path / "same/best.pt", dump=fingerprint, weights=weights)
    done = call_script("evaluate.py", *arguments, "--against", "same")
    comparison = json.loads((tmp_path / "one/comparison.json").read_text())
    labels, settings = np.load(evaluated / "tags.npy")[29:, [2, 0, 1]], evaluate.Settings(data=evaluated, device="cpu")
    both = (evaluate.Evaluation(settings, tmp_path / name / "best.pt") for name in ("one", "same"))
    ours, theirs = (one.predict(np.arange(29, 40)) for one in both)
    expected = roc_auc_score(labels, ours) - roc_auc_score(labels, theirs)
    assert expected != 0 and comparison["roc_auc"]["value"] == pytest.approx(expected)
    by_track = np.arange(29, 40) // 2, 20, evaluate.Settings().seed
    ours, theirs = (scores.scores_of(labels, predictions, *by_track) for predictions in (ours, theirs))
    assert comparison["roc_auc"] == pytest.approx(ours.minus(theirs).macro()["roc_auc"])
    refused = call_script("evaluate.py", *arguments, "--against", "seen", status=1).stderr
    assert "5 clips of the two test sets were trained or chosen on" in refused and refused.count("\n") == 1


def test_what_a_checkpoint_started_from_has_seen_is_never_forgotten(evaluated, call_script, tmp_path):
    """A validation clip and three test clips of the same clips; of other data, one of these ids and one more."""
    own, arguments = Dump(evaluated).fingerprint, ["--device", "cpu", "--data", evaluated, "--resamples", 9]
    arguments += ["--no-baseline", "--experiments", tmp_path, "--name"]
    before = {"train": torch.tensor([121, 131]), "validation": torch.tensor([132, 140]), "test": torch.tensor([133])}
    elsewhere = {"train": torch.tensor([140, 135]), "validation": torch.tensor([5]), "test": torch.tensor([134])}
    seen = {"tuned": [(own, before), ("other", elsewhere)], "doubtful": [("other", elsewhere)], "plain": []}
    for name, sources in seen.items():
        (tmp_path / name).mkdir()
        make_checkpoint(tmp_path / name / "best.pt", dump=own, seen_before=sources)
    printed = call_script("evaluate.py", *arguments, "tuned").stdout
    results = json.loads((tmp_path / "tuned/results.json").read_text())
    found = [(results[part]["seen_before"], results[part]["seen_before_by_id"]) for part in ("validation", "test")]
    assert found == [(1, 0), (3, 1)]
    assert "fine-tuned from: 3 clips for certain, 1 perhaps (equal ids in other data)" in printed
    heard = {row // 2 for row in [*range(20), 20, 30]}  # the tracks of what was trained on, ever
    assert results["test"]["leakage"]["share_of_track"] == np.mean([row // 2 in heard for row in range(29, 40)])
    assert "seen before" not in call_script("evaluate.py", *arguments, "plain").stdout

    for one, other in (("plain", "tuned"), ("tuned", "plain")):
        refused = call_script("evaluate.py", *arguments, one, "--against", other, status=1).stderr
        assert "3 clips of the two test sets were trained or chosen on" in refused
    printed = call_script("evaluate.py", *arguments, "plain", "--against", "doubtful").stdout
    (note,) = json.loads((tmp_path / "plain/comparison.json").read_text())["notes"]
    assert note.startswith("2 test clips have ids that one network saw in other data") and f"note: {note}\n" in printed

    make_checkpoint(tmp_path / "doubtful/best.pt", dump="other")
    printed = call_script("evaluate.py", *arguments, "plain", "--against", "doubtful", "--other-data").stdout
    (note,) = json.loads((tmp_path / "plain/comparison.json").read_text())["notes"]
    assert "is not the dump of both checkpoints" in note and f"note: {note}\n" in printed


def test_several_seeds_are_one_experiment(evaluated, call_script, tmp_path, monkeypatch):
    """Mean and deviation of every score of three evaluations; each evaluation is the one that it is alone."""
    place = ["--data", evaluated, "--experiments", tmp_path, "--device", "cpu", "--resamples", 9]
    names, found = ["one", "two", "three"], {}
    monkeypatch.setitem(NETWORKS, "MultiScaleCNN", SmallNetwork)
    for seed, name in enumerate(names):
        (tmp_path / name).mkdir()
        settings = {"seed": seed, "name": name, "split_seed": seed or None}
        made = {"dump": Dump(evaluated).fingerprint, "made_with": [f"commit {min(seed, 1)}"]}
        for best_or_last, epochs in (("best.pt", 30 + seed), ("last.pt", 40)):
            hyperparameters = {**HYPERPARAMETERS, **settings, "epochs": epochs}
            make_checkpoint(tmp_path / name / best_or_last, seed=seed, hyperparameters=hyperparameters, **made)
        call_script("evaluate.py", *place, "--name", name)
        found[name] = json.loads((tmp_path / f"{name}/results.json").read_text())
        (tmp_path / f"{name}/results.json").unlink()
    call_script("evaluate.py", *place, "--name", *names, "--output", tmp_path / "elsewhere")
    elsewhere = tmp_path / "elsewhere/two/results.json"
    assert json.loads(elsewhere.read_text()) == found["two"] and not (tmp_path / "two/results.json").exists()
    printed = call_script("evaluate.py", *place, "--name", *names).stdout
    assert (tmp_path / "one/seeds.csv").read_bytes() == (tmp_path / "elsewhere/seeds.csv").read_bytes()
    assert all(json.loads((tmp_path / f"{name}/results.json").read_text()) == found[name] for name in names)
    assert found["two"]["made_with"] == ["commit 1"] and "made with commit 1\n" in printed

    table = {row["score"]: row for row in csv.DictReader((tmp_path / "one/seeds.csv").open())}
    for score, value in (
        ("test roc_auc", lambda test: test["roc_auc"]["value"]),
        ("test average_precision", lambda test: test["average_precision"]["value"]),
        ("test clip_roc_auc", lambda test: test["clip_roc_auc"]),
        ("test precision_at 3", lambda test: test["precision_at"]["3"]),
        ("test at_thresholds recall", lambda test: test["at_thresholds"]["recall"]),
        ("test tags guitar average_precision", lambda test: test["tags"][1]["average_precision"]),
        ("test baseline roc_auc", lambda test: test["baseline"]["roc_auc"]["value"]),
        (
            "test names_only network_minus_names_only roc_auc",
            lambda test: test["names_only"]["network_minus_names_only"]["roc_auc"]["value"],
        ),
    ):
        values = [value(found[name]["test"]) for name in names]
        row = table[score]
        assert [float(row[name]) for name in names] == values
        mean, deviation = np.mean(values), np.sqrt(np.sum((values - np.mean(values)) ** 2) / 2)
        assert [float(row["mean"]), float(row["standard_deviation"])] == pytest.approx([mean, deviation], abs=1e-12)
        assert f"\n  {score:<66}{mean:.4f} ± {deviation:.4f}\n" in printed
    values = [found[name]["validation"]["roc_auc"]["value"] for name in names]
    assert float(table["validation roc_auc"]["mean"]) == pytest.approx(np.mean(values)) and len({*values}) == 3
    # of each part: both scores, macro, of the network, both rivals and both differences; 4 within clips; 2 at the
    # thresholds; 3 of other origins; and of 3 tags in the test
    assert len(table) == 2 * (2 * (1 + 4) + 4 + 2 + 3) + 2 * 3


def test_experiments_that_differ_in_more_than_their_seeds_are_no_seeds_of_one(evaluated, call_script, tmp_path):
    own = {**HYPERPARAMETERS, "seed": 1, "epochs": 40}
    for name, settings, clip_ids in (
        ("one", {}, {}),
        ("same_seed", {}, {}),
        ("longer", {"seed": 2, "epochs": 50}, {}),
        ("other_clips", {"seed": 2}, {"clip_ids": ids_of(train=(102, 122), validation=(122, 130), test=(130, 141))}),
    ):
        (tmp_path / name).mkdir()
        settings = {"hyperparameters": {**own, **settings}, "dump": Dump(evaluated).fingerprint}
        for path in ("best.pt", "last.pt"):
            make_checkpoint(tmp_path / name / path, **settings, **clip_ids)
    arguments = ["--data", evaluated, "--experiments", tmp_path, "--device", "cpu", "--name"]
    differ = "differ in more than the seed (see --split-seed): "
    for names, message in (
        (["one", "longer"], f"{tmp_path / 'one'} and {tmp_path / 'longer'} {differ}epochs (40 against 50)"),
        (["one", "other_clips"], f"{differ}train clips, validation clips"),
        (["other_clips", "longer", "one"], f"{differ}epochs (40 against 50)"),
        (["one", "same_seed"], "have the same seed"),
        (["one", "longer", "--against", "one"], "--name: takes one experiment"),
        (["one", "longer", "--checkpoint", "x"], "--name: takes one experiment"),
        ([], "--name: takes one experiment"),
    ):
        done = call_script("evaluate.py", *arguments, *names, status=1)
        assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert [path.name for path in tmp_path.glob("*/*") if path.suffix != ".pt"] == []


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.1, 0.3, "one is better"),
        (-0.3, -0.1, "two is better"),
        (-0.1, 0.3, "these clips cannot tell which of one"),
        (np.nan, np.nan, "these clips cannot tell which of one"),
    ],
)
def test_only_an_interval_that_leaves_out_zero_says_which_is_better(low, high, verdict, capsys):
    macro = dict.fromkeys(scores.SCORES, {"value": 0.2, "low": low, "high": high})
    tag = {
        "tag": "slow",
        "roc_auc": 0.2,
        "roc_auc_low": low,
        "roc_auc_high": high,
        "differs_clearly": "better" in verdict,
    }
    about = {"name": "one", "against": "two", "clips": 9, "intervals": "", "notes": ["note 1"]}
    evaluate.print_comparison({**about, "tags": [tag], **macro})
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(verdict) and ("differs clearly" in printed) == ("better" in verdict)
    assert "note: note 1\n" in printed
    part = {"clips": 9, **macro, "clip_roc_auc": 0.5, "precision_at": {}, "one_class": [], "leakage": None}
    part["at_thresholds"] = {"precision": 0.6, "recall": 0.7}
    rivals = {name: {**macro, f"network_minus_{name}": macro} for name in evaluate.RIVALS}
    words = evaluate.summary({**part, "seen_before": 0, "seen_before_by_id": 0, **rivals})
    assert words["at the thresholds"].startswith("precision 0.6000, recall 0.7000  macro")
    for rival, what in (("baseline", "a logistic regression"), ("names", "the labels of artist and album")):
        assert (f": not clearly better than {what}" in words[f"network - {rival}"]) == (low < 0 < high)
        assert (f": clearly worse than {what}" in words[f"network - {rival}"]) == (high < 0)


def test_data_that_are_not_the_checkpoints_are_named(evaluated, call_script, tmp_path):
    fewer, other = (tmp_path / name for name in ("fewer", "other"))
    for folder, n_clips in ((fewer, 38), (other, 40)):
        folder.mkdir()
        write_dump(folder, n_clips, seed=1)
    good = evaluated / "best.pt"
    changed = {name: tmp_path / f"{name}.pt" for name in ("tags", "front_end")}
    make_checkpoint(changed["tags"], n_tags=2, tag_names=["slow", "harp"])
    make_checkpoint(changed["front_end"], front_end={"n_fft": 1024})
    for data, checkpoint, message in (
        (fewer, good, "lacks 2 of the checkpoint's test clips"),
        (evaluated, changed["tags"], "has no tag harp"),
        (evaluated, changed["front_end"], "different front end"),
        (other, good, "not the dump that the checkpoint was trained on"),
    ):
        done = call_script("evaluate.py", "--device", "cpu", "--data", data, "--checkpoint", checkpoint, status=1)
        assert message in done.stderr and done.stderr.count("\n") == 1
    here = make_checkpoint(tmp_path / "best.pt")
    place = ["--data", other, "--checkpoint", here]
    done = call_script("evaluate.py", "--device", "cpu", *place, "--other-data", "--resamples", 9)
    assert "is not the checkpoint's dump (--other-data): nothing published" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["other_data"]


@pytest.mark.parametrize(
    "hyperparameters, asked, expected",
    [({"precision": "bfloat16"}, "checkpoint", "bfloat16"), ({"precision": "bfloat16"}, "float32", "float32")],
)
def test_the_network_computes_in_the_checkpoints_precision(hyperparameters, asked, expected, evaluated, tmp_path):
    path = make_checkpoint(tmp_path / "best.pt", hyperparameters=HYPERPARAMETERS | hyperparameters)
    settings = evaluate.Settings(data=evaluated, precision=asked, batch_size=4, device="cpu", other_data=True)
    evaluation = evaluate.Evaluation(settings, path)
    found, checkpoint, device = evaluation.predict(np.arange(3)), evaluation.checkpoint, torch.device("cpu")
    spectrograms = torch.from_numpy((evaluation.dump.spectrograms[0][:3, None] + 5) / 3)

    def predictions(precision):
        net, _ = load_network(checkpoint, device, precision)
        with torch.no_grad(), autocast(device, precision):
            return torch.sigmoid(net(spectrograms.to(getattr(torch, precision))).double()).numpy()

    assert np.array_equal(found, predictions(expected))
    assert (expected == "float32") == np.array_equal(found, predictions("float32"))
    tagger = evaluate.Tagger(path, "cpu", asked)
    tagger.spectrograms = lambda clips: clips.to(getattr(torch, expected))
    assert np.array_equal(found, tagger.scores(spectrograms))


def test_few_clips_and_few_steps_are_said(monkeypatch):
    """Of 20 training clips in batches of 2, none across a super-batch of 5: 3 + 3 + 3 + 3 = 12 steps an epoch."""
    trained = HYPERPARAMETERS | {"network": "MultiScaleCNN", "batch_size": 2, "super_batch_size": 5}
    thresholds = torch.tensor([0.3], dtype=torch.float64)
    checkpoint = {"tag_names": ["slow"], "hyperparameters": trained, "seen_before": [], "thresholds": thresholds}
    for epoch, n_validation, n_said, words in (
        (25, 30, 0, []),  # 0.99 ** 300 is 4.9%
        (24, 30, 1, ["at step 288", "running averages are 6%"]),
        (0, 30, 1, ["epoch 0 was best", "its tags are noise", "lower the --learning-rate"]),
        (25, 29, 1, ["29 validation clips", "by chance", "larger --validation-size"]),
        (5, 5, 2, ["at step 60", "are 55%", "5 validation clips"]),
    ):
        parts = {"clip_ids": ids_of(train=(0, 20), validation=(20, 20 + n_validation)), "history": [{"epoch": epoch}]}
        said = [*cautions({**checkpoint, **parts})]
        assert len(said) == n_said and all(word in " ".join(said) for word in words)
        assert all(line.startswith("note: ") for line in said)
    assert len([*cautions({**checkpoint, **parts, "seen_before": ["another"]})]) == 1, "its averages began elsewhere"
    slower, faster = FeatureBatchNorm(2, momentum=0.01), torch.nn.BatchNorm2d(2, momentum=0.1)
    for layers, n_said in (([slower], 2), ([slower, faster], 2), ([faster], 1), ([torch.nn.ReLU()], 1)):
        monkeypatch.setitem(NETWORKS, "MultiScaleCNN", lambda _: torch.nn.Sequential(*layers))
        assert len([*cautions({**checkpoint, **parts})]) == n_said, layers


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_what_is_not_a_checkpoint_is_one_line_and_runs_nothing(tmp_path):
    good = make_checkpoint(tmp_path / "good.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 1
    victim = tmp_path / "executed"
    torch.save({"weights": Payload(victim)}, tmp_path / "payload.pt")
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    make_checkpoint(tmp_path / "network.pt", tag_names=["slow", "guitar"])
    make_checkpoint(tmp_path / "unknown.pt", hyperparameters={"network": "AnotherCNN"})
    make_checkpoint(tmp_path / "front_end.pt", weights={}, front_end=FRONT_END | {"n_mels": 96})
    cases = {
        "truncated": (good[: len(good) // 2], "damaged, or not a checkpoint of trainer.py"),
        "flipped": (bytes(flipped), "damaged, .*wrong checksum"),
        "pickle": (pickle.dumps(Payload(victim)), "damaged, or not a checkpoint of trainer.py"),
        "payload": ((tmp_path / "payload.pt").read_bytes(), "holds a _?io.open, which is not safe to load"),
        "other": ((tmp_path / "other.pt").read_bytes(), "damaged, or not a checkpoint of trainer.py"),
        "changed": (
            (tmp_path / "network.pt").read_bytes(),
            "not model.py's MultiScaleCNN; each network needs its own name .*size mismatch",
        ),
        "unknown": ((tmp_path / "unknown.pt").read_bytes(), "not model.py's AnotherCNN; .*there is none"),
        "front end": (
            (tmp_path / "front_end.pt").read_bytes(),
            "made with a different front end from lib/audio.py's: n_mels \\(96 against 128\\); restore that, or train",
        ),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: {said}") as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not victim.exists()


def test_the_clips_that_are_worth_a_listen():
    labels = np.array([[0], [0], [1], [1], [0]])
    predictions = np.array([[0.1], [0.9], [0.2], [0.7], [0.5]])
    assert [*evaluate.worth_a_listen(labels, predictions, [0.5])] == [(0, 0, 1), (0, 0, 4), (0, 1, 2)]
    assert [*evaluate.worth_a_listen(labels, predictions, [0.8])] == [(0, 0, 1), (0, 1, 2), (0, 1, 3)]
    found = [*evaluate.worth_a_listen(np.zeros((12, 2)), np.linspace(0.6, 0.8, 24).reshape(12, 2), [1, 0.5])]
    assert found == [(1, 0, clip) for clip in range(11, 1, -1)], "ten at most"
