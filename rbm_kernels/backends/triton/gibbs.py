"""k-sweep chains: a Python loop of half-sweeps over two buffers of int8 states."""

from __future__ import annotations

import torch
from torch import Tensor

from rbm_kernels.backends.triton.operands import (
    States,
    Weights,
    check_units,
    digits_of,
    operation,
    padded,
    quantise,
)
from rbm_kernels.backends.triton.sample import Beta, as_bytes, half_sweep


def advance(
    visible: States | None,
    weights: Weights,
    b: Tensor,
    c: Tensor,
    k: int,
    log_var: Tensor | None,
    beta: Beta,
    seed: Tensor,
    chain_offset: int,
    last: Tensor,
    hidden: Tensor | None = None,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> None:
    """Runs k sweeps and leaves the visible states in `last`.

    Args:
        visible: where the chains start; None if `hidden` is their first hidden layer.
        last: [B, V], int8 (perhaps with padded rows), or float32 for Gaussian or clamped units.
        hidden: int8 [B, H padded], the buffer of hidden states, filled if `visible` is None.
        mask: bool [B, V] or [V], the units to keep at `held`, float32 [B, V].
    """
    n_rows = last.shape[0]
    n_visible, n_hidden = b.shape[0], c.shape[0]
    assert weights.hidden is not None and weights.visible is not None
    limbs = weights.hidden.shape[0]
    real = log_var is not None or mask is not None

    def bytes_of(units: int) -> Tensor:
        return torch.empty((n_rows, padded(units)), dtype=torch.int8, device=b.device)

    if hidden is None:
        hidden = bytes_of(n_hidden)
    between = None if real or k == 1 else bytes_of(n_visible)
    for sweep in range(k):
        if visible is not None:
            half_sweep(
                visible, weights.hidden, weights.scale, c, beta, seed, 2 * sweep, chain_offset,
                hidden[:, :n_hidden],
            )  # fmt: skip
        target = last
        if between is not None and sweep < k - 1:
            target = between[:, :n_visible]
        half_sweep(
            States(hidden[None]), weights.visible, weights.scale, b, beta, seed, 2 * sweep + 1,
            chain_offset, target, log_var, mask=mask, held=held,
        )  # fmt: skip
        if sweep < k - 1:
            visible = digits_of(last, limbs, log_var) if between is None else States(between[None])


@operation
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
    check_units("gibbs_sample", *W.shape)
    held = None
    if mask is not None:
        mask = mask.contiguous()
        held = v.float().contiguous()
        if values is not None:
            held = v = torch.where(mask, values.float(), held)
    real = log_var is not None or mask is not None
    dtype = torch.float32 if real or out_dtype.itemsize != 1 else out_dtype
    states = torch.empty(v.shape, dtype=dtype, device=v.device)
    advance(
        digits_of(v, limbs, log_var), quantise(W, limbs, hidden=True, visible=True), b, c, k,
        log_var, beta, seed, chain_offset, as_bytes(states), mask=mask, held=held,
    )  # fmt: skip
    return states.to(out_dtype)
