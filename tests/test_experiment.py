"""The experiment: trainer.run_experiment against a plain loop, and the constants of the paper in what is built."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

import evaluate
import tags
import trainer
from conftest import write_dump
from lib.checkpoint import load_checkpoint
from lib.common import InputError, keep_freed_memory
from lib.dump import Dump
from lib.loader import Loader
from lib.splits import epoch_batches
from model import MultiScaleCNN, initialize
from trainer import Settings, learning_rate_at, split_clips

N_CLIPS, TRAIN, VALIDATION = 20, 6, 5
RATES = {1: 1e-3, 2: 1e-4, 3: 1e-5}  # of each epoch: divided by ten after the first and after the second
BATCHES = (0, 2), (2, 4), (4, 5), (5, 6)  # of 2 clips, cut by super-batches of 5


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return Dump(write_dump(tmp_path_factory.mktemp("dump"), N_CLIPS))


def plain_experiment(dump, normalize_on, seed, n_epochs):
    """Return what the trainer should report and leave, from the original's experiment as one would write it down."""
    torch.manual_seed(seed)
    rng = np.random.RandomState(seed)
    net = MultiScaleCNN(3).double()
    initialize(net, rng)
    train, validation, test = split_clips(N_CLIPS, TRAIN, VALIDATION, rng)
    clips = np.concatenate([np.load(dump.data / f"spectrograms_{index}.npy") for index in range(3)])
    seen = (clips[train] if normalize_on == "train" else clips).astype(float)
    mean, std = (np.float32(of_each_band(seen, axis=(0, 2))) for of_each_band in (np.mean, np.std))
    clips = torch.from_numpy((clips - mean[:, None]) / std[:, None])[:, None].double()
    labels = np.load(dump.data / "tags.npy")[:, [2, 0, 1]]  # slow, guitar, flute: the most frequent first
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.999), eps=1e-8)

    def score(rows):
        with torch.no_grad():
            return roc_auc_score(labels[rows], net.eval()(clips[rows]))

    losses, scores, chosen = [None], [score(validation)], (0, copy.deepcopy(net.state_dict()))
    for epoch, rate in list(RATES.items())[:n_epochs]:
        optimizer.param_groups[0]["lr"] = rate
        steps = []
        for start, end in BATCHES:
            rows = train[start:end]
            loss = F.binary_cross_entropy(net.train()(clips[rows]).sigmoid(), torch.from_numpy(labels[rows]).double())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        rng.shuffle(train)
        losses.append(np.mean(steps))
        scores.append(score(validation))
        if scores[-1] > max(scores[:-1]):
            chosen = epoch, copy.deepcopy(net.state_dict())
    weights = {"best.pt": chosen[1], "last.pt": copy.deepcopy(net.state_dict())}
    net.load_state_dict(chosen[1])
    found = {"losses": losses, "scores": scores, "epoch": chosen[0], "test_score": score(test), "weights": weights}
    return SimpleNamespace(**found, mean=mean, std=std)


# With these seeds the chosen epoch is 1, after which scores are equal, and 0, after which they are lower
@pytest.mark.parametrize("normalize_on, seed, n_epochs, chosen_epoch", [("all", 8, 3, 1), ("train", 1, 1, 0)])
def test_the_trainer_does_what_a_plain_loop_does(dump, tmp_path, capsys, normalize_on, seed, n_epochs, chosen_epoch):
    keep_freed_memory()  # float64 is slow enough
    expected = plain_experiment(dump, normalize_on, seed, n_epochs)
    assert expected.epoch == chosen_epoch
    settings = Settings(
        data=dump.data, train_size=TRAIN, validation_size=VALIDATION, normalize_on=normalize_on, drop_after=(1, 2),
        epochs=n_epochs, batch_size=2, super_batch_size=5, seed=seed, precision="float64",
        experiments=str(tmp_path), name="one", device="cpu",
    )  # fmt: skip
    found = trainer.train(settings)

    saved = {name: load_checkpoint(tmp_path / "one" / name) for name in ("best.pt", "last.pt")}
    history = saved["last.pt"]["history"]
    assert [row["epoch"] for row in history] == list(range(n_epochs + 1))
    assert [row["learning_rate"] for row in history[1:]] == pytest.approx(list(RATES.values())[:n_epochs])
    assert history[0]["loss"] is None
    assert [row["loss"] for row in history[1:]] == pytest.approx(expected.losses[1:], abs=1e-6)
    assert [row["validation_roc_auc"] for row in history] == pytest.approx(expected.scores, abs=1e-9)
    assert saved["best.pt"]["history"] == history[: chosen_epoch + 1]
    for name, checkpoint in saved.items():
        for key, weights in expected.weights[name].items():
            assert (checkpoint["weights"][key] - weights).norm() <= 1e-4 * weights.norm(), f"{name}: {key}"
        assert np.allclose(checkpoint["normalization"]["mean"], expected.mean, atol=1e-6)
        assert np.allclose(checkpoint["normalization"]["std"], expected.std, atol=1e-6)
    best = f"best validation ROC-AUC {expected.scores[chosen_epoch]:.4f} (epoch {chosen_epoch})"
    assert f"{best}, test ROC-AUC {expected.test_score:.4f}" in capsys.readouterr().out
    assert found == pytest.approx(
        {
            "epoch": chosen_epoch,
            "validation_roc_auc": expected.scores[chosen_epoch],
            "test_roc_auc": expected.test_score,
        }
    )
    (adam,) = saved["last.pt"]["continuation"]["optimizer"]["param_groups"]
    assert (adam["betas"], adam["eps"], adam["weight_decay"], adam["amsgrad"]) == ((0.9, 0.999), 1e-8, 0, False)
    assert adam["lr"] == pytest.approx(RATES[n_epochs]), "Adam has the last epoch's learning rate"


def test_the_defaults_are_the_originals():
    settings = Settings()
    assert (settings.train_size, settings.validation_size, settings.seed, settings.n_tags) == (18000, 2000, 1337, 50)
    assert (settings.epochs, settings.batch_size, settings.super_batch_size) == (40, 32, 3000)
    assert (settings.split, settings.normalize_on, settings.precision) == ("random", "all", "float32")
    assert settings.untagged and settings.split_seed is None
    assert settings.merge_tags and (tags.Settings().n_tags, tags.Settings().merge_tags) == (50, True)
    assert (evaluate.Settings().resamples, evaluate.Settings().seed) == (1000, 1337)
    rates = [learning_rate_at(epoch, settings) for epoch in range(1, 41)]
    assert rates == [1e-3] * 20 + [1e-4] * 10 + [1e-5] * 5 + [1e-6] * 5


def test_an_epoch_at_full_size_is_564_batches_in_order():
    train = np.random.RandomState(0).permutation(25863)[:18000]
    batches = epoch_batches(train, batch_size=32, super_batch_size=3000)
    assert [len(rows) for rows in batches] == ([32] * 93 + [24]) * 6
    assert np.array_equal(np.concatenate(batches), train)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(dump, monkeypatch):
    losses = map(torch.tensor, (1.0, 0.9, float("nan"), 0.8))
    monkeypatch.setattr(trainer, "training_step", lambda *_: next(losses))
    normalization = {"mean": torch.zeros(128), "std": torch.ones(128)}
    loader = Loader(dump, dump.labels, normalization, torch.device("cpu"), "float32")
    with pytest.raises(InputError, match="epoch 1, step 3: the loss is nan"):
        trainer.train_epoch(MultiScaleCNN(3), None, loader, np.arange(4)[:, None], 1, None)
