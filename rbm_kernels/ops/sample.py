"""One half-sweep of Gibbs sampling: hidden units given visible ones, and the reverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rbm_kernels import seeds
from rbm_kernels.arithmetic import limbs_of
from rbm_kernels.backends import select
from rbm_kernels.ops import _checks, _library

Beta = float | Tensor


def sample_hidden(
    v: Tensor,
    W: Tensor,
    c: Tensor,
    *,
    log_var: Tensor | None = None,
    beta: Beta = 1.0,
    return_probs: bool = False,
    out_dtype: torch.dtype | None = None,
    seed: seeds.Seed | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw the hidden units: h_j is on with probability sigmoid(beta (c_j + v'W_j)).

    Args:
        v: [B, V] visible states: bool, uint8 or floating point, binary or real.
        W: [V, H] weights, any float dtype.
        c: [H] hidden biases.
        log_var: [V] log-variances; given exactly when the visible units are Gaussian, and then
            (v / s^2)'W_j takes the place of v'W_j.
        beta: inverse temperature, one number or float32 [B].
        return_probs: also return the probabilities, differentiable in v, W, c and log_var.
        out_dtype: dtype of the states; W's by default, uint8 and bool also serve.
        seed: int, (seed, offset), or int64[2] tensor whose offset is advanced by 1. Calls that
            share a seed and an offset share their uniform numbers, whichever layer they draw.
        generator: source of the seed where none is given; torch's default generator otherwise.
        chain_offset: global index of row 0, so that a batch cut in parts draws the same.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium"; default
            ``torch.get_float32_matmul_precision()``.

    Returns:
        h [B, H], or (h, p) with p [B, H] in W's dtype.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape or device, or values that are not finite.
        RuntimeError: an explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> v, W, c = torch.ones(2, 3), torch.zeros(3, 4), torch.full((4,), 50.0)
        >>> sample_hidden(v, W, c, seed=0)
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    op = "sample_hidden"
    _checks.weight(op, W)
    try:
        _checks.states(op, "v", v, W.shape[0], "V", W)
        _checks.vector(op, "c", c, W.shape[1], "H", W)
    except ValueError:
        _checks.transposed(op, W, v, c)
        raise
    return _sample(
        op, v, W, c, W.shape[0], log_var, beta, return_probs, out_dtype, seed, generator,
        chain_offset, backend, precision,
    )  # fmt: skip


def sample_visible(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    log_var: Tensor | None = None,
    beta: Beta = 1.0,
    return_probs: bool = False,
    out_dtype: torch.dtype | None = None,
    seed: seeds.Seed | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw the visible units given the hidden ones.

    Bernoulli units are on with probability sigmoid(beta (b_i + W_i h)); Gaussian units (log_var
    given) are Normal(b_i + W_i h, s_i^2 / beta).

    Args:
        h: [B, H] hidden states: bool, uint8 or floating point, binary or real.
        W: [V, H] weights.
        b: [V] visible biases.
        log_var: [V] log-variances of Gaussian visible units.
        return_probs: also return the conditional means [B, V] (for Bernoulli units, the
            probabilities), differentiable in h, W and b.

    The other arguments, errors and the order of results are those of :func:`sample_hidden`.
    """
    op = "sample_visible"
    _checks.weight(op, W)
    try:
        _checks.states(op, "h", h, W.shape[1], "H", W)
        _checks.vector(op, "b", b, W.shape[0], "V", W)
    except ValueError:
        _checks.transposed(op, W, b, h)
        raise
    return _sample(
        op, h, W, b, W.shape[0], log_var, beta, return_probs, out_dtype, seed, generator,
        chain_offset, backend, precision,
    )  # fmt: skip


