"""Devices and processes: choose a device, join torchrun's processes, share a batch among them, sum over them."""

import ctypes
import os
import sys
from contextlib import contextmanager, redirect_stdout, suppress

import numpy as np
import torch
import torch.distributed as dist

from lib.common import InputError, reason


def choose_device(name):
    """Return the torch.device called `name`; for "auto" a CUDA GPU, else Apple's, else the CPU.

    Each process of torchrun gets the CUDA GPU of its own rank. Raises InputError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not available ({str(error).splitlines()[0]})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_freed_memory():
    """Tell the C library to keep freed memory for the next tensors instead of giving it back.

    Each training step frees and takes a gigabyte again; having the kernel clear those pages anew costs as much time
    as the arithmetic. Only glibc understands this; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too ...
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... and the heap is not given back ...
            mallopt(-8, 1)  # M_ARENA_MAX: ... nor is it another one for each thread


def prepare_device(device, precision, tf32):
    """Prepare `device` to compute in `precision`, with TF32 matrix products if `tf32`; return the weights' dtype.

    Raises InputError for a precision that the device does not have.
    """
    if device.type == "mps" and precision == "float64":
        raise InputError(f"--precision float64: {device} has no float64; --device cpu has")
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    return torch.float64 if precision == "float64" else torch.float32


def note_speed_of_bfloat16(precision):
    """Say what --precision bfloat16 costs or saves on this CPU, where PyTorch knows the processor's instructions."""
    knows = getattr(torch.cpu, "get_capabilities", dict)()
    has_bfloat16 = knows.get("avx512_bf16") or knows.get("amx_bf16")
    if has_bfloat16 and precision == "float32":
        print("note: this CPU computes in bfloat16 too: --precision bfloat16 takes about half the time")
    if knows and not has_bfloat16 and precision == "bfloat16":
        print("note: this CPU has no bfloat16 arithmetic: --precision bfloat16 will be slower than float32")


def autocast(device, precision):
    """Return a context that computes convolutions and matrix products in bfloat16, if that is the `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def joined_processes(device):
    """Be one of the processes that torchrun started, if it did; only the main one prints.

    Raises InputError if torchrun's environment is incomplete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise InputError(f"WORLD_SIZE is set, but {reason(error)}: start processes with torchrun") from error
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_main_process() else nowhere):
        yield
    dist.destroy_process_group()


def n_processes():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process():
    """Return whether this process is the one that writes, prints and validates."""
    return n_processes() == 1 or dist.get_rank() == 0


def barrier():
    """Wait for the other processes."""
    if n_processes() > 1:
        dist.barrier()


def share_of_this_process(rows):
    """Return this process's rows of a global batch: consecutive; their numbers differ by at most one."""
    return np.array_split(rows, n_processes())[dist.get_rank()] if n_processes() > 1 else rows


def sum_over_processes(tensor):
    """Return the sum of `tensor` over all training processes, and let gradients flow back to each of them."""
    if n_processes() == 1:
        return tensor
    from torch.distributed.nn.functional import all_reduce  # not every build of PyTorch has it

    return all_reduce(tensor)


def sum_gradients(net):
    """Replace each process's gradients by their sum over all processes."""
    if n_processes() > 1:
        for weights in net.parameters():
            dist.all_reduce(weights.grad)
