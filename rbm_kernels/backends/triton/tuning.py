"""Which tile sizes a kernel runs with: few, timed on first use, never while a graph is captured."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from triton import Config

from rbm_kernels.backends.triton.arithmetic import INTERPRETED

# The first of each list runs where nothing may be timed; it fits the 99 KiB of shared memory of the
# smaller GPUs. Larger tiles spill with three digits (tests/test_triton_compiled.py).
# Every product has the same BLOCK_N, so that its sums over a tile's columns do not depend on what
# was found fastest.
BLOCK_N = 64
PRODUCT = [
    Config({"BLOCK_B": 64, "BLOCK_N": BLOCK_N, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    Config({"BLOCK_B": 128, "BLOCK_N": BLOCK_N, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_B": 16, "BLOCK_N": BLOCK_N, "BLOCK_K": 128}, num_warps=4, num_stages=3),
]
GRADIENT = [
    Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=8, num_stages=2),
    Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128}, num_warps=4, num_stages=3),
]

_chosen: dict[Hashable, Config] = {}


def _size_class(rows: int) -> int:
    """Coarse, so that a ragged last batch is not timed again."""
    return 16 if rows <= 16 else 256 if rows <= 256 else 4096


def _time(run: Callable[[Config], None], config: Config) -> float:
    try:
        return float(
            triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
        )
    except triton.OutOfResources:
        return float("inf")


def launch(
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, ...]],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    configs: list[Config],
    rows: int,
    sizes: Hashable,
) -> Config:
    """Runs the kernel with the fastest of ``configs`` for its sizes, and says which that was.

    Args:
        grid: The grid, from the tile sizes.
        options: The kernel's other compile-time arguments, part of what is tuned for.
        rows: Rows of the batch, whose rough size alone counts.
        sizes: Whatever else the fastest configuration depends on.

    The kernel may run several times, so it must not read what it writes.
    """

    def run(config: Config) -> None:
        kernel[grid(config.kwargs)](
            *arguments, **options, **config.all_kwargs(), enable_fp_fusion=False
        )

    config = configs[0]
    if not INTERPRETED.value:
        key = (kernel, _size_class(rows), sizes, tuple(options.values()), arguments[0].device)
        if key in _chosen:
            config = _chosen[key]
        elif not torch.cuda.is_current_stream_capturing():
            config = _chosen[key] = min(configs, key=lambda candidate: _time(run, candidate))
    run(config)
    return config
