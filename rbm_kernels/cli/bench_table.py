"""The table of ``rbm-kernels bench``: this package against plain PyTorch, eager and compiled.

The naive RBM is the package's textbook: eager float32 as a careful PyTorch user writes it, with the
bias fused into the product and no product computed twice. benchmarks/ measures more, with the
cases, the variants and the timer of this file.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbm_kernels import backends, cd_step, free_energy, gibbs_sample, openmp, textbook
from rbm_kernels._version import __version__
from rbm_kernels.units import Bernoulli

SHAPES = ((512, 784, 1024), (128, 784, 500), (64, 64, 64), (1024, 2048, 2048))
SWEEPS = (1, 10)
PRECISIONS = ("high", "highest")

_log = logging.getLogger("rbm_kernels")

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: 20th, 50th and 80th percentiles over some rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def summarize(samples: Sequence[float]) -> Timing:
    """Percentiles of measured seconds."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7], len(samples))


def one_turn(
    variants: Mapping[str, Call],
    samples: Mapping[str, list[float]],
    turn: int,
    prepare: Call | None = None,
) -> None:
    """Time each variant once, beginning with another one each turn; ``prepare`` is not timed."""
    names = list(variants)
    first = turn % len(names) if names else 0
    for name in names[first:] + names[:first]:
        if prepare is not None:
            prepare()
        call = variants[name]
        start = time.perf_counter()
        call()
        samples[name].append(time.perf_counter() - start)


def interleave(
    variants: Mapping[str, Call],
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    prepare: Call | None = None,
) -> dict[str, Timing]:
    """Time variants in turn, so that a busy moment of the machine hits all of them.

    Args:
        variants: Calls by name.
        seconds: Time to spend on all of them after one warm-up call each.
        min_rounds: Smallest number of rounds, however long they take.
        max_rounds: Largest number of rounds.
        prepare: Called before each call, outside the timing.

    Returns:
        The timings by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    one_turn(variants, samples, 0, prepare)
    for taken in samples.values():
        taken.clear()
    start = time.perf_counter()
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() - start > seconds:
            break
        one_turn(variants, samples, turn, prepare)
    return {name: summarize(taken) for name, taken in samples.items()}


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: ``"cd_step"``, ``"gibbs_sample"`` or ``"free_energy"``.
        batch: Number B of rows of the data.
        n_visible: Number V of visible units.
        n_hidden: Number H of hidden units.
        k: Number of sweeps.
        chains: Number of persistent chains that a CD step advances; 0 starts from the data.
    """

    operation: str
    batch: int
    n_visible: int
    n_hidden: int
    k: int = 1
    chains: int = 0

    @property
    def label(self) -> str:
        """The operation in words, e.g. ``CD-10``."""
        if self.operation == "cd_step":
            return f"PCD-{self.k}" if self.chains else f"CD-{self.k}"
        if self.operation == "gibbs_sample":
            return "1 sweep" if self.k == 1 else f"{self.k} sweeps"
        return "free energy"

    @property
    def shape(self) -> str:
        """``B x V x H``."""
        return f"{self.batch} x {self.n_visible} x {self.n_hidden}"


@dataclass
class Result:
    """Timings of one case by variant, and which baseline and backend they are of."""

    case: Case
    timings: dict[str, Timing]
    backend: str
    baseline: str
    tried: dict[str, float] = field(default_factory=dict)

    def ratio(self, variant: str, against: str = "naive") -> float | None:
        """How many times faster ``variant`` is than ``against``, by medians."""
        if variant not in self.timings or against not in self.timings:
            return None
        return self.timings[against].p50 / self.timings[variant].p50


def default_cases(
    shapes: Iterable[Sequence[int]] = SHAPES, sweeps: Iterable[int] = SWEEPS
) -> Iterator[Case]:
    """CD-k, k sweeps and the free energy at each shape (B, V, H)."""
    for batch, n_visible, n_hidden in shapes:
        for operation in ("cd_step", "gibbs_sample"):
            for k in sweeps:
                yield Case(operation, batch, n_visible, n_hidden, k)
        yield Case("free_energy", batch, n_visible, n_hidden)


def fused_backend() -> str:
    """The backend whose speed is shown: ``cpu`` where it was built, otherwise ``reference``."""
    return "reference" if backends.cpu.unavailable_reason() else "cpu"


@contextmanager
def torch_settings(threads: int | None, matmul: str = "highest") -> Iterator[None]:
    """Set torch's threads and float32 matmul precision for a while."""
    before = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


