"""Checkpoints: saved whole, loaded without executing anything, checked; and the state that resuming needs."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from lib.common import InputError, reason, whole_file
from model import MultiScaleCNN

# What a checkpoint holds, with the type of each; last.pt has a "continuation" besides, see resume_state.
CONTENTS = {
    "weights": dict,  # the network's state_dict
    "tag_names": list,  # in the order of the outputs
    "normalization": dict,  # "mean" and "std" of each mel band, (128,) float32 each
    "front_end": dict,  # what the spectrograms were made with (lib.audio.FRONT_END)
    "hyperparameters": dict,  # trainer.Settings
    "clip_ids": dict,  # the clips of "train", "validation" and "test", (clips,) int64 each
    "history": list,  # a dict for each epoch, from 0, which is before training; the last is the checkpoint's own
    "dump": str,  # Dump.fingerprint
    "synthetic": bool,  # trained on the demo
}


def save(path, checkpoint):
    """Write a checkpoint that loads with weights_only=True."""
    buffer = io.BytesIO()  # because torch.save meets a full disk with a RuntimeError
    torch.save(checkpoint, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path):
    """Return a checkpoint that trainer.py wrote, as a dict, without executing anything that the file might hold.

    Raises InputError if it is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; trainer.py writes them")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not compare the checksums
            if damaged := archive.testzip():
                raise InputError(f"its part {damaged} has another checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check(checkpoint)
    except Exception as error:  # a damaged file can fail in as many ways as it can be damaged
        fault = reason(error)[:100]
        raise InputError(f"{path}: damaged, or not a checkpoint of trainer.py ({fault}); train again") from error
    return checkpoint


def _check(checkpoint):
    """Raise an exception if the contents of a checkpoint are not what trainer.py writes."""
    for name, kind in CONTENTS.items():
        if not isinstance(checkpoint[name], kind):
            raise InputError(f"its {name} is no {kind.__name__}")
    with torch.device("meta"):
        expected = MultiScaleCNN(len(checkpoint["tag_names"])).state_dict()
    found = {name: value.shape for name, value in checkpoint["weights"].items()}
    if found != {name: value.shape for name, value in expected.items()}:
        raise InputError(f"it holds the weights of another network than this with {len(checkpoint['tag_names'])} tags")


def n_test_clips_seen(checkpoint, experiment):
    """Return how many test clips of an `experiment`, or of another checkpoint, trained or chose the checkpoint."""
    seen = torch.cat([checkpoint["clip_ids"][part] for part in ("train", "validation")])
    return int(torch.isin(experiment["clip_ids"]["test"], seen).sum())


def take_weights(checkpoint, net, experiment):
    """Copy the checkpoint's weights into `net`, but for the last layer if its tags are not the experiment's; say so.

    Raises InputError if its spectrograms had another front end.
    """
    if checkpoint["front_end"] != experiment["front_end"]:
        raise InputError("--start-from: that checkpoint was trained on spectrograms of another front end")
    if checkpoint["dump"] == experiment["dump"] and (n_seen := n_test_clips_seen(checkpoint, experiment)):
        print(f"note: {n_seen:,} of the test clips trained, or chose, that checkpoint; their score will be too good")
    weights, same_tags = checkpoint["weights"], checkpoint["tag_names"] == experiment["tag_names"]
    if not same_tags:
        weights = {name: value for name, value in weights.items() if not name.startswith("top.")}
    net.load_state_dict(weights, strict=same_tags)
    top = "with its own" if same_tags else "for other tags, with a fresh"
    print(f"starting   from a checkpoint of epoch {checkpoint['history'][-1]['epoch']}, {top} last layer")


def resume_state(optimizer, train, rng, device):
    """Return what resuming needs besides the checkpoint: the optimiser, the clips' order, all generators."""
    _, numpy_key, *numpy_rest = rng.get_state()
    return {
        "optimizer": optimizer.state_dict(),
        "train_order": torch.from_numpy(train),
        "numpy_key": torch.from_numpy(numpy_key.astype(np.int64)),
        "numpy_rest": numpy_rest,
        "torch_rng": torch.get_rng_state(),
        "device_rng": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
    }


def restore(saved, net, optimizer, train, rng, device):
    """Put the network, the optimiser, the clips' order `train` and all generators into the state of `saved`."""
    state = saved["continuation"]
    net.load_state_dict(saved["weights"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
    train[:] = state["train_order"].numpy()
    rng.set_state(("MT19937", state["numpy_key"].numpy().astype(np.uint32), *state["numpy_rest"]))
    torch.set_rng_state(state["torch_rng"])
    if state["device_rng"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device_rng"])
