"""What every script needs: named types for settings, one-line errors, progress, whole files, locks.

trainer.py and evaluate.py import it before the packages that take seconds, so that Ctrl-C is one line from then on.
"""

import contextlib
import csv
import ctypes
import errno
import functools
import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from filelock import FileLock, Timeout
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

ROOT = Path(__file__).resolve().parent.parent
LOCK_SECONDS = 3  # the last worker of a killed run may take a while to notice
GPU_IS_FULL = "OutOfMemoryError"  # PyTorch's exception, by name: not every script imports PyTorch
progress = functools.partial(tqdm, disable=None)  # shows nothing if the output is not a terminal, so logs stay readable


def number(kind, low, high=1e9):
    """Return the type of a setting that is an int or a float from `low` to `high`, both included."""

    def parse(words):
        if not low <= (value := kind(words[0])) <= high:  # also rejects NaN
            raise ValueError(f"must be in the range {low:g} to {high:g}")
        return value

    spec = PrimitiveConstructorSpec(1, kind.__name__.upper(), parse, lambda value: True, lambda value: [str(value)])
    return Annotated[kind | None, spec]  # None may be a default


Count = number(int, 1)
Seed = number(int, 0, 2**32 - 1)  # those that numpy.random.RandomState takes


class InputError(Exception):
    """Something that the user can put right; the message names the file and the remedy."""


class FromPython:
    """A base of Settings: strings do for paths, lists and values for tuples. Raises InputError for an unknown word."""

    def __post_init__(self):
        for name, kind, value in [(field.name, field.type, getattr(self, field.name)) for field in fields(self)]:
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise InputError(f"{name}={value!r}: must be one of {get_args(kind)}")
            if value is not None:
                make = Path if "pathlib" in str(kind) else lambda each: getattr(each, "item", lambda: each)()  # NumPy's
                values = value if isinstance(value, (list, tuple)) else [value]
                several = str(kind).startswith("tuple")
                object.__setattr__(self, name, tuple(map(make, values)) if several else make(value))


def run(main, to_continue="the same command resumes"):
    """Call `main()` and exit; foreseeable failures become one line on stderr and a non-zero status.

    Exit status: what `main` returns (None is 0), 1 for bad input or a failed file operation, 130 for Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell's >&-
            setattr(sys, name, open(os.devnull, "w"))
    with contextlib.suppress(AttributeError):  # a notebook's output has no such settings
        # Line buffering lets a log file show the progress; backslashreplace prints any file name
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        status = main()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {to_continue}", file=sys.stderr)
        status = 130
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(LOCK_SECONDS)  # if rank 0 fails too, torchrun ends this process before it repeats the message
        if not isinstance(error, (InputError, OSError)) and type(error).__name__ != GPU_IS_FULL:
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC
        print(f"error: {reason(error)}{f'; make room, then {to_continue}' if full else ''}", file=sys.stderr)
        status = 1
    sys.exit(status)


def require_writable(folder, remedy):
    """Make `folder` if it is missing. Raises InputError, with the `remedy`, if it can't be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: not writable, and the results go there; {remedy}")


def report_interrupt(previous, kind, error, traceback):
    """Print one line for a Ctrl-C outside `run`, as during the imports; leave other exceptions to `previous`."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        previous(kind, error, traceback)


sys.excepthook = functools.partial(report_interrupt, sys.excepthook)


def keep_freed_memory():
    """Tell the C library to keep freed memory for the next arrays instead of returning it to the kernel.

    A training step, or a spectrogram, frees and allocates the same memory again; the kernel would zero its pages each
    time, which costs as much as the arithmetic. Does nothing without glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks on the heap too
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
            mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads


def reason(error):
    """Return an exception as one line for the user."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    if type(error).__name__ == GPU_IS_FULL:
        return "out of GPU memory; a smaller --batch-size or --precision bfloat16 needs less; or use --device cpu"
    first_line = next(iter(str(error).splitlines()), "")
    return first_line if isinstance(error, InputError) else f"{type(error).__name__}: {first_line}"


@contextlib.contextmanager
def naming(path):
    """Add the file name `path` to an OSError without one: that of a write to a full disk carries none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def whole_file(path, mode="wb", durable=True, **options):
    """Open `path` for writing so that it appears complete or not at all, whenever the process dies.

    The bytes go to `<path>.partial`, which is renamed once they are on the disk. `durable=False` skips fsync, for
    files that are verified on the next run.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), open(partial, mode, **options) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def optional_picture(path):
    """Turn whatever goes wrong while `path` is drawn into a note: training and scores are worth more."""
    try:
        yield
    except Exception as error:
        print(f"note: {path}: no picture drawn ({reason(error)})", file=sys.stderr)


def write_table(path, rows, **options):
    """Write `rows`, each a sequence of values, as a CSV file; `options` are those of csv.writer."""
    with whole_file(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows(rows)


def write_json(path, content):
    """Write `content` with null in place of NaN, which JSON does not have."""
    with whole_file(path, "w", encoding="utf-8") as file:
        json.dump(json.loads(json.dumps(content), parse_constant={"NaN": None}.__getitem__), file, indent=1)


@contextlib.contextmanager
def lock(path):
    """Let one process at a time work on the file `path`, which need not exist.

    The lock is released when its process dies; its file, `.<name>.<folder's inode>.lock`, remains, and means nothing
    in a copy of the folder. Raises InputError if another process holds it; on a file system without flock, where the
    file itself is the lock, also if that process was killed on another machine.
    """
    file = path.with_name(f".{path.name}.{path.parent.stat().st_ino}.lock")
    try:
        with naming(file):
            held = FileLock(file, timeout=LOCK_SECONDS).acquire()
    except Timeout:
        remedy = f"wait until it ends; if there is none on any machine, delete {file}"
        raise InputError(f"{path}: in use by another process; {remedy}") from None
    with held:
        yield
