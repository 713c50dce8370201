"""Small calls of every kernel, for compute-sanitizer: python gpu_small_cases.py BACKEND.

Sizes lie below, at and above the edges of tiles, so that a read or write beside a tensor is one
beside an allocation too (run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import rbm_kernels as rk

SIZES = [(1, 1, 1), (3, 5, 17), (65, 63, 64), (130, 129, 33)]


def run(backend: str, device: str, size: tuple[int, int, int], gaussian: bool) -> None:
    """Every operation on one size, in both precisions and several dtypes."""
    rows, n_visible, n_hidden = size
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    W, b, c = 0.3 * normal(n_visible, n_hidden), normal(n_visible), normal(n_hidden)
    v = normal(rows, n_visible) if gaussian else (normal(rows, n_visible) > 0).float()
    h, mask = (normal(rows, n_hidden) > 0).float(), normal(rows, n_visible) > 1
    chains = v[: max(rows // 2, 1)].clone()
    for precision in ("high", "highest"):
        common: dict[str, Any] = {"seed": 3, "backend": backend, "precision": precision}
        if gaussian:
            common["log_var"] = 0.2 * b
        rk.sample_hidden(v, W, c, return_probs=True, **common)
        rk.sample_visible(h, W, b, return_probs=True, **common)
        rk.gibbs_sample(v, W, b, c, 2, clamp=mask, **common)
        rk.gibbs_sample(v, W, b, c, 3, beta=torch.full((rows,), 0.5, device=device), **common)
        rk.cd_step(v, W, b, c, 2, **common)
        rk.cd_step(v, W, b, c, 1, chains=chains, **common)
        half = {**common, "log_var": common["log_var"].half()} if gaussian else common
        rk.cd_step(v.half(), W.half(), b.half(), c.half(), 1, **half)
        if not gaussian:
            rk.sample_hidden(v.bool(), W, c, out_dtype=torch.uint8, **common)
            rk.gibbs_sample(v.to(torch.uint8), W, b, c, 2, out_dtype=torch.bool, **common)
            rk.gibbs_sample(v * 0.7, W, b, c, 1, **common)
        del common["seed"]
        rk.free_energy(v, W, b, c, **common)


def run_once(call: Callable[[Any], None], config: Any) -> float:
    """Takes the place of Triton's timings, which mean nothing under a sanitizer and take long."""
    call(config)
    return 0.0


def main() -> None:
    """All sizes, on the GPU unless another device is named."""
    backend, device = sys.argv[1], (*sys.argv[2:], "cuda")[0]
    if backend == "triton":
        from rbm_kernels.backends.triton import tuning

        tuning._time = run_once  # still runs every tile size
    for size in SIZES:
        for gaussian in (False, True):
            run(backend, device, size, gaussian)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{backend}: every operation ran")


if __name__ == "__main__":
    main()
