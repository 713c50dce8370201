"""How bench_gpu.py takes its figures: operands, the device's clock, its graphs, its ceilings."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from work import flops, least_bytes

from rbm_kernels.cli import bench_table as bench

SAMPLE_SECONDS = 5e-3  # short calls are timed in rows that take at least this long

Call = Callable[[], object]


@dataclass
class Operands:
    """One set of inputs; sets are rotated so that the next one is not in the L2 cache."""

    v: Tensor
    W: Tensor
    b: Tensor
    c: Tensor
    seed: Tensor

    @classmethod
    def make(cls, case: bench.Case, device: str, number: int = 0) -> Operands:
        """Binary float32 data, a fifth of it on, and weights of N(0, 0.05^2)."""
        generator = torch.Generator(device).manual_seed(number)
        shape = (case.batch, case.n_visible)
        v = torch.rand(shape, generator=generator, device=device).lt_(0.2)
        weights = (case.n_visible, case.n_hidden)
        W = torch.randn(weights, generator=generator, device=device).mul_(0.05)
        b = torch.full((case.n_visible,), -1.0, device=device)
        c = torch.zeros(case.n_hidden, device=device)
        return cls(v, W, b, c, torch.tensor([number, 0], device=device))

    @property
    def model(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.v, self.W, self.b, self.c


class Device:
    """The GPU: its clock, its graphs, its memory. The CPU stands in for it in a dry run."""

    def __init__(self, name: str, backends: Sequence[str] = ()) -> None:
        self.name, self.backends = name, backends
        self.gpu = name.startswith("cuda")
        self.pool = torch.cuda.graph_pool_handle() if self.gpu else None
        self.l2_bytes = torch.cuda.get_device_properties(name).L2_cache_size if self.gpu else 0

    def seconds(self, calls: Iterator[Call], repeat: int) -> float:
        """Seconds of one call, by ``repeat`` calls queued back to back."""
        if not self.gpu:
            start = time.perf_counter()
            for _ in range(repeat):
                next(calls)()
            return (time.perf_counter() - start) / repeat
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(repeat):
            next(calls)()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / repeat

    def captured(self, call: Call) -> Call:
        """The same call as a CUDA graph; all graphs share their memory and run one by one."""
        if not self.gpu:
            return call
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
            # Not torch.cuda.graph, which empties torch's cache before each of hundreds of captures.
            torch.cuda.synchronize()
            gc.disable()  # a graph or a module that is freed meanwhile would end the capture
            graph.capture_begin(pool=self.pool)
            try:
                call()
            finally:
                graph.capture_end()
                gc.enable()
        torch.cuda.current_stream().wait_stream(side)
        return graph.replay

    def sets(self, case: bench.Case) -> list[Operands]:
        """As many operands as three L2 caches hold, so that none of them is found there."""
        count = math.ceil(3 * self.l2_bytes / least_bytes(case))
        return [Operands.make(case, self.name, i) for i in range(min(max(count, 1), 64))]

    def peak_bytes(self, call: Call) -> int:
        """Most memory that a call has taken beside what was there, its results included."""
        if not self.gpu:
            return 0
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before


def interleave(
    device: Device, variants: Mapping[str, Sequence[Call]], seconds: float
) -> dict[str, bench.Timing]:
    """Time variants in turn, beginning with another one each round, over rotating operands."""
    calls = {name: itertools.cycle(sets) for name, sets in variants.items()}
    repeat = {}
    for name, queue in calls.items():
        device.seconds(queue, 2)  # warms up
        once = max(device.seconds(queue, 2), 1e-7)
        repeat[name] = min(max(math.ceil(SAMPLE_SECONDS / once), 1), 500) if device.gpu else 1
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    start = time.perf_counter()
    for turn in range(200):
        if turn >= 5 and time.perf_counter() - start > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(device.seconds(calls[name], repeat[name]))
    return {name: bench.summarize(taken) for name, taken in samples.items()}


def ceilings(device: Device, copy_bytes: int, n: int) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of a bf16 product.

    Args:
        device: The device that is measured.
        copy_bytes: Number of bytes that are copied.
        n: Number of rows and of columns of the product's operands.
    """
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    # Random, as a product of zeros runs faster than one of data.
    a, b = (torch.randn(n, n, device=device.name).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "bf16 product": lambda: torch.mm(a, b, out=out),
    }
    timings = interleave(device, {name: [call] for name, call in calls.items()}, 1.0)
    return {
        "copy bytes per second": 2 * source.numel() / timings["copy"].p50,
        "bf16 operations per second": 2 * n**3 / timings["bf16 product"].p50,
    }


def floor_seconds(case: bench.Case, rates: Mapping[str, float]) -> float:
    """No bf16 implementation is faster: products at the measured rate, or bytes at a copy's."""
    return max(
        flops(case) / rates["bf16 operations per second"],
        least_bytes(case) / rates["copy bytes per second"],
    )
