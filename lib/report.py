"""What a run of the trainer prints: notes on the data, a summary, the loss, and each epoch's score."""

import numpy as np
import torch

from lib.common import InputError, progress
from lib.parallel import is_main_process, n_processes, note_speed_of_bfloat16, print_once, sum_over_processes
from lib.scores import compare_with_paper, format_score

STEPS_PER_READING = 100  # of the loss, on a GPU, which has to wait for each


def note_bad_clips(dump):
    """Say that some clips are bad. Raises InputError if most of them are."""
    bad = f"{dump.n_bad:,} of {len(dump):,} clips are bad"
    if dump.n_bad > len(dump) / 2:
        raise InputError(f"{dump.data}: {bad} (bad_clips.csv); too few to train on")
    if dump.n_bad:
        print_once(f"note: {bad}: all zeros, and used all the same, as in the original")


def note_one_class_tags(labels, tag_names):
    """Name the tags that validation, whose `labels` these are, can't score."""
    names = [name for name, column in zip(tag_names, labels.T) if np.ptp(column) == 0]
    if len(names) == len(tag_names):
        print_once("note: the validation clips agree on every tag, so no score can choose: the last epoch is kept")
    elif names:
        print_once(f"note: left out of the validation mean, because all its clips agree on them: {', '.join(names)}")


def print_summary(settings, experiment, net, device, n_steps, first_epoch):
    n_tags = len(experiment["tag_names"])
    fewer = f" (all there are; {settings.n_tags} were asked for)" if n_tags < settings.n_tags else ""
    rounding = " with TF32 matrix products" if device.type == "cuda" and settings.tf32 else ""
    train, validation, test = (f"{len(ids):,}" for ids in experiment["clip_ids"].values())
    print_once(f"data       {settings.data}{' (synthetic)' if experiment['synthetic'] else ''}")
    print_once(f"clips      {train} training, {validation} validation, {test} test")
    print_once(f"tags       {n_tags} tags{fewer}")
    print_once(f"network    {sum(weights.numel() for weights in net.parameters()):,} parameters")
    print_once(f"machine    {device}, {settings.precision}{rounding}, {n_processes()} process(es)")
    print_once(f"schedule   {settings.epochs} epochs of {n_steps:,} steps, learning rate {settings.learning_rate:g}")
    if device.type == "cpu":
        note_speed_of_bfloat16(settings.precision)
    if first_epoch > 1:
        print_once(f"resuming   after epoch {first_epoch - 1}")


class Losses:
    """The loss of each step of an epoch. A GPU has to wait where one is read, so that is done only now and then."""

    def __init__(self, epoch, n_steps, device):
        self.epoch, self.values, self.unread = epoch, [], []
        self.steps_per_reading = 1 if device.type == "cpu" else STEPS_PER_READING
        options = {"unit": "step", "leave": False, "disable": not is_main_process()}
        self.bar = progress(desc=f"epoch {epoch}", total=n_steps, **options)

    def append(self, loss):
        """Add this process's part of a step's loss, 0-d. Raises InputError at one that turns out not to be finite."""
        self.unread.append(loss.clone())  # a replayed graph overwrites its loss
        self.bar.update()
        if len(self.unread) == self.steps_per_reading:
            self._read()

    def _read(self):
        first_step = len(self.values) + 1
        self.values += sum_over_processes(torch.stack(self.unread)).tolist()
        self.unread = []
        for step, loss in enumerate(self.values[first_step - 1 :], start=first_step):
            if not np.isfinite(loss):
                where = f"epoch {self.epoch}, step {step}"
                raise InputError(f"{where}: the loss is {loss}; a lower --learning-rate may help")
        self.bar.set_postfix(loss=f"{self.values[-1]:.4f}", refresh=False)

    def mean(self):
        if self.unread:
            self._read()
        self.bar.close()
        return float(np.mean(self.values))


def print_epoch(row):
    """Print a row of the history."""
    loss = "" if row["loss"] is None else f"loss {row['loss']:.4f}  "
    score = f"validation ROC-AUC {format_score(row['validation_roc_auc'])}"
    print(f"epoch {row['epoch']:3}  {loss}{score}{'  best' if row['best'] else ''}")


def print_scores(best, test_auc):
    """Print what the paper reports: the best validation score, and that checkpoint's test score."""
    chosen = best["history"][-1]
    validation = f"{format_score(chosen['validation_roc_auc'])} (epoch {chosen['epoch']})"
    print(f"best validation ROC-AUC {validation}, test ROC-AUC {format_score(test_auc)}")
    print(compare_with_paper(best))
