"""What the scripts share."""

import signal
import sys
from pathlib import Path

# The scripts import this first: until their main() runs, Ctrl-C ends them without a traceback (lib.common.run).
if Path(sys.argv[0]).parent.resolve() == Path(__file__).parent.parent.resolve():
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
