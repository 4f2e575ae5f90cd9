"""Devices and processes: choose a device, join torchrun's processes, share a batch among them, sum over them."""

import ctypes
import os
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from lib.common import InputError, n_cores, reason

COLLECTIVE_HOURS = 2  # that a process waits for the others: the main one reads the whole dump, and validates, alone


def choose_device(name):
    """Return the torch.device called `name`; for "auto" a CUDA GPU, else Apple's, else the CPU.

    A GPU's has an index, as torch.cuda.set_device demands. Each process of torchrun gets the CUDA GPU of its own
    local rank. Raises InputError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        probe = torch.ones(1, device=name)
        probe.item()  # where PyTorch has no kernels for this GPU, that fails here and not at the first step
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fault = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not available ({fault}); --device cpu always is") from error
    if probe.device.type == "cuda":
        torch.cuda.set_device(probe.device)
    return probe.device


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
        if n_cores() < torch.get_num_threads():  # which does not know a container's share of the machine
            torch.set_num_threads(n_cores())
    if device.type == "cuda":
        fp32 = "tf32" if tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = fp32
    return torch.float64 if precision == "float64" else torch.float32


def note_speed_of_bfloat16(precision):
    """Say what --precision bfloat16 costs or saves on this CPU, where PyTorch knows the processor's instructions."""
    knows = getattr(torch.cpu, "get_capabilities", dict)()
    has_bfloat16 = knows.get("avx512_bf16") or knows.get("amx_bf16")
    if has_bfloat16 and precision == "float32":
        print("note: this CPU computes in bfloat16 too: --precision bfloat16 takes about half the time")
    if knows and not has_bfloat16 and precision == "bfloat16":
        print("note: this CPU has no bfloat16 arithmetic: --precision bfloat16 will be slower than float32")


def note_idle_cores():
    """Say so where torchrun's processes leave cores idle: unless told otherwise, it gives each of them one thread."""
    share = n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if n_processes() > 1 and torch.get_num_threads() < share:
        print(f"note: each process uses {torch.get_num_threads()} of its {share} cores; set OMP_NUM_THREADS={share}")


def autocast(device, precision):
    """Return a context that computes convolutions and matrix products in bfloat16, if that is the `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def remedy_for_full_gpu(device):
    """Turn PyTorch's report of a GPU without free memory into an InputError that says what needs less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "a smaller --batch-size or --precision bfloat16 needs less; --device cpu has more"
        raise InputError(f"{device}: out of memory; {remedy}") from error


@contextmanager
def joined_processes(device):
    """Be one of the processes that torchrun started, if it did; only the main one prints.

    Raises InputError if torchrun's environment is incomplete.
    """
    if not started_with_others():
        yield
        return
    try:
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=COLLECTIVE_HOURS), device_id=gpu)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"WORLD_SIZE is set, but {reason(error)}: start processes with torchrun") from error
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_main_process() else nowhere):
        yield
    dist.destroy_process_group()


def started_with_others():
    """Return whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def require_one_process(script):
    """Raise InputError in processes of torchrun, which would write the same files."""
    if started_with_others():
        raise InputError(f"{script}: runs in one process; start it with python instead of torchrun")


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


def from_main_process(compute):
    """Return in every process what `compute()` returns in the main one; what it raises there is raised everywhere."""
    if n_processes() == 1:
        return compute()
    outcome = [None, None]
    if is_main_process():
        try:
            outcome = [compute(), None]
        except (InputError, OSError) as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error:
        raise error
    return result


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes; each process's loss depends on it, so its gradient is a sum too."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    backward = forward


def sum_over_processes(tensor):
    """Return the sum of `tensor` over all training processes, and let gradients flow back to each of them."""
    return _AllReduce.apply(tensor) if n_processes() > 1 else tensor


def sum_gradients(net):
    """Replace each process's gradients by their sum over all processes, in one message."""
    if n_processes() > 1:
        gradients = [weights.grad for weights in net.parameters()]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total)
        for gradient, summed in zip(gradients, total.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view(gradient.shape))
