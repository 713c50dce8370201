"""Peak memory of one CD step over what its inputs take, each variant in a process of its own.

The kernel's own high-water mark (VmHWM) is reset after the inputs are made and the libraries are
warm, so allocations of C++ and of PyTorch count alike. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rbm_kernels.cli import bench_table as bench

SHAPES = ((512, 784, 1024), (1024, 2048, 2048))
VARIANTS = ("naive", "high", "highest")
# glibc keeps freed memory for later unless told not to, which would hide what is needed at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def peak_bytes(variant: str, shape: tuple[int, int, int]) -> int:
    """Growth of this process' resident memory during one CD-1 step and with its results alive."""
    small = bench.Case("cd_step", 8, 16, 16)
    with bench.torch_settings(2):
        for case in (small, bench.Case("cd_step", *shape)):
            calls = bench.build_variants(case, compile=False, probe=False).calls
            if case is not small:
                before = _status("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")
            result = calls[variant]()
        after = _status("VmHWM")
        del result
    return after - before


def needed_bytes(digits: int, shape: tuple[int, int, int]) -> int:
    """Gradient, digits of W in both layouts, states, v_k as float32, digits of p in both phases."""
    B, V, H = shape
    return 4 * (V * H + V + H) + 2 * digits * V * H + B * (V + H) + 4 * B * V + 2 * digits * B * H


def bench_memory(benchmark, report):
    """MiB, each measured once: the figure hardly varies."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    rows, data = [], {}

    def measure():
        for shape in SHAPES:
            found = {}
            for variant in VARIANTS:
                command = [sys.executable, __file__, variant, *map(str, shape)]
                ran = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **ALLOCATOR},
                )
                found[variant] = int(ran.stdout.split()[-1])
            label = " x ".join(map(str, shape))
            data[label] = {
                **found,
                "needed high": needed_bytes(2, shape),
                "needed highest": needed_bytes(3, shape),
            }
            rows.append([label, *(f"{data[label][name] / 2**20:.1f}" for name in data[label])])

    benchmark.pedantic(measure, rounds=1, iterations=1)
    report.table(
        "Peak memory of CD-1, MiB over the inputs",
        "needed: the gradient, W's digits in both layouts, states and digits of p, all at once.",
    )
    report.table(
        "Peak memory of CD-1, MiB over the inputs",
        bench.markdown(["B x V x H", *next(iter(data.values()))], rows),
    )
    report.data["memory_bytes"] = data


if __name__ == "__main__":
    with torch.no_grad():
        print(peak_bytes(sys.argv[1], tuple(int(size) for size in sys.argv[2:5])))
