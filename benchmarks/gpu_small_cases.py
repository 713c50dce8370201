"""Small calls of every kernel, for compute-sanitizer.

    python benchmarks/gpu_small_cases.py BACKEND [--regime NAME] [--device cpu]

Sizes lie below, at and above the edges of tiles, so that a read or write beside a tensor is one
beside an allocation too (run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

import rbm_kernels as rk
from rbm_kernels.backends import cuda

# The last one fills several blocks of a cluster, and tiles with several steps of their sums.
SIZES = [(1, 1, 1), (3, 5, 17), (65, 63, 64), (130, 129, 33), (130, 300, 1030)]
PRECISIONS = {"high": 2, "highest": 3}  # and their digits


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
    for precision in PRECISIONS:
        common: dict[str, Any] = {"seed": 3, "backend": backend, "precision": precision}
        if gaussian:
            common["log_var"] = 0.2 * b
        rk.sample_hidden(v, W, c, return_probs=True, **common)
        rk.sample_visible(h, W, b, return_probs=True, **common)
        rk.gibbs_sample(v, W, b, c, 2, clamp=mask, **common)
        rk.gibbs_sample(v, W, b, c, 3, beta=torch.full((rows,), 0.5, device=device), **common)
        rk.cd_step(v, W, b, c, 2, **common)
        rk.cd_step(v, W, b, c, 1, chains=chains, **common)
        rk.cd_loss(v, W, b, c, 1, **common)
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


def takes(regime: str, device: str, size: tuple[int, int, int], gaussian: bool) -> bool:
    """Whether the cuda backend's forced regime runs chains of this size in either precision."""
    where = torch.device(device)
    return any(
        cuda.regime(*size, 2, digits, where, gaussian).split()[0] == regime
        for digits in PRECISIONS.values()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """All sizes, or those that a regime takes; 1 if it takes none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backend")
    parser.add_argument("--regime", help="of the cuda backend, and then only the sizes it takes")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.backend == "triton":
        from rbm_kernels.backends.triton import tuning

        tuning._time = run_once  # still runs every tile size
    if options.regime:
        os.environ["RBM_KERNELS_CUDA_REGIME"] = options.regime
    ran = 0
    # The largest takes an emulator a minute.
    for size in SIZES if options.device == "cuda" else SIZES[:-1]:
        for gaussian in (False, True):
            if not options.regime or takes(options.regime, options.device, size, gaussian):
                run(options.backend, options.device, size, gaussian)
                ran += 1
    if options.device == "cuda":
        torch.cuda.synchronize()
    words = f", {options.regime}" if options.regime else ""
    print(f"{options.backend}{words}: every operation ran on {ran} models")
    return 0 if ran else 1


if __name__ == "__main__":
    raise SystemExit(main())