def _sample(
    op: str,
    given: Tensor,
    W: Tensor,
    bias: Tensor,
    n_visible: int,
    log_var: Tensor | None,
    beta: Beta,
    return_probs: bool,
    out_dtype: torch.dtype | None,
    seed: seeds.Seed | None,
    generator: torch.Generator | None,
    chain_offset: int,
    backend: str | None,
    precision: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if log_var is not None:
        _checks.vector(op, "log_var", log_var, n_visible, "V", W)
    real = log_var is not None and op == "sample_visible"
    dtype = _checks.state_dtype(op, out_dtype, W, real)
    value, betas = _checks.temperature(op, beta, given.shape[0], W, real)
    _checks.chain(op, chain_offset)
    key = seeds.resolve(op, seed, generator, W.device)
    if _library.plain_eager() and not (
        return_probs and _library.needs_grad(given, W, bias, log_var)
    ):
        module = select(op, backend, W.device, W.dtype, max(W.shape))
        states, probs = getattr(module, op)(
            given, W, bias, log_var, value if betas is None else betas, return_probs, key,
            chain_offset, dtype, limbs_of(op, precision),
        )  # fmt: skip
    else:
        states, probs = getattr(torch.ops.rbm_kernels, op)(
            given, W, bias, log_var, value, betas, return_probs, key, chain_offset, dtype,
            backend, precision,
        )  # fmt: skip
    seeds.advance(seed, 1)
    return (states, probs) if return_probs else states


_SCHEMA = (
    "(Tensor given, Tensor W, Tensor bias, Tensor? log_var, float beta, Tensor? betas, "
    "bool return_probs, Tensor seed, int chain_offset, ScalarType out_dtype, "
    "str? backend, str? precision) -> (Tensor, Tensor)"
)


def _implementation(op: str) -> Any:
    def run(
        given: Tensor, W: Tensor, bias: Tensor, log_var: Tensor | None, beta: float,
        betas: Tensor | None, return_probs: bool, seed: Tensor, chain_offset: int,
        out_dtype: torch.dtype, backend: str | None, precision: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        module = select(op, backend, W.device, W.dtype, max(W.shape))
        result: tuple[Tensor, Tensor] = getattr(module, op)(
            given, W, bias, log_var, beta if betas is None else betas, return_probs, seed,
            chain_offset, out_dtype, limbs_of(op, precision),
        )  # fmt: skip
        return result

    return run


def _fake(
    given: Tensor, W: Tensor, bias: Tensor, log_var: Tensor | None, beta: float,
    betas: Tensor | None, return_probs: bool, seed: Tensor, chain_offset: int,
    out_dtype: torch.dtype, backend: str | None, precision: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (given.shape[0], bias.shape[0])
    probs = W.new_empty(shape) if return_probs else W.new_empty(0)
    return W.new_empty(shape, dtype=out_dtype), probs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given, W, _, log_var, beta, betas = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(given, W, log_var, betas, output[1])
    ctx.beta = beta


def _through_sigmoid(ctx: Any, grad: Tensor, p: Tensor, betas: Tensor | None) -> Tensor:
    factor = ctx.beta if betas is None else betas[:, None].to(p.dtype)
    return grad * p * (1 - p) * factor


def _hidden_backward(ctx: Any, _: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    v, W, log_var, betas, p = ctx.saved_tensors
    g = _through_sigmoid(ctx, grad, p, betas)
    precision = 1.0 if log_var is None else torch.exp(-log_var)
    scaled = v.to(W.dtype) * precision
    grad_scaled = g @ W.t()
    return (
        grad_scaled * precision if v.is_floating_point() else None,
        scaled.t() @ g,
        g.sum(dim=0),
        None if log_var is None else -(grad_scaled * scaled).sum(dim=0),
        *(None,) * 8,
    )


def _visible_backward(ctx: Any, _: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    h, W, log_var, betas, p = ctx.saved_tensors
    g = _through_sigmoid(ctx, grad, p, betas) if log_var is None else grad
    return (
        g @ W if h.is_floating_point() else None,
        g.t() @ h.to(W.dtype),
        g.sum(dim=0),
        *(None,) * 9,
    )


for _op, _backward in (("sample_hidden", _hidden_backward), ("sample_visible", _visible_backward)):
    _library.register(_op, _SCHEMA, _implementation(_op), _fake, _save, _backward)
