"""The chains that stay on the chip: tests/chain_kernels.cu, run on the emulated GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.native import CUDA, ROOT, compiler

SOURCES = (
    ROOT / "tests" / "native" / "chain_kernels.cu",
    CUDA / "chain.cu",
    CUDA / "chain_sm90a.cu",
    CUDA / "gaussian_chain.cu",
    CUDA / "gaussian_chain_sm90a.cu",
    *CUDA.glob("emulated*.cpp"),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CUDA.exists():
        pytest.skip("the source tree is not here")
    path = tmp_path_factory.mktemp("chain_kernels") / "chain_kernels"
    command = [*compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-DRBM_EMULATED"]
    command += [f"-I{CUDA}", f"-I{ROOT / 'csrc' / 'include'}", "-o", str(path), "-x", "c++"]
    command += [str(source) for source in SOURCES]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return path


@pytest.mark.parametrize("kernel", ["block", "cluster"])
def test_same_chains_as_plain_loops(program: Path, kernel: str) -> None:
    result = subprocess.run(
        [program, kernel], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
