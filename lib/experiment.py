"""An experiment's folder: claimed by one run, checked before that goes on, and filled with what shows its progress."""

import contextlib
import dataclasses
import json
import time

import torch

from lib.checkpoint import load_checkpoint, save
from lib.common import InputError, lock, whole_file, write_table
from lib.parallel import barrier, is_main_process

MAY_DIFFER = {"data", "experiments", "name", "resume", "overwrite", "epochs", "device"}
# Besides last.pt, by trainer.py and by evaluate.py
OUTPUTS = ("best.pt", "hyperparameters.json", "history.csv", "curves.png", "results.json", "per_tag.*")
OUTPUTS += ("correlations.png", "taggram_*.png", "predictions_*.csv", "worth_a_listen.csv", "comparison.*")
SECONDS_BETWEEN_PICTURES = 10  # drawing the curves takes a third of one, which short epochs would feel


@contextlib.contextmanager
def claimed_folder(settings):
    """Hold the experiment's folder for this run alone; yield (folder, the checkpoint to resume from or None)."""
    folder = settings.experiments / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "last.pt") if is_main_process() else contextlib.nullcontext():
        barrier()  # the other processes look into the folder once it is held
        yield folder, saved_experiment(folder, settings)


def saved_experiment(folder, settings):
    """Return the checkpoint to resume from, or None to begin.

    Raises InputError where beginning would overwrite an experiment, or resuming would change it.
    """
    last, best = folder / "last.pt", folder / "best.pt"
    if settings.resume and settings.overwrite:
        raise InputError("--resume goes on and --overwrite begins anew: give one of them")
    if settings.overwrite or not (last.exists() or best.exists()):
        return None
    if not settings.resume:
        raise InputError(f"{folder}: holds an experiment; --resume goes on, --overwrite begins anew")
    if not last.exists():
        raise InputError(f"{last}: missing, and {best.name} is not enough to go on from; --overwrite begins anew")
    saved = load_checkpoint(last)
    if "continuation" not in saved:
        raise InputError(f"{last}: lacks the state that resuming needs; it is a copy of another checkpoint")
    require_same_hyperparameters(saved, settings, last)
    if not best.exists() and not saved["history"][-1]["best"]:  # else it is written anew: a kill came before it
        raise InputError(f"{best}: missing; --overwrite begins anew")
    return saved


def require_same_hyperparameters(saved, settings, path):
    """Raise InputError if `settings` are of another experiment than `saved`; only more epochs are the same one."""
    then, now = hyperparameters(type(settings)()) | saved["hyperparameters"], hyperparameters(settings)
    names = [name for name in now if name not in MAY_DIFFER and then[name] != now[name]]
    differing = [f"{name} ({then[name]} there, {now[name]} now)" for name in names]
    if differing:
        raise InputError(f"{path}: begun with other hyperparameters: {', '.join(differing)}; resume with the same")


def require_same_clips(saved, experiment, data):
    """Raise InputError if `saved` was trained on another dump, or on other clips or tags of it."""
    same_clips = all(torch.equal(ids, saved["clip_ids"][part]) for part, ids in experiment["clip_ids"].items())
    if saved["dump"] != experiment["dump"] or saved["tag_names"] != experiment["tag_names"] or not same_clips:
        raise InputError(f"{data}: not the dump that this experiment was begun on")


def hyperparameters(settings):
    """Return the settings as JSON and checkpoints hold them."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def write_outputs(folder, checkpoint, is_last):
    """Write what follows from last.pt; at an experiment's start, what an older one left in the folder goes first."""
    from lib.figures import training_curves  # matplotlib takes a while to import

    history, curves = checkpoint["history"], folder / "curves.png"
    if len(history) == 1:
        for path in [path for pattern in OUTPUTS for path in folder.glob(pattern)]:
            path.unlink()
    if history[-1]["best"]:
        save(folder / "best.pt", {name: value for name, value in checkpoint.items() if name != "continuation"})
    with whole_file(folder / "hyperparameters.json", "w", encoding="utf-8") as file:
        json.dump(checkpoint["hyperparameters"], file, indent=1)
    write_table(folder / "history.csv", [history[0], *(row.values() for row in history)])
    if is_last or not curves.exists() or time.time() - curves.stat().st_mtime > SECONDS_BETWEEN_PICTURES:
        training_curves(curves, history, synthetic=checkpoint["synthetic"])
