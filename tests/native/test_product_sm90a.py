"""The tiled kernels with Hopper's instructions: tests/product_sm90a.cu, run on the emulated GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.native import CUDA, ROOT, compiler

SOURCES = (
    ROOT / "tests" / "native" / "product_sm90a.cu",
    *(CUDA / f"{name}.cu" for name in ("half_sweep", "half_sweep_sm90a")),
    *(CUDA / f"{name}.cu" for name in ("gradient", "gradient_sm90a")),
    *CUDA.glob("emulated*.cpp"),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CUDA.exists():
        pytest.skip("the source tree is not here")
    path = tmp_path_factory.mktemp("product_sm90a") / "product_sm90a"
    command = [*compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-DRBM_EMULATED"]
    command += [f"-I{CUDA}", f"-I{ROOT / 'csrc' / 'include'}", "-o", str(path), "-x", "c++"]
    command += [str(source) for source in SOURCES]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return path


# 0 is round robin. In the others a stage that is released too early is overwritten in time to show.
@pytest.mark.parametrize("schedule", [0, 1, 3])
def test_same_bits_as_the_portable_kernels(program: Path, schedule: int) -> None:
    environment = {**os.environ, "RBM_EMULATED_SCHEDULE": str(schedule)}
    result = subprocess.run(
        [program], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
