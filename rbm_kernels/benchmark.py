"""Competent naive PyTorch RBMs to compare with, and a timer that treats all variants alike.

The baselines do the work of the package's own operations, in eager float32, the way a careful
PyTorch user writes it: fused bias (``addmm``), in-place sigmoid and comparison, gradients written
into one buffer. ``benchmarks/`` and ``rbm-kernels bench`` share them.
"""

from __future__ import annotations

import importlib
import logging
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from ._version import __version__
from .ops.cd import cd_step
from .ops.free_energy import free_energy
from .ops.gibbs import gibbs_sample

SHAPES = ((512, 784, 1024), (128, 784, 500), (64, 64, 64), (1024, 2048, 2048))
SWEEPS = (1, 10)
PRECISIONS = ("high", "highest")

_log = logging.getLogger("rbm_kernels")

Call = Callable[[], object]
Draw = Callable[[Tensor], Tensor]


def draw_bernoulli(p: Tensor) -> Tensor:
    """States 0 or 1 with probabilities p, by ``torch.bernoulli``."""
    return torch.bernoulli(p)


def draw_rand(p: Tensor) -> Tensor:
    """States 0 or 1 with probabilities p, by ``u < p`` written over ``u``."""
    return torch.rand_like(p).lt_(p)


def naive_gibbs(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int, draw: Draw = draw_rand
) -> Tensor:
    """k sweeps of block Gibbs sampling from v [B, V]; returns v_k [B, V]."""
    for _ in range(k):
        h = draw(_hidden(v, W, c))
        v = draw(torch.addmm(b, h, W.t()).sigmoid_())
    return v


