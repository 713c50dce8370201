"""What the Python layer costs a call: the public function less the compiled call within it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict

import pytest
import torch

import rbm_kernels
from rbm_kernels.cli import bench_table as bench


class Stopwatch:
    """Stands in for a compiled function and adds up the time spent in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function):
        """The same function, timed."""

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def split(call, module, monkeypatch, rounds=2000):
    """Median seconds of the whole call, and of the compiled functions within it.

    The raw call is timed in place, since its pointers are good only during the public call.
    """
    for _ in range(100):
        call()
    whole = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        whole.append(time.perf_counter() - start)
    watch, inside = Stopwatch(), []
    with monkeypatch.context() as patch:
        for name, function in vars(module).copy().items():
            if callable(function) and not name.startswith("_"):
                patch.setattr(module, name, watch.wrap(function))
        for _ in range(rounds):
            watch.seconds = 0.0
            call()
            inside.append(watch.seconds)
    return bench.summarize(whole), bench.summarize(inside)


def bench_overhead(benchmark, report, monkeypatch):
    """Shapes so small that the kernels have next to nothing to do."""
    module = pytest.importorskip("rbm_kernels._cpu", reason="the cpu backend was not built")
    rows, data = [], {}

    def measure():
        for size in (1, 8):
            v, W = torch.ones(size, size), torch.zeros(size, size)
            b, c = torch.zeros(size), torch.zeros(size)
            seed = torch.tensor([1, 0])
            out = (torch.empty_like(W), torch.empty_like(b), torch.empty_like(c))
            calls = {
                "cd_step": lambda v=v, W=W, b=b, c=c: rbm_kernels.cd_step(v, W, b, c),
                "cd_step, seed tensor, out=": lambda v=v, W=W, b=b, c=c, seed=seed, out=out: (
                    rbm_kernels.cd_step(v, W, b, c, seed=seed, out=out)
                ),
                "sample_hidden": lambda v=v, W=W, c=c: rbm_kernels.sample_hidden(v, W, c),
                "gibbs_sample": lambda v=v, W=W, b=b, c=c: rbm_kernels.gibbs_sample(v, W, b, c),
                "free_energy": lambda v=v, W=W, b=b, c=c: rbm_kernels.free_energy(v, W, b, c),
            }
            for name, call in calls.items():
                whole, inside = split(call, module, monkeypatch)
                label = f"{name}, {size} x {size} x {size}"
                over = whole.p50 - inside.p50
                data[label] = {"call": asdict(whole), "kernel": asdict(inside), "overhead": over}
                figures = (whole.p50, inside.p50, over)
                rows.append([label, *(f"{figure * 1e6:.1f}" for figure in figures)])

    benchmark.pedantic(measure, rounds=1, iterations=1)
    worst = max(row["overhead"] for row in data.values())
    typical = statistics.median(row["overhead"] for row in data.values())
    report.table(
        "Overhead of the Python layer in eager, microseconds",
        bench.markdown(["call", "whole", "compiled part", "overhead"], rows),
    )
    report.table(
        "Overhead of the Python layer in eager, microseconds",
        f"typical {typical * 1e6:.1f}, worst {worst * 1e6:.1f}",
    )
    report.data["overhead_seconds"] = data
