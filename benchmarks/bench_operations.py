"""CD-k, Gibbs sweeps and free energies against naive PyTorch, eager and compiled."""

from __future__ import annotations

import pytest

from rbm_kernels import benchmark as bench

CASES = list(bench.default_cases())


@pytest.mark.parametrize("case", CASES, ids=[f"{case.label}, {case.shape}" for case in CASES])
def bench_operation(case, compare, report, request):
    """One row of the main table."""
    variants, prepare, baseline, probe = bench.build_variants(
        case, compile=not request.config.getoption("--no-compile")
    )
    timings = compare(variants, "high", prepare)
    report.results.append(bench.Result(case, timings, bench.fused_backend(), baseline, probe))
