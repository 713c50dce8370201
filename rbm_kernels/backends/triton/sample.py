"""One half-sweep in one kernel: product, bias, probability, Philox, comparison, states."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbm_kernels.arguments import Draw, Layer
from rbm_kernels.backends.triton import tuning
from rbm_kernels.backends.triton.arithmetic import (
    exp_neg,
    fma,
    interleave4,
    normal_pair,
    random_words,
    sigmoid,
    uniform,
)
from rbm_kernels.backends.triton.operands import (
    States,
    check_units,
    contiguous,
    operation,
    planes_of,
    quantize,
)
from rbm_kernels.backends.triton.product import preactivation
from rbm_kernels.units import Bernoulli, Gaussian, Units

_BERNOULLI = Bernoulli()


@triton.jit
def draw_bernoulli(
    x, seed, step, chain_offset, rows, first_unit, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):
    """bool [BLOCK_B, BLOCK_N]: on where u < sigmoid(x), decided without a division."""
    w0, w1, w2, w3 = random_words(seed, step, chain_offset, rows, first_unit, BLOCK_N)
    u = uniform(interleave4(w0, w1, w2, w3, BLOCK_B, BLOCK_N))
    return fma(u, exp_neg(x), u) < 1.0


@triton.jit
def draw_normals(
    seed, step, chain_offset, rows, first_unit, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Standard normals, float32 [BLOCK_B, BLOCK_N]."""
    w0, w1, w2, w3 = random_words(seed, step, chain_offset, rows, first_unit, BLOCK_N)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return interleave4(z0, z1, z2, z3, BLOCK_B, BLOCK_N)


@triton.jit(
    do_not_specialize=["n_rows", "n_units", "n_padded", "step", "chain_offset", "mask_row_stride"],
    do_not_specialize_on_alignment=["bias", "betas", "seed", "log_var", "mask", "held"],
)
def half_sweep_kernel(
    states, state_stride, state_plane, row_scale, real,
    weights, weight_stride, weight_plane, weight_scale, bias, betas, beta,
    n_rows, n_units, n_padded, seed, step, chain_offset,
    log_var, mask, mask_row_stride, held, drawn, drawn_stride, means,
    DIGITS: tl.constexpr, GAUSSIAN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Draws a layer [n_rows, n_units] from the digits of the other.

    log_var: of drawn Gaussian units. mask: bytes [n_rows or 1, n_units],
    units to take from ``held`` [n_rows, n_units] instead, or None. drawn: states, of any dtype that
    holds them. means: float32 [n_rows, n_units], conditional means, or None.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_unit = tl.program_id(1) * BLOCK_N
    units = first_unit + tl.arange(0, BLOCK_N)
    inside = (rows < n_rows)[:, None] & (units < n_units)[None, :]
    at = rows[:, None].to(tl.int64) * n_units + units[None, :]
    x = preactivation(
        states, state_stride, state_plane, row_scale, real,
        weights, weight_stride, weight_plane, weight_scale, bias,
        None if GAUSSIAN else betas, 1.0 if GAUSSIAN else beta,
        rows, units, n_rows, n_units, n_padded, DIGITS, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if GAUSSIAN:
        noise = draw_normals(seed, step, chain_offset, rows, first_unit, BLOCK_B, BLOCK_N)
        width = exp_neg(-0.5 * tl.load(log_var + units, units < n_units, 0.0).to(tl.float32))
        if betas is None:
            temperature = tl.full((BLOCK_B,), 1.0, tl.float32) * beta
        else:
            temperature = tl.load(betas + rows, rows < n_rows, 1.0)
        sigma = tl.div_rn(
            tl.broadcast_to(width[None, :], (BLOCK_B, BLOCK_N)),
            tl.broadcast_to(tl.sqrt_rn(temperature)[:, None], (BLOCK_B, BLOCK_N)),
        )
        state = fma(sigma, noise, x)
        if means is not None:
            tl.store(means + at, x, inside)
    else:
        state = draw_bernoulli(x, seed, step, chain_offset, rows, first_unit, BLOCK_B, BLOCK_N).to(
            tl.float32
        )
        if means is not None:
            tl.store(means + at, sigmoid(x), inside)
    if mask is not None:
        clamped = tl.load(
            mask + rows[:, None].to(tl.int64) * mask_row_stride + units[None, :], inside, 0
        )
        state = tl.where(clamped != 0, tl.load(held + at, inside, 0.0), state)
    drawn_at = rows[:, None].to(tl.int64) * drawn_stride + units[None, :]
    tl.store(drawn + drawn_at, state.to(drawn.dtype.element_ty), inside)


def half_sweep(
    given: States,
    weights: Tensor,
    scale: Tensor,
    bias: Tensor,
    draw: Draw,
    step: int,
    drawn: Tensor,
    units: Units = _BERNOULLI,
    means: Tensor | None = None,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> None:
    """Fills ``drawn`` [B, units] from the other layer: int8 or float32, perhaps with padded rows.

    Args:
        weights: int8 [digits, units padded, given padded].
        units: The kind of the drawn units.
        mask: bool [B, units] or [units], contiguous, with ``held`` float32 [B, units].
    """
    n_rows, n_units = drawn.shape
    if not drawn.numel():
        return
    betas = draw.beta if isinstance(draw.beta, Tensor) else None
    gaussian = isinstance(units, Gaussian)
    digits, _, n_padded = weights.shape
    mask_stride = 0 if mask is None or mask.dim() == 1 else mask.stride(0)
    mask = None if mask is None else as_bytes(mask)
    tuning.launch(
        half_sweep_kernel,
        lambda tile: (triton.cdiv(n_rows, tile["BLOCK_B"]), triton.cdiv(n_units, tile["BLOCK_N"])),
        (
            given.planes, *row_strides(given.planes), given.scale, given.real,
            weights, *row_strides(weights), scale, bias.contiguous(), betas,
            1.0 if isinstance(draw.beta, Tensor) else draw.beta,
            n_rows, n_units, n_padded, draw.seed, step, int32(draw.chain_offset),
            contiguous(units.log_var), mask, mask_stride, held, drawn, drawn.stride(0), means,
        ),
        {"DIGITS": digits, "GAUSSIAN": gaussian},
        tuning.PRODUCT,
        n_rows,
        (n_units, n_padded, given.real is None, means is None, mask is None),
    )  # fmt: skip


def row_strides(operand: Tensor) -> tuple[int, int]:
    """Strides of the rows and of the planes."""
    return operand.stride(1), operand.stride(0)


def int32(value: int) -> int:
    """The same 32 bits as a signed integer."""
    return (value + 2**31) % 2**32 - 2**31


def as_bytes(states: Tensor) -> Tensor:
    return states.view(torch.int8) if states.dtype.itemsize == 1 else states


@operation
def sample_layer(
    op: str, given: Tensor, layer: Layer, draw: Draw, return_means: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    W, bias, given_units, units = layer
    check_units(op, *W.shape)
    weights = quantize(W, draw.digits, hidden=True)
    assert weights.hidden is not None
    shape = (given.shape[0], bias.shape[0])
    dtype = torch.float32 if units.continuous or out_dtype.itemsize != 1 else out_dtype
    states = torch.empty(shape, dtype=dtype, device=W.device)
    means = torch.empty(shape, dtype=torch.float32, device=W.device) if return_means else None
    half_sweep(
        planes_of(given, draw.digits, given_units), weights.hidden, weights.scale, bias, draw, 0,
        as_bytes(states), units, means,
    )  # fmt: skip
    return states, means
