"""Restricted Boltzmann machines in PyTorch, on fused kernels.

The operations take plain tensors (``cd_step``, ``cd_loss``, ``free_energy``, ``gibbs_sample``,
``sample_hidden``, ``sample_visible``); ``RBM`` is the module. ``python -m rbm_kernels`` prints
which backends can run here.

A name's module, and with it torch, is imported when the name is first used. So the command line
answers ``--help`` at once, and can still choose how OpenMP threads wait, which torch reads when it
is imported.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from rbm_kernels._version import __version__

if TYPE_CHECKING:
    from rbm_kernels.ops.cd import CDStep, cd_loss, cd_step
    from rbm_kernels.ops.free_energy import free_energy
    from rbm_kernels.ops.gibbs import gibbs_sample
    from rbm_kernels.ops.sample import sample_hidden, sample_visible
    from rbm_kernels.rbm import RBM

__all__ = [
    "RBM",
    "CDStep",
    "__version__",
    "cd_loss",
    "cd_step",
    "free_energy",
    "gibbs_sample",
    "sample_hidden",
    "sample_visible",
]

if not TYPE_CHECKING:
    _HOMES = {
        "RBM": "rbm",
        "CDStep": "ops.cd",
        "cd_loss": "ops.cd",
        "cd_step": "ops.cd",
        "free_energy": "ops.free_energy",
        "gibbs_sample": "ops.gibbs",
        "sample_hidden": "ops.sample",
        "sample_visible": "ops.sample",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    if "torch" in sys.modules:
        # Nothing is saved by waiting, and the operators are in torch.ops.rbm_kernels at once.
        for _name in _HOMES:
            __getattr__(_name)
