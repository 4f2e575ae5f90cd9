"""Train the paper's network on a dump of spectrograms, and report its ROC-AUC as the paper does.

The defaults are the original's. Writes to experiments/<name>/: best.pt (the checkpoint of the best validation score),
last.pt (everything that --resume needs), hyperparameters.json, history.csv (a row per epoch) and curves.png.
With several GPUs or machines: torchrun --nproc-per-node=N trainer.py trains the same experiment.
"""

import csv
import dataclasses
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common import ROOT, InputError, run, settings_from_command_line, whole_file
from dump import Dump, Feeder, band_normalization
from model import MultiScaleCNN, choose_device, initialize
from scores import PAPER_SIZES, compare_with_paper, macro, roc_auc, shown
from tagger import load_checkpoint, predict
from tags import clip_info_of, select_tags


@dataclass(frozen=True)
class Settings:
    # where
    data: Path = ROOT / "data"  # folder with the dump that gen_spectrograms.py made
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: str = "paper"  # this experiment's folder in it
    resume: bool = False  # go on from last.pt (or begin, if there is none)
    overwrite: bool = False  # begin anew over an existing experiment

    # tags and clips
    n_tags: int = 50  # the most frequent over all clips
    merge_tags: bool = True  # merge synonyms first; other papers that use the folder split do not
    split: Literal["random", "folder", "artist"] = "random"  # random is the paper's; README.md compares them
    train_size: int = 18000  # clips, for the random and artist splits; the rest is for the test
    validation_size: int = 2000  # clips
    normalize_on: Literal["all", "train"] = "all"  # clips whose mean and deviation normalise each mel band

    # optimisation
    learning_rate: float = 0.001  # Adam's, with betas 0.9 and 0.999 and epsilon 1e-8
    drop_after: tuple[int, ...] = (20, 30, 35)  # epochs after which the learning rate is divided by ten
    epochs: int = 40  # passes over the training clips
    batch_size: int = 32  # clips a step
    super_batch_size: int = 3000  # clips; batches never cross its end, so its last one is smaller
    seed: int = 1337  # of the weights, the split and the order (NumPy), and of the dropout (PyTorch)

    # machine
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name, such as cuda:1
    precision: Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: mixed with float32; float64: for tests
    tf32: bool = True  # in float32 on CUDA, let matrix products round their inputs to TF32
    compile: bool = False  # torch.compile the network: slower to start, faster after


SECONDS_BETWEEN_PICTURES = 10  # drawing the curves takes a third of one, which short epochs would feel
NOT_HYPERPARAMETERS = {"data", "experiments", "name", "resume", "overwrite", "device", "compile"}


def main():
    settings = settings_from_command_line(Settings, __doc__)
    device = join_processes(settings)
    folder = settings.experiments / settings.name
    saved = claim_folder(folder, settings)
    meet()

    dump = Dump(settings.data)
    warn_of_bad_clips(dump)
    training = Training(settings, dump, device)
    if saved:
        training.restore(saved)
    training.load_clips(dump)
    training.announce()

    if saved:
        training.write_the_rest(folder)  # a kill may have come between last.pt and these
    else:
        training.validate_and_save(folder, loss=None)
    for epoch in range(training.epoch + 1, settings.epochs + 1):
        loss = training.run_epoch(epoch)
        training.validate_and_save(folder, loss)
    training.report(folder)
    part()


# Before the first step


