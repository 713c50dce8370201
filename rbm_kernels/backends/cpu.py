"""The C++ kernels of ``csrc/cpu``: check, allocate, launch."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from rbm_kernels import info
from rbm_kernels.backends import reference

Beta = float | Tensor

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


def _beta(beta: Beta) -> tuple[Tensor, int]:
    if isinstance(beta, Tensor):
        return beta, 1
    return _ONE if beta == 1.0 else torch.tensor(beta, dtype=_FLOAT32), 0


_ONE = torch.ones((), dtype=_FLOAT32)


def _kernel_dtype(out_dtype: torch.dtype) -> torch.dtype:
    return out_dtype if out_dtype.itemsize == 1 else _FLOAT32


def _sample(
    op: str,
    given: Tensor,
    weight: Tensor,
    bias: Tensor,
    given_log_var: Tensor | None,
    drawn_log_var: Tensor | None,
    beta: Beta,
    return_probs: bool,
    seed: Tensor,
    chain_offset: int,
    out_dtype: torch.dtype,
    limbs: int,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = weight.dtype
    given, weight, bias = _states(given), _weights(weight), _vector(bias)
    given_log_var = None if given_log_var is None else _vector(given_log_var)
    drawn_log_var = None if drawn_log_var is None else _vector(drawn_log_var)
    betas, beta_stride = _beta(beta)
    shape = (given.shape[0], weight.shape[1])
    kernel_dtype = _FLOAT32 if drawn_log_var is not None else _kernel_dtype(out_dtype)
    states = torch.empty(shape, dtype=kernel_dtype)
    means = torch.empty(shape, dtype=_FLOAT32) if return_probs else None
    status = _module().sample(
        given.data_ptr(), given.dtype.itemsize, *given.shape, given.stride(0),
        weight.data_ptr(), weight.shape[1], *_strides(weight), bias.data_ptr(),
        0 if given_log_var is None else given_log_var.data_ptr(),
        0 if drawn_log_var is None else drawn_log_var.data_ptr(),
        betas.data_ptr(), beta_stride, states.data_ptr(), kernel_dtype.itemsize,
        0 if means is None else means.data_ptr(), 0 if sums is None else sums.data_ptr(),
        seed.data_ptr(), chain_offset, limbs, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        hidden = op == "sample_hidden"
        _refuse(op, status, v="v" if hidden else "h", b="b", c="c" if hidden else "b")
    if states.dtype != out_dtype:
        states = states.to(out_dtype)
    if means is None:
        return states, torch.empty(0, dtype=dtype)
    return states, means.to(dtype)


def sample_hidden(
    v: Tensor,
    W: Tensor,
    c: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    return_probs: bool,
    seed: Tensor,
    chain_offset: int,
    out_dtype: torch.dtype,
    limbs: int,
) -> tuple[Tensor, Tensor]:
    return _sample(
        "sample_hidden", v, W, c, log_var, None, beta, return_probs, seed, chain_offset,
        out_dtype, limbs,
    )  # fmt: skip


def sample_visible(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    return_probs: bool,
    seed: Tensor,
    chain_offset: int,
    out_dtype: torch.dtype,
    limbs: int,
) -> tuple[Tensor, Tensor]:
    return _sample(
        "sample_visible", h, W.t(), b, None, log_var, beta, return_probs, seed, chain_offset,
        out_dtype, limbs,
    )  # fmt: skip


def integer_sums(given: Tensor, weight: Tensor, limbs: int) -> Tensor:
    """The exact fixed-point sums of one half-sweep, float64 [B, N]: what every backend shares."""
    sums = torch.empty(given.shape[0], weight.shape[1], dtype=torch.float64)
    zero = torch.zeros(weight.shape[1])
    seed = torch.zeros(2, dtype=torch.int64)
    _sample(
        "integer_sums", given, weight, zero, None, None, 1.0, False, seed, 0, _FLOAT32, limbs, sums
    )
    return sums


def gibbs_sample(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int,
    log_var: Tensor | None,
    beta: Beta,
    mask: Tensor | None,
    values: Tensor | None,
    seed: Tensor,
    chain_offset: int,
    out_dtype: torch.dtype,
    limbs: int,
) -> Tensor:
    v, weight, b, c = _states(v), _weights(W), _vector(b), _vector(c)
    log_var = None if log_var is None else _vector(log_var)
    mask = None if mask is None else mask.contiguous()
    values = None if values is None or mask is None else _states(values)
    betas, beta_stride = _beta(beta)
    real = log_var is not None or mask is not None
    kernel_dtype = _FLOAT32 if real else _kernel_dtype(out_dtype)
    states = torch.empty(v.shape, dtype=kernel_dtype)
    status = _module().gibbs_sample(
        v.data_ptr(), v.dtype.itemsize, v.shape[0], v.stride(0),
        weight.data_ptr(), *weight.shape, *_strides(weight), b.data_ptr(), c.data_ptr(), k,
        0 if log_var is None else log_var.data_ptr(), betas.data_ptr(), beta_stride,
        0 if mask is None else mask.data_ptr(),
        0 if mask is None or mask.dim() == 1 else mask.stride(0),
        0 if values is None else values.data_ptr(), 4 if values is None else values.dtype.itemsize,
        0 if values is None or values.dim() == 1 else values.stride(0),
        states.data_ptr(), kernel_dtype.itemsize, seed.data_ptr(), chain_offset, limbs,
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("gibbs_sample", status)
    return states if states.dtype == out_dtype else states.to(out_dtype)


def free_energy(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    limbs: int,
) -> Tensor:
    v, weight, b, c = _states(v), _weights(W), _vector(b), _vector(c)
    log_var = None if log_var is None else _vector(log_var)
    betas, beta_stride = _beta(beta)
    energy = torch.empty(v.shape[0], dtype=_FLOAT32)
    status = _module().free_energy(
        v.data_ptr(), v.dtype.itemsize, v.shape[0], v.stride(0),
        weight.data_ptr(), *weight.shape, *_strides(weight), b.data_ptr(), c.data_ptr(),
        0 if log_var is None else log_var.data_ptr(), betas.data_ptr(), beta_stride,
        energy.data_ptr(), limbs, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("free_energy", status)
    return energy


def cd_step(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int,
    chains: Tensor | None,
    log_var: Tensor | None,
    out: tuple[Tensor, ...] | None,
    accumulate: bool,
    seed: Tensor,
    chain_offset: int,
    limbs: int,
    op: str = "cd_step",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    data, weight, bias, hidden_bias = _states(v), _weights(W), _vector(b), _vector(c)
    start = None if chains is None else _states(chains)
    variance = None if log_var is None else _vector(log_var)
    n_visible, n_hidden = weight.shape
    state_dtype = W.dtype if chains is None else chains.dtype
    kernel_dtype = _FLOAT32 if log_var is not None else _kernel_dtype(state_dtype)
    advanced = torch.empty((data if start is None else start).shape, dtype=kernel_dtype)
    # The kernel writes straight into the caller's buffers where it can.
    direct = (
        out is not None
        and log_var is None
        and out[0].dtype == out[1].dtype == out[2].dtype == _FLOAT32
        and out[0].stride(1) == out[1].stride(0) == out[2].stride(0) == 1
    )
    if direct and out is not None:
        grad_W, grad_b, grad_c = out
    else:
        grad_W = torch.empty(n_visible, n_hidden, dtype=_FLOAT32)
        grad_b = torch.empty(n_visible, dtype=_FLOAT32)
        grad_c = torch.empty(n_hidden, dtype=_FLOAT32)
    energies = torch.empty(2, dtype=_FLOAT32)
    status = _module().cd_step(
        data.data_ptr(), data.dtype.itemsize, data.shape[0], data.stride(0),
        weight.data_ptr(), n_visible, n_hidden, *_strides(weight),
        bias.data_ptr(), hidden_bias.data_ptr(), k,
        *(
            (0, 4, 0, 0)
            if start is None
            else (start.data_ptr(), start.dtype.itemsize, start.shape[0], start.stride(0))
        ),
        0 if variance is None else variance.data_ptr(),
        grad_W.data_ptr(), grad_W.stride(0), grad_b.data_ptr(), grad_c.data_ptr(),
        direct and accumulate, advanced.data_ptr(), kernel_dtype.itemsize, energies.data_ptr(),
        seed.data_ptr(), chain_offset, limbs, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse(op, status)
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None] = (grad_W, grad_b, grad_c, None)
    if not direct and (log_var is not None or out is not None or W.dtype != _FLOAT32):
        grads = reference.finish_gradients(
            grad_W, grad_b, grad_c, data, advanced, W, b, log_var, out, accumulate
        )
    if advanced.dtype != state_dtype:
        advanced = advanced.to(state_dtype)
    return (*grads, advanced, energies)
