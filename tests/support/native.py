"""Compiles the CUDA sources with a C++ compiler, for the emulated GPU of ``csrc/emulator``."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PROGRAMS = Path(__file__).resolve().parents[1] / "native"


def _compiler() -> list[str]:
    """The C++ compiler's command; the test is skipped where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    found = [command for command in candidates if shutil.which(command[0])]
    if not found:
        pytest.skip("no C++ compiler")
    return found[0]


def compile_emulated(
    output: Path, program: str, *kernels: str, flags: tuple[str, ...] = ()
) -> Path:
    """Compiles a program with the kernels that it calls and the emulator beneath them.

    Args:
        output: The file to write.
        program: A source in ``tests/native``.
        kernels: Patterns of sources below ``csrc/cuda``, such as ``"resident/*.cu"``.
        flags: Further flags of the compiler.

    Returns:
        ``output``. The test is skipped where there are no sources or no compiler.
    """
    if not CSRC.exists():
        pytest.skip("the source tree is not here")
    sources = [PROGRAMS / program, *(CSRC / "emulator").glob("*.cpp")]
    for pattern in kernels:
        found = list((CSRC / "cuda").glob(pattern))
        assert found, f"csrc/cuda holds no {pattern}"
        sources += found
    command = [*_compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-DRBM_EMULATED"]
    command += [*flags, f"-I{CSRC}", "-o", str(output), "-x", "c++", *map(str, sources)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return output


def run(program: Path, *arguments: str, schedule: int = 0) -> None:
    """Runs a compiled program, which must end with status 0 within five minutes.

    Args:
        program: What ``compile_emulated`` returned.
        arguments: The program's own arguments.
        schedule: The order in which the emulator runs threads: 0 is round robin, any other number
            a random order of that seed.
    """
    environment = {**os.environ, "RBM_EMULATED_SCHEDULE": str(schedule)}
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
