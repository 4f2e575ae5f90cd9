"""The trainer's folder: what is saved when, going on, beginning from another experiment's weights."""

import contextlib
import csv
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from conftest import ROOT, SmallNetwork, write_dump
from evaluate import clips_of
from lib.checkpoint import load_checkpoint, made_with, save
from lib.common import InputError, lock
from lib.dump import Dump, same_clips
from lib.experiment import PLACE, require_same, write_outputs
from lib.scores import best_thresholds
from model import NETWORKS, MultiScaleCNN
from trainer import Settings

TINY = "--device cpu --epochs 3 --train-size 8 --validation-size 3 --batch-size 2 --super-batch-size 5".split()
TINY += "--learning-rate 1e-4 --drop-after 2".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished dump of 20 random clips with three tags, one of them without positives in validation."""
    return write_dump(tmp_path_factory.mktemp("small"), n_clips=20)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A finished experiment on the small dump, and what it printed."""
    experiments = tmp_path_factory.mktemp("experiments")
    process = train(small, experiments)
    printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed[1]
    return experiments / "paper", printed[0]


def train(data, experiments, *more):
    """Start a trainer of two threads, as on a user's machine, where the tests' own have one."""
    arguments = ["--data", data, "--experiments", experiments, *TINY, *more]
    command = [sys.executable, str(ROOT / "trainer.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_what_an_experiment_leaves(uninterrupted, small):
    folder, printed = uninterrupted
    history = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in history] == ["0", "1", "2", "3"]
    scores = [row["validation_roc_auc"] for row in load_checkpoint(folder / "last.pt")["history"]]
    assert [float(row["validation_roc_auc"]) for row in history] == scores
    settings = json.loads((folder / "hyperparameters.json").read_text())
    assert [settings[name] for name in ("batch_size", "train_size", "validation_size", "test_size")] == [2, 8, 3, 9]
    best = load_checkpoint(folder / "best.pt")
    assert printed.endswith("nothing published to compare with: other clips, tags or split, or fine-tuned\n")
    assert "all there are; 50 were asked for" in printed and "\nnote: 3 validation clips chose" in printed
    dump = Dump(small)
    assert sorted(torch.cat(list(best["clip_ids"].values())).tolist()) == sorted(dump.ids.tolist())
    assert best["front_end"] == dump.front_end and best["tag_names"] == ["slow", "guitar", "flute"]
    one = evaluate.Evaluation(evaluate.Settings(data=small, device="cpu"), folder / "best.pt")
    rows = one.rows["validation"]
    assert best["thresholds"].numpy() == pytest.approx(best_thresholds(one.labels[rows], one.predict(rows)), abs=1e-5)
    assert best["made_with"] == made_with(torch.device("cpu"), dump, None) and dump.made_with in best["made_with"][0]


def test_what_a_run_was_made_with(tmp_path, monkeypatch, gpus):
    root, device, dump = tmp_path / "a clone", torch.device("cpu"), SimpleNamespace(made_with="librosa 1, soxr 2")
    info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.partition(": ")[2] for line in info if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    (root / "inside").mkdir(parents=True)
    (root / "model.py").write_text("1")
    git = "git -c user.name=a -c user.email=b".split()
    for words in (["init"], ["add", "model.py"], ["commit", "-m", "1"], ["tag", "v1"]):
        subprocess.run([*git, *words], cwd=root, check=True, capture_output=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr("lib.checkpoint.ROOT", root)
    (line,) = made_with(device, dump, None)
    found, rest = re.fullmatch(r"commit (\w{7,40}), (.*)", line).groups()
    assert commit.startswith(found)
    assert rest == f"PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, librosa 1, soxr 2, 1 x {cpu}"
    assert made_with(device, dump, {"made_with": ["earlier", line]}) == ["earlier", line]
    (root / "model.py").write_text("2")
    assert made_with(device, dump, {"made_with": [line]}) == [line, line.replace(found, f"{found}-dirty")]
    assert made_with(torch.device("cuda"), dump, None)[0].endswith(", 1 x a GPU played by the CPU")
    for path, where in ((root / "inside", os.environ["PATH"]), (root, "")):  # of another repository, and without git
        monkeypatch.setattr("lib.checkpoint.ROOT", path)
        monkeypatch.setenv("PATH", where)
        assert made_with(device, dump, None)[0].startswith("commit unknown, PyTorch")


def same_checkpoint(one, other):
    """Return whether two checkpoints hold the same values, bit for bit."""
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_checkpoint(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_checkpoint, one, other))
    return one == other


def without_paths(checkpoint):
    checkpoint["hyperparameters"] = {
        name: value for name, value in checkpoint["hyperparameters"].items() if name not in PLACE | {"epochs"}
    }
    return checkpoint


def kill_after_epoch(process, folder, epoch):
    """Kill a trainer in the epoch after `epoch`."""
    rows = ""
    while f"\n{epoch}," not in rows:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
        with contextlib.suppress(FileNotFoundError):  # not there yet, or just being replaced
            rows = (folder / "history.csv").read_text()
    time.sleep(0.2)
    process.kill()
    process.communicate(timeout=60)


def test_killed_and_resumed_is_bit_identical(uninterrupted, small, tmp_path):
    folder, printed = uninterrupted
    kill_after_epoch(train(small, tmp_path), tmp_path / "paper", 1)
    resumed = train(small, tmp_path, "--resume")
    printed_then, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert printed_then.splitlines()[-2:] == printed.splitlines()[-2:]
    for name in ("best.pt", "last.pt"):
        one, other = (without_paths(load_checkpoint(where / name)) for where in (folder, tmp_path / "paper"))
        assert same_checkpoint(one, other), name
    for name in ("history.csv", "curves.png"):
        assert (folder / name).read_bytes() == (tmp_path / "paper" / name).read_bytes(), name


def test_the_settings_of_an_experiment_need_not_be_repeated(small, tmp_path, call_script, monkeypatch):
    monkeypatch.setitem(NETWORKS, "MultiScaleCNN", SmallNetwork)
    experiments = "--experiments", tmp_path / "experiments", "--device", "cpu"
    resume = "trainer.py", *experiments, "--name", "mine", "--resume"
    evaluated = "evaluate.py", *experiments, "--name", "mine", "--resamples", 9
    monkeypatch.chdir(small.parent)
    begin = *experiments, "--data", small.name, "--epochs", 3, "--batch-size", 2, "--drop-after", 2
    printed = call_script("trainer.py", *begin, "--name", "mine").stdout
    assert "epoch   1" in call_script("trainer.py", *begin, "--name", "new", "--resume").stdout
    monkeypatch.chdir(tmp_path)
    done = call_script(*resume).stdout
    assert f"data       {small}\n" in done and done.splitlines()[-2:] == printed.splitlines()[-2:]
    assert "epoch   4" in call_script(*resume, "--epochs", 4, "--train-size", 14).stdout, "the size that it had"
    error = call_script(*resume, "--batch-size", 3, "--epochs", 5, status=1).stderr
    assert error.endswith("resumes only as it began, and this differs: batch_size (2 against 3)\n")
    assert "test, 4 clips" in call_script(*evaluated).stdout

    for name in ("best.pt", "last.pt"):
        moved = load_checkpoint(tmp_path / "experiments/mine" / name)
        moved["hyperparameters"]["data"] = str(tmp_path / "elsewhere")
        save(tmp_path / "experiments/mine" / name, moved)
    monkeypatch.setattr("lib.experiment.ROOT", tmp_path)
    for command in (resume, evaluated):
        error = f"error: {tmp_path / 'elsewhere'}: no complete dump here; name another folder with --data"
        assert call_script(*command, status=1).stderr.startswith(error)
        assert call_script(*command, "--data", small).returncode == 0
    (tmp_path / "data").symlink_to(small)
    assert "test, 4 clips" in call_script(*evaluated).stdout, "on another machine, the data are in the usual place"
    assert f"data       {small}\n" in call_script("trainer.py", *experiments, "--name", "new", "--resume").stdout


def test_an_epoch_may_have_more_to_report_than_those_before(uninterrupted, tmp_path):
    checkpoint = load_checkpoint(uninterrupted[0] / "last.pt")
    checkpoint["history"][-1]["norm"] = 0.5
    write_outputs(tmp_path, checkpoint, is_last=False)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [row["norm"] for row in rows] == ["", "", "", "0.5"] and [row["epoch"] for row in rows] == list("0123")


def test_resuming_with_other_hyperparameters_or_data_is_refused(uninterrupted, small, tmp_path, call_script):
    folder, _ = uninterrupted
    arguments = ["--experiments", folder.parent, *TINY, "--resume"]
    done = call_script("trainer.py", "--data", small, *arguments, "--seed", 1, "--n-tags", 2, status=1)
    message = f"error: {folder / 'last.pt'}: resumes only as it began, and this differs: "
    assert done.stderr.startswith(f"{message}n_tags (50 against 2), seed (1337 against 1), tag_names, train clips, ")
    assert done.stderr.count("\n") == 1
    other = write_dump(tmp_path, n_clips=20, seed=1)
    done = call_script("trainer.py", "--data", other, *arguments, status=1)
    assert done.stderr == f"{message}dump\n"


def test_only_where_and_how_long_may_differ_in_one_experiment(uninterrupted):
    last = load_checkpoint(uninterrupted[0] / "last.pt")
    for name in (field.name for field in dataclasses.fields(Settings)):
        other = {**last, "hyperparameters": {**last["hyperparameters"], name: "another"}}
        may_differ = name in {"data", "experiments", "name", "resume", "overwrite", "epochs", "device"}
        with contextlib.nullcontext() if may_differ else pytest.raises(InputError, match=f"^refused: {name} "):
            require_same(last, other, {"epochs"}, "refused")
    clip_ids = {**last["clip_ids"], "test": last["clip_ids"]["test"][1:]}
    for other, name in (
        ({"tag_names": ["another"]}, "tag_names"),
        ({"dump": "another"}, "dump"),
        ({"clip_ids": clip_ids}, "test clips"),
        ({"history": last["history"][1:]}, "epochs so far"),
    ):
        with pytest.raises(InputError, match=f"^refused: {name}$"):
            require_same(last, {**last, **other}, {"epochs"}, "refused")
    del (earlier := {**last["hyperparameters"]})["untagged"]
    require_same({**last, "hyperparameters": earlier}, last, {"epochs"}, "refused")
    require_same(last, {**last, "hyperparameters": earlier}, {"epochs"}, "refused")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_nothing_is_deleted_before_everything_is_checked(uninterrupted, small, tmp_path, call_script):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "paper")
    (folder / "results.json").write_text("{}")
    (folder / "labels_test.csv").write_text("")
    before = contents(folder)
    arguments = ["--experiments", tmp_path, *TINY, "--overwrite"]
    for wrong in (
        ["--data", tmp_path / "typo"],
        ["--data", small, "--seed", -1],
        ["--data", small, "--train-size", 99],
        ["--data", small, "--resume"],
    ):
        call_script("trainer.py", *arguments, *wrong, status=(1, 2))
        assert contents(folder) == before, wrong
    for wrong in (["--data", tmp_path / "typo"], ["--data", small, "--train-size", 99]):
        call_script("trainer.py", *arguments, "--name", "typo/typo", *wrong, status=1)
        assert not (tmp_path / "typo").exists(), "a failed start leaves no folder"
    call_script("trainer.py", "--data", small, *arguments, "--epochs", 0)
    for name in ("results.json", "labels_test.csv"):
        assert not (folder / name).exists(), "it described the old experiment"
    assert [len(load_checkpoint(folder / name)["history"]) for name in ("best.pt", "last.pt")] == [1, 1]


