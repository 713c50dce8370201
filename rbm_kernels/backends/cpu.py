"""The C++ kernels of ``csrc/cpu``, for tensors on the CPU.

They read every value of their arguments and refuse those that are not finite, and states of
Bernoulli units outside [0, 1], before they write.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from rbm_kernels import info
from rbm_kernels.arguments import Draw, Layer
from rbm_kernels.backends._native import Kernels
from rbm_kernels.units import Bernoulli, Gaussian

UNITS = (Bernoulli, Gaussian)

_log = logging.getLogger("rbm_kernels")

# torch comes first: the module then finds torch's OpenMP runtime loaded, and shares its threads.
_cpu: ModuleType | None = None
_failure: str | None = None
try:
    _cpu = importlib.import_module("rbm_kernels._cpu")
    _cpu.use(os.environ.get("RBM_KERNELS_ISA", ""))
except ImportError as error:
    _failure = info.why_missing("cpu", error)
except ValueError as error:
    _failure = f"RBM_KERNELS_ISA: {error}"


# What a status says, by csrc/cpu/operations.h's enum Argument, and the bit that is set where values
# lie outside [0, 1].
_ARGUMENTS = {1: "W", 2: "v", 3: "b", 4: "c", 5: "log_var", 6: "chains", 7: "clamp's values"}
_OUTSIDE = 16


_threads = torch.get_num_threads


def _after_fork() -> None:
    """A process that is forked after kernels have run on several threads runs on one.

    It lacks the threads of its parent, for which GNU OpenMP would wait for ever. PyTorch shares
    that OpenMP and hangs in the same way, so that it is told too.
    """
    global _threads
    if _cpu is not None and _cpu.threads_started():
        _threads = _one_thread
        torch.set_num_threads(1)
        _log.info("this process was forked after kernels had run on several threads: it uses one")


def _one_thread() -> int:
    return 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Cpu(Kernels):
    def context(self, device: torch.device) -> int:
        return _threads()

    def check(self, op: str, name: str, states: Tensor, W: Tensor) -> None:
        """The kernels take every size."""

    def fail(self, op: str, status: int, **states: Tensor | None) -> None:
        argument = name = _ARGUMENTS[status & ~_OUTSIDE]
        if op == "sample_visible":  # whose kernel calls its states v and its bias c
            name = {"v": "h", "c": "b"}.get(name, name)
        if status & _OUTSIDE:
            values = states[argument.split()[-1]]
            assert values is not None
            Bernoulli().check(op, name, values)
        raise ValueError(f"{op}: {name} must be finite, got values that are NaN or infinite")


_FLOATS = {torch.float32: 0}
_kernels = _Cpu(_cpu, states={**_FLOATS, torch.uint8: 3, torch.bool: 3}, weights=_FLOATS)
gibbs_sample = _kernels.gibbs_sample
free_energies = _kernels.free_energies
cd_step = _kernels.cd_step


def sample_layer(
    op: str,
    given: Tensor,
    layer: Layer,
    draw: Draw,
    return_means: bool,
    out_dtype: torch.dtype,
    sums: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.sample_layer``; ``sums`` is an address for ``integer_sums``."""
    return _kernels.sample_layer(op, given, layer, draw, return_means, out_dtype, sums)


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    return _failure


def runs_on(device: torch.device) -> str | None:
    """Why this backend cannot take tensors of a device, or None if it can."""
    return None if device.type == "cpu" else f"the tensors are on {device}"


def instruction_sets() -> list[str]:
    """The instruction sets that were built and run on this processor, widest first."""
    return [] if _cpu is None else list(_cpu.instruction_sets())


def integer_sums(given: Tensor, weight: Tensor, digits: int) -> Tensor:
    """The exact fixed-point sums of one half-sweep, float64 [B, N]: what every backend shares."""
    sums = torch.empty(given.shape[0], weight.shape[1], dtype=torch.float64)
    layer = Layer(weight, torch.zeros(weight.shape[1]), Bernoulli(), Bernoulli())
    draw = Draw(torch.zeros(2, dtype=torch.int64), 0, 1.0, digits)
    sample_layer("sample_hidden", given, layer, draw, False, torch.float32, sums.data_ptr())
    return sums