class TorchBernoulli(Bernoulli):
    """Bernoulli units drawn by ``torch.bernoulli`` in place of ``torch.rand < p``."""

    def sample(self, mean: Tensor, beta: float | Tensor = 1.0) -> Tensor:
        """States 0 or 1 with these means."""
        return torch.bernoulli(mean)


DRAWS: dict[str, Bernoulli] = {
    "torch.rand < p": textbook.BERNOULLI,
    "torch.bernoulli": TorchBernoulli(),
}


def naive(case: Case, v: Tensor, W: Tensor, b: Tensor, c: Tensor, units: Bernoulli) -> Call:
    """The textbook's call for a case, with a way of drawing."""
    if case.operation == "cd_step":
        return lambda: textbook.cd_step(v, W, b, c, case.k, units=units, hidden=units)
    if case.operation == "gibbs_sample":
        return lambda: textbook.gibbs_sample(v, W, b, c, case.k, units=units, hidden=units)
    return lambda: textbook.free_energy(v, W, b, c)


def compiled(case: Case, v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Call:
    """torch.compile of the textbook. k > 1 loops over one compiled sweep, to compile in seconds."""
    torch.compiler.reset()  # the same functions at other shapes would reach the recompile limit
    if case.operation == "free_energy":
        free_energies = torch.compile(textbook.free_energy, dynamic=False)
        return lambda: free_energies(v, W, b, c)
    if case.operation == "gibbs_sample":
        sample = torch.compile(textbook.gibbs_sample, dynamic=False)

        def sweeps() -> Tensor:
            state = v
            for _ in range(case.k):
                state = sample(state, W, b, c)
            return state

        return sweeps
    if case.k == 1:
        step = torch.compile(textbook.cd_step, dynamic=False)
        return lambda: step(v, W, b, c)
    hidden_mean = torch.compile(textbook.hidden_mean, dynamic=False)
    sweep = torch.compile(textbook.sweep, dynamic=False)
    gradients = torch.compile(textbook.gradients, dynamic=False)

    def steps() -> object:
        p = p_data = hidden_mean(v, W, c)
        for _ in range(case.k):
            state, p = sweep(p, W, b, c)
        return gradients(v, p_data, state, p, W, b), state

    return steps


def ours(
    case: Case, v: Tensor, W: Tensor, b: Tensor, c: Tensor, backend: str, precision: str
) -> Call:
    """The package's own call for a case."""
    options: Any = {"backend": backend, "precision": precision}
    if case.operation == "cd_step":
        return lambda: cd_step(v, W, b, c, case.k, **options)
    if case.operation == "gibbs_sample":
        return lambda: gibbs_sample(v, W, b, c, case.k, **options)
    return lambda: free_energy(v, W, b, c, **options)


@dataclass(frozen=True)
class Variants:
    """What is compared for a case.

    Attributes:
        calls: Calls by name: ``naive``, the textbook; ``naive medium``, the same with products in
            bfloat16 where PyTorch has them; ``compile``; ``high`` and ``highest``, this package.
        prepare: Called before each of them, outside the timing.
        baseline: How ``naive`` draws.
        tried: Seconds of the textbook by way of drawing.
        operands: v [B, V], W [V, H], b [V] and c [H].
    """

    calls: dict[str, Call]
    prepare: Call
    baseline: str
    tried: dict[str, float]
    operands: tuple[Tensor, Tensor, Tensor, Tensor]


def build_variants(
    case: Case, *, compile: bool = True, backend: str | None = None, probe: bool = True
) -> Variants:
    """The calls to compare for a case, on binary float32 data and weights of N(0, 0.05^2).

    Nobody keeps W between two training steps, so ``prepare`` touches it before each CD step:
    whatever a backend remembers of W must be made anew within the timing.

    Args:
        case: The operation and its shape.
        compile: Also compile the textbook; where that fails, it is left out with a warning.
        backend: This package's backend, by default the fused one that was built.
        probe: Try both ways of drawing first, so that ``naive`` is the faster one.
    """
    generator = torch.Generator().manual_seed(0)
    B, V, H = case.batch, case.n_visible, case.n_hidden
    v = (torch.rand(B, V, generator=generator) < 0.2).float()
    W = torch.randn(V, H, generator=generator).mul_(0.05)
    operands = v, W, torch.full((V,), -1.0), torch.zeros(H)

    def prepare() -> None:
        if case.operation == "cd_step":
            W.mul_(1.0)

    ways = {name: naive(case, *operands, units) for name, units in DRAWS.items()}
    tried: dict[str, float] = {}
    if case.operation == "free_energy":
        ways = {"softplus": naive(case, *operands, textbook.BERNOULLI)}
    elif probe:
        timings = interleave(ways, seconds=0.1, min_rounds=2, max_rounds=20)
        tried = {name: timing.p50 for name, timing in timings.items()}
    baseline = min(tried, key=lambda name: tried[name], default=next(iter(ways)))
    fastest = ways[baseline]

    def medium() -> object:
        torch.set_float32_matmul_precision("medium")
        try:
            return fastest()
        finally:
            torch.set_float32_matmul_precision("highest")

    calls: dict[str, Call] = {"naive": fastest, "naive medium": medium}
    if compile:
        try:
            calls["compile"] = compiled(case, *operands)
            calls["compile"]()
        except Exception as error:  # no C++ compiler, or one that inductor cannot use
            del calls["compile"]
            _log.warning("torch.compile is left out of the table: %s", error)
    for precision in PRECISIONS:
        calls[precision] = ours(case, *operands, backend or fused_backend(), precision)
    return Variants(calls, prepare, baseline, tried, operands)


@torch.no_grad()
def measure(
    case: Case,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    backend: str | None = None,
    threads: int | None = 2,
) -> Result:
    """Time one case; ``Variants`` says what is compared."""
    backend = backend or fused_backend()
    with torch_settings(threads):
        variants = build_variants(case, compile=compile, backend=backend)
        timings = interleave(variants.calls, seconds=seconds, prepare=variants.prepare)
    return Result(case, timings, backend, variants.baseline, variants.tried)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well on a terminal."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([text(lines[0]), text(rule), *(text(line) for line in lines[1:])])


def milliseconds(seconds: float | None) -> str:
    """Milliseconds with three digits that count."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def times(ratio: float | None) -> str:
    """A ratio such as ``3.1x``."""
    return "-" if ratio is None else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def results_table(
    results: Iterable[Result], others: Sequence[str] = ("naive", "compile", "naive medium")
) -> str:
    """One row a case: medians in milliseconds and ratios within the same run.

    Args:
        results: The cases.
        others: The variants to show beside this package's own.
    """
    columns = ["operation", "B x V x H", *others]
    for precision in PRECISIONS:
        columns += [precision, "vs naive", "vs compile"]
    rows = []
    for result in results:
        median = {name: timing.p50 for name, timing in result.timings.items()}
        row = [result.case.label, result.case.shape]
        row += [milliseconds(median.get(name)) for name in others]
        for precision in PRECISIONS:
            row += [
                milliseconds(median.get(precision)),
                times(result.ratio(precision)),
                times(result.ratio(precision, "compile")),
            ]
        rows.append(row)
    return markdown(columns, rows)


def main_table(
    shapes: Iterable[Sequence[int]] = SHAPES,
    sweeps: Iterable[int] = SWEEPS,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    backend: str | None = None,
    threads: int | None = 2,
    progress: Callable[[Case], None] | None = None,
) -> str:
    """The table of ``rbm-kernels bench``: this package against naive PyTorch.

    Args:
        shapes: (B, V, H) of each case.
        sweeps: Values of k.
        seconds: Time to spend on each row, more where a single round takes longer.
        compile: Also time torch.compile of the baseline (needs a C++ compiler; takes a while).
        backend: Backend to show, by default the fused one that was built.
        threads: Threads of torch and of the kernels; None leaves them as they are.
        progress: Called with each case before it is measured.

    Returns:
        Markdown: what was measured on, and a table of medians in milliseconds.
    """
    results = []
    for case in default_cases(shapes, sweeps):
        if progress is not None:
            progress(case)
        results.append(
            measure(case, seconds=seconds, compile=compile, backend=backend, threads=threads)
        )
    name = results[0].backend if results else backend or fused_backend()
    return f"{header(name, threads)}\n\n{results_table(results)}"


def header(backend: str, threads: int | None) -> str:
    """What was measured on, and how to read the columns."""
    return (
        f"Median milliseconds, float32, {threads or torch.get_num_threads()} threads, backend "
        f"{backend} ({instruction_set()}), {processor()}, torch {torch.__version__}, rbm-kernels "
        f"{__version__}, {wait_policy()}. naive: the faster of torch.bernoulli and "
        "torch.rand < p; naive medium: the same with bfloat16 products "
        "(float32_matmul_precision 'medium')."
    )


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The instruction set that the cpu backend uses."""
    try:
        return str(importlib.import_module("rbm_kernels._cpu").in_use())
    except ImportError:
        return "not built"


def wait_policy() -> str:
    """How OpenMP threads wait, which is the same for all variants."""
    for name in openmp.VARIABLES:
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    return "OpenMP's own wait policy"
