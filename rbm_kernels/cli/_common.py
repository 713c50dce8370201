"""What the commands share: file names, the options of the operations, and the parser."""

from __future__ import annotations

import argparse
from typing import NoReturn

CHECKPOINT = "checkpoint.pt"
MODEL = "model.safetensors"
METRICS = "metrics.csv"

BACKENDS = ("reference", "cpu", "triton", "cuda")


class Parser(argparse.ArgumentParser):
    """argparse whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts with the defaults that say something: neither None nor a flag's False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how exactly the operations compute."""
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        help="the backend (default: RBM_KERNELS_BACKEND, or auto)",
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        help="precision of the matrix products (default: torch's float32 matmul precision)",
    )
