"""CD-k, Gibbs sweeps and free energies against naive PyTorch, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from baselines import products

from rbm_kernels.cli import bench_table as bench

CASES = list(bench.default_cases())


@pytest.mark.parametrize("case", CASES, ids=[f"{case.label}, {case.shape}" for case in CASES])
def bench_operation(case, compare, report, request):
    """One row of the main bench."""
    variants = bench.build_variants(case, compile=not request.config.getoption("--no-compile"))
    v, W, *_ = variants.operands
    buffers = torch.empty(case.batch, case.n_hidden), torch.empty_like(W)
    bare = products(case.operation, case.k)
    calls = {**variants.calls, "products": lambda: bare(v, W, *buffers)}
    timings = compare(calls, "high", variants.prepare)
    report.results.append(
        bench.Result(case, timings, bench.fused_backend(), variants.baseline, variants.tried)
    )
