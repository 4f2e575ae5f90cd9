"""Train the paper's network on a dump of spectrograms, and report its ROC-AUC as the paper does.

The defaults are the original's. Writes to experiments/<name>/: best.pt (the checkpoint of the best validation score),
last.pt (everything that --resume needs), hyperparameters.json, history.csv (a row per epoch) and curves.png.
With several GPUs or machines: torchrun --nproc-per-node=N trainer.py trains the same experiment.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.common import ROOT, Count, FromPython, InputError, Seed, number, progress, run

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from lib.checkpoint import cautions, load_checkpoint, made_with, resume, resume_state, save, start_from
from lib.dump import Dump, band_normalization
from lib.experiment import claimed_folder, hyperparameters, require_same, saved_settings, write_outputs
from lib.graph import Graphed
from lib.loader import Loader, predict
from lib.parallel import all_reduce_gradients, autocast, choose_device, from_rank_0, joined_processes, prepare_device
from lib.parallel import rank, share_of_batch, world_size
from lib.published import published
from lib.scores import best_thresholds, format_score, macro, roc_auc
from lib.splits import divide_clips, epoch_batches, split_clips  # noqa: F401 - one is re-exported
from model import NETWORKS, all_reduce, build_network, initialize
from tags import select_tags, synonyms_among


@dataclass(frozen=True)
class Settings(FromPython):
    # where
    data: Path = ROOT / "data"  # folder with the dump that gen_spectrograms.py made
    experiments: Path = ROOT / "experiments"  # folder of all experiments
    name: str = "paper"  # this experiment's folder in it
    resume: bool = False  # continue from last.pt, with its settings; without one, begin
    overwrite: bool = False  # replace an existing experiment
    start_from: Path | None = None  # a checkpoint to fine-tune: its weights and normalisation

    # tags and clips
    n_tags: Count = 50  # the most frequent over all clips
    merge_tags: bool = True  # merge synonyms first; other papers that use the folder split do not
    split: Literal["random", "folder", "artist"] = "random"  # random is the paper's; README.md compares them
    train_size: Count = 18000  # clips, in the random and artist splits
    validation_size: Count = 2000  # clips; what training and validation leave is the test set
    untagged: bool = True  # keep clips that have none of the tags; other papers mostly leave them out
    split_seed: Seed = None  # draws the split instead of --seed, so that other seeds have the same clips
    normalize_on: Literal["all", "train"] = "all"  # clips that give the mean and deviation of each mel band

    # network and optimisation
    network: Literal[tuple(NETWORKS)] = "MultiScaleCNN"  # of model.py
    learning_rate: number(float, 1e-12, 10) = 0.001  # Adam's, with betas 0.9 and 0.999 and epsilon 1e-8
    drop_after: tuple[Count, ...] = (20, 30, 35)  # divide the learning rate by ten after each of these epochs
    epochs: number(int, 0) = 40  # passes over the training clips
    batch_size: Count = 32  # clips per step
    super_batch_size: Count = 3000  # clips; no batch spans two, so the last batch of each may be smaller
    seed: Seed = 1337  # of weights, split and order of clips (NumPy), and of dropout (PyTorch)

    # machine
    device: str = "auto"  # auto (CUDA, else Apple's mps, else cpu), or one of them by name, such as cuda:1
    precision: Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: mixed with float32; float64: for tests
    tf32: bool = True  # in float32 on CUDA, round the inputs of matrix products to TF32


STEPS_PER_READING = 20  # steps between readings of the loss on a GPU; each waits for the GPU


def main(settings=None):
    if settings is None:
        settings = tyro.cli(Settings, description=__doc__)
        if settings.resume:  # what the command line leaves out is then last.pt's
            settings = tyro.cli(Settings, description=__doc__, default=saved_settings(settings))
    train(settings)


def train(settings):
    """Run the experiment of `settings`, or what is left of it, and print and return its scores."""
    device, dump = choose_device(settings.device), Dump(settings.data)
    with joined_processes(device), claimed_folder(settings) as (folder, last):
        return run_experiment(settings, dump, device, folder, last)


def run_experiment(settings, dump, device, folder, last):
    """Run the experiment, or what is left of it after the checkpoint `last`; print its scores, and return them."""
    # ====== data and network: one generator draws the weights, then the split, then the clips' order ======
    torch.manual_seed(settings.seed)
    rng = np.random.RandomState(settings.seed)
    labels, tag_names = select_tags(dump.labels, dump.tag_names, settings.n_tags, settings.merge_tags)
    dtype = prepare_device(device, settings.precision, settings.tf32)
    torch.backends.cudnn.benchmark = True  # on CUDA, choose each convolution's algorithm by trying
    net = build_network(len(tag_names), settings.network).to(dtype)
    initialize(net, rng)
    parts = divide_clips(settings, dump, labels, rng)

    # ====== optimiser ======
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate, fused=True)

    # ====== what a checkpoint holds; last.pt also has a "continuation", see resume_state ======
    checkpoint = {
        "weights": net.state_dict(),  # the network's own tensors: always the current ones
        "tag_names": tag_names,  # in the order of the outputs
        "thresholds": None,  # one per tag, (tags,) float64: see validate
        "normalization": None,  # "mean" and "std" per mel band, (128,) float32 each: see below
        "front_end": dump.front_end,  # what the spectrograms were made with (lib.audio.FRONT_END)
        "hyperparameters": hyperparameters(settings),
        "clip_ids": {part: torch.from_numpy(np.sort(dump.ids[rows])) for part, rows in parts.items()},  # int64
        "history": last["history"] if last else [],  # one dict per epoch so far; epoch 0 is before training
        "dump": dump.fingerprint,
        "seen_before": last["seen_before"] if last else [],  # [(dump, clip_ids), ...] of what it started from
        "synthetic": dump.synthetic,  # trained on the demo
        "made_with": made_with(device, dump, last),  # commit, versions and machine, a line for each start
    }
    history = checkpoint["history"]

    # ====== resume, or start from another checkpoint's weights ======
    source = last
    if last:
        may_differ = {"epochs", "train_size", "validation_size"}  # the clips themselves are compared
        require_same(last, checkpoint, may_differ, f"{folder / 'last.pt'}: resumes only as it began, and this differs")
        resume(last, net, optimizer, parts["train"], rng)
    elif settings.start_from:
        source = load_checkpoint(settings.start_from)
        start_from(source, checkpoint, net)

    # ====== normalisation ======
    rows = parts["train"] if settings.normalize_on == "train" else slice(None)
    mean, std = from_rank_0(lambda: band_normalization(*dump.verify()[:, rows]))
    computed = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
    checkpoint["normalization"] = source["normalization"] if source else computed
    loader = Loader(dump, labels, checkpoint["normalization"], device, settings.precision)
    uses_graph = device.type == "cuda" and world_size() == 1 and hasattr(net, "draw")
    compute = Graphed(compute_gradients) if uses_graph else compute_gradients
    print_summary(settings, checkpoint, dump, net, device)

    # ====== epochs ======
    if last and rank() == 0:
        write_outputs(folder, last, is_last=True)  # the last run may have been killed before it wrote these
    for epoch in range(len(history), settings.epochs + 1):
        learning_rate, loss = float(learning_rate_at(epoch, settings)), None
        if epoch > 0:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            batches = epoch_batches(parts["train"], settings.batch_size, settings.super_batch_size)
            loss = train_epoch(net, optimizer, loader, batches, epoch, compute)
            rng.shuffle(parts["train"])
        if rank() == 0:
            auc, checkpoint["thresholds"] = validate(net, loader, labels, parts["validation"], settings)
            row = {"epoch": epoch, "learning_rate": learning_rate, "loss": loss, "validation_roc_auc": auc}
            row["best"] = auc is None or all(auc > past["validation_roc_auc"] for past in history)
            history.append(row)
            printed = "" if loss is None else f"loss {loss:.4f}  "
            print(f"epoch {epoch:3}  {printed}validation ROC-AUC {format_score(auc)}{'  best' if row['best'] else ''}")
            save(folder / "last.pt", {**checkpoint, "continuation": resume_state(optimizer, parts["train"], rng)})
            write_outputs(folder, checkpoint, is_last=epoch == settings.epochs)

    # ====== test ======
    if rank() == 0:
        best = load_checkpoint(folder / "best.pt")
        net.load_state_dict(best["weights"])
        (test, _), chosen = validate(net, loader, labels, parts["test"], settings), best["history"][-1]
        validation = f"{format_score(chosen['validation_roc_auc'])} (epoch {chosen['epoch']})"
        print(f"best validation ROC-AUC {validation}, test ROC-AUC {format_score(test)}")
        print(*cautions(best), published(best), sep="\n")
        return {"epoch": chosen["epoch"], "validation_roc_auc": chosen["validation_roc_auc"], "test_roc_auc": test}


def print_summary(settings, checkpoint, dump, net, device):
    n_tags, n_done = len(checkpoint["tag_names"]), len(checkpoint["history"][1:])
    train, validation, test = (f"{len(ids):,}" for ids in checkpoint["clip_ids"].values())
    fewer = f" (all there are; {settings.n_tags} were asked for)" if n_tags < settings.n_tags else ""
    bad = f"; {dump.n_bad:,} could not be decoded: used as zeros, as in the original" if dump.n_bad else ""
    tf32 = device.type == "cuda" and settings.precision == "float32" and settings.tf32
    print(f"data       {settings.data}{' (synthetic)' if dump.synthetic else ''}")
    print(f"clips      {train} training, {validation} validation, {test} test{bad}")
    print(f"tags       {n_tags} tags{fewer}")
    if settings.merge_tags and (merged := synonyms_among(dump.tag_names)):
        print("merged    ", ", ".join(f"{' + '.join(names)} = {name}" for name, names in merged.items()))
    print(end=dump.note_on_table())
    print(f"network    {settings.network}, {sum(weights.numel() for weights in net.parameters()):,} parameters")
    print(f"machine    {device}, {settings.precision}{' with TF32 matrix products' * tf32}, {world_size()} process(es)")
    print(f"seeds      --seed {settings.seed}, --split-seed {settings.split_seed}")
    print(f"schedule   epochs {n_done + 1} to {settings.epochs}, learning rate {settings.learning_rate:g} at first")


def train_epoch(net, optimizer, loader, batches, epoch, compute):
    """Take a step on each batch, an array of rows; return the mean loss. Raises InputError if a loss is not finite."""
    net.train()
    losses, unread = [], []
    steps_per_reading = 1 if loader.device.type == "cpu" else STEPS_PER_READING
    shares = loader.batches([share_of_batch(rows) for rows in batches])
    bar = progress(shares, f"epoch {epoch}", len(batches), unit="step", leave=False, disable=True if rank() else None)
    for step, (rows, (spectrograms, targets)) in enumerate(zip(batches, bar), start=1):
        unread.append(training_step(net, optimizer, compute, spectrograms, targets, len(rows), loader.precision))
        if len(unread) == steps_per_reading or step == len(batches):
            losses += all_reduce(torch.stack(unread)).tolist()
            unread = []
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if not np.isfinite(losses[-1]):
                raise InputError(f"epoch {epoch}, step {step}: the loss is {losses[-1]}; try a lower --learning-rate")
    return float(np.mean(losses))


def training_step(net, optimizer, compute, *batch):
    """Take one step on a batch, by `compute`: compute_gradients, or a CUDA graph of it. Returns what it returns."""
    loss = compute(net, *batch)
    all_reduce_gradients(net)
    optimizer.step()
    return loss


def compute_gradients(net, spectrograms, targets, n_clips, precision):
    """Compute the gradients of this process's share of a batch of `n_clips`. Returns its part of the loss, 0-d."""
    with autocast(spectrograms.device, precision):
        logits = net(spectrograms)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / (n_clips * targets.shape[1])
    net.zero_grad()
    loss.backward()
    return loss.detach()


def validate(net, loader, labels, rows, settings):
    """Return (macro ROC-AUC over all `rows` at once, or None if no tag has one; best_thresholds there: (tags,))."""
    predictions = predict(net, loader, rows, settings.batch_size)
    auc = macro(roc_auc(labels[rows], predictions))
    return None if np.isnan(auc) else float(auc), torch.from_numpy(best_thresholds(labels[rows], predictions))


def learning_rate_at(epoch, settings):
    """Return the learning rate of an epoch; the first is 1."""
    return settings.learning_rate / 10 ** sum(epoch > drop for drop in settings.drop_after)


if __name__ == "__main__":
    run(main, "the same command with --resume, without --overwrite, resumes after the last epoch printed")
