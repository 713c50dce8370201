"""Compiles the Triton kernels of a call for a GPU that is not there.

The backend's own Python runs, on CPU tensors: each launch compiles what it would launch, for the
very types, alignments and options of its arguments, and then does nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rbm_kernels.backends import triton as backend
from rbm_kernels.backends.triton import tuning


@dataclass
class Compiled:
    """One kernel for one architecture.

    Attributes:
        stack: bytes of local memory a thread, which is where spilled registers go.
        shared: bytes of shared memory a block.
    """

    name: str
    arch: int
    options: dict[str, int]
    registers: int
    stack: int
    shared: int
    ptx: str = field(repr=False)


class AbsentGPU:
    """What Triton asks a driver before it launches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


@contextmanager
def compiling(arch: int, every_tile: bool = False) -> Iterator[list[Compiled]]:
    """While this lasts, the backend compiles and launches nothing; what it returns means nothing.

    Args:
        arch: compute capability, 80 or 90.
        every_tile: compile all tile sizes that would be timed, not only the first.

    Yields:
        The kernels compiled, each once.
    """
    compiled: list[Compiled] = []
    known: set[int] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in known:
            known.add(id(kernel))
            options = {k: v for k, v in kwargs.items() if k.isupper() or k.startswith("num_")}
            assert not kernel.metadata.enable_fp_fusion, self.__name__
            compiled.append(
                Compiled(
                    self.__name__,
                    arch,
                    options,
                    *_resources(kernel.asm["cubin"]),
                    kernel.metadata.shared,
                    kernel.asm["ptx"],
                )
            )
        return kernel

    def time_by_compiling(candidate: Any, config: Any) -> float:
        if every_tile:
            candidate(config)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(tuning, "_chosen", {})
        patch.setattr(tuning, "_time", time_by_compiling)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(backend, "unavailable_reason", lambda: None)
        patch.setattr(backend, "runs_on", lambda device: None)
        before = driver._active
        driver.set_active(AbsentGPU(arch))
        try:
            yield compiled
        finally:
            driver._active = before
