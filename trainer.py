"""Train the paper's network on a dump of spectrograms, and report its ROC-AUC as the paper does.

The defaults are the original's. Writes to experiments/<name>/: best.pt (the checkpoint of the best validation score),
last.pt (everything that --resume needs), hyperparameters.json, history.csv (a row per epoch) and curves.png.
With several GPUs or machines: torchrun --nproc-per-node=N trainer.py trains the same experiment.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

from lib.checkpoint import load_checkpoint, restore, resume_state, save, take_weights
from lib.common import ROOT, Range, run, settings_from_command_line
from lib.dump import Dump, band_normalization
from lib.experiment import claimed_folder, hyperparameters, require_same_clips, write_outputs
from lib.feeder import Feeder, predict
from lib.parallel import autocast, choose_device, from_main_process, is_main_process, joined_processes, prepare_device
from lib.parallel import remedy_for_full_gpu, share_of_this_process, sum_gradients
from lib.report import Losses, print_epoch, print_scores, print_summary
from lib.scores import macro, roc_auc
from lib.splits import divide_clips, epoch_batches, split_clips  # noqa: F401 - split_clips: for other programs
from model import MultiScaleCNN, initialize
from tags import select_tags


@dataclass(frozen=True)
class Settings:
    # where
    data: Path = ROOT / "data"  # folder with the dump that gen_spectrograms.py made
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: str = "paper"  # this experiment's folder in it
    resume: bool = False  # go on from last.pt (or begin, if there is none)
    overwrite: bool = False  # begin anew over an existing experiment
    start_from: Path | None = None  # a checkpoint to fine-tune: its weights and normalisation instead of fresh ones

    # tags and clips
    n_tags: Annotated[int, Range(1)] = 50  # the most frequent over all clips
    merge_tags: bool = True  # merge synonyms first; other papers that use the folder split do not
    split: Literal["random", "folder", "artist"] = "random"  # random is the paper's; README.md compares them
    train_size: Annotated[int, Range(1)] = 18000  # clips, for the random and artist splits; the rest is for the test
    validation_size: Annotated[int, Range(1)] = 2000  # clips
    normalize_on: Literal["all", "train"] = "all"  # clips whose mean and deviation normalise each mel band

    # optimisation
    learning_rate: Annotated[float, Range(1e-12, 10)] = 0.001  # Adam's, with betas 0.9 and 0.999 and epsilon 1e-8
    drop_after: Annotated[tuple[int, ...], Range(1)] = (20, 30, 35)  # epochs after which it is divided by ten
    epochs: Annotated[int, Range(0)] = 40  # passes over the training clips
    batch_size: Annotated[int, Range(1)] = 32  # clips a step
    super_batch_size: Annotated[int, Range(1)] = 3000  # clips; batches never cross its end, so its last one is smaller
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1337  # of weights, split and order (NumPy), and of dropout (PyTorch)

    # machine
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name, such as cuda:1
    precision: Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: mixed with float32; float64: for tests
    tf32: bool = True  # in float32 on CUDA, let matrix products round their inputs to TF32


CLIPS_AHEAD = 512  # are read before they are needed: 160 MB


def main():
    settings = settings_from_command_line(Settings, __doc__)
    device = choose_device(settings.device)
    dtype = prepare_device(device, settings.precision, settings.tf32)
    with joined_processes(device), claimed_folder(settings) as (folder, saved), remedy_for_full_gpu(device):
        train(settings, device, dtype, folder, saved)


def train(settings, device, dtype, folder, saved):
    """Run the experiment, or what is left of it after the checkpoint `saved`, and print its scores."""
    dump = Dump(settings.data)
    labels, tag_names = select_tags(dump.labels, dump.tag_names, settings.n_tags, settings.merge_tags)

    torch.manual_seed(settings.seed)
    rng = np.random.RandomState(settings.seed)  # one generator draws weights, split and order, in this order
    net = MultiScaleCNN(len(tag_names)).to(dtype)
    initialize(net, rng)
    parts = divide_clips(settings, dump, rng)
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate, fused=True)

    experiment = {
        "tag_names": tag_names,
        "front_end": dump.front_end,
        "hyperparameters": hyperparameters(settings),
        "clip_ids": {part: torch.from_numpy(np.sort(dump.ids[rows])) for part, rows in parts.items()},
        "dump": dump.fingerprint,
        "synthetic": dump.synthetic,
    }
    history = []
    source = saved or (load_checkpoint(settings.start_from) if settings.start_from else None)
    if saved:
        require_same_clips(saved, experiment, settings.data)
        restore(saved, net, optimizer, parts["train"], rng, device)
        history = saved["history"]
    elif source:
        take_weights(source, net, experiment)

    def normalization():
        sums, squares = dump.band_sums()  # reads the whole dump, and compares its checksums
        rows = parts["train"] if settings.normalize_on == "train" else slice(None)
        return band_normalization(sums[rows], squares[rows])

    mean, std = from_main_process(normalization)
    if source:
        mean, std = (source["normalization"][name].numpy() for name in ("mean", "std"))
    experiment["normalization"] = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
    n_ahead = CLIPS_AHEAD // settings.batch_size
    feeder = Feeder(dump, labels, (mean, std), device, getattr(torch, settings.precision), n_ahead)
    n_steps = len(epoch_batches(parts["train"], settings.batch_size, settings.super_batch_size))
    print_summary(settings, experiment, dump, net, device, n_steps, n_done=len(history[1:]))

    def score(rows):
        """Return the macro ROC-AUC over all `rows` at once; NaN if no tag has one."""
        with autocast(device, settings.precision):
            return macro(roc_auc(labels[rows], predict(net, feeder, rows, settings.batch_size)))

    def finish_epoch(epoch, loss):
        """Validate, and write the checkpoints and what shows the progress."""
        if is_main_process():
            auc = score(parts["validation"])
            row = {"epoch": epoch, "learning_rate": learning_rate_at(max(epoch, 1), settings), "loss": loss}
            row["validation_roc_auc"] = None if np.isnan(auc) else float(auc)
            row["best"] = bool(np.isnan(auc)) or all(auc > past["validation_roc_auc"] for past in history)
            history.append(row)
            print_epoch(row)
            checkpoint = {**experiment, "weights": net.state_dict(), "history": history}
            state = resume_state(optimizer, parts["train"], rng, device)
            save(folder / "last.pt", {**checkpoint, "continuation": state})
            write_outputs(folder, checkpoint, is_last=epoch == settings.epochs)

    if not saved:
        finish_epoch(0, loss=None)
    elif is_main_process():
        write_outputs(folder, saved, is_last=True)  # a kill may have come between last.pt and these
    for epoch in range(max(1, len(history)), settings.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(epoch, settings)
        net.train()
        batches = epoch_batches(parts["train"], settings.batch_size, settings.super_batch_size)
        losses = Losses(epoch, len(batches), device)
        shares = [share_of_this_process(rows) for rows in batches]
        for rows, (spectrograms, targets) in zip(batches, feeder.batches(shares)):
            losses.append(training_step(net, optimizer, spectrograms, targets, len(rows), settings.precision))
        rng.shuffle(parts["train"])
        finish_epoch(epoch, losses.mean())

    if is_main_process():
        best = load_checkpoint(folder / "best.pt")
        net.load_state_dict(best["weights"])
        print_scores(best, score(parts["test"]))


def training_step(net, optimizer, spectrograms, targets, n_clips, precision):
    """Take one step on this process's share of a batch of `n_clips`; return its part of the loss, 0-d, unread."""
    with autocast(spectrograms.device, precision):
        logits = net(spectrograms)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / (n_clips * targets.shape[1])
    optimizer.zero_grad()
    loss.backward()
    sum_gradients(net)
    optimizer.step()
    return loss.detach()


def learning_rate_at(epoch, settings):
    """Return the learning rate of an epoch, counted from 1."""
    return settings.learning_rate / 10 ** sum(epoch > drop for drop in settings.drop_after)


if __name__ == "__main__":
    run(main, "after the last epoch printed, the same command with --resume, without --overwrite, goes on")
