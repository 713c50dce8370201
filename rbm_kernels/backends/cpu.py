"""The C++ kernels of ``csrc/cpu``: check, allocate, launch."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from rbm_kernels import info
from rbm_kernels.arguments import Beta, Draw, Layer, Model
from rbm_kernels.units import Bernoulli, Gaussian

UNITS = (Bernoulli, Gaussian)

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

_FLOAT32 = torch.float32
_ARGUMENTS = {1: "W", 2: "v", 3: "b", 4: "c", 5: "log_var", 6: "chains", 7: "clamp's values"}


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    return _failure


def runs_on(device: torch.device) -> str | None:
    """Why this backend cannot take tensors of `device`, or None if it can."""
    return None if device.type == "cpu" else f"the tensors are on {device}"


def instruction_sets() -> list[str]:
    """The instruction sets that were built and run on this processor, widest first."""
    return [] if _cpu is None else list(_cpu.instruction_sets())


def _module() -> ModuleType:
    assert _cpu is not None
    return _cpu


def _refuse(op: str, status: int, **names: str) -> NoReturn:
    name = names.get(_ARGUMENTS[status], _ARGUMENTS[status])
    raise ValueError(f"{op}: {name} must be finite, got values that are NaN or infinite")


def _weights(W: Tensor) -> Tensor:
    if W.dtype != _FLOAT32:
        W = W.float()
    return W if 1 in W.stride() or W.numel() < 2 else W.contiguous()


def _strides(W: Tensor) -> tuple[int, int]:
    rows, cols = W.stride()
    # Of a single column or row, torch may report any stride; one of the two must read 1.
    return (rows, 1) if cols == 1 or W.shape[1] == 1 else (1 if W.shape[0] == 1 else rows, cols)


def _states(x: Tensor) -> Tensor:
    if x.dtype.itemsize != 1 and x.dtype != _FLOAT32:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    return x if x.dtype == _FLOAT32 and x.is_contiguous() else x.float().contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _vector(x)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _beta(beta: Beta) -> tuple[Tensor, int]:
    if isinstance(beta, Tensor):
        return beta, 1
    return _ONE if beta == 1.0 else torch.tensor(beta, dtype=_FLOAT32), 0


_ONE = torch.ones((), dtype=_FLOAT32)


def _kernel_dtype(out_dtype: torch.dtype) -> torch.dtype:
    return out_dtype if out_dtype.itemsize == 1 else _FLOAT32


def sample_layer(
    op: str,
    given: Tensor,
    layer: Layer,
    draw: Draw,
    return_means: bool,
    out_dtype: torch.dtype,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    given, weight, bias = _states(given), _weights(layer.W), _vector(layer.bias)
    given_log_var, drawn_log_var = _optional(layer.given.log_var), _optional(layer.drawn.log_var)
    betas, beta_stride = _beta(draw.beta)
    shape = (given.shape[0], weight.shape[1])
    kernel_dtype = _FLOAT32 if layer.drawn.continuous else _kernel_dtype(out_dtype)
    states = torch.empty(shape, dtype=kernel_dtype)
    means = torch.empty(shape, dtype=_FLOAT32) if return_means else None
    status = _module().sample(
        given.data_ptr(), given.dtype.itemsize, *given.shape, given.stride(0),
        weight.data_ptr(), weight.shape[1], *_strides(weight), bias.data_ptr(),
        _address(given_log_var), _address(drawn_log_var),
        betas.data_ptr(), beta_stride, states.data_ptr(), kernel_dtype.itemsize,
        _address(means), _address(sums),
        draw.seed.data_ptr(), draw.chain_offset, draw.digits, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        hidden = op == "sample_hidden"
        _refuse(op, status, v="v" if hidden else "h", b="b", c="c" if hidden else "b")
    return states, means


def integer_sums(given: Tensor, weight: Tensor, digits: int) -> Tensor:
    """The exact fixed-point sums of one half-sweep, float64 [B, N]: what every backend shares."""
    sums = torch.empty(given.shape[0], weight.shape[1], dtype=torch.float64)
    layer = Layer(weight, torch.zeros(weight.shape[1]), Bernoulli(), Bernoulli())
    draw = Draw(torch.zeros(2, dtype=torch.int64), 0, 1.0, digits)
    sample_layer("integer_sums", given, layer, draw, False, _FLOAT32, sums)
    return sums


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
    v, weight, b, c = _states(v), _weights(model.W), _vector(model.b), _vector(model.c)
    log_var = _optional(model.units.log_var)
    mask = None if mask is None else mask.contiguous()
    values = None if values is None or mask is None else _states(values)
    betas, beta_stride = _beta(draw.beta)
    real = model.units.continuous or mask is not None
    kernel_dtype = _FLOAT32 if real else _kernel_dtype(out_dtype)
    states = torch.empty(v.shape, dtype=kernel_dtype)
    status = _module().gibbs_sample(
        v.data_ptr(), v.dtype.itemsize, v.shape[0], v.stride(0),
        weight.data_ptr(), *weight.shape, *_strides(weight), b.data_ptr(), c.data_ptr(), k,
        _address(log_var), betas.data_ptr(), beta_stride,
        _address(mask), 0 if mask is None or mask.dim() == 1 else mask.stride(0),
        _address(values), 4 if values is None else values.dtype.itemsize,
        0 if values is None or values.dim() == 1 else values.stride(0),
        states.data_ptr(), kernel_dtype.itemsize,
        draw.seed.data_ptr(), draw.chain_offset, draw.digits, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse(op, status)
    return states


def free_energies(op: str, v: Tensor, model: Model, beta: Beta, digits: int) -> Tensor:
    v, weight, b, c = _states(v), _weights(model.W), _vector(model.b), _vector(model.c)
    log_var = _optional(model.units.log_var)
    betas, beta_stride = _beta(beta)
    energy = torch.empty(v.shape[0], dtype=_FLOAT32)
    status = _module().free_energy(
        v.data_ptr(), v.dtype.itemsize, v.shape[0], v.stride(0),
        weight.data_ptr(), *weight.shape, *_strides(weight), b.data_ptr(), c.data_ptr(),
        _address(log_var), betas.data_ptr(), beta_stride,
        energy.data_ptr(), digits, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse(op, status)
    return energy


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
    data, weight, b, c = _states(v), _weights(model.W), _vector(model.b), _vector(model.c)
    start = None if chains is None else _states(chains)
    log_var = _optional(model.units.log_var)
    state_dtype = model.W.dtype if chains is None else chains.dtype
    kernel_dtype = _FLOAT32 if model.units.continuous else _kernel_dtype(state_dtype)
    advanced = torch.empty((data if start is None else start).shape, dtype=kernel_dtype)
    energies = torch.empty(2, dtype=_FLOAT32)
    grad_W, grad_b, grad_c = averages
    status = _module().cd_step(
        data.data_ptr(), data.dtype.itemsize, data.shape[0], data.stride(0),
        weight.data_ptr(), *weight.shape, *_strides(weight), b.data_ptr(), c.data_ptr(), k,
        *(
            (0, 4, 0, 0)
            if start is None
            else (start.data_ptr(), start.dtype.itemsize, start.shape[0], start.stride(0))
        ),
        _address(log_var),
        grad_W.data_ptr(), grad_W.stride(0), grad_b.data_ptr(), grad_c.data_ptr(),
        accumulate, advanced.data_ptr(), kernel_dtype.itemsize, energies.data_ptr(),
        draw.seed.data_ptr(), draw.chain_offset, draw.digits, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse(op, status)
    return advanced, energies
