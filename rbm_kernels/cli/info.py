"""``rbm-kernels info``: versions, what was built, what can run."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``rbm-kernels``."""
    text = "show versions, what was built, and which backends can run"
    parser = commands.add_parser("info", help=text, description=text.capitalize() + ".")
    parser.set_defaults(run=info)


def info(arguments: argparse.Namespace) -> int:
    """Print the report."""
    from rbm_kernels.info import report

    print(report())
    return 0
