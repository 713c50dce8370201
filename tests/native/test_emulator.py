"""The emulated GPU that runs the CUDA kernels on a CPU: tests/emulator.cu, compiled and run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.native import CUDA, ROOT, compiler


# The second is how stacks are switched where the assembler routine does not fit the machine.
@pytest.mark.parametrize("switch", [[], ["-DRBM_EMULATED_UCONTEXT"]], ids=["default", "ucontext"])
def test_emulated_instructions(switch: list[str], tmp_path: Path) -> None:
    if not CUDA.exists():
        pytest.skip("the source tree is not here")
    program = tmp_path / "emulator"
    command = [*compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-DRBM_EMULATED", *switch]
    command += [f"-I{CUDA}", f"-I{ROOT / 'csrc' / 'include'}", "-o", str(program), "-x", "c++"]
    command += [
        str(source)
        for source in (ROOT / "tests" / "native" / "emulator.cu", *CUDA.glob("emulated*.cpp"))
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
