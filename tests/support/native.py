"""Where the sources of the CUDA kernels are, and what compiles them for the emulator."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"


def compiler() -> list[str]:
    """The C++ compiler's command; the test is skipped where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    found = [command for command in candidates if shutil.which(command[0])]
    if not found:
        pytest.skip("no C++ compiler")
    return found[0]
