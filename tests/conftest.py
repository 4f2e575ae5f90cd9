"""What the tests share: how a script is run, and where the optional real data lies."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture
def run_script():
    """Return a function that runs one of the scripts in a process of its own, as a person would."""

    def run(script, *arguments, status=0, timeout=120, **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
        assert done.returncode == status, f"{done.args}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def shared():
    """Return the folder of real data beside the checkout, or skip."""
    if not SHARED.is_dir():
        pytest.skip("the real annotations and clips are not beside this checkout")
    return SHARED
