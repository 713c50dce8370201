"""k sweeps of block Gibbs sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rbm_kernels import seeds
from rbm_kernels.arguments import Draw, Model
from rbm_kernels.inputs import as_states
from rbm_kernels.ops import _checks
from rbm_kernels.ops._dispatch import define, run


def gibbs_sample(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int = 1,
    *,
    log_var: Tensor | None = None,
    visible: str | None = None,
    beta: float | Tensor = 1.0,
    clamp: Tensor | tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    seed: seeds.Seed | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Run k sweeps (hidden given visible, visible given hidden) from v in one call.

    States have no derivative, and ``torch.vmap`` runs a chain after the other: see
    ``sample_hidden``.

    Args:
        v: [B, V] initial visible states: a tensor, a NumPy array, a table or lists (see
            ``rbm_kernels.inputs``).
        W: [V, H] weights.
        b: [V] visible biases.
        c: [H] hidden biases.
        k: Sweeps, at least 1.
        log_var: [V] log-variances; given exactly when the visible units are Gaussian.
        visible: The kind of visible units, by its name in docs/units.md; None means Gaussian units
            where ``log_var`` is given and Bernoulli units otherwise.
        beta: Inverse temperature of the chains, one number or [B]: each chain samples
            exp(-beta E(v, h)).
        clamp: Units to hold still, for conditional sampling and in-painting: a bool mask [V] or
            [B, V] (True units keep their value in v), or (mask, values) with values of the same
            shapes, set before the first sweep.
        out_dtype: Dtype of the returned states; W's by default.
        seed: int, (seed, offset), or int64[2] tensor whose offset is advanced by 2k.
        generator: Source of the seed where none is given.
        chain_offset: Global index of row 0.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium".

    Returns:
        v_k [B, V].

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A wrong shape or device, k < 1, or values that are not finite or that the
            units do not take (docs/units.md).
        RuntimeError: An explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> W, b, c = torch.zeros(3, 2), torch.tensor([50.0, -50.0, 50.0]), torch.zeros(2)
        >>> gibbs_sample(torch.zeros(1, 3), W, b, c, k=5, seed=0)
        tensor([[1., 0., 1.]])
    """
    op = "gibbs_sample"
    v, model = _checks.model(op, v, W, b, c, log_var, visible)
    k = _checks.sweeps(op, k)
    dtype = _checks.state_dtype(op, out_dtype, W, model.units)
    beta = _checks.temperature(op, beta, v.shape[0], W, model.units)
    mask, values = _clamp(op, clamp, v)
    if values is not None:
        _checks.values(op, "clamp's values", values, model.units)
    draw = _checks.draw(op, W, beta, seed, generator, chain_offset, backend, precision)
    if (change := model.units.change) is not None:
        v, model = change.states(v), Model(*change.model(W, b, c), change.units)
        values = None if values is None else change.states(values)
    states: Tensor = run(_GIBBS, backend, v, model, k, draw, mask, values, dtype)
    seeds.advance(seed, 2 * k)
    return states if change is None else change.restored(states)


def _clamp(op: str, clamp: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if clamp is None:
        return None, None
    pair = isinstance(clamp, (tuple, list)) and len(clamp) == 2
    mask, values = clamp if pair else (clamp, None)
    given, mask = mask, as_states(op, "clamp's mask", mask, v.device)
    if mask.dtype != torch.bool:
        got = getattr(given, "dtype", mask.dtype)
        raise TypeError(
            f"{op}: clamp's mask must be bool, got {got}: clamp is a mask or a pair (mask, values)"
        )
    if values is not None:
        values = as_states(op, "clamp's values", values, v.device)
    shapes = (v.shape[1:], v.shape)
    for name, tensor in (("mask", mask), ("values", values)):
        if tensor is not None and tensor.shape not in shapes:
            raise ValueError(
                f"{op}: clamp's {name} must be [V] or [B, V] = {list(v.shape)}, "
                f"got {list(tensor.shape)}"
            )
        if tensor is not None and tensor.device != v.device:
            raise ValueError(
                f"{op}: clamp's {name} must be on v's device {v.device}, got {tensor.device}"
            )
    return mask, values


def _body(
    kernel: Callable[..., Tensor],
    op: str,
    v: Tensor,
    model: Model,
    k: int,
    draw: Draw,
    mask: Tensor | None,
    values: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    states = kernel(op, v, model, k, draw, mask, values, out_dtype)
    return states if states.dtype is out_dtype else states.to(out_dtype)


def _fake(
    v: Tensor,
    model: Model,
    k: int,
    draw: Draw,
    mask: Tensor | None,
    values: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return model.W.new_empty(v.shape, dtype=out_dtype)


_GIBBS = define(
    "gibbs_sample",
    "Tensor v, Model model, SymInt k, Draw draw, Tensor? mask, Tensor? values, "
    "ScalarType out_dtype",
    "Tensor",
    "gibbs_sample",
    _body,
    _fake,
)
