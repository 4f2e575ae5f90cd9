"""What every script shares: settings, one-line errors, and files that are whole or absent."""

import contextlib
import ctypes
import errno
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class InputError(Exception):
    """Something the person running the script can put right; the message names the file and the remedy."""


def settings_from_command_line(settings_class, description):
    """Return `settings_class` (a dataclass) filled from the command line.

    Every field is an option; the comment beside it is its help. An unknown name or a value of the
    wrong type ends the program with exit status 2 and one line.
    """
    import tyro  # here, so that a library user of the scripts' functions needs no command line

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(settings_class, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code == 2:
            print(f"error: {_first_paragraph(message.getvalue())} (see --help)", file=sys.stderr)
        raise


def _first_paragraph(box):
    """Return the first paragraph of one of tyro's boxes of text as one line."""
    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    paragraph = []
    for line in lines:
        if not line.strip("─╰╯"):
            break
        paragraph.append(line)
    return " ".join(paragraph)


def run(main, when_interrupted="the same command goes on from here"):
    """Call `main()` and exit; foreseeable failures become one line on stderr and a non-zero status.

    Exit status: what `main` returns (None is 0), 1 for bad input or a failed file operation, 130 for Ctrl-C.
    """
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows what has been done so far
    try:
        status = main()
    except InputError as error:
        status = _complain(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        remedy = "; make room and run the same command again" if error.errno == errno.ENOSPC else ""
        status = _complain(f"{error.filename or 'writing'}: {error.strerror}{remedy}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; {when_interrupted}", file=sys.stderr)
        status = 130
    sys.exit(status)


def _complain(message):
    print(f"error: {message}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def whole_file(path, mode="wb", durable=True, **options):
    """Open `path` for writing so that it appears complete or not at all, whenever the process dies.

    The bytes go to `<path>.partial`, reach the disk, and only then take the name. With `durable=False` they need
    not have reached the disk, for files that the next start checks byte by byte.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, mode, **options) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def keep_freed_memory():
    """Tell the C library to keep freed memory for the next tensors instead of giving it back.

    Each training step frees and takes a gigabyte again; having the kernel clear those pages anew costs as much time
    as the arithmetic. Only glibc understands this; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too ...
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... and the heap is not given back
