"""``rbm-kernels bench``: time this package against naive PyTorch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ._common import BACKENDS, HelpFormatter


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``rbm-kernels``."""
    parser = commands.add_parser(
        "bench",
        help="time this package against naive PyTorch, eager and compiled",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=bench)
    add = parser.add_argument
    add("--full", action="store_true", help="every shape, and ten sweeps too (minutes)")
    add("--seconds", type=float, default=1.0, help="time to spend on each row")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--threads", type=int, default=2, help="number of threads of torch and of the kernels")
    add("--backend", choices=BACKENDS, help="backend to show (default: the fused one if built)")


def bench(arguments: argparse.Namespace) -> int:
    """Measure, and print the table."""
    from . import bench_table

    for name in ("seconds", "threads"):
        if not getattr(arguments, name) > 0:
            raise ValueError(f"bench: {name} must be positive, got {getattr(arguments, name)}")
    shapes = [shape for shape in bench_table.SHAPES if arguments.full or max(shape) <= 1024]
    sweeps = bench_table.SWEEPS if arguments.full else (1,)

    def show(case: Any) -> None:
        print(f"\r\x1b[K{case} ...", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    table = bench_table.main_table(
        shapes,
        sweeps,
        seconds=arguments.seconds,
        compile=not arguments.no_compile,
        backend=arguments.backend,
        threads=arguments.threads,
        progress=show if terminal else None,
    )
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(table)
    return 0
