"""k-sweep chains: a Python loop of half-sweeps over two buffers of int8 states."""

from __future__ import annotations

import torch
from torch import Tensor

from rbm_kernels.arguments import Draw, Model
from rbm_kernels.backends.triton.operands import (
    States,
    Weights,
    check_units,
    operation,
    padded,
    planes_of,
    quantize,
)
from rbm_kernels.backends.triton.sample import as_bytes, half_sweep


def advance(
    visible: States | None,
    weights: Weights,
    model: Model,
    k: int,
    draw: Draw,
    last: Tensor,
    hidden: Tensor | None = None,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> None:
    """Runs k sweeps and leaves the visible states in ``last``.

    Args:
        visible: Where the chains start; None if ``hidden`` is their first hidden layer.
        last: [B, V], int8 (perhaps with padded rows), or float32 for Gaussian or clamped units.
        hidden: int8 [B, H padded], the buffer of hidden states, filled if ``visible`` is None.
        mask: bool [B, V] or [V], the units to keep at ``held``, float32 [B, V].
    """
    n_rows = last.shape[0]
    W, b, c, units = model
    n_visible, n_hidden = W.shape
    assert weights.hidden is not None and weights.visible is not None
    real = units.continuous or mask is not None

    def bytes_of(units: int) -> Tensor:
        return torch.empty((n_rows, padded(units)), dtype=torch.int8, device=W.device)

    if hidden is None:
        hidden = bytes_of(n_hidden)
    between = None if real or k == 1 else bytes_of(n_visible)
    for sweep in range(k):
        if visible is not None:
            half_sweep(
                visible, weights.hidden, weights.scale, c, draw, 2 * sweep, hidden[:, :n_hidden]
            )  # fmt: skip
        target = last
        if between is not None and sweep < k - 1:
            target = between[:, :n_visible]
        half_sweep(
            States(hidden[None]), weights.visible, weights.scale, b, draw, 2 * sweep + 1, target,
            units, mask=mask, held=held,
        )  # fmt: skip
        if sweep < k - 1:
            if between is None:
                visible = planes_of(last, draw.digits, units)
            else:
                visible = States(between[None])


@operation
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
    W, _, _, units = model
    check_units(op, *W.shape)
    held = None
    if mask is not None:
        mask = mask.contiguous()
        held = v.float().contiguous()
        if values is not None:
            held = v = torch.where(mask, values.float(), held)
    real = units.continuous or mask is not None
    dtype = torch.float32 if real or out_dtype.itemsize != 1 else out_dtype
    states = torch.empty(v.shape, dtype=dtype, device=v.device)
    advance(
        planes_of(v, draw.digits, units), quantize(W, draw.digits, hidden=True, visible=True),
        model, k, draw, as_bytes(states), mask=mask, held=held,
    )  # fmt: skip
    return states
