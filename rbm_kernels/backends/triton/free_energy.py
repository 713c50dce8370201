"""Free energies: a product whose epilogue sums softplus, so that no [B, H] matrix is written."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbm_kernels.arguments import Beta, Model
from rbm_kernels.backends.triton import tuning
from rbm_kernels.backends.triton.arithmetic import INTERPRETED, exp_neg, softplus
from rbm_kernels.backends.triton.operands import (
    check_units,
    contiguous,
    operation,
    planes_of,
    quantize,
)
from rbm_kernels.backends.triton.product import preactivation
from rbm_kernels.backends.triton.sample import as_bytes, row_strides
from rbm_kernels.units import Gaussian, Units


@triton.jit
def store_softplus(x, inside, rows, tile, n_rows, softplus_sums):
    """Sums softplus(x) over the columns of a tile, in float64, into softplus_sums [tiles, B]."""
    terms = tl.where(inside, softplus(x), 0.0).to(tl.float64)
    at = tile.to(tl.int64) * n_rows + rows
    tl.store(softplus_sums + at, tl.sum(terms, axis=1), rows < n_rows)


@triton.jit(
    do_not_specialize=["n_rows", "n_units", "n_padded"],
    do_not_specialize_on_alignment=["bias", "betas"],
)
def _softplus_kernel(
    states, state_stride, state_plane, row_scale, real,
    weights, weight_stride, weight_plane, weight_scale, bias, betas, beta,
    n_rows, n_units, n_padded, softplus_sums,
    DIGITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.program_id(1)
    units = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x = preactivation(
        states, state_stride, state_plane, row_scale, real,
        weights, weight_stride, weight_plane, weight_scale, bias, betas, beta,
        rows, units, n_rows, n_units, n_padded, DIGITS, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (rows < n_rows)[:, None] & (units < n_units)[None, :]
    store_softplus(x, inside, rows, tile, n_rows, softplus_sums)


@triton.jit(
    do_not_specialize=["n_rows", "n_units", "n_tiles"],
    do_not_specialize_on_alignment=["given", "b", "log_var", "betas"],
)
def _energy_kernel(
    given, row_stride, col_stride, b, log_var, betas, beta, n_rows, n_units,
    softplus_sums, n_tiles, energy,
    GAUSSIAN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    within = rows < n_rows
    given_rows = given + rows[:, None].to(tl.int64) * row_stride
    terms = tl.zeros((BLOCK_B, BLOCK_V), tl.float64)
    for first in range(0, n_units, BLOCK_V):
        units = first + tl.arange(0, BLOCK_V)
        inside = within[:, None] & (units < n_units)[None, :]
        v = tl.load(given_rows + units[None, :].to(tl.int64) * col_stride, inside, 0)
        v = v.to(tl.float32).to(tl.float64)
        bias = tl.load(b + units, units < n_units, 0.0).to(tl.float32).to(tl.float64)[None, :]
        if GAUSSIAN:
            width = tl.load(log_var + units, units < n_units, 0.0).to(tl.float32)
            precision = exp_neg(width).to(tl.float64)[None, :]
            terms += tl.where(inside, (v - bias) * (v - bias) * precision * 0.5, 0.0)
        else:
            terms -= v * bias
    total = tl.sum(terms, axis=1)
    if betas is None:
        total *= beta
    else:
        total *= tl.load(betas + rows, within, 0.0).to(tl.float64)
    for tile in range(n_tiles):
        total -= tl.load(softplus_sums + tl.cast(tile, tl.int64) * n_rows + rows, within, 0.0)
    tl.store(energy + rows, total.to(tl.float32), within)


def tiles_of(n_hidden: int) -> int:
    """How many sums over columns a product of n_hidden units leaves for each row."""
    return triton.cdiv(n_hidden, tuning.BLOCK_N)


def energies_from(v: Tensor, b: Tensor, units: Units, beta: Beta, softplus_sums: Tensor) -> Tensor:
    """float32 [B] from the states [B, V] and float64 [tiles, B] sums of softplus."""
    n_rows, n_visible = v.shape
    energy = torch.empty(n_rows, dtype=torch.float32, device=v.device)
    betas = beta if isinstance(beta, Tensor) else None
    block_b, block_v = (64, 128) if INTERPRETED.value else (8, 128)
    if n_rows:
        v = as_bytes(v) if v.dtype == torch.bool else v
        _energy_kernel[(triton.cdiv(n_rows, block_b),)](
            v, *v.stride(), b.contiguous(), contiguous(units.log_var), betas,
            1.0 if betas is not None else float(beta),
            n_rows, n_visible, softplus_sums, softplus_sums.shape[0], energy,
            GAUSSIAN=isinstance(units, Gaussian), BLOCK_B=block_b, BLOCK_V=block_v,
            enable_fp_fusion=False,
        )  # fmt: skip
    return energy


@operation
def free_energies(op: str, v: Tensor, model: Model, beta: Beta, digits: int) -> Tensor:
    W, b, c, units = model
    check_units(op, *W.shape)
    n_rows, n_hidden = v.shape[0], c.shape[0]
    sums = torch.empty((tiles_of(n_hidden), n_rows), dtype=torch.float64, device=v.device)
    betas = beta if isinstance(beta, Tensor) else None
    if sums.numel():
        weights = quantize(W, digits, hidden=True)
        assert weights.hidden is not None
        given = planes_of(v, digits, units)
        tuning.launch(
            _softplus_kernel,
            lambda tile: (triton.cdiv(n_rows, tile["BLOCK_B"]), sums.shape[0]),
            (
                given.planes, *row_strides(given.planes), given.scale, given.real,
                weights.hidden, *row_strides(weights.hidden), weights.scale, c.contiguous(), betas,
                1.0 if betas is not None else float(beta),
                n_rows, n_hidden, weights.hidden.shape[2], sums,
            ),
            {"DIGITS": digits},
            tuning.PRODUCT,
            n_rows,
            (*W.shape, given.real is None),
        )  # fmt: skip
    return energies_from(v, b, units, beta, sums)
