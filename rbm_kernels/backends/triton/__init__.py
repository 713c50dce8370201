"""The Triton kernels. Importing this module imports no triton and touches no device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from rbm_kernels.units import Bernoulli, Gaussian

UNITS = (Bernoulli, Gaussian)
_OPERATIONS = {
    "sample_layer": "sample",
    "gibbs_sample": "gibbs",
    "free_energies": "free_energy",
    "cd_step": "cd",
}


def interpreted() -> bool:
    """Whether the kernels run on the CPU, in NumPy. Triton reads the variable on its import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can. The first call asks the driver."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


@functools.cache
def runs_on(device: torch.device) -> str | None:
    """Why this backend cannot take tensors of ``device``, or None if it can."""
    if interpreted():
        return None if device.type == "cpu" else f"TRITON_INTERPRET is set, and W is on {device}"
    if device.type != "cuda":
        return f"the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{device} has compute capability {major}.{minor}, below 8.0"
    return None


def __getattr__(name: str) -> Any:
    # The operations, and with them triton, are imported by the first call.
    if name not in _OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_OPERATIONS[name]}")
    globals()[name] = getattr(module, name)
    return globals()[name]
