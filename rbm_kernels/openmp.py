"""How OpenMP threads wait, chosen so that a command keeps its speed on a machine that is not idle.

By default the threads of GNU OpenMP, which PyTorch and the ``cpu`` backend use, spin at the end of
every parallel loop. While they spin, no core looks idle, so the scheduler leaves a thread that
waits for its turn where it is: one other busy process can cost a two-thread CD step nine tenths of
its speed or more (benchmarks/NOTES.md has figures). Threads that sleep while they wait are a little
slower on a quiet machine and keep most of their speed on a busy one.

The commands of this package choose that. A library must not choose for its user, who can: by
``OMP_WAIT_POLICY=passive`` in the environment, or by calling ``wait_passively`` before torch is
imported.
"""

from __future__ import annotations

import os
import sys

# Either says how GNU OpenMP's threads wait.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_passively() -> bool:
    """Let OpenMP threads sleep while they wait, unless the environment says how they shall wait.

    OpenMP reads its environment once, when torch is imported, so nothing is done after that.

    Returns:
        Whether the policy was set.
    """
    if "torch" in sys.modules or any(name in os.environ for name in VARIABLES):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True
