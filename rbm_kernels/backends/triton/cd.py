"""Contrastive divergence: chains, both phases' statistics, and one product over the stacked batch.

grad_W is the sum over data and chains, one below the other, of v times -p(h|v), with the chains'
v negated: then every digit fits int8 (of +p = 1 the top digit would be 128). Both operands are
stored transposed, the batch contiguous, each phase padded with rows of p = 0.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbm_kernels.arguments import Draw, Model
from rbm_kernels.backends.triton import tuning
from rbm_kernels.backends.triton.arithmetic import (
    INTERPRETED,
    fixed_point,
    integer_of,
    scale_of,
    sigmoid,
    split_digit,
)
from rbm_kernels.backends.triton.free_energy import energies_from, store_softplus, tiles_of
from rbm_kernels.backends.triton.gibbs import advance
from rbm_kernels.backends.triton.operands import (
    States,
    Weights,
    check_units,
    operation,
    padded,
    planes_of,
    quantize,
)
from rbm_kernels.backends.triton.product import integer_sums, preactivation
from rbm_kernels.backends.triton.sample import as_bytes, draw_bernoulli, int32, row_strides


@triton.jit(
    do_not_specialize=["n_rows", "n_units", "n_padded", "first_column", "chain_offset"],
    do_not_specialize_on_alignment=["bias", "seed"],
)
def _statistics_kernel(
    states, state_stride, state_plane, row_scale, real,
    weights, weight_stride, weight_plane, weight_scale, bias,
    n_rows, n_units, n_padded, first_column,
    fixed, fixed_stride, fixed_plane, fixed_sums, sums_stride, softplus_sums, not_a_number,
    seed, chain_offset, drawn, drawn_stride,
    DIGITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p(h|v) of one phase as what the gradient and the free energy need of it.

    fixed: int8 [DIGITS, H padded, batch padded], digits of -p from column first_column on;
    fixed_sums: float64 [row tiles, H padded], sums of p; softplus_sums: float64 [column tiles, B];
    not_a_number: int32, raised to 1 where p is NaN; drawn: hidden states of half-sweep 0, or None.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.program_id(1)
    units = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x = preactivation(
        states, state_stride, state_plane, row_scale, real,
        weights, weight_stride, weight_plane, weight_scale, bias, None, 1.0,
        rows, units, n_rows, n_units, n_padded, DIGITS, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (rows < n_rows)[:, None] & (units < n_units)[None, :]
    store_softplus(x, inside, rows, tile, n_rows, softplus_sums)
    if drawn is not None:
        state = draw_bernoulli(x, seed, 0, chain_offset, rows, tile * BLOCK_N, BLOCK_B, BLOCK_N)
        drawn_at = rows[:, None].to(tl.int64) * drawn_stride + units[None, :]
        tl.store(drawn + drawn_at, state.to(tl.int8), inside)
    p = sigmoid(x)
    undefined = inside & (p != p)
    if tl.max(undefined.to(tl.int32)) != 0:
        tl.atomic_max(not_a_number, 1, sem="relaxed")
    q = -integer_of(p * (8388608.0 if DIGITS == 3 else 32768.0))
    q = tl.where(inside & (p == p), q, 0)
    sums_at = tl.program_id(0).to(tl.int64) * sums_stride + units
    tl.store(fixed_sums + sums_at, -tl.sum(q, axis=0).to(tl.float64))
    at = units[:, None].to(tl.int64) * fixed_stride + (first_column + rows)[None, :]
    for i in tl.static_range(DIGITS):
        digit, q = split_digit(q)
        tl.store(fixed + i * fixed_plane.to(tl.int64) + at, digit.T)


@triton.jit
def _shared_scale(seen, DIGITS: tl.constexpr):
    """Whether any state of either phase is real, and the scale of both; a binary phase counts 1."""
    data_real = tl.load(seen + 1)
    chain_real = tl.load(seen + 5)
    largest = tl.maximum(
        tl.where(data_real != 0, tl.load(seen), 0x3F800000),
        tl.where(chain_real != 0, tl.load(seen + 4), 0x3F800000),
    )
    real = (data_real | chain_real) != 0
    return real, tl.where(real, scale_of(largest, DIGITS), 1.0)


@triton.jit(
    do_not_specialize=["n_rows", "n_units", "first_column"],
    do_not_specialize_on_alignment=["given"],
)
def _transpose_kernel(
    given, row_stride, col_stride, n_rows, n_units, seen, first_column,
    planes, stride, plane, sums, sums_stride,
    NEGATE: tl.constexpr, DIGITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """States [B, V] as digits [planes, V padded, batch padded], and their sums over each tile.

    seen: int32 [2 or more, 4], or None where both phases are known to be binary.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < n_rows)[:, None] & (units < n_units)[None, :]
    offsets = rows[:, None].to(tl.int64) * row_stride + units[None, :].to(tl.int64) * col_stride
    v = tl.load(given + offsets, inside, 0).to(tl.float32)
    sums_at = tl.program_id(0).to(tl.int64) * sums_stride + units
    tl.store(sums + sums_at, tl.sum(v.to(tl.float64), axis=0))
    at = units[:, None].to(tl.int64) * stride + (first_column + rows)[None, :]
    sign: tl.constexpr = -1.0 if NEGATE else 1.0
    if seen is None:
        tl.store(planes + at, (sign * v).to(tl.int8).T)
    else:
        real, scale = _shared_scale(seen, DIGITS)
        digit, q = split_digit(fixed_point(sign * v, scale))
        tl.store(planes + at, digit.T)
        if real:
            for i in tl.static_range(1, DIGITS):
                digit, q = split_digit(q)
                tl.store(planes + i * plane.to(tl.int64) + at, digit.T)


