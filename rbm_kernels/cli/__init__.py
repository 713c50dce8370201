"""The command ``rbm-kernels``: info, train, sample, bench.

Nothing here imports torch before a command runs that needs it: ``--help`` answers at once, and the
OpenMP policy is set in time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rbm_kernels import openmp

from . import bench, info, sample, train
from ._common import Parser

# What ends in one line and exit status 2. Anything else is a bug of ours and shows its traceback.
_USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; None takes the process's.

    Returns:
        The exit status: 0, 2 after an error of the user's, 130 after Ctrl-C.
    """
    openmp.wait_passively()
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        print("\nrbm-kernels: interrupted", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"rbm-kernels: error: {text}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(
        prog="rbm-kernels", description="Restricted Boltzmann machines on fused kernels."
    )
    parser.set_defaults(run=info.info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (info, train, sample, bench):
        command.add_parser(commands)
    return parser
