"""An experiment's folder: locked by one run, checked before that starts or resumes, and filled with its results."""

import contextlib
import dataclasses
import json
import time

import torch
import torch.distributed as dist

from lib.checkpoint import load_checkpoint, save
from lib.common import InputError, lock, optional_picture, whole_file, write_table
from lib.parallel import rank, world_size

MAY_DIFFER = {"data", "experiments", "name", "resume", "overwrite", "epochs", "device"}  # when a run resumes
# What belongs to a checkpoint besides last.pt; those from results.json on are evaluate.py's
OUTPUTS = "best.pt hyperparameters.json history.csv curves.png results.json per_tag.* correlations.png taggram_*.png"
OUTPUTS += " predictions_*.csv worth_a_listen.csv comparison.*"
SECONDS_BETWEEN_PICTURES = 10  # drawing the curves takes a third of one, too long after short epochs


@contextlib.contextmanager
def claimed_folder(settings):
    """Hold the experiment's folder for this run alone; yield (folder, the checkpoint to resume from or None)."""
    folder = settings.experiments / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "last.pt") if rank() == 0 else contextlib.nullcontext():
        if world_size() > 1:
            dist.barrier()  # the other processes read the folder only once it is locked
        yield folder, saved_experiment(folder, settings)


def saved_experiment(folder, settings):
    """Return the checkpoint to resume from, or None to begin.

    Raises InputError if that would overwrite an experiment, or resume one with other hyperparameters.
    """
    last, best = folder / "last.pt", folder / "best.pt"
    if settings.resume and settings.overwrite:
        raise InputError("--resume continues an experiment and --overwrite replaces it: give one of them")
    if settings.overwrite or not (last.exists() or best.exists()):
        return None
    if not settings.resume:
        raise InputError(f"{folder}: holds an experiment; --resume continues it, --overwrite replaces it")
    saved = load_checkpoint(last)
    if "continuation" not in saved:
        raise InputError(f"{last}: lacks the state that resuming needs; it is a copy of another checkpoint")
    then, now = hyperparameters(type(settings)()) | saved["hyperparameters"], hyperparameters(settings)
    names = [name for name in now if name not in MAY_DIFFER and then[name] != now[name]]
    if differing := [f"{name} ({then[name]} there, {now[name]} now)" for name in names]:
        raise InputError(f"{last}: has other hyperparameters: {', '.join(differing)}; resume with the same")
    if not best.exists() and not saved["history"][-1]["best"]:  # else write_outputs had no time to write it
        raise InputError(f"{best}: missing; --overwrite starts over")
    return saved


def require_same_clips(saved, checkpoint, data):
    """Raise InputError if `saved` was trained on another dump, or on other clips or tags of it."""
    same_clips = all(torch.equal(ids, saved["clip_ids"][part]) for part, ids in checkpoint["clip_ids"].items())
    if saved["dump"] != checkpoint["dump"] or saved["tag_names"] != checkpoint["tag_names"] or not same_clips:
        raise InputError(f"{data}: not the dump that this experiment was started on")


def hyperparameters(settings):
    """Return the settings in the form stored in JSON and in checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def write_outputs(folder, checkpoint, is_last):
    """Write the files derived from last.pt; at epoch 0, first delete those of an earlier experiment in the folder."""
    history, curves = checkpoint["history"], folder / "curves.png"
    if len(history) == 1:
        for path in [path for pattern in OUTPUTS.split() for path in folder.glob(pattern)]:
            path.unlink()
    if history[-1]["best"]:
        save(folder / "best.pt", {name: value for name, value in checkpoint.items() if name != "continuation"})
    with whole_file(folder / "hyperparameters.json", "w", encoding="utf-8") as file:
        json.dump(checkpoint["hyperparameters"], file, indent=1)
    write_table(folder / "history.csv", [history[0], *(row.values() for row in history)])
    if is_last or not curves.exists() or time.time() - curves.stat().st_mtime > SECONDS_BETWEEN_PICTURES:
        with optional_picture(curves):
            from lib.figures import training_curves  # matplotlib takes a while to import

            training_curves(curves, history, synthetic=checkpoint["synthetic"])
