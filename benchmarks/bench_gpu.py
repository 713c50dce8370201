"""Speed and memory on a GPU against naive PyTorch, torch.compile and what the hardware allows.

    python benchmarks/bench_gpu.py RESULTS_DIR [--only WORD ...] [--backends NAME ...] [--dry-run]

Writes RESULTS_DIR/bench_gpu.json after every line of the table, so that a run cut short leaves what
it has measured, and adds to the lines that the file has: gpu_check.py runs a process for each line,
so that a kernel that hangs or faults costs its own line alone. A dry run takes the same way on the
CPU with tiny sizes: it tests this program. README.md says how the figures are made.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from baselines import products
from gpu_timing import Call, Device, Operands, ceilings, floor_seconds, interleave
from tables import environment as host_environment
from torch import Tensor
from work import flops, least_bytes, unit_updates

import rbm_kernels
from rbm_kernels import textbook
from rbm_kernels.backends import cuda
from rbm_kernels.cli import bench_table as bench

REGIME = "RBM_KERNELS_CUDA_REGIME"
REGIMES = ("cluster", "resident", "tiled_sm90a", "tiled")
MNIST_UPDATES = 97_500  # 130 epochs of 60,000 images in batches of 80

Variant = Callable[[Operands], Call]


@dataclass(frozen=True)
class Sizes:
    """What the lines are measured at."""

    sampling: bench.Case
    small: bench.Case
    large: bench.Case
    training: bench.Case
    regimes: tuple[bench.Case, ...]
    images: int
    updates: int
    naive_updates: int
    copy_bytes: int
    product: int


FULL = Sizes(
    sampling=bench.Case("gibbs_sample", 65_536, 784, 500, k=100),
    small=bench.Case("cd_step", 128, 784, 500),
    large=bench.Case("cd_step", 8192, 4096, 4096),
    training=bench.Case("cd_step", 80, 784, 500, k=30, chains=80),
    regimes=(
        bench.Case("gibbs_sample", 128, 64, 64),
        bench.Case("gibbs_sample", 128, 64, 64, k=10),
        bench.Case("gibbs_sample", 128, 784, 500),
        bench.Case("gibbs_sample", 128, 784, 500, k=2),
        bench.Case("gibbs_sample", 128, 784, 500, k=10),
        bench.Case("gibbs_sample", 4096, 784, 500, k=10),
        bench.Case("gibbs_sample", 65_536, 784, 500, k=10),
        bench.Case("gibbs_sample", 4096, 2048, 2048, k=2),
        bench.Case("cd_step", 128, 784, 500),
        bench.Case("cd_step", 1024, 784, 1024),
        bench.Case("cd_step", 8192, 4096, 4096),
    ),
    images=60_000,
    updates=2_000,
    naive_updates=200,
    copy_bytes=2**31,
    product=8192,
)
TINY = Sizes(
    sampling=bench.Case("gibbs_sample", 300, 20, 12, k=3),
    small=bench.Case("cd_step", 9, 20, 12),
    large=bench.Case("cd_step", 40, 33, 17),
    training=bench.Case("cd_step", 8, 20, 12, k=2, chains=8),
    regimes=(bench.Case("gibbs_sample", 8, 20, 12),),
    images=50,
    updates=40,
    naive_updates=20,
    copy_bytes=2**12,
    product=32,
)


@dataclass
class Target:
    """A figure to reach; ``most`` says that a smaller one is better."""

    what: str
    value: float
    goal: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.most else self.value >= self.goal


@dataclass
class Line:
    """One line of the table: what was measured, what could not be, and whose bits differ.

    ``equals_cpu`` says of each variant of ours whether it computes what the cpu backend does. The
    time of one that does not is that of another computation.
    """

    title: str
    case: bench.Case
    timings: dict[str, bench.Timing] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    equals_cpu: dict[str, bool] = field(default_factory=dict)

    @property
    def differing(self) -> list[str]:
        """The variants of ours that compute other bits than cpu."""
        return [name for name, same in self.equals_cpu.items() if not same]

    def ratio(self, variant: str, against: Iterable[str]) -> float | None:
        """How many times faster than the fastest of these, by medians; None without both."""
        others = [self.timings[name].p50 for name in against if name in self.timings]
        if variant not in self.timings or not others:
            return None
        return min(others) / self.timings[variant].p50

    def aim(self, what: str, value: float | None, goal: float, most: bool = False) -> None:
        """Hold a figure against its goal, if it was measured."""
        if value is not None:
            self.targets.append(Target(what, value, goal, most))


def naive(case: bench.Case) -> Variant:
    """The plain PyTorch way, rbm_kernels/textbook.py."""
    if case.operation == "gibbs_sample":
        return lambda o: lambda: textbook.gibbs_sample(*o.model, case.k)
    return lambda o: lambda: textbook.cd_step(*o.model, case.k)


def ours(case: bench.Case, backend: str, precision: str) -> Variant:
    """The package's own operation; the seed tensor is read and advanced on the device."""

    def variant(o: Operands) -> Call:
        keywords: dict[str, Any] = {"backend": backend, "precision": precision, "seed": o.seed}
        if case.operation == "gibbs_sample":
            return lambda: rbm_kernels.gibbs_sample(*o.model, case.k, **keywords)
        return lambda: rbm_kernels.cd_step(*o.model, case.k, **keywords)

    return variant


