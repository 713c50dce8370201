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
from rbm_kernels.arguments import Beta, Draw, Layer, Model
from rbm_kernels.arithmetic import MOST_UNITS
from rbm_kernels.units import Bernoulli, Gaussian

UNITS = (Bernoulli, Gaussian)

_EMULATED = os.environ.get("RBM_KERNELS_CUDA_EMULATED") == "1"
_module: ModuleType | None = None
_failure = ""
try:
    _module = importlib.import_module(f"rbm_kernels._cuda{'_emulated' if _EMULATED else ''}")
except ImportError as error:
    _failure = info.why_missing("cuda_emulated" if _EMULATED else "cuda", error)

_FLOAT32 = torch.float32
# What the kernels read and write, by csrc/cuda's enum Element. Other dtypes become float32 first.
_ELEMENTS = {_FLOAT32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3, torch.bool: 3}
_NO_STATES = (0, 0, 0, 0, False)

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
    """Why this backend cannot take tensors of `device`, or None if it can."""
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


def _built() -> ModuleType:
    assert _module is not None
    return _module


@functools.cache
def _allocator(device: torch.device) -> Callable[[int], Tensor]:
    return functools.partial(torch.empty, dtype=torch.uint8, device=device)


def _place(device: torch.device) -> tuple[Callable[[int], Tensor], int, int]:
    """Where a call takes memory from, and its device and stream."""
    if device.type != "cuda":
        return _allocator(device), 0, 0
    # torch.cuda.current_stream's number, without the object around it that costs a microsecond.
    return _allocator(device), device.index, torch._C._cuda_getCurrentRawStream(device.index)


def _launched(op: str, status: int) -> None:
    if status:
        words = _built().error_string(status)
        raise RuntimeError(f"{op}: the cuda backend's kernels were not launched: {words}")


def _weight(W: Tensor) -> Tensor:
    if W.dtype not in _ELEMENTS:
        W = W.float()
    return W if 1 in W.stride() or W.numel() < 2 else W.contiguous()


def _weight_arguments(W: Tensor) -> tuple[int, int, int, int, int, int]:
    row, col = W.stride()
    # Of a single column or row, torch may report any stride; one of the two must read 1.
    row, col = (row, 1) if col == 1 or W.shape[1] == 1 else (1 if W.shape[0] == 1 else row, col)
    return W.data_ptr(), _ELEMENTS[W.dtype], *W.shape, row, col


def _states(x: Tensor) -> Tensor:
    if x.dtype not in _ELEMENTS:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    return x if x.dtype == _FLOAT32 and x.is_contiguous() else x.float().contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _vector(x)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _beta(beta: Beta) -> tuple[float, int]:
    return (1.0, beta.data_ptr()) if isinstance(beta, Tensor) else (beta, 0)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _ELEMENTS else _FLOAT32


def _check_sizes(op: str, given: Tensor, weight: Tensor, given_name: str) -> None:
    units, computed = weight.shape
    if units > MOST_UNITS or computed > MOST_UNITS:
        raise ValueError(
            f"{op}: the cuda backend takes at most {MOST_UNITS} units in a layer, "
            f"got {units} and {computed}"
        )
    if units > _MOST_REAL_UNITS and given.dtype != torch.bool:
        raise ValueError(
            f"{op}: the cuda backend takes at most {_MOST_REAL_UNITS} units of states that may be "
            f"real, got {given_name} {list(given.shape)} of {given.dtype}; "
            "pass bool where all are 0 or 1"
        )


def _check_rows(op: str, name: str, states: Tensor) -> None:
    if states.shape[0] > _MOST_ROWS:
        raise ValueError(
            f"{op}: the cuda backend takes at most {_MOST_ROWS} rows of a phase, "
            f"got {name} {list(states.shape)}"
        )


