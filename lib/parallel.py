"""Devices and processes: choose a device, join torchrun's processes, share a batch among them, sum over them."""

import os
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from joblib import cpu_count

from lib.common import InputError, keep_freed_memory, reason

COLLECTIVE_HOURS = 2  # timeout: the others wait while rank 0 verifies the dump, and validates


def choose_device(name):
    """Return the torch.device called `name`; for "auto" a CUDA GPU, else Apple's, else the CPU.

    Each process of torchrun gets the CUDA GPU of its own local rank. Raises InputError for a missing device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        probe = torch.ones(1, device=name)
        probe.item()  # fails if PyTorch has no kernels for this GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fault = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not available ({fault}); --device cpu always is") from error
    if probe.device.type == "cuda":
        torch.cuda.set_device(probe.device)
    return probe.device


def prepare_device(device, precision, tf32):
    """Prepare `device` to compute in `precision`, with TF32 matrix products if `tf32`; return the weights' dtype."""
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))  # the latter respects a container's quota
    if device.type == "cuda":
        fp32 = "tf32" if tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = fp32
    return torch.float64 if precision == "float64" else torch.float32


def autocast(device, precision):
    """Return a context that computes convolutions and matrix products in bfloat16, if that is the `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def joined_processes(device):
    """Join the other processes, if torchrun started several; only rank 0 prints."""
    if not started_with_others():
        yield
        return
    backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=COLLECTIVE_HOURS), device_id=gpu)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"can't join the other processes ({reason(error)}); start them with torchrun") from error
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    dist.destroy_process_group()


def started_with_others():
    """Return whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return this process's number. Rank 0 writes, prints and validates."""
    return dist.get_rank() if world_size() > 1 else 0


def share_of_batch(rows):
    """Return this process's rows of a global batch: consecutive ones, in shares that differ by at most one."""
    return np.array_split(rows, world_size())[rank()]


def from_rank_0(compute):
    """Return in every process what `compute()` returns in rank 0."""
    result = [None if rank() else compute()]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def all_reduce_gradients(net):
    """Replace each process's gradients by their sum over all processes, in one message."""
    if world_size() > 1:
        gradients = [weights.grad for weights in net.parameters() if weights.grad is not None]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total)
        for gradient, summed in zip(gradients, total.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view(gradient.shape))