def at_precision(precision: str, call: Call) -> Call:
    """The call under a float32 matmul precision of torch; elsewhere it is "highest"."""

    def run() -> object:
        torch.set_float32_matmul_precision(precision)
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def in_tf32(variant: Variant) -> Variant:
    """The same with float32 products rounded to TF32."""
    return lambda o: at_precision("high", variant(o))


def bare_products(case: bench.Case) -> Variant:
    """The products of the operation in bfloat16 and nothing else."""

    def variant(o: Operands) -> Call:
        v, W = o.v.bfloat16(), o.W.bfloat16()
        h, grad = v.new_zeros(case.batch, case.n_hidden), torch.zeros_like(W)
        run = products(case.operation, case.k)
        return lambda: run(v, W, h, grad)

    return variant


def compiled(device: Device, mode: str, precision: str, capture: bool) -> Variant:
    """torch.compile of the naive step; with ``capture``, in a CUDA graph that copies no inputs."""
    function = torch.compile(textbook.cd_step, mode=mode, dynamic=False)

    def variant(o: Operands) -> Call:
        run = at_precision(precision, lambda: function(*o.model))
        run()
        return device.captured(run) if capture else run

    return variant


def equals_cpu(case: bench.Case, device: Device, backend: str, precision: str) -> bool:
    """Whether the backend's results are those of the cpu backend, bit for bit.

    Chains do not depend on one another, so three parts of a sampling case stand for all: the first,
    middle and last 128 rows, as a warp that runs several chains one after the other meets what the
    earlier ones left behind.
    """
    o = Operands.make(case, device.name, 7)
    if case.operation == "gibbs_sample":
        sample = functools.partial(rbm_kernels.gibbs_sample, k=case.k, seed=7, precision=precision)
        mine = sample(*o.model, backend=backend)
        v, *parameters = (t.cpu() for t in o.model)
        last = max(case.batch - 128, 0)
        return all(
            torch.equal(
                mine[first : first + 128].cpu(),
                sample(v[first : first + 128], *parameters, chain_offset=first, backend="cpu"),
            )
            for first in (0, last // 2, last)
        )
    steps = [
        rbm_kernels.cd_step(
            *(t.to(where) for t in o.model), case.k, seed=7, backend=name, precision=precision
        )
        for where, name in ((device.name, backend), ("cpu", "cpu"))
    ]
    names = ("grad_W", "grad_b", "grad_c", "chains")
    return all(torch.equal(getattr(steps[0], n).cpu(), getattr(steps[1], n)) for n in names)


def measure(line: Line, device: Device, variants: Mapping[str, Variant], seconds: float) -> None:
    """Time what runs; what does not is written down with its reason."""
    sets = device.sets(line.case)
    calls: dict[str, list[Call]] = {}
    for name, variant in variants.items():
        with reported(line, name):
            made = [variant(o) for o in sets]
            made[0]()
            calls[name] = made
    if calls:
        with reported(line, f"timing of {', '.join(calls)}"):
            line.timings = interleave(device, calls, seconds)


@contextmanager
def reported(line: Line, variant: str) -> Iterator[None]:
    """Write an error down instead of ending the run."""
    try:
        yield
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        # What broke a capture is the context of the error that ends it.
        if error.__context__ is not None:
            words = f"{type(error.__context__).__name__}: {error.__context__}; then {words}"
        line.left_out[variant] = words[:2000]
        print(f"{line.title}: {variant} is left out: {words[:500]}", flush=True)


def our_variants(line: Line, device: Device, captured: bool = False) -> dict[str, Variant]:
    """Our backends in both precisions. One that computes other bits than cpu is timed as well."""
    found: dict[str, Variant] = {}
    for backend in device.backends:
        for precision in bench.PRECISIONS:
            name = f"{backend} {precision}"
            with reported(line, name):
                line.equals_cpu[name] = equals_cpu(line.case, device, backend, precision)
                variant = ours(line.case, backend, precision)
                found[name] = variant
                if captured:
                    found[f"{name}, captured"] = lambda o, v=variant: device.captured(v(o))
    return found


def sampling(device: Device, sizes: Sizes, seconds: float) -> Line:
    """Unit updates a nanosecond of many long chains."""
    case = sizes.sampling
    line = Line(f"{case.batch} chains, {case.k} sweeps", case)
    variants = {"naive": naive(case), "naive TF32": in_tf32(naive(case))}
    measure(line, device, variants | our_variants(line, device), seconds)
    for name, timing in line.timings.items():
        line.figures[name] = {"unit updates per ns": unit_updates(case) / timing.p50 * 1e-9}
    for precision, goal in (("high", 300.0), ("highest", 180.0)):
        for backend in device.backends:
            rate = line.figures.get(f"{backend} {precision}", {}).get("unit updates per ns")
            line.aim(f"{backend} {precision}, unit updates per ns", rate, goal)
    return line


def small_steps(device: Device, sizes: Sizes, seconds: float) -> Line:
    """CD-1 of a small model, where launches cost more than arithmetic."""
    case = sizes.small
    line = Line("CD-1, small", case)
    variants = {"naive": naive(case), "naive TF32": in_tf32(naive(case))}
    measure(line, device, variants | our_variants(line, device, captured=True), seconds)
    for backend in device.backends:
        for precision in bench.PRECISIONS:
            for name in (f"{backend} {precision}", f"{backend} {precision}, captured"):
                line.aim(f"{name}: times naive", line.ratio(name, ["naive"]), 10.0)
    return line


def compiled_steps(device: Device, sizes: Sizes, seconds: float) -> Line:
    """The same against torch.compile, which takes a minute to compile."""
    case = sizes.small
    line = Line("CD-1, small, against torch.compile", case)
    variants = {"naive": naive(case)} | our_variants(line, device, captured=True)
    graphs = []
    if device.gpu:
        for name, mode, precision, capture in (
            ("max-autotune fp32, captured", "max-autotune-no-cudagraphs", "highest", True),
            ("max-autotune TF32, captured", "max-autotune-no-cudagraphs", "high", True),
            ("max-autotune TF32", "max-autotune", "high", False),
        ):
            with reported(line, name):
                variants[name] = compiled(device, mode, precision, capture)
                graphs.append(name)
    measure(line, device, variants, seconds)
    for backend in device.backends:
        for precision in bench.PRECISIONS:
            name = f"{backend} {precision}, captured"
            line.aim(f"{name}: times max-autotune", line.ratio(name, graphs), 3.0)
    return line


def large_steps(device: Device, sizes: Sizes, seconds: float) -> Line:
    """CD-1 of a large model, where matrix products are all."""
    case = sizes.large
    line = Line("CD-1, large", case)
    variants = {
        "bf16 products": bare_products(case),
        "naive": naive(case),
        "naive TF32": in_tf32(naive(case)),
    }
    measure(line, device, variants | our_variants(line, device), seconds)
    for name, timing in line.timings.items():
        line.figures[name] = {"TFLOP/s": flops(case) / timing.p50 * 1e-12}
    for backend in device.backends:
        high, highest = f"{backend} high", f"{backend} highest"
        line.aim(f"{high}: of bf16 products' speed", line.ratio(high, ["bf16 products"]), 0.75)
        line.aim(f"{highest}: times naive", line.ratio(highest, ["naive"]), 5.0)
        line.aim(f"{highest}: times naive TF32", line.ratio(highest, ["naive TF32"]), 1.5)
    return line


def training(device: Device, sizes: Sizes, seconds: float) -> Line:
    """PCD with SGD on random images of MNIST's shape: whole updates, extrapolated to a training."""
    case = sizes.training
    line = Line(f"{case.label} training", case)
    generator = torch.Generator(device.name).manual_seed(0)
    shape = (sizes.images, case.n_visible)
    images = torch.rand(shape, generator=generator, device=device.name).lt_(0.13)

    def updates(step: Call, batch: Tensor) -> Call:
        rows = itertools.cycle(range(0, sizes.images - case.batch + 1, case.batch))

        def update() -> None:
            first = next(rows)
            batch.copy_(images[first : first + case.batch])
            step()

        return update

    def state() -> tuple[Tensor, list[Tensor], Tensor, torch.optim.Optimizer]:
        start = Operands.make(case, device.name)
        parameters = [start.W, start.b, start.c]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        chains = images[: case.chains].clone()
        return start.v.clone(), parameters, chains, torch.optim.SGD(parameters, lr=0.01)

    def our_update(backend: str, precision: str, capture: bool) -> Call:
        batch, parameters, chains, optimizer = state()
        gradients = tuple(p.grad for p in parameters if p.grad is not None)
        seed = torch.tensor([1, 0], device=device.name)

        def step() -> None:
            done = rbm_kernels.cd_step(
                batch, *parameters, case.k, chains=chains, out=gradients, seed=seed,
                backend=backend, precision=precision,
            )  # fmt: skip
            chains.copy_(done.chains)
            optimizer.step()

        return updates(device.captured(step) if capture else step, batch)

    def naive_update() -> Call:
        batch, parameters, chains, optimizer = state()

        def step() -> None:
            gradients, advanced = textbook.cd_step(batch, *parameters, case.k, chains=chains)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            chains.copy_(advanced)
            optimizer.step()

        return updates(step, batch)

    runs: dict[str, tuple[Callable[[], Call], int]] = {"naive": (naive_update, sizes.naive_updates)}
    for backend in device.backends:
        for precision in bench.PRECISIONS:
            for words, capture in (("", False), (", captured", True)):
                runs[f"{backend} {precision}{words}"] = (
                    lambda b=backend, p=precision, c=capture: our_update(b, p, c),
                    sizes.updates if capture else sizes.naive_updates,
                )
    for name, (make, count) in runs.items():
        with reported(line, name):
            calls = itertools.repeat(make())
            device.seconds(calls, 5)
            rows = max(count // 20, 1)
            taken = [device.seconds(calls, rows) for _ in range(count // rows)]
            line.timings[name] = bench.summarize(taken)
            measured = rows * sum(taken)
            line.figures[name] = {
                "measured updates": float(rows * len(taken)),
                "measured seconds": measured,
                "extrapolated seconds": measured / (rows * len(taken)) * MNIST_UPDATES,
            }
    for name in (f"{backend} high, captured" for backend in device.backends):
        total = line.figures.get(name, {}).get("extrapolated seconds")
        line.aim(f"{name}: seconds for {MNIST_UPDATES} updates", total, 20.0, most=True)
    return line


def memory(device: Device, sizes: Sizes, seconds: float) -> Line:
    """Peak memory of a call beside its inputs."""
    del seconds
    line = Line("peak memory", sizes.large)
    for case in (sizes.large, sizes.small, sizes.sampling):
        o = Operands.make(case, device.name)
        variants = {"naive": naive(case)}
        for backend in device.backends:
            for precision in bench.PRECISIONS:
                variants[f"{backend} {precision}"] = ours(case, backend, precision)
        for name, variant in variants.items():
            row = f"{case.label} {case.shape}: {name}"
            with reported(line, row):
                line.figures[row] = {"MiB": device.peak_bytes(variant(o)) / 2**20}
        base = line.figures.get(f"{case.label} {case.shape}: naive", {}).get("MiB")
        for name in variants:
            row = f"{case.label} {case.shape}: {name}"
            if row in line.figures and base:
                line.figures[row]["of naive"] = line.figures[row]["MiB"] / base
    return line


@contextmanager
def forced_regime(name: str) -> Iterator[None]:
    """The cuda backend's kernels of one regime, read at every call from the environment."""
    before = os.environ.get(REGIME)
    os.environ[REGIME] = name
    try:
        yield
    finally:
        del os.environ[REGIME]
        if before is not None:
            os.environ[REGIME] = before


def in_regime(regime: str, device: Device, sizes: Sizes, seconds: float) -> Line:
    """One regime of the cuda backend, captured, at the sizes that fit it.

    The figures of all regimes are what the table that chooses between them is filled from.
    """
    line = Line(f"cuda, {regime}", sizes.regimes[0])
    for case in sizes.regimes if "cuda" in device.backends else ():
        variants: dict[str, list[Call]] = {}
        sets = device.sets(case)
        for precision, digits in (("high", 2), ("highest", 3)):
            shape = (case.batch, case.n_visible, case.n_hidden, case.k, digits)
            with forced_regime(regime):
                found = cuda.regime(*shape, torch.device(device.name))
                name = f"cuda {precision}, {found}: {case.label} {case.shape}"
                if found.split()[0] == regime:  # another one runs where this one cannot
                    with reported(line, name):
                        variant = ours(case, "cuda", precision)
                        line.equals_cpu[name] = equals_cpu(case, device, "cuda", precision)
                        variants[name] = [device.captured(variant(o)) for o in sets]
        with forced_regime(regime), reported(line, f"cuda, timing of {case.label} {case.shape}"):
            timings = interleave(device, variants, seconds / 4) if variants else {}
            for name, t in timings.items():
                times = {"ms": t.p50, "p20": t.p20, "p80": t.p80}
                line.figures[name] = {what: 1e3 * value for what, value in times.items()}
    return line


# In the order of their worth; what takes the longest to compile comes last.
LINES: dict[str, Callable[[Device, Sizes, float], Line]] = {
    "sampling": sampling,
    "large": large_steps,
    "small": small_steps,
    "training": training,
    **{name: functools.partial(in_regime, name) for name in REGIMES},
    "memory": memory,
    "compiled": compiled_steps,
}


def record(line: Line, rates: Mapping[str, float]) -> dict[str, Any]:
    """A line as it is written to the JSON."""
    return {
        **asdict(line),
        "flops": flops(line.case),
        "least_bytes": least_bytes(line.case),
        "unit_updates": unit_updates(line.case),
        "floor_seconds": floor_seconds(line.case, rates),
        "targets": [{**asdict(target), "met": target.met} for target in line.targets],
    }


def table(line: Line, rates: Mapping[str, float]) -> str:
    """A line in words: times of all variants, then figures and targets."""
    floor = floor_seconds(line.case, rates)
    rows = [
        [
            name,
            *(bench.milliseconds(t) for t in (timing.p50, timing.p20, timing.p80)),
            f"{timing.p50 / floor:.2f}",
        ]
        for name, timing in line.timings.items()
    ]
    parts = [f"## {line.title}"]
    if rows:
        parts[0] += f" ({line.case.shape}), floor {bench.milliseconds(floor)} ms"
        parts.append(bench.markdown(["variant", "ms", "p20", "p80", "of floor"], rows))
    for name, figures in line.figures.items():
        words = ", ".join(f"{what} {value:.4g}" for what, value in figures.items())
        parts.append(f"- {name}: {words}")
    for target in line.targets:
        verdict = "met" if target.met else "MISSED"
        parts.append(f"- {verdict}: {target.what} {target.value:.3g} (goal {target.goal:g})")
    parts += [f"- left out: {name}: {reason[:120]}" for name, reason in line.left_out.items()]
    parts += [f"- OTHER BITS than cpu's: {name}" for name in line.differing]
    return "\n".join(parts)


def environment(device: Device) -> dict[str, str]:
    """What the figures were measured on, asked while the GPU's clocks are those of work."""
    found = host_environment()
    if device.gpu:
        properties = torch.cuda.get_device_properties(device.name)
        found |= {
            "gpu": properties.name,
            "multiprocessors": str(properties.multi_processor_count),
            "l2_bytes": str(device.l2_bytes),
            "cuda": str(torch.version.cuda),
            "clocks": clocks(),
        }
    if "cuda" in device.backends:
        where = torch.device(device.name)
        counts = {blocks: cuda.clusters_on(where, blocks, 2) for blocks in (1, 2, 4, 8, 16)}
        words = (f"{count} of {blocks} blocks" for blocks, count in counts.items())
        found["clusters_at_once"] = ", ".join(words)
    return found


def clocks() -> str:
    """The GPU's clocks as nvidia-smi reads them."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip()


def unusable(backends: Iterable[str], device: str) -> dict[str, str]:
    """The backends that cannot run on this device, with the reasons."""
    reasons = {}
    probe = torch.zeros(1, 1, device=device)
    for backend in backends:
        try:
            rbm_kernels.sample_hidden(probe, probe, probe[0], seed=0, backend=backend)
        except RuntimeError as error:
            reasons[backend] = str(error)
    return reasons


def call_once(word: str, sizes: Sizes, device: str) -> None:
    """One call of a line's case on cuda, for a profiler to look at."""
    case = {"sampling": sizes.sampling, "large": sizes.large, "small": sizes.small}[word]
    ours(case, "cuda", "high")(Operands.make(case, device))()
    if device != "cpu":
        torch.cuda.synchronize()


def load(path: Path, device: Device, sizes: Sizes) -> dict[str, Any]:
    """What earlier calls have written into a file, or, where there is none, a beginning of it."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    rates = ceilings(device, sizes.copy_bytes, sizes.product)
    found = {"environment": environment(device), "ceilings": rates, "lines": {}}
    print(*(f"{name}: {value}" for name, value in found["environment"].items()), sep="\n")
    print(*(f"{name}: {rate:.4g}" for name, rate in rates.items()), sep="\n")
    save(path, found)
    return found


def save(path: Path, found: dict[str, Any]) -> None:
    """Write the file as a whole, as the process may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a backend of ours failed, has other bits than cpu or, named, cannot run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder for bench_gpu.json")
    parser.add_argument("--only", nargs="*", metavar="LINE", help=", ".join(LINES))
    parser.add_argument(
        "--backends", nargs="+", choices=["cpu", "cuda", "triton"],
        help="what is measured; the lines are then named after them, as in 'small of triton'",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each line")
    parser.add_argument("--once", action="store_true", help="one call of cuda, without a clock")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return 1 if options.backends else 0  # a backend that is named must run
    name, sizes, wanted = ("cuda", FULL, ["cuda", "triton"])
    if options.dry_run:
        name, sizes, wanted = ("cpu", TINY, ["cpu"])
    words = list(LINES) if options.only is None else options.only
    if unknown := set(words) - set(LINES):
        parser.error(f"lines are {', '.join(LINES)}, got {', '.join(sorted(unknown))}")
    if options.once:
        for word in words:
            call_once(word, sizes, name)
        return 0
    wanted = options.backends or wanted
    suffix = f" of {' and '.join(options.backends)}" if options.backends else ""
    reasons = unusable(wanted, name)
    device = Device(name, [backend for backend in wanted if backend not in reasons])
    path, lines = options.results / "bench_gpu.json", []
    with torch.no_grad(), bench.torch_settings(None, "highest"):
        found = load(path, device, sizes)
        for word in words:
            line = LINES[word](device, sizes, options.seconds)
            lines.append(line)
            found["lines"][word + suffix] = record(line, found["ceilings"])
            save(path, found)
            print(table(line, found["ceilings"]), flush=True)
    for backend, reason in reasons.items():
        print(f"{backend} was not measured: {reason}")
    failed = [name for line in lines for name in line.left_out if any(b in name for b in wanted)]
    failed += [name for line in lines for name in line.differing]
    return 1 if failed or reasons else 0


if __name__ == "__main__":
    sys.exit(main())
