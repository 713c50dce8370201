"""What nvcc and ptxas say of the CUDA kernels, on a machine with or without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import native

from rbm_kernels import info

kernels = info.build_info().get("cuda", {}).get("kernels", [])


@pytest.mark.skipif(not kernels, reason="the CUDA module is not built")
def test_no_kernel_of_the_build_spills_registers() -> None:
    for kernel in kernels:
        print(
            f"{kernel['architecture']:7} {kernel['registers']:3} registers, "
            f"{kernel['spill_bytes']} bytes spilled  {kernel['kernel']}"
        )
    assert {kernel["architecture"] for kernel in kernels} == {"sm_80", "sm_90", "sm_90a"}
    assert [kernel for kernel in kernels if kernel["spill_bytes"] or kernel["stack_bytes"]] == []


def _other_architectures() -> list[str]:
    """Those left to the code of sm_80 and the PTX of sm_90, as far as nvcc has them."""
    if shutil.which("nvcc") is None:
        return []
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in ("86", "89", "100") if f"compute_{arch}\n" in listed]


@pytest.mark.slow
def test_other_architectures_compile_without_spills(tmp_path: Path) -> None:
    architectures = _other_architectures()
    if not architectures:
        pytest.skip("nvcc is not on PATH")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]

    def compile_source(source: Path) -> str:
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", *codes]
        command += [f"-I{native.CSRC}", "-c", str(source), "-o", str(tmp_path / source.stem)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    all_sources = (native.CSRC / "cuda").rglob("*.cu")
    sources = [source for source in all_sources if not source.stem.endswith("_sm90a")]
    with ThreadPoolExecutor(2) as pool:
        words = "".join(pool.map(compile_source, sources))
    for arch in architectures:
        assert f"for 'sm_{arch}'" in words
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", words)
    assert spills and set(spills) == {("0", "0")}