@triton.jit(
    do_not_specialize=["n_data", "n_batch", "weight_data", "weight_chain", "n_visible", "n_hidden"]
)
def _gradient_kernel(
    v, p, stride, v_plane, p_plane, n_data, n_batch, weight_data, weight_chain, unit,
    seen, not_a_number, n_visible, n_hidden, grad,
    DIGITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad [V, H] from the digits of both layers, [planes, units padded, stride]."""
    visible = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    hidden = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    v_offsets = visible.to(tl.int64) * stride
    p_offsets = hidden.to(tl.int64) * stride
    v_digits = 1
    scale = 1.0
    if seen is not None:
        real, scale = _shared_scale(seen, DIGITS)
        v_digits = tl.where(real, DIGITS, 1)
    # The two sums are combined in float64, as the contract has it.
    data = integer_sums(
        v, v_plane, v_offsets, v_digits, p, p_plane, p_offsets, DIGITS, 0, n_data,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    weighted = data.to(tl.float64) * weight_data.to(tl.float64)
    chain = integer_sums(
        v, v_plane, v_offsets, v_digits, p, p_plane, p_offsets, DIGITS, n_data, n_batch,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    total = chain.to(tl.float64) * weight_chain.to(tl.float64) + weighted
    factor = tl.where(tl.load(not_a_number) != 0, float("nan"), scale * unit)
    at = visible[:, None].to(tl.int64) * n_hidden + hidden[None, :]
    inside = (visible < n_visible)[:, None] & (hidden < n_hidden)[None, :]
    tl.store(grad + at, total.to(tl.float32) * factor, inside)


@triton.jit(
    do_not_specialize=[
        "data_tiles", "chain_tiles", "weight_data", "weight_chain", "n_units", "common",
    ]
)  # fmt: skip
def _bias_kernel(
    data_sums, data_tiles, chain_sums, chain_tiles, stride, weight_data, weight_chain,
    n_units, common, unit, not_a_number, grad,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [units] from float64 [tiles, stride] sums of each phase."""
    units = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = units < n_units
    data = tl.zeros((BLOCK,), tl.float64)
    for tile in range(data_tiles):
        data += tl.load(data_sums + tl.cast(tile, tl.int64) * stride + units, within, 0.0)
    chain = tl.zeros((BLOCK,), tl.float64)
    for tile in range(chain_tiles):
        chain += tl.load(chain_sums + tl.cast(tile, tl.int64) * stride + units, within, 0.0)
    total = chain * weight_chain.to(tl.float64) - data * weight_data.to(tl.float64)
    if HIDDEN:
        factor = tl.where(tl.load(not_a_number) != 0, float("nan"), unit)
        result = total.to(tl.float32) * factor
    else:
        result = (total / common.to(tl.float64)).to(tl.float32)
    tl.store(grad + units, result, within)


@triton.jit(do_not_specialize=["n_data", "n_chain"])
def _mean_kernel(data, n_data, chain, n_chain, means, BLOCK: tl.constexpr):
    """means [2] of two float32 vectors, in float64; one program each."""
    phase = tl.program_id(0)
    n = tl.where(phase == 0, n_data, n_chain)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        of_data = tl.load(data + at, (at < n) & (phase == 0), 0.0)
        of_chain = tl.load(chain + at, (at < n) & (phase == 1), 0.0)
        total += (of_data + of_chain).to(tl.float64)
    tl.store(means + phase, (tl.sum(total) / n.to(tl.float64)).to(tl.float32))


@operation
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
    W, b, c, units = model
    check_units(op, *W.shape)
    device, digits = v.device, draw.digits
    n_visible, n_hidden = W.shape
    n_data, n_chain = v.shape[0], (v if chains is None else chains).shape[0]
    maybe_real = units.continuous or v.dtype != torch.bool
    weights = quantize(W, digits, hidden=True, visible=True)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # The largest state and whether any is real, of the data; of the chains; whether any probability
    # is NaN. Rows of 16 bytes, because a kernel is compiled for the alignment of its pointers.
    notes = torch.zeros((3, 4), dtype=torch.int32, device=device)
    not_a_number = notes[2]
    data_columns, chain_columns = padded(n_data), padded(n_chain)
    fixed = empty(digits, padded(n_hidden), data_columns + chain_columns, dtype=torch.int8)
    data_planes = planes_of(v, digits, units, notes[0])
    if chains is None:
        hidden = empty(n_chain, padded(n_hidden), dtype=torch.int8)
        visible = None
    else:
        hidden = None
        visible = planes_of(chains, digits, units)
    data_softplus, data_sums = _statistics(
        data_planes, weights, c, 0, fixed, not_a_number, draw, hidden
    )
    if units.continuous:
        last = empty(n_chain, n_visible, dtype=torch.float32)
    else:
        buffer = empty(n_chain, padded(n_visible), dtype=torch.int8)
        last = buffer[:, :n_visible]
    advance(visible, weights, model, k, draw, last, hidden)
    if units.continuous:
        chain_planes = planes_of(last, digits, units, notes[1])
    else:
        chain_planes = States(buffer[None])
    chain_softplus, chain_sums = _statistics(
        chain_planes, weights, c, data_columns, fixed, not_a_number, draw, None
    )
    # The kernels write rows side by side, and more than once while tiles are timed.
    direct = not accumulate and averages[0].is_contiguous()
    targets = averages if direct else tuple(torch.empty_like(x).contiguous() for x in averages)
    _averages(
        targets, v, last, fixed, data_sums, chain_sums, notes if maybe_real else None,
        not_a_number, digits,
    )  # fmt: skip
    if not direct:
        for buffer, average in zip(averages, targets, strict=True):
            buffer.add_(average) if accumulate else buffer.copy_(average)
    energies = empty(2, dtype=torch.float32)
    _mean_kernel[(2,)](
        energies_from(v, b, units, 1.0, data_softplus), n_data,
        energies_from(last, b, units, 1.0, chain_softplus), n_chain,
        energies, BLOCK=1024, enable_fp_fusion=False,
    )  # fmt: skip
    return last, energies


def _statistics(
    given: States,
    weights: Weights,
    c: Tensor,
    first_column: int,
    fixed: Tensor,
    not_a_number: Tensor,
    draw: Draw,
    drawn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fills one phase's columns of ``fixed``; sums of softplus [tiles, B] and of p [tiles, H]."""
    assert weights.hidden is not None
    n_rows, n_hidden = given.planes.shape[1], c.shape[0]
    digits, h_padded, n_padded = weights.hidden.shape
    device = c.device
    columns = padded(n_rows)
    softplus_sums = torch.empty((tiles_of(n_hidden), n_rows), dtype=torch.float64, device=device)
    smallest = min(config.kwargs["BLOCK_B"] for config in tuning.PRODUCT)
    sums = torch.empty((columns // smallest, h_padded), dtype=torch.float64, device=device)
    if not n_hidden:
        return softplus_sums, sums
    config = tuning.launch(
        _statistics_kernel,
        lambda tile: (columns // tile["BLOCK_B"], softplus_sums.shape[0]),
        (
            given.planes, *row_strides(given.planes), given.scale, given.real,
            weights.hidden, *row_strides(weights.hidden), weights.scale, c.contiguous(),
            n_rows, n_hidden, n_padded, first_column,
            fixed, *row_strides(fixed), sums, h_padded, softplus_sums, not_a_number,
            draw.seed, int32(draw.chain_offset), drawn, h_padded,
        ),
        {"DIGITS": digits},
        tuning.PRODUCT,
        n_rows,
        (n_hidden, n_padded, given.real is None, drawn is None),
    )  # fmt: skip
    return softplus_sums, sums[: columns // config.kwargs["BLOCK_B"]]


def _averages(
    averages: tuple[Tensor, ...],
    data: Tensor,
    chain: Tensor,
    fixed: Tensor,
    data_sums: Tensor,
    chain_sums: Tensor,
    seen: Tensor | None,
    not_a_number: Tensor,
    digits: int,
) -> None:
    """Fills float32 differences of <v p>, <v> and <p>, each phase divided by its own count."""
    grad_W, grad_b, grad_c = averages
    device = data.device
    n_visible, n_hidden = grad_W.shape
    n_data, n_chain = data.shape[0], chain.shape[0]
    common = math.lcm(n_data, n_chain)
    weight_data, weight_chain = common // n_data, common // n_chain
    unit = 2.0 ** (-23 if digits == 3 else -15) / common
    _, h_padded, columns = fixed.shape
    v_padded = padded(n_visible)
    planes = 1 if seen is None else digits
    transposed = torch.empty((planes, v_padded, columns), dtype=torch.int8, device=device)
    block = 128 if INTERPRETED.value else 64
    visible_sums = []
    for states, negate in ((data, False), (chain, True)):
        n_rows = states.shape[0]
        states = as_bytes(states) if states.dtype == torch.bool else states
        tiles = triton.cdiv(n_rows, block)
        sums = torch.empty((tiles, v_padded), dtype=torch.float64, device=device)
        if n_visible:
            _transpose_kernel[(tiles, v_padded // block)](
                states, *states.stride(), n_rows, n_visible, seen, padded(n_data) * negate,
                transposed, *row_strides(transposed), sums, v_padded,
                NEGATE=negate, DIGITS=digits, BLOCK_B=block, BLOCK_V=block, enable_fp_fusion=False,
            )  # fmt: skip
        visible_sums.append(sums)
    if grad_W.numel():
        tuning.launch(
            _gradient_kernel,
            lambda tile: (
                triton.cdiv(n_visible, tile["BLOCK_M"]), triton.cdiv(n_hidden, tile["BLOCK_N"])
            ),
            (
                transposed, fixed, columns, transposed.stride(0), fixed.stride(0),
                padded(n_data), columns, weight_data, weight_chain, unit, seen, not_a_number,
                n_visible, n_hidden, grad_W,
            ),
            {"DIGITS": digits},
            tuning.GRADIENT,
            columns,
            (n_visible, n_hidden, seen is None),
        )  # fmt: skip
    for grad, (of_data, of_chain), stride, is_hidden in (
        (grad_b, visible_sums, v_padded, False),
        (grad_c, [data_sums, chain_sums], h_padded, True),
    ):
        if grad.numel():
            _bias_kernel[(triton.cdiv(grad.shape[0], 128),)](
                of_data, of_data.shape[0], of_chain, of_chain.shape[0], stride,
                weight_data, weight_chain, grad.shape[0], common, unit, not_a_number, grad,
                HIDDEN=is_hidden, BLOCK=128, enable_fp_fusion=False,
            )  # fmt: skip
