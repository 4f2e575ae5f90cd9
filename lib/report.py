"""What a run of the trainer prints: a summary, the loss, and each epoch's score."""

import numpy as np
import torch

from lib.common import InputError, progress
from lib.parallel import is_main_process, n_processes, note_idle_cores, note_speed_of_bfloat16, sum_over_processes
from lib.scores import compare_with_paper, format_score

STEPS_PER_READING = 100  # of the loss, on a GPU, which has to wait for each


def print_summary(settings, experiment, dump, net, device, n_steps, n_done):
    n_tags = len(experiment["tag_names"])
    fewer = f" (all there are; {settings.n_tags} were asked for)" if n_tags < settings.n_tags else ""
    tf32 = device.type == "cuda" and settings.precision == "float32" and settings.tf32
    rounding = " with TF32 matrix products" if tf32 else ""
    train, validation, test = (f"{len(ids):,}" for ids in experiment["clip_ids"].values())
    bad = f"; {dump.n_bad:,} are bad: all zeros, and used all the same, as in the original" if dump.n_bad else ""
    print(f"data       {settings.data}{' (synthetic)' if dump.synthetic else ''}")
    print(f"clips      {train} training, {validation} validation, {test} test{bad}")
    print(f"tags       {n_tags} tags{fewer}")
    print(f"network    {sum(weights.numel() for weights in net.parameters()):,} parameters")
    print(f"machine    {device}, {settings.precision}{rounding}, {n_processes()} process(es)")
    print(f"schedule   {settings.epochs} epochs of {n_steps:,} steps, learning rate {settings.learning_rate:g}")
    if device.type == "cpu":
        note_speed_of_bfloat16(settings.precision)
        note_idle_cores()
    if n_done:
        print(f"resuming   after epoch {n_done}")


class Losses:
    """The loss of each step of an epoch. A GPU has to wait where one is read, so that is done only now and then."""

    def __init__(self, epoch, n_steps, device):
        self.epoch, self.values, self.unread = epoch, [], []
        self.steps_per_reading = 1 if device.type == "cpu" else STEPS_PER_READING
        silent = None if is_main_process() else True  # None: unless the output is a terminal
        self.bar = progress(desc=f"epoch {epoch}", total=n_steps, unit="step", leave=False, disable=silent)

    def append(self, loss):
        """Add this process's part of a step's loss, 0-d. Raises InputError at one that turns out not to be finite."""
        self.unread.append(loss)
        self.bar.update()
        if len(self.unread) == self.steps_per_reading:
            self._read()

    def _read(self):
        for loss in sum_over_processes(torch.stack(self.unread)).tolist():
            self.values.append(loss)
            if not np.isfinite(loss):
                step = f"epoch {self.epoch}, step {len(self.values)}"
                raise InputError(f"{step}: the loss is {loss}; a lower --learning-rate may help")
        self.unread = []
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
