"""What every script needs: settings and their ranges, one-line errors, progress, whole files, locks."""

import contextlib
import csv
import errno
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LOCK_SECONDS = 3  # a killed run's last worker may take a while to notice
progress = functools.partial(tqdm, disable=None)  # shows nothing where the output is no terminal: logs stay readable


def n_cores():
    """Return how many of the machine's cores this process may use, by its affinity and its container's quota."""
    import joblib  # here, because most scripts never ask

    return joblib.cpu_count()


class InputError(Exception):
    """Something the person running the script can put right; the message names the file and the remedy."""


@dataclass(frozen=True)
class Range:
    """The values that a number in a settings block may have, both ends included: Annotated[int, Range(1, 99)]."""

    low: float
    high: float = 1e9


def settings_from_command_line(settings_class, description):
    """Return `settings_class` (a dataclass) filled from the command line: every field is an option.

    The comment beside a field is its help. A wrong name or type ends the program with status 2. Raises InputError for
    a number outside its Range.
    """
    import tyro  # here, so that a library user of the scripts' functions needs no command line

    settings = tyro.cli(settings_class, description=description)
    for name, hint in get_type_hints(settings_class, include_extras=True).items():
        for allowed in getattr(hint, "__metadata__", ()):
            value = getattr(settings, name)
            for number in value if isinstance(value, tuple) else [value]:
                if not allowed.low <= number <= allowed.high:  # nor is NaN
                    ends = f"{allowed.low:g} to {allowed.high:g}"
                    raise InputError(f"--{name.replace('_', '-')} {number}: must be in the range {ends}")
    return settings


def run(main, to_continue="the same command goes on from here"):
    """Call `main()` and exit; foreseeable failures become one line on stderr and a non-zero status.

    Exit status: what `main` returns (None is 0), 1 for bad input or a failed file operation, 130 for Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell's >&-
            setattr(sys, name, open(os.devnull, "w"))
    # Lines, so that a log file shows what has been done so far; no name of a file is too odd to print.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        status = main()
    except (InputError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        print(f"error: {reason(error)}{f'; make room, then {to_continue}' if full else ''}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {to_continue}", file=sys.stderr)
        status = 130
    sys.exit(status)


def reason(error):
    """Return an exception as one line for the person who runs the script."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "too large for the memory"
    first_line = next(iter(str(error).splitlines()), "")
    return first_line if isinstance(error, InputError) else f"{type(error).__name__}: {first_line}"


@contextlib.contextmanager
def naming(path):
    """Give an OSError that names no file the name of `path`: a full disk does not say which file it had no room for."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def whole_file(path, mode="wb", durable=True, **options):
    """Open `path` for writing so that it appears complete or not at all, whenever the process dies.

    The bytes go to `<path>.partial`, reach the disk, and only then take the name. With `durable=False` they need
    not have reached the disk, for files that the next start checks byte by byte.
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


def write_table(path, rows, **options):
    """Write `rows`, each a sequence of values, as a CSV file; `options` are those of csv.writer."""
    with whole_file(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows(rows)


@contextlib.contextmanager
def lock(path):
    """Let one process at a time work on the file `path`, which need not exist.

    The lock dies with its process; its file, `.<name>.lock`, stays. Raises InputError if another process has it.
    """
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise InputError(f"{path}: another process is at work on it; wait for its end, or write elsewhere") from None
