"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch

from rbm_kernels.arithmetic import MOST_UNITS
from rbm_kernels.backends import cpu, cuda, reference, triton
from rbm_kernels.units import Bernoulli, Units

_log = logging.getLogger("rbm_kernels")
_told: set[str] = set()

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}

# What ``auto`` tries for tensors on a device, in this order. Others have the reference alone.
# The entry for cuda is an estimate by counting and not measured: both backends multiply the same
# bytes on the same tensor cores, but cuda keeps a small model's chain on the chip through one
# launch, where triton launches 2k half-sweeps that pass the states through memory. A shape for
# which benchmarks/bench_gpu.py finds triton ahead gets an entry of its own here.
PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}


def _refusal(
    name: str,
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    kinds: tuple[type[Units], ...],
    kernel: str | None,
) -> str | None:
    """Why backend ``name`` cannot run this call, or None when it can."""
    if name == "reference":
        return None
    module = BACKENDS[name]
    reason: str | None = module.unavailable_reason() or module.runs_on(device)
    if reason is not None:
        return reason
    for kind in kinds:
        if kind not in module.UNITS:
            return f"it has no {kind.label} units"
    if kernel is not None and not hasattr(module, kernel):
        return f"it has no {kernel}"
    if dtype == torch.float64 and operation == "free_energy":
        return "float64 free energies are computed in float64 by the reference backend"
    return None


@functools.cache
def _automatic(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    too_large: bool,
    kinds: tuple[type[Units], ...],
    kernel: str | None,
) -> ModuleType:
    """The first backend that can run; a fall-back is logged once for each reason."""
    reasons = ""
    for name in PREFERRED.get(device.type, ("reference",)):
        refusal = _refusal(name, operation, device, dtype, kinds, kernel)
        if refusal is None and name in ("cuda", "triton") and too_large:
            refusal = f"a layer has more than {MOST_UNITS} units"
        if refusal is None:
            break
        reasons += f"; {name}: {refusal}"
    if reasons and reasons not in _told:
        _told.add(reasons)
        _log.info("%s: the %s backend runs (%s)", operation, name, reasons[2:])
    return BACKENDS[name]


def select(
    operation: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    n_units: int = 0,
    kinds: tuple[type[Units], ...] = (Bernoulli,),
    kernel: str | None = None,
    empty: bool = False,
) -> ModuleType:
    """The backend module for one call.

    Args:
        operation: The public function's name.
        backend: An explicit choice, or None for ``RBM_KERNELS_BACKEND`` and then ``auto``. ``auto``
            takes the first of ``PREFERRED`` that can run, falls back to the reference backend, and
            logs the reason once.
        device: Where the tensors are.
        dtype: That of the weights.
        n_units: The number of units of the larger layer.
        kinds: The kinds of unit of the model.
        kernel: The function that the backend must have.
        empty: Whether there are no rows or a layer has no units. Kernels have nothing to launch
            then; the reference makes the results, of whatever shape, if the backend could run.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: When an explicitly named backend cannot run, with the reason.
    """
    name = backend or os.environ.get("RBM_KERNELS_BACKEND") or "auto"
    if name == "auto":
        module = _automatic(operation, device, dtype, n_units > MOST_UNITS, kinds, kernel)
    else:
        require(operation, name)
        refusal = _refusal(name, operation, device, dtype, kinds, kernel)
        if refusal is not None:
            raise _cannot_run(operation, name, refusal)
        module = BACKENDS[name]
    return reference if empty else module


def require(operation: str, name: str) -> None:
    """Refuse an explicit choice that no call could follow here.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: When the backend cannot run on this machine, with the reason.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(
            f"{operation}: backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}"
        )
    refusal = BACKENDS[name].unavailable_reason()
    if refusal is not None:
        raise _cannot_run(operation, name, refusal)


def _cannot_run(operation: str, name: str, refusal: str) -> RuntimeError:
    return RuntimeError(f"{operation}: backend {name!r} cannot run: {refusal}")