def join_processes(settings):
    """Return this process's device, after meeting the others if torchrun started several."""
    device = choose_device(settings.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def meet():
    """Wait for the other processes, so that none finds what another has begun to write."""
    if dist.is_initialized():
        dist.barrier()


def part():
    if dist.is_initialized():
        dist.destroy_process_group()


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    """Return whether this process is the one that writes, prints and validates."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    if is_main_process():
        print(text)


def claim_folder(folder, settings):
    """Return the checkpoint to resume from, or None to begin in an empty folder.

    Raises InputError where beginning would overwrite an experiment, or resuming would change its hyperparameters.
    """
    last = folder / "last.pt"
    if settings.overwrite and is_main_process():
        for path in (last, folder / "best.pt"):
            path.unlink(missing_ok=True)
    if settings.overwrite or not last.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return None
    if not settings.resume:
        raise InputError(
            f"{folder}: holds an experiment; --resume goes on, --overwrite begins anew, --name names another"
        )
    saved = load_checkpoint(last)
    if "continuation" not in saved:
        raise InputError(f"{last}: lacks the state that resuming needs; it is a copy of another checkpoint")
    now = hyperparameters(settings)
    differing = [
        f"{name} ({saved['hyperparameters'].get(name)} there, {value} now)"
        for name, value in now.items()
        if name not in NOT_HYPERPARAMETERS and saved["hyperparameters"].get(name) != value
    ]
    if differing:
        raise InputError(
            f"{last}: was begun with other hyperparameters: {', '.join(differing)}; use the same to resume"
        )
    return saved


def hyperparameters(settings):
    """Return the settings as JSON and checkpoints hold them."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def warn_of_bad_clips(dump):
    """Say that many clips are bad; raises InputError if most of them are."""
    if dump.n_bad > len(dump) / 2:
        raise InputError(
            f"{dump.data}: {dump.n_bad:,} of {len(dump):,} clips are bad (bad_clips.csv); too few to train on"
        )
    if dump.n_bad:
        say(
            f"note: {dump.n_bad:,} of {len(dump):,} clips are bad: all zeros, and used all the same, as in the original"
        )


def split_sizes(n_clips, train_size, validation_size):
    """Return (train, validation) sizes: those asked for, or the same proportions of a smaller data set.

    Raises InputError for fewer than three clips.
    """
    if n_clips > train_size + validation_size:
        return train_size, validation_size
    if n_clips < 3:
        raise InputError(f"{n_clips} clips can't be divided into training, validation and test")
    whole = train_size + validation_size + PAPER_SIZES["test"]
    validation = max(1, round(n_clips * validation_size / whole))
    train = min(round(n_clips * train_size / whole), n_clips - validation - 1)
    say(
        f"note: {n_clips:,} clips are too few for {train_size:,} + {validation_size:,}; divided in the same proportions"
    )
    return train, validation


def split_clips(n_clips, train_size, validation_size, rng):
    """Return (train, validation, test) rows, as the original draws them from `rng`, a numpy.random.RandomState."""
    rows = np.arange(n_clips)
    rng.shuffle(rows)
    test_end = n_clips - train_size
    return rows[test_end:], rows[:validation_size], rows[validation_size:test_end]


def split_by_folder(mp3_paths, rng):
    """Return (train, validation, test) rows: folders 0-b, c and d-f, as most other papers divide MagnaTagATune."""
    first = np.array([path.split("/")[0] for path in mp3_paths])
    foreign = sorted(set(first) - set("0123456789abcdef"))
    if foreign:
        raise InputError(f"--split folder: needs MagnaTagATune's folders 0 to f, but there is {foreign[0]!r}")
    train = np.flatnonzero(first < "c")
    rng.shuffle(train)
    return train, np.flatnonzero(first == "c"), np.flatnonzero(first > "c")


def split_by_artist(artists, train_size, validation_size, rng):
    """Return (train, validation, test) rows such that no artist is in two of them.

    Artists are taken in an order drawn from `rng`; each goes to validation if it still fits there, else to the
    test if it fits there, else to training.
    """
    names, artist_of_clip, n_clips_of = np.unique(artists, return_inverse=True, return_counts=True)
    room = {"validation": validation_size, "test": len(artists) - train_size - validation_size}
    part_of = np.empty(len(names), object)
    for artist in rng.permutation(len(names)):
        part_of[artist] = next((part for part, free in room.items() if n_clips_of[artist] <= free), "train")
        if part_of[artist] in room:
            room[part_of[artist]] -= n_clips_of[artist]
    train, validation, test = (
        np.flatnonzero(part_of[artist_of_clip] == part) for part in ("train", "validation", "test")
    )
    rng.shuffle(train)
    return train, validation, test


def divide_clips(settings, dump, rng):
    """Return (train, validation, test) rows of the dump by `settings.split`."""
    if settings.split == "folder":
        if dump.mp3_paths is None:
            raise InputError(
                f"{dump.data}: --split folder needs the clips' paths; make the dump with gen_spectrograms.py"
            )
        parts = split_by_folder(dump.mp3_paths, rng)
    else:
        sizes = split_sizes(len(dump), settings.train_size, settings.validation_size)
        if settings.split == "random":
            parts = split_clips(len(dump), *sizes, rng)
        else:
            artists = [clip.artist for clip in clip_info_of(settings.data, dump.ids)]
            parts = split_by_artist(np.array(artists), *sizes, rng)
    for name, rows in zip(("training", "validation", "test"), parts):
        if not len(rows):
            raise InputError(f"--split {settings.split}: leaves no clips for {name}")
    return parts


def epoch_batches(train, batch_size, super_batch_size):
    """Return the rows of each step of an epoch: `train` in its order, in batches that no super-batch's end cuts."""
    return [
        train[start : min(start + batch_size, end)]
        for first in range(0, len(train), super_batch_size)
        for end in (min(first + super_batch_size, len(train)),)
        for start in range(first, end, batch_size)
    ]


def learning_rate_at(epoch, settings):
    """Return the learning rate of an epoch, counted from 1."""
    return settings.learning_rate / 10 ** sum(epoch > drop for drop in settings.drop_after)


# Training


class Training:
    """One experiment under way: the network, its optimiser, the clips' order, and the history so far."""

    def __init__(self, settings, dump, device):
        self.settings, self.device = settings, device
        self.dtype = torch.float64 if settings.precision == "float64" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        labels, self.tag_names = select_tags(dump.labels, dump.tag_names, settings.n_tags, settings.merge_tags)
        self.labels = torch.from_numpy(labels).to(device, self.dtype)

        torch.manual_seed(settings.seed)
        self.rng = np.random.RandomState(settings.seed)  # one generator draws weights, split and order, in this order
        net = MultiScaleCNN(len(self.tag_names)).to(self.dtype)
        initialize(net, self.rng)
        self.train, self.validation, self.test = divide_clips(settings, dump, self.rng)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.net.parameters(), settings.learning_rate, fused=True)
        self.epoch, self.history = 0, []
        self.drawn_at = -np.inf
        self.record = self._record_of(dump)
        self.check_labels()

    def _record_of(self, dump):
        """Return what a checkpoint says besides the weights and the history."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "tag_names": self.tag_names,
            "front_end": dump.front_end,
            "hyperparameters": hyperparameters(self.settings),
            "clip_ids": {part: torch.from_numpy(np.sort(dump.ids[rows])) for part, rows in parts.items()},
            "dump": dump.fingerprint,
            "synthetic": dump.synthetic,
        }

    def check_labels(self):
        """Name the tags that validation can't score."""
        labels = self.labels[torch.from_numpy(self.validation)]
        one_class = (labels == labels[:1]).all(dim=0).tolist()
        names = [name for name, only in zip(self.tag_names, one_class) if only]
        if len(names) == len(self.tag_names):
            say("note: the validation clips agree on every tag, so no score can choose: the last epoch is kept")
        elif names:
            say(f"note: left out of the validation mean, because all its clips agree on them: {', '.join(names)}")

    def load_clips(self, dump):
        """Read the whole dump once, for its checksums and its normalisation, and make it ready to feed."""
        sums, squares = dump.band_sums()
        rows = self.train if self.settings.normalize_on == "train" else slice(None)
        mean, std = band_normalization(sums[rows], squares[rows])
        self.record["normalization"] = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
        n_ahead = -(-self.settings.super_batch_size // self.settings.batch_size)  # the next super-batch
        dtype = torch.bfloat16 if self.settings.precision == "bfloat16" else self.dtype
        self.feeder = Feeder(dump, (mean, std), self.device, dtype, n_ahead)
        if self.settings.compile:
            self.net.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")

    def announce(self):
        settings = self.settings
        n_steps = len(epoch_batches(self.train, settings.batch_size, settings.super_batch_size))
        tags = f"{len(self.tag_names)} tags"
        if len(self.tag_names) < settings.n_tags:
            tags += f" (all there are; {settings.n_tags} were asked for)"
        data = f"{settings.data} (synthetic)" if self.record["synthetic"] else f"{settings.data}"
        rounding = " with TF32 matrix products" if self.device.type == "cuda" and settings.tf32 else ""
        n_parameters = sum(weights.numel() for weights in self.net.parameters())
        say(f"data       {data}")
        say(f"clips      {len(self.train):,} training, {len(self.validation):,} validation, {len(self.test):,} test")
        say(f"tags       {tags}")
        say(f"network    {n_parameters:,} parameters")
        say(f"machine    {self.device}, {settings.precision}{rounding}, {n_processes()} process(es)")
        say(f"schedule   {settings.epochs} epochs of {n_steps:,} steps, learning rate {settings.learning_rate:g}")
        if self.epoch:
            say(f"resuming   after epoch {self.epoch}")

    def run_epoch(self, epoch):
        """Train for one epoch, shuffle for the next, and return the mean loss over its steps.

        Raises InputError at the first step whose loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(epoch, self.settings)
        self.net.train()
        batches = epoch_batches(self.train, self.settings.batch_size, self.settings.super_batch_size)
        shares = [share_of_this_process(rows) for rows in batches]
        read_every = 1 if self.device.type == "cpu" else 100  # steps; reading a loss makes a GPU wait
        losses = []
        progress = tqdm(batches, desc=f"epoch {epoch}", unit="step", leave=False, disable=not is_main_process())
        for step, (rows, share, clips) in enumerate(zip(progress, shares, self.feeder.batches(shares)), start=1):
            losses.append(self.train_step(clips, share, len(rows)))
            if step % read_every == 0 or step == len(batches):
                progress.set_postfix(loss=f"{self.check_losses(losses, epoch, step):.4f}")
        self.rng.shuffle(self.train)
        self.epoch = epoch
        return float(np.mean(losses))

    def train_step(self, clips, rows, n_clips):
        """Take one step on this process's `rows` of a batch of `n_clips`; return its part of the loss, 0-d."""
        labels = self.labels[torch.from_numpy(rows).to(self.device)]
        with self.autocast():
            logits = self.net(clips).to(labels.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / (n_clips * labels.shape[1])
        self.optimizer.zero_grad()
        loss.backward()
        sum_gradients(self.net)
        self.optimizer.step()
        return loss.detach()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def check_losses(self, losses, epoch, step):
        """Replace the 0-d tensors at the end of `losses` by numbers, and return the last.

        Raises InputError that names the step of the first that is not finite.
        """
        unread = [index for index, loss in enumerate(losses) if torch.is_tensor(loss)]
        values = torch.stack([losses[index] for index in unread])
        if n_processes() > 1:
            dist.all_reduce(values)
        for index, value in zip(unread, values.tolist()):
            if not np.isfinite(value):
                raise InputError(
                    f"epoch {epoch}, step {index + 1}: the loss is {value}; a lower --learning-rate may help "
                    f"(last.pt is as it was after epoch {epoch - 1})"
                )
            losses[index] = value
        return losses[-1]

    def validate_and_save(self, folder, loss):
        """Score the network on the validation clips, and write the checkpoints and what shows the progress."""
        if not is_main_process():
            return
        auc = self.score(self.validation)
        best = auc is None or all(auc > past["validation_roc_auc"] for past in self.history)
        row = {
            "epoch": self.epoch,
            "learning_rate": learning_rate_at(max(self.epoch, 1), self.settings),
            "loss": loss,
            "validation_roc_auc": auc,
            "best": best,
        }
        self.history.append(row)
        shown_loss = "" if loss is None else f"loss {loss:.4f}  "
        say(f"epoch {self.epoch:3}  {shown_loss}validation ROC-AUC {shown(auc)}{'  best' if best else ''}")
        save(folder / "last.pt", {**self.checkpoint(), "continuation": self.continuation()})
        self.write_the_rest(folder)

    def write_the_rest(self, folder):
        """Write what follows from the state that last.pt holds."""
        if not is_main_process():
            return
        from figures import training_curves  # matplotlib takes a while to import

        if self.history[-1]["best"]:
            save(folder / "best.pt", self.checkpoint())
        with whole_file(folder / "hyperparameters.json", "w", encoding="utf-8") as file:
            json.dump(self.record["hyperparameters"], file, indent=1)
        with whole_file(folder / "history.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, self.history[0])
            table.writeheader()
            table.writerows(self.history)
        is_last = self.epoch == self.settings.epochs
        if is_last or time.monotonic() - self.drawn_at > SECONDS_BETWEEN_PICTURES:
            training_curves(folder / "curves.png", self.history, synthetic=self.record["synthetic"])
            self.drawn_at = time.monotonic()

    def score(self, rows):
        """Return the macro ROC-AUC on `rows`, over all of them at once; None if no tag has one."""
        with self.autocast():
            probabilities = predict(self.net, self.feeder, rows, self.settings.batch_size)
        auc = macro(roc_auc(self.labels[torch.from_numpy(rows)].cpu().numpy(), probabilities))
        return None if np.isnan(auc) else float(auc)

    def checkpoint(self):
        return {**self.record, "weights": self.net.state_dict(), "history": self.history}

    def continuation(self):
        """Return what resuming needs besides the checkpoint."""
        numpy_state = self.rng.get_state(legacy=False)
        return {
            "optimizer": self.optimizer.state_dict(),
            "train_order": torch.from_numpy(self.train),
            "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "numpy_rest": [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
            "torch_rng": torch.get_rng_state(),
            "device_rng": None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state(),
        }

    def restore(self, saved):
        """Take up the state of `saved`, a checkpoint with a continuation. Raises InputError if the data are others."""
        same_clips = all(torch.equal(ids, saved["clip_ids"][part]) for part, ids in self.record["clip_ids"].items())
        if saved["dump"] != self.record["dump"] or saved["tag_names"] != self.tag_names or not same_clips:
            raise InputError(f"{self.settings.data}: not the dump that this experiment was begun on")
        state = saved["continuation"]
        self.net.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.train = state["train_order"].numpy().copy()
        position, has_gauss, gauss = state["numpy_rest"]
        self.rng.set_state(("MT19937", state["numpy_key"].numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(state["torch_rng"])
        if state["device_rng"] is not None and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(state["device_rng"])
        self.history = saved["history"]
        self.epoch = self.history[-1]["epoch"]

    def report(self, folder):
        """Print the line that the paper reports: the best validation score, and that checkpoint's test score."""
        if not is_main_process():
            return
        best = load_checkpoint(folder / "best.pt")
        self.net.load_state_dict(best["weights"])
        chosen = best["history"][-1]
        validation, test = shown(chosen["validation_roc_auc"]), shown(self.score(self.test))
        say(f"best validation ROC-AUC {validation} (epoch {chosen['epoch']}), test ROC-AUC {test}")
        say(compare_with_paper(best))


def share_of_this_process(rows):
    """Return this process's rows of a global batch: consecutive, and as many as the others' but one at most."""
    return np.array_split(rows, n_processes())[dist.get_rank()] if dist.is_initialized() else rows


def sum_gradients(net):
    """Replace each process's gradients by their sum over all processes."""
    if n_processes() == 1:
        return
    gradients = [weights.grad for weights in net.parameters()]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    for gradient, part in zip(gradients, together.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def save(path, checkpoint):
    """Write a checkpoint that loads with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


if __name__ == "__main__":
    run(main, when_interrupted="the same command with --resume goes on after the last finished epoch")
