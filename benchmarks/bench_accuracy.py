"""The table of errors, in the same report as the speeds that they are bought with."""

from __future__ import annotations

import accuracy


def bench_accuracy(benchmark, report):
    """Timed only because the suite runs with --benchmark-only."""
    found = benchmark.pedantic(accuracy.measure, rounds=1, iterations=1)
    shape = " x ".join(map(str, accuracy.SHAPE))
    report.table(f"Error of x = c + v'W against fp64, {shape}", accuracy.table(found))
    report.data["accuracy"] = found