def test_half_an_experiment_is_neither_overwritten_nor_resumed(uninterrupted, small, tmp_path, call_script):
    arguments = ["--data", small, "--experiments", tmp_path, *TINY]
    folder = shutil.copytree(uninterrupted[0], tmp_path / "paper")
    (folder / "last.pt").rename(tmp_path / "last.pt")
    assert "holds an experiment" in call_script("trainer.py", *arguments, status=1).stderr
    assert "last.pt: no such checkpoint" in call_script("trainer.py", *arguments, "--resume", status=1).stderr
    last = load_checkpoint(tmp_path / "last.pt")
    last["history"][-1]["best"] = False
    save(folder / "last.pt", last)
    (folder / "best.pt").unlink()
    assert "best.pt: missing" in call_script("trainer.py", *arguments, "--resume", status=1).stderr


def test_a_value_that_comes_later_is_checked_too(uninterrupted, tmp_path):
    checkpoint = load_checkpoint(uninterrupted[0] / "last.pt")
    save(tmp_path / "last.pt", checkpoint)
    checkpoint["history"][-1]["norm"] = np.float64(1)
    with pytest.raises(InputError, match="last.pt: holds a numpy"):
        save(tmp_path / "last.pt", checkpoint)
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 4 and [*tmp_path.iterdir()] == [
        tmp_path / "last.pt"
    ]


