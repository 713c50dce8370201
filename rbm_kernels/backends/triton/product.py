"""Exact int8 products of fixed-point operands, and the pre-activations made of them.

Every operand is [planes, rows, stride] int8 with the summed dimension contiguous, as the matrix
instructions want it; plane i holds the i-th signed base-256 digit, the lowest first. Binary states
have one plane, of zeros and ones.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rbm_kernels.backends.triton.arithmetic import fma

# Every padded dimension is a multiple of this, so that no load of digits needs a mask.
PADDING = 128
# As many products of two digits, 2^14 each, stay below 2^31.
_ROWS_OF_INT32 = tl.constexpr(65536)


@triton.jit
def load_rows(operand, row_offsets, begin, BLOCK_K: tl.constexpr):
    """int8 [rows, BLOCK_K] of one plane."""
    return tl.load(operand + row_offsets[:, None] + (begin + tl.arange(0, BLOCK_K))[None, :])


@triton.jit
def binary_sums(
    states,
    state_offsets,
    weights,
    weight_plane,
    weight_offsets,
    n_padded,
    DIGITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_B, BLOCK_N]: sums of fixed-point weights over the units that are on.

    Digits sum to at most 128 * 65535 in int32, two digits' sums to 127 * 257 * 65535 < 2^31.
    """
    low = tl.zeros((BLOCK_B, BLOCK_N), tl.int32)
    middle = tl.zeros((BLOCK_B, BLOCK_N), tl.int32)
    if DIGITS == 3:
        high = tl.zeros((BLOCK_B, BLOCK_N), tl.int32)
    for k in range(0, n_padded, BLOCK_K):
        on = load_rows(states, state_offsets, k, BLOCK_K)
        low = tl.dot(on, load_rows(weights, weight_offsets, k, BLOCK_K).T, low, out_dtype=tl.int32)
        plane = load_rows(weights + weight_plane, weight_offsets, k, BLOCK_K)
        middle = tl.dot(on, plane.T, middle, out_dtype=tl.int32)
        if DIGITS == 3:
            plane = load_rows(weights + 2 * weight_plane.to(tl.int64), weight_offsets, k, BLOCK_K)
            high = tl.dot(on, plane.T, high, out_dtype=tl.int32)
    if DIGITS == 3:
        upper = high * 256 + middle
        total = (upper.to(tl.int64) * 256 + low).to(tl.float32)
    else:
        total = (middle * 256 + low).to(tl.float32)
    return total


@triton.jit
def integer_sums(
    a,
    a_plane,
    a_offsets,
    a_digits,
    b,
    b_plane,
    b_offsets,
    b_digits,
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int64 [BLOCK_M, BLOCK_N]: exact sums of a[m, k] * b[n, k] over k in [begin, end).

    One pair of digits after the other, so that a single int32 accumulator serves them all.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
    for i in range(a_digits):
        a_planes = a + tl.cast(i, tl.int64) * a_plane
        for j in range(b_digits):
            b_planes = b + tl.cast(j, tl.int64) * b_plane
            for chunk in range(begin, end, _ROWS_OF_INT32):
                partial = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                for k in range(chunk, tl.minimum(chunk + _ROWS_OF_INT32, end), BLOCK_K):
                    left = load_rows(a_planes, a_offsets, k, BLOCK_K)
                    right = load_rows(b_planes, b_offsets, k, BLOCK_K)
                    partial = tl.dot(left, right.T, partial, out_dtype=tl.int32)
                total += partial.to(tl.int64) << (8 * (i + j))
    return total


@triton.jit
def preactivation(
    states,
    state_stride,
    state_plane,
    row_scale,
    real,
    weights,
    weight_stride,
    weight_plane,
    weight_scale,
    bias,
    betas,
    beta,
    rows,
    units,
    n_rows,
    n_units,
    n_padded,
    DIGITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``beta * (bias + states W)`` of a tile, float32 [BLOCK_B, BLOCK_N].

    states: int8 [planes, n_rows, state_stride]; row_scale: float32 [n_rows], real: int32 [n_rows],
    or both None for states known to be binary; weights: int8 [DIGITS, units padded, weight_stride];
    bias: [n_units]; betas: float32 [n_rows], or None and one beta for all; n_padded: padded units
    of the given layer, a multiple of BLOCK_K.
    """
    row = tl.minimum(rows, n_rows - 1)
    state_offsets = row.to(tl.int64) * state_stride
    weight_offsets = units.to(tl.int64) * weight_stride
    scale = tl.load(weight_scale)
    if real is None:
        total = binary_sums(
            states, state_offsets, weights, weight_plane, weight_offsets, n_padded,
            DIGITS, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        scales = tl.full((BLOCK_B,), 1.0, tl.float32) * scale
    else:
        scales = tl.load(row_scale + row) * scale
        # A binary row among real ones has zeros above its lowest digit and a scale of 1.
        if tl.max(tl.load(real + row), axis=0) == 0:
            total = binary_sums(
                states, state_offsets, weights, weight_plane, weight_offsets, n_padded,
                DIGITS, BLOCK_B, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            sums = integer_sums(
                states, state_plane, state_offsets, DIGITS, weights, weight_plane, weight_offsets,
                DIGITS, 0, n_padded, BLOCK_B, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            # By way of float64, as the contract has it for sums beyond 2^53.
            total = sums.to(tl.float64).to(tl.float32)
    offset = tl.load(bias + units, mask=units < n_units, other=0.0).to(tl.float32)
    x = fma(total, scales[:, None], offset[None, :])
    return x * beta if betas is None else x * tl.load(betas + row)[:, None]
