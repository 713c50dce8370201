"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import logging
import os
from types import ModuleType

import torch

from rbm_kernels.backends import cpu, cuda, reference, triton

_log = logging.getLogger("rbm_kernels")
_told: set[str] = set()

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}


def _refusal(name: str, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run this call, or None when it can."""
    if name == "reference":
        return None
    reason: str | None = BACKENDS[name].unavailable_reason()
    if reason is not None:
        return reason
    if name != "cpu":
        return f"{operation} has no {name} kernel in this release"
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype == torch.float64 and operation == "free_energy":
        return "float64 free energies are computed in float64 by the reference backend"
    return None


def select(
    operation: str, backend: str | None, device: torch.device, dtype: torch.dtype
) -> ModuleType:
    """The backend module for one call.

    Args:
        operation: public function name.
        backend: explicit choice, or None for ``RBM_KERNELS_BACKEND`` and then ``auto``. ``auto``
            falls back to the reference backend and logs the reason once.
        device: where the tensors are.
        dtype: of the weights.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: when an explicitly named backend cannot run, with the reason.
    """
    name = backend or os.environ.get("RBM_KERNELS_BACKEND") or "auto"
    if name == "auto":
        refusal = _refusal("cpu", operation, device, dtype)
        if refusal is None:
            return cpu
        if refusal not in _told:
            _told.add(refusal)
            _log.info("%s: the reference backend runs, because %s", operation, refusal)
        return reference
    if name not in BACKENDS:
        raise ValueError(
            f"{operation}: backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}"
        )
    refusal = _refusal(name, operation, device, dtype)
    if refusal is not None:
        raise RuntimeError(f"{operation}: backend {name!r} cannot run: {refusal}")
    return BACKENDS[name]