def naive_cd_step(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int,
    chains: Tensor | None = None,
    draw: Draw = draw_rand,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One CD-k (or, with chains [N, V], PCD-k) gradient: (grad_W, grad_b, grad_c, v_k)."""
    p_data = _hidden(v, W, c)
    p = p_data if chains is None else _hidden(chains, W, c)
    for _ in range(k):
        state, p = _sweep(p, W, b, c, draw)
    return (*_gradient(v, p_data, state, p), state)


def _hidden(v: Tensor, W: Tensor, c: Tensor) -> Tensor:
    return torch.addmm(c, v, W).sigmoid_()


def _sweep(
    p: Tensor, W: Tensor, b: Tensor, c: Tensor, draw: Draw = draw_rand
) -> tuple[Tensor, Tensor]:
    """From p(h|v) to the next v and its p(h|v)."""
    state = draw(torch.addmm(b, draw(p), W.t()).sigmoid_())
    return state, _hidden(state, W, c)


def _gradient(v: Tensor, p_data: Tensor, state: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_W = torch.mm(v.t(), p_data)
    grad_W.addmm_(state.t(), p, beta=-1.0 / v.shape[0], alpha=1.0 / state.shape[0])
    return grad_W, state.mean(0).sub_(v.mean(0)), p.mean(0).sub_(p_data.mean(0))


def _one_sweep(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return naive_gibbs(v, W, b, c, 1)


def _cd_1(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return naive_cd_step(v, W, b, c, 1)


def naive_free_energy(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Free energies [B] of Bernoulli units."""
    return torch.mv(v, b).neg_().sub_(F.softplus(torch.addmm(c, v, W)).sum(1))


def _compiled(operation: str, k: int) -> Callable[..., object]:
    """torch.compile of the baseline; k > 1 loops over one compiled sweep, to compile in seconds."""
    torch.compiler.reset()  # the same functions at other shapes would reach the recompile limit
    compiled: Callable[..., Any]
    if operation == "free_energy":
        compiled = torch.compile(naive_free_energy, dynamic=False)
        return lambda v, W, b, c: compiled(v, W, b, c)
    if operation == "gibbs_sample":
        compiled = torch.compile(_one_sweep, dynamic=False)

        def sweeps(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
            for _ in range(k):
                v = compiled(v, W, b, c)
            return v

        return sweeps
    if k == 1:
        compiled = torch.compile(_cd_1, dynamic=False)
        return lambda v, W, b, c: compiled(v, W, b, c)
    hidden: Callable[..., Tensor] = torch.compile(_hidden, dynamic=False)
    sweep: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_sweep, dynamic=False)
    gradient = torch.compile(_gradient, dynamic=False)

    def step(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> object:
        p = p_data = hidden(v, W, c)
        for _ in range(k):
            state, p = sweep(p, W, b, c)
        return gradient(v, p_data, state, p), state

    return step


def products(operation: str, k: int) -> Callable[..., None]:
    """The bare matrix products of an operation: no implementation in their dtype is faster."""

    def run(v: Tensor, W: Tensor, h: Tensor, grad: Tensor) -> None:
        if operation == "free_energy":
            torch.mm(v, W, out=h)
            return
        state = torch.empty_like(v)
        for _ in range(k):
            torch.mm(v, W, out=h)
            torch.mm(h, W.t(), out=state)
        if operation == "cd_step":
            torch.mm(v, W, out=h)
            torch.mm(v.t(), h, out=grad)
            torch.mm(v.t(), h, out=grad)

    return run


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: 20th, 50th and 80th percentiles over some rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def summarise(samples: Sequence[float]) -> Timing:
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
        min_rounds: Fewest rounds, however long they take.
        max_rounds: Most rounds.
        prepare: Called before each call, outside the timing.
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
    return {name: summarise(taken) for name, taken in samples.items()}


@dataclass(frozen=True)
class Case:
    """One operation at one shape: ``cd_step``, ``gibbs_sample`` or ``free_energy``.

    With ``chains``, a CD step advances so many persistent chains instead of starting from the data.
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

    @property
    def unit_updates(self) -> int:
        """Units drawn by one call, of both layers ("flips")."""
        if self.operation == "free_energy":
            return 0
        return (self.chains or self.batch) * self.k * (self.n_visible + self.n_hidden)

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products that one call cannot do without.

        A CD step needs p(h|v) of the data and of v_k and one product for each phase of the
        gradient; chains that start from the data share their first product with p(h|v).
        """
        product = 2 * self.n_visible * self.n_hidden  # for one row
        if self.operation == "free_energy":
            return product * self.batch
        chains = self.chains or self.batch
        if self.operation == "gibbs_sample":
            return product * chains * 2 * self.k
        shared = 0 if self.chains else self.batch
        return product * (chains * (2 * self.k + 2) + 2 * self.batch - shared)

    @property
    def least_bytes(self) -> int:
        """Bytes moved if each float32 input is read once and each output written once."""
        parameters = self.n_visible * self.n_hidden + self.n_visible + self.n_hidden
        states = self.batch * self.n_visible
        if self.operation == "free_energy":
            return 4 * (states + parameters + self.batch)
        if self.operation == "gibbs_sample":
            return 4 * (2 * states + parameters)
        chains = self.chains * self.n_visible
        return 4 * (states + 2 * parameters + (2 * chains or states))


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


def build_variants(
    case: Case,
    *,
    compile: bool = True,
    backend: str | None = None,
    probe: bool = True,
    seed: int = 0,
) -> tuple[dict[str, Call], Call, str, dict[str, float]]:
    """The calls to compare for a case, on binary float32 data and weights of N(0, 0.05^2).

    With ``probe``, both ways of drawing are tried first and the faster one becomes ``naive``.
    Nobody keeps W between two training steps, so ``prepare`` touches it before each CD step:
    whatever a backend remembers of W must be made anew within the timing.

    Returns:
        Calls by name (``naive``, ``naive medium``: its products in bfloat16 where PyTorch has
        them, ``compile``, ``products``, ``high``, ``highest``), ``prepare``, the name of the
        baseline's way of drawing, and the probe's seconds by way of drawing.
    """
    backend = backend or fused_backend()
    generator = torch.Generator().manual_seed(seed)
    B, V, H = case.batch, case.n_visible, case.n_hidden
    v = (torch.rand(B, V, generator=generator) < 0.2).float()
    W = torch.randn(V, H, generator=generator).mul_(0.05)
    b, c = torch.full((V,), -1.0), torch.zeros(H)
    hidden, grad = torch.empty(B, H), torch.empty(V, H)
    k = case.k

    def naive(draw: Draw) -> Call:
        if case.operation == "cd_step":
            return lambda: naive_cd_step(v, W, b, c, k, None, draw)
        if case.operation == "gibbs_sample":
            return lambda: naive_gibbs(v, W, b, c, k, draw)
        return lambda: naive_free_energy(v, W, b, c)

    def ours(precision: str) -> Call:
        keywords: dict[str, Any] = {"backend": backend, "precision": precision}
        if case.operation == "cd_step":
            return lambda: cd_step(v, W, b, c, k, **keywords)
        if case.operation == "gibbs_sample":
            return lambda: gibbs_sample(v, W, b, c, k, **keywords)
        return lambda: free_energy(v, W, b, c, **keywords)

    def prepare() -> None:
        if case.operation == "cd_step":
            W.mul_(1.0)

    tried: dict[str, float] = {}
    ways = {"torch.rand < p": naive(draw_rand), "torch.bernoulli": naive(draw_bernoulli)}
    if case.operation == "free_energy":
        ways = {"softplus": naive(draw_rand)}
    elif probe:
        timings = interleave(ways, seconds=0.1, min_rounds=2, max_rounds=20)
        tried = {name: timing.p50 for name, timing in timings.items()}
    baseline = min(tried, key=lambda name: tried[name], default=next(iter(ways)))
    fastest = ways[baseline]

    def medium() -> None:
        torch.set_float32_matmul_precision("medium")
        try:
            fastest()
        finally:
            torch.set_float32_matmul_precision("highest")

    bare = products(case.operation, k)
    variants: dict[str, Call] = {"naive": fastest, "naive medium": medium}
    if compile:
        compiled = _compiled(case.operation, k)
        try:
            compiled(v, W, b, c)
            variants["compile"] = lambda: compiled(v, W, b, c)
        except Exception as error:  # no C++ compiler, or one that inductor cannot use
            _log.warning("torch.compile is left out of the table: %s", error)
    variants["products"] = lambda: bare(v, W, hidden, grad)
    for precision in PRECISIONS:
        variants[precision] = ours(precision)
    return variants, prepare, baseline, tried


@torch.no_grad()
def measure(
    case: Case,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    backend: str | None = None,
    threads: int | None = 2,
) -> Result:
    """Time one case; see :func:`build_variants` for what is compared."""
    backend = backend or fused_backend()
    with torch_settings(threads):
        variants, prepare, baseline, tried = build_variants(case, compile=compile, backend=backend)
        timings = interleave(variants, seconds=seconds, prepare=prepare)
    return Result(case, timings, backend, baseline, tried)


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


def results_table(results: Iterable[Result]) -> str:
    """One row a case: medians in milliseconds and ratios within the same run."""
    columns = [
        "operation",
        "B x V x H",
        "naive",
        "compile",
        "naive medium",
        "products",
        "high",
        "vs naive",
        "vs compile",
        "highest",
        "vs naive",
        "vs compile",
    ]
    rows = []
    for result in results:
        median = {name: timing.p50 for name, timing in result.timings.items()}
        row = [result.case.label, result.case.shape]
        row += [
            milliseconds(median.get(name))
            for name in ("naive", "compile", "naive medium", "products")
        ]
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
        shapes: (B, V, H) each.
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
    """One line on what was measured, and how to read the columns."""
    where = environment()
    return (
        f"Median milliseconds, float32, {threads or torch.get_num_threads()} threads, backend "
        f"{backend} ({where['isa']}), {where['cpu']}, torch {where['torch']}, rbm-kernels "
        f"{where['rbm_kernels']} at {where['commit']}. naive: the faster of torch.bernoulli and "
        "torch.rand < p; naive medium: the same with bfloat16 products "
        "(float32_matmul_precision 'medium'); products: the bare float32 matrix products of the "
        "same operation."
    )


def environment(checkout: Path | None = None) -> dict[str, str]:
    """Device, versions and commit (of a checkout, by default the package's), for the record."""
    return {
        "cpu": _cpu_name(),
        "isa": _isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rbm_kernels": __version__,
        "commit": _commit(checkout),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _isa() -> str:
    """Instruction set that the cpu backend uses."""
    try:
        return str(importlib.import_module("rbm_kernels._cpu").in_use())
    except ImportError:
        return "not built"


def _commit(checkout: Path | None) -> str:
    """Short commit of the checkout, with a plus sign when files differ from it."""
    here = checkout or Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed copy may lie inside some other repository's folder.
        if not git("ls-files", "."):
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
