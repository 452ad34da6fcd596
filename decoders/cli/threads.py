"""How PyTorch's threads wait for each other. OpenMP's library reads it once, when PyTorch is imported."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

PRESSURE = Path("/proc/pressure/cpu")  # Linux: how long programs have waited for a processor
CROWDED = 20.0  # percent of the last ten seconds
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # the user's own choice


def choose_wait_policy() -> None:
    """Where other programs want the processors, threads that wait sleep at once. Else they wait actively for
    some milliseconds, as by default: that is faster on a machine of one's own. docs/speed.md has figures."""
    is_free = "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS)
    if is_free and is_crowded():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def is_crowded() -> bool:
    """Whether programs have been waiting for a processor lately."""
    with suppress(OSError):
        waited = re.match(r"some avg10=([\d.]+)", PRESSURE.read_text())
        return waited is not None and float(waited[1]) > CROWDED
    return False