def test_a_setting_that_is_new_is_compared_with_its_default(uninterrupted, small, tmp_path, call_script):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "paper")
    last = load_checkpoint(folder / "last.pt")
    del last["hyperparameters"]["normalize_on"]
    save(folder / "last.pt", last)
    arguments = ["--experiments", tmp_path, "--resume", "--normalize-on", "train"]
    assert "normalize_on (all against train)" in call_script("trainer.py", *arguments, status=1).stderr


def test_more_epochs_are_the_same_experiment(uninterrupted, small, tmp_path, call_script):
    shutil.copytree(uninterrupted[0], tmp_path / "paper")
    arguments = ["--data", small, "--experiments", tmp_path, *TINY, "--resume"]
    error = call_script("trainer.py", *arguments, "--drop-after", 1, status=1).stderr
    assert "resumes only as it began, and this differs: drop_after ([2] against [1])\n" in error
    call_script("trainer.py", *arguments, "--epochs", 4)
    history = load_checkpoint(tmp_path / "paper/last.pt")["history"]
    assert [row["learning_rate"] for row in history[1:]] == [1e-4, 1e-4, 1e-5, 1e-5]
    assert history[:4] == load_checkpoint(uninterrupted[0] / "last.pt")["history"]


def test_fine_tuning_begins_with_the_checkpoints_weights(uninterrupted, small, tmp_path, call_script, monkeypatch):
    best, started = tmp_path / "best.pt", load_checkpoint(uninterrupted[0] / "best.pt")
    started["normalization"]["mean"] -= 1  # another than the dump's own
    started["weights"]["hidden.weight"] += 1  # others than the seed's
    save(best, started)
    arguments = ["--data", small, "--experiments", tmp_path, *TINY, "--epochs", 0, "--start-from", best, "--name"]
    done = call_script("trainer.py", *arguments, "same").stdout
    assert "its own last layer" in done and "of the test clips" not in done
    same = load_checkpoint(tmp_path / "same/best.pt")
    assert same_checkpoint(same["weights"], started["weights"])
    assert same_checkpoint(same["normalization"], started["normalization"])
    assert same["hyperparameters"]["start_from"] == str(best)
    done = call_script("trainer.py", *arguments, "other", "--n-tags", 2).stdout  # whose split differs too
    assert "a fresh last layer" in done and "has seen 3 clips for certain, 0 perhaps" in done
    other = load_checkpoint(tmp_path / "other/best.pt")["weights"]
    assert torch.equal(other["hidden.weight"], started["weights"]["hidden.weight"]) and len(other["head.bias"]) == 2
    monkeypatch.setitem(NETWORKS, "mine", MultiScaleCNN)
    save(best, {**started, "hyperparameters": started["hyperparameters"] | {"network": "mine"}})
    error = call_script("trainer.py", *arguments, "mine", status=1).stderr
    assert error == "error: --start-from: that checkpoint is of another network; give --network mine\n"
    os.unlink(best)
    assert "epoch   1" in call_script("trainer.py", *arguments, "same", "--resume", "--epochs", 1).stdout
    (tmp_path / "other chunks").mkdir()
    (tmp_path / "other data").mkdir()
    (tmp_path / "renewed").mkdir()
    write_dump(tmp_path / "other chunks", 20, n_chunks=5)
    write_dump(tmp_path / "other data", 20, seed=1, names=("harp", "drum", "fast"), n_of_a_track=2)
    own, renewed = Dump(small).fingerprint, write_dump(tmp_path / "renewed", 20, seed=1)
    assert same_clips(Dump(renewed).fingerprint, ["x", own]), "with other spectrograms"
    assert not same_clips(Dump(tmp_path / "other data").fingerprint, ["x", own])
    once, twice = tmp_path / "same/last.pt", tmp_path / "twice/best.pt"
    arguments = ["--experiments", tmp_path, *TINY, "--epochs", 0, "--n-tags", 2, "--start-from"]
    done = call_script("trainer.py", *arguments, once, "--data", tmp_path / "other chunks", "--name", "twice").stdout
    assert "has seen 3 clips for certain, 0 perhaps" in done
    done = call_script("trainer.py", *arguments, twice, "--data", tmp_path / "other data", "--name", "thrice").stdout
    assert "has seen 0 clips for certain, 3 perhaps (equal ids in other data)" in done
    of_each = [load_checkpoint(path)["clip_ids"] for path in (uninterrupted[0] / "best.pt", once, twice)]
    found = load_checkpoint(tmp_path / "thrice/best.pt")["seen_before"]
    assert [dump for dump, _ in found] == [Dump(small).fingerprint] * 3
    for (_, ids), clip_ids in zip(found, of_each, strict=True):
        assert all(torch.equal(ids[part], clip_ids[part]) for part in ("train", "validation"))


