"""An experiment's folder: locked by one run, checked before that starts or resumes, and filled with its results."""

import contextlib
import dataclasses
import itertools
import json
import time
from pathlib import Path

import torch.distributed as dist

from lib.checkpoint import load_checkpoint, save
from lib.common import ROOT, InputError, lock, optional_picture, write_json, write_table
from lib.dump import MANIFEST
from lib.parallel import rank, world_size

PLACE = {"data", "experiments", "name", "resume", "overwrite", "device"}  # settings that may differ in one experiment
# What belongs to a checkpoint besides last.pt; those from results.json on are evaluate.py's
OUTPUTS = "best.pt hyperparameters.json history.csv curves.png results.json per_tag.* correlations.png taggram_*"
OUTPUTS += " predictions_*.csv labels_*.csv worth_a_listen.csv report.html comparison.* seeds.csv"
SECONDS_BETWEEN_PICTURES = 10  # drawing the curves takes a third of one, too long after short epochs


@contextlib.contextmanager
def claimed_folder(settings):
    """Hold the experiment's folder for this run alone; yield (folder, the checkpoint to resume from or None)."""
    folder = settings.experiments / settings.name
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "last.pt") if rank() == 0 else contextlib.nullcontext():
        try:
            if world_size() > 1:
                dist.barrier()  # the other processes read the folder only once it is locked
            yield folder, saved_experiment(folder, settings)
        finally:
            if rank() == 0 and made and not (folder / "last.pt").exists():  # a failed start leaves no folder
                with contextlib.suppress(OSError):
                    for path in [*folder.glob(".last.pt.*.lock")]:
                        path.unlink()
                    for path in made:
                        path.rmdir()


def saved_experiment(folder, settings):
    """Return the checkpoint to resume from, or None to begin. Raises InputError if either would lose anything."""
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
    saved["hyperparameters"] = hyperparameters(type(settings)()) | saved["hyperparameters"]  # which may lack new ones
    if not best.exists() and not saved["history"][-1]["best"]:  # else write_outputs had no time to write it
        raise InputError(f"{best}: missing; --overwrite starts over")
    return saved


def require_same(one, other, may_differ, refusal):
    """Raise InputError, naming what differs, unless two checkpoints have equal clips and, but for a few, settings."""
    then, now = one["hyperparameters"], other["hyperparameters"]
    names = [name for name in then if name not in PLACE | may_differ and then[name] != now.get(name, then[name])]
    differing = [f"{name} ({then[name]} against {now[name]})" for name in names]
    differing += [name for name in ("dump", "tag_names") if one[name] != other[name]]
    differing += [f"{part} clips" for part, ids in one["clip_ids"].items() if not ids.equal(other["clip_ids"][part])]
    differing += ["epochs so far"] * (len(one["history"]) != len(other["history"]))
    if differing:
        raise InputError(f"{refusal}: {', '.join(differing)}")


def require_other_seeds(folders):
    """Raise InputError unless the experiments in `folders` differ in the seed, and in nothing else."""
    lasts = [(folder, load_checkpoint(folder / "last.pt")) for folder in folders]
    for (a, one), (b, other) in itertools.combinations(lasts, 2):
        require_same(one, other, {"seed", "split_seed"}, f"{a} and {b} differ in more than the seed (see --split-seed)")
        if one["hyperparameters"]["seed"] == other["hyperparameters"]["seed"]:
            raise InputError(f"{a} and {b} have the same seed")


def hyperparameters(settings):
    """Return the settings in the form stored in JSON and in checkpoints, with an absolute path of the data."""
    return json.loads(json.dumps(dataclasses.asdict(settings) | {"data": settings.data.resolve()}, default=str))


def saved_settings(settings):
    """Return `settings` with the values in their experiment's last.pt, if there is one; of PLACE, only the data's."""
    last = settings.experiments / settings.name / "last.pt"
    if not last.exists():
        return settings
    then = load_checkpoint(last)["hyperparameters"]
    found = {name: then.get(name, now) for name, now in vars(settings).items() if name not in PLACE}
    return dataclasses.replace(settings, **found, data=data_folder(then))


def data_folder(trained):
    """Return the data folder of a checkpoint's hyperparameters or, if it is missing, this repository's with a dump."""
    data, ours = Path(trained["data"]), ROOT / "data"
    return ours if (ours / MANIFEST).exists() and not data.is_dir() else data


def write_outputs(folder, checkpoint, is_last):
    """Write the files derived from last.pt; at epoch 0, first delete those of an earlier experiment in the folder."""
    history, curves = checkpoint["history"], folder / "curves.png"
    if len(history) == 1:
        for path in [path for pattern in OUTPUTS.split() for path in folder.glob(pattern)]:
            path.unlink()
    if history[-1]["best"]:
        save(folder / "best.pt", {name: value for name, value in checkpoint.items() if name != "continuation"})
    sizes = {f"{part}_size": len(ids) for part, ids in checkpoint["clip_ids"].items()}  # of what the settings led to
    write_json(folder / "hyperparameters.json", checkpoint["hyperparameters"] | sizes)
    names = dict.fromkeys(name for row in history for name in row)  # an epoch may have more than those before
    write_table(folder / "history.csv", [names, *([row.get(name) for name in names] for row in history)])
    if is_last or not curves.exists() or time.time() - curves.stat().st_mtime > SECONDS_BETWEEN_PICTURES:
        with optional_picture(curves):
            from lib.figures import training_curves  # matplotlib takes a while to import

            training_curves(curves, history, synthetic=checkpoint["synthetic"])
