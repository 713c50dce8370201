"""The CUDA C++ kernels of ``csrc/cuda``: check, allocate, launch. Importing this touches no device.

Every call goes to the current stream of the tensors' device and comes back without waiting for it:
memory comes from torch's allocator and nothing is read back, so that a call can be captured in a
CUDA graph. For the same reason values that are not finite cannot be refused here. Where a
parameter is NaN or infinite, probabilities, energies and gradients come out as NaN.

bool states are known to be 0 or 1. Of all others the device finds out, which costs some launches of
kernels that return at once; both kinds give the same results.

``RBM_KERNELS_CUDA_EMULATED=1`` uses a build of the same kernels that runs on the CPU, for tests.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from rbm_kernels import info
from rbm_kernels.arguments import Draw, Model
from rbm_kernels.arithmetic import MOST_UNITS
from rbm_kernels.backends._native import Kernels
from rbm_kernels.units import Bernoulli, Gaussian

UNITS = (Bernoulli, Gaussian)

_EMULATED = os.environ.get("RBM_KERNELS_CUDA_EMULATED") == "1"
_module: ModuleType | None = None
_failure = ""
try:
    _module = importlib.import_module(f"rbm_kernels._cuda{'_emulated' if _EMULATED else ''}")
except ImportError as error:
    _failure = info.why_missing("cuda_emulated" if _EMULATED else "cuda", error)

# Sums over more units of real states, or over more rows, would leave the 32-bit accumulators.
_MOST_REAL_UNITS, _MOST_ROWS = 43_000, 8_000_000


@functools.cache
def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can. The first call asks the driver."""
    if _module is None:
        return _failure
    if _EMULATED:
        return None
    count, error = _module.device_count()
    if count == 0:
        return f"no CUDA device: {error}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None


@functools.cache
def runs_on(device: torch.device) -> str | None:
    """Why this backend cannot take tensors of ``device``, or None if it can."""
    if _EMULATED:
        return None if device.type == "cpu" else "the emulated build takes CPU tensors"
    if device.type != "cuda":
        return f"the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    # Newer devices run an older one's code or compile its PTX; older ones can do neither.
    built = info.build_info().get("cuda", {}).get("architectures", ["80"])
    lowest = min(int(arch.rstrip("af")) for arch in built)
    if 10 * major + minor < lowest:
        need = f"{lowest // 10}.{lowest % 10}"
        return f"{device} has compute capability {major}.{minor}, and the kernels need {need}"
    return None


def regime(
    rows: int,
    n_visible: int,
    n_hidden: int,
    k: int,
    digits: int,
    device: torch.device,
    gaussian: bool = False,
) -> str:
    """How chains would be run: resident, cluster of n, tiled or tiled_sm90a."""
    name: str = _built().regime(rows, n_visible, n_hidden, k, digits, gaussian, device.index or 0)
    return name


def clusters_on(device: torch.device, blocks: int, digits: int, gaussian: bool = False) -> int:
    """How many clusters of that many blocks run at once on a device; 0 where there are none."""
    count: int = _built().clusters_on_device(device.index or 0, blocks, digits, gaussian)
    return count


def _built() -> ModuleType:
    assert _module is not None
    return _module


@functools.cache
def _allocator(device: torch.device) -> Callable[[int], Tensor]:
    return functools.partial(torch.empty, dtype=torch.uint8, device=device)


class _Cuda(Kernels):
    def context(self, device: torch.device) -> tuple[Callable[[int], Tensor], int, int]:
        """What gives a call its memory, and its device and stream."""
        if device.type != "cuda":
            return _allocator(device), 0, 0
        # torch.cuda.current_stream's number, without the object around it, a microsecond's work.
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        return _allocator(device), device.index, stream

    def check(self, op: str, name: str, states: Tensor, W: Tensor) -> None:
        units, computed = W.shape
        if units > MOST_UNITS or computed > MOST_UNITS:
            raise ValueError(
                f"{op}: the cuda backend takes at most {MOST_UNITS} units in a layer, "
                f"got {units} and {computed}"
            )
        if units > _MOST_REAL_UNITS and states.dtype != torch.bool:
            raise ValueError(
                f"{op}: the cuda backend takes at most {_MOST_REAL_UNITS} units of states that may "
                f"be real, got {name} {list(states.shape)} of {states.dtype}; "
                "pass bool where all are 0 or 1"
            )

    def fail(self, op: str, status: int, **states: Tensor | None) -> None:
        words = _built().error_string(status)
        raise RuntimeError(f"{op}: the cuda backend's kernels were not launched: {words}")


# By csrc/cuda/types.h's enum Element.
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_kernels = _Cuda(_module, states={**_FLOATS, torch.uint8: 3, torch.bool: 3}, weights=_FLOATS)
sample_layer = _kernels.sample_layer
gibbs_sample = _kernels.gibbs_sample
free_energies = _kernels.free_energies


def cd_step(
    op: str,
    v: Tensor,
    model: Model,
    k: int,
    chains: Tensor | None,
    draw: Draw,
    averages: tuple[Tensor, Tensor, Tensor],
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference.cd_step``."""
    for name, states in (("v", v), ("chains", chains)):
        if states is not None and states.shape[0] > _MOST_ROWS:
            raise ValueError(
                f"{op}: the cuda backend takes at most {_MOST_ROWS} rows of a phase, "
                f"got {name} {list(states.shape)}"
            )
    return _kernels.cd_step(op, v, model, k, chains, draw, averages, accumulate)
