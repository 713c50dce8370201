"""Weights and states as planes of int8 digits: what the products read.

Nothing here waits for the device: scales, and whether states are binary, stay in its memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbm_kernels.arithmetic import MOST_UNITS
from rbm_kernels.backends.triton.arithmetic import (
    INTERPRETED,
    exp_neg,
    fixed_point,
    magnitude_bits,
    scale_of,
    split_digit,
)
from rbm_kernels.backends.triton.product import PADDING
from rbm_kernels.units import Bernoulli, Gaussian, Units

_P = ParamSpec("_P")
_R = TypeVar("_R")
_BERNOULLI = Bernoulli()


def operation(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a backend's function without autograd, on the device of its second argument, states."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        states = args[1]
        assert isinstance(states, Tensor)
        on = torch.cuda.device(states.device) if states.is_cuda else contextlib.nullcontext()
        with torch.no_grad(), on:
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Weights:
    """W in fixed point, in the layouts asked for.

    Attributes:
        scale: float32 [1], in the device's memory.
        hidden: int8 [digits, H padded, V padded], for sums over visible units.
        visible: int8 [digits, V padded, H padded], for sums over hidden units.
    """

    scale: Tensor
    hidden: Tensor | None
    visible: Tensor | None


@dataclass(frozen=True)
class States:
    """States of a layer as digits.

    Attributes:
        planes: int8 [planes, B, units padded]; the padding is undefined (the weights' is zero).
        scale: float32 [B], the power of two of each row; None if known to be binary.
        real: int32 [B], whether a row is not binary; None if known to be binary.
    """

    planes: Tensor
    scale: Tensor | None = None
    real: Tensor | None = None


def contiguous(x: Tensor | None) -> Tensor | None:
    """The same values side by side in memory; None stays None."""
    return None if x is None else x.contiguous()


def padded(units: int) -> int:
    return -(-units // PADDING) * PADDING


def check_units(op: str, *layers: int) -> None:
    """Raises RuntimeError where a layer has more units than the accumulators hold."""
    if max(layers) > MOST_UNITS:
        raise RuntimeError(
            f"{op}: backend 'triton' cannot run: its int32 sums hold layers of at most "
            f"{MOST_UNITS} units, got {max(layers)}"
        )


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _largest_kernel(
    W, row_stride, col_stride, n_rows, n_cols, largest,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offsets = rows[:, None].to(tl.int64) * row_stride + cols[None, :].to(tl.int64) * col_stride
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    w = tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.atomic_max(largest, tl.max(magnitude_bits(w)), sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _weight_digits_kernel(
    W, row_stride, col_stride, n_rows, n_cols, largest, scale_out,
    hidden, hidden_stride, hidden_plane, visible, visible_stride, visible_plane,
    DIGITS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offsets = rows[:, None].to(tl.int64) * row_stride + cols[None, :].to(tl.int64) * col_stride
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    w = tl.load(W + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.load(largest), DIGITS)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_out, scale)
    q = fixed_point(w, scale)
    for i in tl.static_range(DIGITS):
        digit, q = split_digit(q)
        if hidden is not None:
            at = cols[:, None].to(tl.int64) * hidden_stride + rows[None, :]
            tl.store(hidden + i * hidden_plane.to(tl.int64) + at, digit.T)
        if visible is not None:
            at = rows[:, None].to(tl.int64) * visible_stride + cols[None, :]
            tl.store(visible + i * visible_plane.to(tl.int64) + at, digit)


def quantize(W: Tensor, digits: int, hidden: bool = False, visible: bool = False) -> Weights:
    """W [V, H] of any float dtype and strides as digits, in the layouts asked for."""
    n_visible, n_hidden = W.shape
    v_padded, h_padded = padded(n_visible), padded(n_hidden)
    largest = torch.zeros(1, dtype=torch.int32, device=W.device)
    scale = torch.empty(1, dtype=torch.float32, device=W.device)

    def planes(rows: int, cols: int) -> Tensor:
        return torch.empty((digits, rows, cols), dtype=torch.int8, device=W.device)

    up = planes(h_padded, v_padded) if hidden else None
    down = planes(v_padded, h_padded) if visible else None
    block = PADDING if INTERPRETED.value else 64
    grid = (v_padded // block, h_padded // block)
    shape = (W, *W.stride(), n_visible, n_hidden)
    if W.numel() == 0:
        return Weights(scale.fill_(1.0), up, down)
    _largest_kernel[grid](*shape, largest, BLOCK_V=block, BLOCK_H=block, enable_fp_fusion=False)
    plane = v_padded * h_padded
    _weight_digits_kernel[grid](
        *shape, largest, scale, up, v_padded, plane, down, h_padded, plane,
        DIGITS=digits, BLOCK_V=block, BLOCK_H=block, enable_fp_fusion=False,
    )  # fmt: skip
    return Weights(scale, up, down)


@triton.jit(
    do_not_specialize=["n_rows", "n_units"],
    do_not_specialize_on_alignment=["given"],
)
def _state_digits_kernel(
    given, row_stride, col_stride, log_var, n_rows, n_units,
    planes, stride, plane, row_scale, real, seen,
    DIGITS: tl.constexpr, GAUSSIAN: tl.constexpr, KNOWN_BINARY: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    # Past the end the last row is read, and written, again.
    at = tl.minimum(rows, n_rows - 1).to(tl.int64)
    given_rows = given + at[:, None] * row_stride
    plane_rows = planes + at[:, None] * stride
    if not KNOWN_BINARY:
        largest = tl.zeros((BLOCK_B,), tl.int32)
        largest_raw = tl.zeros((BLOCK_B,), tl.int32)
        others = tl.zeros((BLOCK_B,), tl.int32)
        others_raw = tl.zeros((BLOCK_B,), tl.int32)
        for k in range(0, n_units, BLOCK_K):
            units = k + tl.arange(0, BLOCK_K)
            inside = (units < n_units)[None, :]
            a = tl.load(given_rows + units[None, :].to(tl.int64) * col_stride, inside, 0)
            a = a.to(tl.float32)
            largest_raw = tl.maximum(largest_raw, tl.max(magnitude_bits(a), axis=1))
            not_binary = ((a != 0) & (a != 1)).to(tl.int32)
            others_raw = tl.maximum(others_raw, tl.max(not_binary, axis=1))
            if GAUSSIAN:
                precision = exp_neg(tl.load(log_var + units, units < n_units, 0.0).to(tl.float32))
                a = a * precision[None, :]
                not_binary = ((a != 0) & (a != 1)).to(tl.int32)
            largest = tl.maximum(largest, tl.max(magnitude_bits(a), axis=1))
            others = tl.maximum(others, tl.max(not_binary, axis=1))
        scale = tl.where(others != 0, scale_of(largest, DIGITS), 1.0)
        tl.store(row_scale + at, scale)
        tl.store(real + at, others)
        if seen is not None:
            tl.atomic_max(seen, tl.max(largest_raw), sem="relaxed")
            tl.atomic_max(seen + 1, tl.max(others_raw), sem="relaxed")
    for k in range(0, n_units, BLOCK_K):
        units = k + tl.arange(0, BLOCK_K)
        inside = (units < n_units)[None, :]
        a = tl.load(given_rows + units[None, :].to(tl.int64) * col_stride, inside, 0)
        if KNOWN_BINARY:
            tl.store(plane_rows + units[None, :], a.to(tl.int8), inside)
        else:
            a = a.to(tl.float32)
            if GAUSSIAN:
                precision = exp_neg(tl.load(log_var + units, units < n_units, 0.0).to(tl.float32))
                a = a * precision[None, :]
            digit, q = split_digit(fixed_point(a, scale[:, None]))
            tl.store(plane_rows + units[None, :], digit, inside)
            for i in tl.static_range(1, DIGITS):
                digit, q = split_digit(q)
                tl.store(plane_rows + i * plane.to(tl.int64) + units[None, :], digit, inside)


def planes_of(
    given: Tensor, digits: int, units: Units = _BERNOULLI, seen: Tensor | None = None
) -> States:
    """What a layer shows of its states [B, units] to the other, of any dtype and strides.

    Args:
        units: The kind of the layer's units; Gaussian states are divided by their variance.
        seen: int32 [2] of zeros, raised to the magnitude_bits of the largest state and to 1 if any
            state is real, both before the variance divides; left alone if ``given`` is bool.
    """
    n_rows, n_units = given.shape
    gaussian = isinstance(units, Gaussian)
    known_binary = given.dtype == torch.bool and not gaussian
    if given.dtype == torch.bool:
        given = given.view(torch.uint8)
    stride = padded(n_units)
    device = given.device
    n_planes = 1 if known_binary else digits
    planes = torch.empty((n_planes, n_rows, stride), dtype=torch.int8, device=device)
    scale = real = None
    if not known_binary:
        scale = torch.empty(n_rows, dtype=torch.float32, device=device)
        real = torch.empty(n_rows, dtype=torch.int32, device=device)
    block_b, block_k = (64, 1024) if INTERPRETED.value else (4, 256)
    if n_rows:
        _state_digits_kernel[(triton.cdiv(n_rows, block_b),)](
            given, *given.stride(), contiguous(units.log_var), n_rows, n_units,
            planes, stride, n_rows * stride, scale, real, seen,
            DIGITS=digits, GAUSSIAN=gaussian, KNOWN_BINARY=known_binary,
            BLOCK_B=block_b, BLOCK_K=block_k, enable_fp_fusion=False,
        )  # fmt: skip
    return States(planes, scale, real)
