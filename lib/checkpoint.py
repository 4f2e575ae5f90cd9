"""Checkpoints: saved whole, loaded without executing anything, checked; and the state that resuming needs.

trainer.run_experiment has the literal that says what a checkpoint holds.
"""

import io
import platform
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import torch

from lib.audio import require_front_end
from lib.common import ROOT, InputError, reason, whole_file
from lib.dump import same_clips
from lib.parallel import prepare_device, world_size
from lib.splits import epoch_batches
from model import build_network

# What count_seen returns, in words
SEEN = "{seen_before:,} clips for certain, {seen_before_by_id:,} perhaps (equal ids in other data); they score too high"


def made_with(device, dump, last):
    """Return what a report of the scores has to name, a line for each start of the run; `last` has the earlier ones."""
    describe = "git --git-dir=.git describe --always --dirty --exclude='*'"  # not of a repository around this folder
    commit = subprocess.run(describe, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    info = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else info[1] if info else platform.machine()
    made = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {dump.made_with}"
    return [*dict.fromkeys([*(last["made_with"] if last else []), f"commit {commit}, {made}, {world_size()} x {name}"])]


def save(path, checkpoint):
    """Write a checkpoint, after checking that it loads: else a run would find out at its end, when all is lost."""
    buffer = io.BytesIO()  # because torch.save reports a full disk with a RuntimeError
    torch.save(checkpoint, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())
        file.flush()
        load_checkpoint(file.name)


def load_checkpoint(path):
    """Return a checkpoint that trainer.py wrote, as a dict, without executing anything that the file might hold.

    Raises InputError if it is missing, damaged, something else, or of another front end or network than the program's.
    """
    name = str(path).removesuffix(".partial")
    if not Path(path).is_file():
        how = "the demo's, a toy, in a few minutes; the paper's in 3 on a large GPU, in 9 to 17 hours on two cores"
        raise InputError(f"{name}: no such checkpoint, and none to download; README.md says how to train one: {how}")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not compare the checksums
            if part := archive.testzip():
                raise InputError(f"its part {part} has a wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = dict(checkpoint["weights"])  # drops the metadata, where load_state_dict leaves assign=True
        trained = {"network": "MultiScaleCNN", **checkpoint["hyperparameters"]}  # earlier versions had no other
        front_end, n_tags, network = checkpoint["front_end"], len(checkpoint["tag_names"]), trained["network"]
        earlier = {"seen_before": [], "made_with": ["an earlier version"], "thresholds": torch.full((n_tags,), 0.5)}
        checkpoint = {**earlier, **checkpoint, "weights": weights, "hyperparameters": trained}
    except Exception as error:  # a damaged file can fail in as many ways as it can be damaged
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        fault = unsafe and f"holds a {unsafe[1]}, which is not safe to load; store plain numbers, strings and tensors"
        damaged = f"damaged, or not a checkpoint of trainer.py ({reason(error)[:100]}); train again"
        raise InputError(f"{name}: {fault or damaged}") from error
    require_front_end(front_end, name, "restore that, or train again")
    try:
        with torch.device("meta"):
            build_network(n_tags, network).load_state_dict(weights, assign=True)
    except (KeyError, RuntimeError) as error:
        fault = "there is none" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise InputError(f"{name}: not model.py's {network}; each network needs its own name ({fault})") from error
    return checkpoint


def cautions(checkpoint):
    """Yield notes, a line each, on why a checkpoint that few clips or steps have made is not to be relied on."""
    trained, clip_ids, epoch = checkpoint["hyperparameters"], checkpoint["clip_ids"], checkpoint["history"][-1]["epoch"]
    n_steps = epoch * len(epoch_batches(clip_ids["train"], trained["batch_size"], trained["super_batch_size"]))
    with torch.device("meta"):
        layers = build_network(len(checkpoint["tag_names"]), trained["network"]).modules()
    remains = max(((1 - layer.momentum) ** n_steps for layer in layers if getattr(layer, "momentum", None)), default=0)
    if checkpoint["thresholds"].eq(0.5).all():
        yield "note: of an earlier version, without thresholds: 0.5 for each tag, too much for most; train again"
    if (n_clips := len(clip_ids["validation"])) < 30:
        yield f"note: {n_clips} validation clips chose the epoch, mostly by chance: try a larger --validation-size"
    if epoch == 0:
        yield "note: epoch 0 was best: without --start-from, its tags are noise; lower the --learning-rate or add clips"
    elif remains > 0.05 and not checkpoint["seen_before"]:  # at 4%, exact statistics gained nothing
        averages = f"batch normalisation's running averages are {remains:.0%} their initial values"
        yield f"note: at step {n_steps:,}, {averages}: scores may be low; try more --epochs or a smaller --batch-size"


def load_network(checkpoint, device, precision="checkpoint"):
    """Return (network on `device`, precision). A `precision` of "checkpoint" becomes the one used in training."""
    trained = checkpoint["hyperparameters"]
    if precision == "checkpoint":
        precision = trained.get("precision", "float32")
    dtype = prepare_device(device, precision, trained.get("tf32", True))
    net = build_network(len(checkpoint["tag_names"]), trained["network"])
    net.load_state_dict(checkpoint["weights"])
    return net.eval().to(device, dtype, memory_format=torch.channels_last), precision


def clips_seen(checkpoint):
    """Return [(dump, clip_ids), ...] of `checkpoint` and of all that it started from, as in trainer.py."""
    return [*checkpoint["seen_before"], (checkpoint["dump"], checkpoint["clip_ids"])]


def count_seen(ids, seen, dumps):
    """Return how many of the clips `ids` of `dumps` are in `seen`, of clips_seen: for certain; by id, in other data."""
    known = {True: [ids[:0]], False: [ids[:0]]}
    for dump, clip_ids in seen:
        known[same_clips(dump, dumps)] += [clip_ids["train"], clip_ids["validation"]]
    surely, perhaps = (torch.isin(ids, torch.cat(known[same])) for same in (True, False))
    return {"seen_before": int(surely.sum()), "seen_before_by_id": int((perhaps & ~surely).sum())}


def note_on_seen(checkpoint, source):
    """Return a note if `source`, or what it started from, has seen clips of the test set of `checkpoint`, else ""."""
    seen = count_seen(checkpoint["clip_ids"]["test"], clips_seen(source), [checkpoint["dump"]])
    note = f"note: of the test set, that checkpoint, or one before it, has seen {SEEN.format_map(seen)}\n"
    return note if any(seen.values()) else ""


def start_from(source, checkpoint, net):
    """Copy the weights of the checkpoint `source` into `net`, except the head's if the tags differ; say so.

    `checkpoint` gets the clips that it has seen. Raises InputError if it is of another network.
    """
    if (network := source["hyperparameters"]["network"]) != checkpoint["hyperparameters"]["network"]:
        raise InputError(f"--start-from: that checkpoint is of another network; give --network {network}")
    checkpoint["seen_before"] = clips_seen(source)
    print(end=note_on_seen(checkpoint, source))
    same_tags = source["tag_names"] == checkpoint["tag_names"]
    weights = {name: value for name, value in source["weights"].items() if same_tags or not name.startswith("head.")}
    net.load_state_dict(weights, strict=same_tags)
    head = "with its own" if same_tags else "for other tags, with a fresh"
    print(f"starting   from a checkpoint of epoch {source['history'][-1]['epoch']}, {head} last layer")


def resume_state(optimizer, train, rng):
    """Return what resuming needs besides the checkpoint: the optimiser, the clips' order, both generators."""
    _, numpy_key, *numpy_rest = rng.get_state()
    return {
        "optimizer": optimizer.state_dict(),
        "train_order": torch.from_numpy(train),
        "numpy_key": torch.from_numpy(numpy_key.astype(np.int64)),
        "numpy_rest": numpy_rest,
        "torch_rng": torch.get_rng_state(),
    }


def resume(last, net, optimizer, train, rng):
    """Put the network, the optimiser, the clips' order `train` and both generators into the state of `last`."""
    state = last["continuation"]
    net.load_state_dict(last["weights"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
    train[:] = state["train_order"].numpy()
    rng.set_state(("MT19937", state["numpy_key"].numpy().astype(np.uint32), *state["numpy_rest"]))
    torch.set_rng_state(state["torch_rng"])
