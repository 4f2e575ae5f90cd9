"""A CUDA GPU played by the CPU: what the scripts do only on a GPU runs in tests on any machine.

A tensor that the code puts on a GPU stays where it is, but says that it is there, and refuses what CUDA's tensors
refuse. Run as a script, it runs another one: python tests/cuda_on_cpu.py trainer.py --device cuda
"""

import contextlib
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lib.loader

RANDOM = {"rand", "randn", "randint", "randperm"}
ONLY_ON_CPU = {"numpy", "__array__", "pin_memory"}
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "unique"}
BETWEEN_DEVICES = {"to", "cpu", "copy_", "__set__", "_has_compatible_shallow_copy_type"}  # the last two: Module.to
CPU = torch.device("cpu")


class PlayedGPUs(TorchFunctionMode):
    """The mode in which PyTorch's functions see GPUs. Each thread that is to see them has to enter it."""

    def __init__(self, n_gpus):
        super().__init__()
        self.n_gpus, self.current = n_gpus, 0
        self.devices = WeakTensorKeyDictionary()  # of the tensors that are on a GPU
        self.pinned, self.n_pinned = WeakTensorKeyDictionary(), 0  # those in pinned memory, and how many ever were
        self.generator = torch.Generator()
        self.waits = []  # names of the calls in which the host waits for a GPU
        self.recording = False
        self.n_replays = 0

    def set_device(self, device):
        self.current = torch.cuda._utils._get_device_index(device)  # which refuses a torch.device without an index

    def manual_seed_all(self, seed):
        self.generator.manual_seed(seed + 1)  # its numbers are not the CPU's

    def named(self, device):
        """Return a device as PyTorch does: a GPU's with its index. Raises RuntimeError for a GPU that is not there."""
        device = torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= self.n_gpus:
            raise RuntimeError("CUDA error: invalid device ordinal\nand more lines")
        return torch.device("cuda", index)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("device", "_parse_to"):  # names of devices, and no tensors
            return function(*args, **kwargs)
        tensors = tensors_in([args, kwargs])
        on = self.device_of(name, tensors)
        if function == torch.Tensor.device.__get__ and on.type == "cuda":
            return on
        if function == torch.Tensor.is_cuda.__get__:
            return on.type == "cuda"
        if on.type == "cuda" and name in READS:
            self.waits.append(name)
        if on.type == "cuda" and name in ONLY_ON_CPU:
            raise TypeError(f"{name}: a tensor on {on} has to be copied to the CPU first")

        wanted = [value for value in [*args, kwargs.get("device")] if is_device(value)]
        target = self.named(wanted[0]) if wanted else CPU if name == "cpu" else on
        if name in ("to", "cpu") and target != on:
            is_plain = not any(isinstance(value, torch.dtype) for value in [*args, *kwargs.values()])
            if not (is_plain and kwargs.get("non_blocking") and tensors[0] in self.pinned):
                self.waits.append(name)
            function, kwargs["copy"] = torch.Tensor.to, True
            args = args if name == "to" else (*args, CPU)
        if name in RANDOM and target.type == "cuda":
            kwargs["generator"] = self.generator
        is_pinned = kwargs.pop("pin_memory", False) or name == "pin_memory"
        if name == "pin_memory":
            function = torch.Tensor.clone
        if function == torch.Tensor.data.__set__:
            self.mark(args[0], self.devices.get(args[1], CPU))

        result = function(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        for tensor in tensors_in([result]):
            if not any(tensor is one for one in tensors):
                self.mark(tensor, target)
            if is_pinned:
                self.pinned[tensor] = True
                self.n_pinned += 1
        return result

    def device_of(self, name, tensors):
        """Return the device on which a function of `tensors` computes. Raises RuntimeError if they are on several."""
        found = {self.devices[tensor] for tensor in tensors if tensor in self.devices}
        on_cpu = any(tensor.dim() for tensor in tensors if tensor not in self.devices)  # a number goes with any
        if len(found) + on_cpu > 1 and name not in BETWEEN_DEVICES:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {found} and the CPU")
        return found.pop() if found else CPU

    def mark(self, tensor, device):
        if device.type == "cuda":
            self.devices[tensor] = device
        else:
            self.devices.pop(tensor, None)


class PlayedGraph(TorchDispatchMode):
    """A CUDA graph: while this mode is entered, operations are recorded, and their effects undone at its end."""

    def __init__(self, gpus):
        super().__init__()
        self.gpus, self.operations, self.before = gpus, [], {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, arguments = kwargs or {}, operation._schema.arguments
        for argument, value in zip(arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.setdefault(id(value), (value, value.clone()))
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result

    def __enter__(self):
        self.gpus.recording = True
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.gpus.recording = False
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for value, before in self.before.values():
                value.copy_(before)

    def replay(self):
        self.gpus.n_replays += 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for operation, args, kwargs, result in self.operations:
                again = operation(*args, **kwargs)
                for old, new in zip(tensors_in([result]), tensors_in([again])):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class PlayedStream:
    def wait_stream(self, other):
        pass


def is_device(value):
    names = "cuda", "cpu", "mps", "meta"
    return isinstance(value, torch.device) or isinstance(value, str) and value.split(":")[0] in names


def on_cpu(value):
    return CPU if is_device(value) and torch.device(value).type == "cuda" else value


def tensors_in(values):
    """Return the tensors in a structure of lists, tuples and dicts."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


@contextlib.contextmanager
def played_gpus(n_gpus=1):
    """Let this thread, and those of the pools that it starts, see `n_gpus` GPUs; yield what played them."""
    gpus = PlayedGPUs(n_gpus)
    autocast, init_process_group, all_reduce = torch.autocast, dist.init_process_group, dist.all_reduce

    def autocast_on_cpu(device_type, *args, **options):
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **options)

    def init_nccl(backend, device_id, **options):
        assert backend == "nccl" and device_id.index is not None, "NCCL's barrier has to guess the GPU, and warns"
        init_process_group("gloo", **options)

    def all_reduce_by_nccl(tensor, **options):
        in_backward_pass = _get_current_function_mode() is None  # where no tensor is marked
        assert in_backward_pass or tensor in gpus.devices, "NCCL has no operations on the CPU's tensors"
        assert not gpus.recording, "never tried on GPUs"
        all_reduce(tensor, **options)

    stand_ins = {
        torch.cuda: {
            "is_available": lambda: n_gpus > 0,
            "device_count": lambda: n_gpus,
            "get_device_name": lambda device=None: "a GPU played by the CPU",
            "synchronize": lambda: None,
            "is_current_stream_capturing": lambda: gpus.recording,
            "CUDAGraph": partial(PlayedGraph, gpus),
            "graph": lambda graph, stream, capture_error_mode: graph,
            "Stream": PlayedStream,
            "current_stream": PlayedStream,
            "stream": contextlib.nullcontext,
            "set_device": gpus.set_device,
            "manual_seed_all": gpus.manual_seed_all,
        },
        torch: {"autocast": autocast_on_cpu},
        dist: {"init_process_group": init_nccl, "all_reduce": all_reduce_by_nccl},
        lib.loader: {"ThreadPoolExecutor": partial(ThreadPoolExecutor, initializer=gpus.__enter__)},
    }
    switches = [(owner, owner.fp32_precision) for owner in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]
    with contextlib.ExitStack() as stack:
        for owner, functions in stand_ins.items():
            stack.enter_context(mock.patch.multiple(owner, **functions))
        stack.enter_context(gpus)
        yield gpus
    for owner, precision in switches:
        owner.fp32_precision = precision


if __name__ == "__main__":
    del sys.argv[0]
    with played_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