MY_NETWORK = """

class MyNetwork(nn.Module):  # with what could be in the way: no bias, weights without a gradient, a layer `top`
    def __init__(self, n_tags):
        super().__init__()
        self.top = nn.Conv2d(1, 4, (128, 9), stride=8, bias=False)
        self.norm, self.dropout = FeatureBatchNorm(4), BatchDropout(4, keep_probability=0.6)
        self.unused, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(4, n_tags)

    def forward(self, spectrograms):
        return self.head(self.dropout(self.norm(self.top(spectrograms).amax(dim=(2, 3)))))


"""


def changed_as_the_readme_says(folder):
    """Copy the scripts into `folder` and make the changes of README.md's section on changing the experiment."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    section = (ROOT / "README.md").read_text().partition("## Change the experiment")[2].partition("\n### ")[0]
    loss, optimizer, schedule, augmentation, networks = re.findall("```python\n(.*?)```", section, re.DOTALL)
    text = (folder / "trainer.py").read_text()
    for place, block in (
        (r"( +)loss = F\..*\n()", loss),
        (r"( +)optimizer = torch\.optim\.Adam\(.*\n()", optimizer),
        (r"( +)return settings\.learning_rate / .*\n()", schedule),
        (r"( +)(unread\.append\(training_step\(.*\n)", augmentation),  # which is kept
    ):
        text, n_places = re.subn(place, lambda found: textwrap.indent(block + found[2], found[1]), text)
        assert n_places == 1, place
    (folder / "trainer.py").write_text(text)
    with open(folder / "model.py", "a") as model:
        model.write(MY_NETWORK + networks)


def test_the_experiment_is_changed_where_the_readme_says(small, tmp_path):
    """The same on one process and on two; and each checkpoint is evaluated with the network that it was trained as."""
    changed_as_the_readme_says(tmp_path)

    def call(*command):
        words = [*map(str, command), "--device", "cpu"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done

    trainer, evaluate = ([sys.executable, script] for script in ("trainer.py", "evaluate.py"))
    start, mine = ["--data", small, *TINY, "--split-seed", 1], ["--network", "mine", "--precision", "float64"]
    call(*trainer, *start, *mine, "--name", "mine", "--epochs", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "trainer.py"]
    call(*torchrun, *start, *mine, "--name", "pair", "--epochs", 2)
    one, two = (torch.load(tmp_path / f"experiments/{name}/last.pt", weights_only=True) for name in ("mine", "pair"))
    assert [row["learning_rate"] for row in one["history"][1:]] == pytest.approx([1e-4, 5e-5])
    assert all((weights - two["weights"][name]).abs().max() < 1e-12 for name, weights in one["weights"].items())
    assert one["hyperparameters"]["network"] == "mine" and not one["weights"]["unused"].any()

    compared = call(*evaluate, "--name", "mine", "--against", "pair", "--resamples", 9).stdout
    assert "mine - pair, 9 test clips of both" in compared
    with pytest.raises(InputError, match="not model.py's mine"):
        load_checkpoint(tmp_path / "experiments/mine/best.pt")


def test_what_could_not_be_loaded_is_not_saved(small, tmp_path, call_script, monkeypatch):
    """It is said before the first epoch: an experiment must not be lost at its end."""
    arguments = ["--data", small, "--experiments", tmp_path / "experiments", *TINY, "--epochs", 0]
    for name, replacement, said in (
        ("made_with", lambda *_: [np.float64(1)], "last.pt: holds a numpy._core.multiarray.scalar, which is not safe"),
        (
            "build_network",
            lambda n_tags, _: SmallNetwork(n_tags),
            "last.pt: not model.py's MultiScaleCNN; each network needs",
        ),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"trainer.{name}", replacement)
            error = call_script("trainer.py", *arguments, status=1).stderr
            assert said in error and error.count("\n") == 1
            assert not (tmp_path / "experiments").exists()
    monkeypatch.setattr("trainer.learning_rate_at", lambda epoch, _: 1e-3 * np.cos(epoch))
    call_script("trainer.py", *arguments)


def test_outputs_that_are_not_finite_are_one_line(small, tmp_path, call_script, monkeypatch):
    monkeypatch.setattr("trainer.initialize", lambda net, rng: net.head.bias.data.fill_(torch.nan))
    error = call_script("trainer.py", "--data", small, "--experiments", tmp_path, *TINY, status=1).stderr
    assert "outputs are not finite" in error and error.count("\n") == 1


def test_only_one_of_two_trainers_gets_the_folder(small, tmp_path, call_script):
    (tmp_path / "paper").mkdir()
    with lock(tmp_path / "paper/last.pt"):  # as another trainer would
        error = call_script("trainer.py", "--data", small, "--experiments", tmp_path, *TINY, status=1).stderr
    assert "last.pt: in use by another process" in error and error.count("\n") == 1


def test_synonyms_are_merged_unless_told_otherwise_and_evaluated_as_trained(tmp_path, call_script):
    dump = Dump(write_dump(tmp_path, n_clips=20, names=("guitar", "metal", "guitars")))
    guitar, metal, guitars = dump.labels.T
    for name, option, names, labels in (
        ("merged", "--merge-tags", ["guitar", "metal"], [guitar | guitars, metal]),
        ("unmerged", "--no-merge-tags", ["guitars", "guitar", "metal"], [guitars, guitar, metal]),
    ):
        place = "--data", tmp_path, "--experiments", tmp_path, "--name", name
        printed = call_script("trainer.py", *place, *TINY, "--epochs", 0, option).stdout
        assert ("merged     guitar + guitars = guitar\n" in printed) == (name == "merged")
        checkpoint = load_checkpoint(tmp_path / name / "best.pt")
        assert checkpoint["tag_names"] == names
        assert np.array_equal(clips_of(checkpoint, dump, other_data=False)[0].T, labels)


def test_a_validation_set_without_any_score_keeps_the_last_epoch(tmp_path, call_script):
    write_dump(tmp_path, n_clips=3)
    done = call_script("trainer.py", "--device", "cpu", "--data", tmp_path, "--experiments", tmp_path, "--epochs", 1)
    assert "3 clips are too few for the paper's" in done.stdout
    assert "validation ROC-AUC undefined (epoch 1), test ROC-AUC undefined" in done.stdout
    done = call_script("evaluate.py", "--device", "cpu", "--data", tmp_path, "--experiments", tmp_path)
    assert "ROC-AUC            undefined" in done.stdout and "nan" not in done.stdout
    json.loads((tmp_path / "paper/results.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN


def test_labels_that_were_corrected_after_the_dump_are_not_ignored_in_silence(small, tmp_path, call_script):
    data = shutil.copytree(small, tmp_path / "data")
    arguments = ["--data", data, "--experiments", tmp_path]
    assert "has changed" not in call_script("trainer.py", *arguments, *TINY, "--epochs", 0).stdout
    (data / "tags.csv").write_text((data / "tags.csv").read_text().replace("\t1\t", "\t0\t"))
    for command in (["trainer.py", *arguments, *TINY, "--epochs", 0, "--overwrite"], ["evaluate.py", *arguments]):
        printed = call_script(*command).stdout
        assert "tags.csv has changed; gen_spectrograms.py renews the dump's tags\n" in printed


def test_where_a_run_may_not_write_is_said_before_it_computes(uninterrupted, small, tmp_path, call_script, monkeypatch):
    folder = uninterrupted[0]
    monkeypatch.setattr(evaluate.Dump, "verify", lambda *_: pytest.fail("it computes"))
    monkeypatch.setattr(os, "access", lambda path, _: path != folder)
    arguments = ["--data", small, "--checkpoint", folder / "best.pt"]
    error = call_script("evaluate.py", *arguments, status=1).stderr
    assert error == f"error: {folder}: not writable, and the results go there; --output names another folder\n"
    monkeypatch.undo()
    before = contents(folder)
    call_script("evaluate.py", *arguments, "--output", tmp_path / "elsewhere", "--resamples", 9)
    assert contents(folder) == before and (tmp_path / "elsewhere/results.json").exists()