def sample_layer(
    op: str, given: Tensor, layer: Layer, draw: Draw, return_means: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    _check_sizes(op, given, layer.W, "v" if op == "sample_hidden" else "h")
    device = layer.W.device
    given, weight, bias = _states(given), _weight(layer.W), _vector(layer.bias)
    given_log_var, drawn_log_var = _optional(layer.given.log_var), _optional(layer.drawn.log_var)
    shape = (given.shape[0], weight.shape[1])
    kernel_dtype = _FLOAT32 if layer.drawn.continuous else _kernel_dtype(out_dtype)
    states = torch.empty(shape, dtype=kernel_dtype, device=device)
    means = torch.empty(shape, dtype=_FLOAT32, device=device) if return_means else None
    address, element, _, units, *strides = _weight_arguments(weight)
    status = _built().sample(
        given.data_ptr(), _ELEMENTS[given.dtype], *given.shape, given.stride(0),
        given.dtype == torch.bool, address, element, units, *strides, bias.data_ptr(),
        _address(given_log_var), _address(drawn_log_var), *_beta(draw.beta),
        states.data_ptr(), _ELEMENTS[kernel_dtype], _address(means),
        draw.seed.data_ptr(), draw.chain_offset, draw.digits, *_place(device),
    )  # fmt: skip
    _launched(op, status)
    return states, means


def gibbs_sample(
    op: str,
    v: Tensor,
    model: Model,
    k: int,
    draw: Draw,
    mask: Tensor | None,
    values: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_sizes(op, v, model.W, "v")
    device = model.W.device
    v, W, b, c = _states(v), _weight(model.W), _vector(model.b), _vector(model.c)
    log_var = _optional(model.units.log_var)
    mask = None if mask is None else mask.contiguous()
    values = None if values is None or mask is None else _states(values)
    # Among clamped units real values may stand, which bytes would not hold.
    exact = model.units.continuous or mask is not None
    kernel_dtype = _FLOAT32 if exact else _kernel_dtype(out_dtype)
    states = torch.empty(v.shape, dtype=kernel_dtype, device=device)
    status = _built().gibbs_sample(
        v.data_ptr(), _ELEMENTS[v.dtype], v.shape[0], v.stride(0), v.dtype == torch.bool,
        *_weight_arguments(W), b.data_ptr(), c.data_ptr(), k, _address(log_var),
        *_beta(draw.beta), _address(mask), 0 if mask is None or mask.dim() == 1 else mask.stride(0),
        *(
            _NO_STATES[1:]
            if values is None
            else (
                values.data_ptr(), _ELEMENTS[values.dtype],
                0 if values.dim() == 1 else values.stride(0), values.dtype == torch.bool,
            )
        ),
        states.data_ptr(), _ELEMENTS[kernel_dtype],
        draw.seed.data_ptr(), draw.chain_offset, draw.digits, *_place(device),
    )  # fmt: skip
    _launched(op, status)
    return states


def free_energies(op: str, v: Tensor, model: Model, beta: Beta, digits: int) -> Tensor:
    _check_sizes(op, v, model.W, "v")
    device = model.W.device
    v, W, b, c = _states(v), _weight(model.W), _vector(model.b), _vector(model.c)
    log_var = _optional(model.units.log_var)
    energies = torch.empty(v.shape[0], dtype=_FLOAT32, device=device)
    status = _built().free_energy(
        v.data_ptr(), _ELEMENTS[v.dtype], v.shape[0], v.stride(0), v.dtype == torch.bool,
        *_weight_arguments(W), b.data_ptr(), c.data_ptr(), _address(log_var), *_beta(beta),
        energies.data_ptr(), digits, *_place(device),
    )  # fmt: skip
    _launched(op, status)
    return energies


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
    _check_sizes(op, v, model.W, "v")
    _check_rows(op, "v", v)
    if chains is not None:
        _check_sizes(op, chains, model.W, "chains")
        _check_rows(op, "chains", chains)
    device = model.W.device
    data, W, b, c = _states(v), _weight(model.W), _vector(model.b), _vector(model.c)
    start = None if chains is None else _states(chains)
    log_var = _optional(model.units.log_var)
    state_dtype = model.W.dtype if chains is None else chains.dtype
    kernel_dtype = _FLOAT32 if model.units.continuous else _kernel_dtype(state_dtype)
    shape = (data if start is None else start).shape
    advanced = torch.empty(shape, dtype=kernel_dtype, device=device)
    energies = torch.empty(2, dtype=_FLOAT32, device=device)
    grad_W, grad_b, grad_c = averages
    status = _built().cd_step(
        data.data_ptr(), _ELEMENTS[data.dtype], data.shape[0], data.stride(0),
        data.dtype == torch.bool, *_weight_arguments(W), b.data_ptr(), c.data_ptr(), k,
        *(
            _NO_STATES
            if start is None
            else (
                start.data_ptr(), _ELEMENTS[start.dtype], start.shape[0], start.stride(0),
                start.dtype == torch.bool,
            )
        ),
        _address(log_var), grad_W.data_ptr(), grad_W.stride(0), grad_b.data_ptr(),
        grad_c.data_ptr(), accumulate, advanced.data_ptr(), _ELEMENTS[kernel_dtype],
        energies.data_ptr(), draw.seed.data_ptr(), draw.chain_offset, draw.digits,
        *_place(device),
    )  # fmt: skip
    _launched(op, status)
    return advanced, energies
