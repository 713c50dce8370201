"""The free energy of visible configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rbm_kernels.arithmetic import limbs_of
from rbm_kernels.backends import select
from rbm_kernels.ops import _checks, _library


def free_energy(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    log_var: Tensor | None = None,
    beta: float | Tensor = 1.0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """F(v) = -log sum_h exp(-beta E(v, h)), differentiable in every tensor argument, twice.

    Bernoulli visible units: F = -beta b'v - sum_j softplus(beta (c_j + v'W_j)); note that this is
    not beta F_1. Gaussian ones (log_var given): F = beta sum_i (v_i - b_i)^2 / (2 s_i^2)
    - sum_j softplus(beta (c_j + (v / s^2)'W_j)).

    Args:
        v: [B, V] visible states: bool, uint8 or floating point, binary or real.
        W: [V, H] weights.
        b: [V] visible biases.
        c: [H] hidden biases.
        log_var: [V] log-variances of Gaussian visible units.
        beta: inverse temperature, one number or [B].
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium". float64 weights are computed in float64.

    Returns:
        F [B] in nats, float32 (float64 for float64 weights).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape or device, or values that are not finite.
        RuntimeError: an explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> W, b, c = torch.zeros(3, 2), torch.ones(3), torch.zeros(2)
        >>> free_energy(torch.ones(1, 3), W, b, c)  # -3 - 2 log 2
        tensor([-4.3863])
    """
    op = "free_energy"
    _checks.model(op, v, W, b, c, log_var)
    value, betas = _checks.temperature(op, beta, v.shape[0], W)
    if _library.plain_eager() and not _library.needs_grad(v, W, b, c, log_var):
        return _run(v, W, b, c, log_var, value, betas, backend, precision)
    result: Tensor = torch.ops.rbm_kernels.free_energy(
        v, W, b, c, log_var, value, betas, backend, precision
    )
    return result


def _run(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None, beta: float,
    betas: Tensor | None, backend: str | None, precision: str | None,
) -> Tensor:  # fmt: skip
    result: Tensor = select("free_energy", backend, W.device, W.dtype, max(W.shape)).free_energy(
        v, W, b, c, log_var, beta if betas is None else betas, limbs_of("free_energy", precision)
    )
    return result


def _fake(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None, beta: float,
    betas: Tensor | None, backend: str | None, precision: str | None,
) -> Tensor:  # fmt: skip
    return W.new_empty(v.shape[0], dtype=torch.promote_types(W.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, W, b, c, log_var, beta, betas = inputs[:7]
    ctx.save_for_backward(v, W, b, c, log_var, betas)
    ctx.beta = beta


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Plain tensor operations on the saved arguments, so that autograd can differentiate again.
    v, W, b, c, log_var, betas = ctx.saved_tensors
    dtype = grad.dtype
    g = (grad * (ctx.beta if betas is None else betas.to(dtype)))[:, None]
    states, weights, beta = v.to(dtype), W.to(dtype), ctx.beta if betas is None else betas[:, None]
    precision = None if log_var is None else torch.exp(-log_var.to(dtype))
    scaled = states if precision is None else states * precision
    gp = g * torch.sigmoid(beta * (c.to(dtype) + scaled @ weights))
    grad_scaled = -(gp @ weights.t())
    if precision is None:
        grad_v, grad_b, grad_log_var = grad_scaled - g * b.to(dtype), -(g * states).sum(dim=0), None
    else:
        distance = states - b.to(dtype)
        grad_v = (grad_scaled + g * distance) * precision
        grad_b = -(g * distance).sum(dim=0) * precision
        grad_log_var = -(g * distance.square() / 2).sum(dim=0) * precision - (
            grad_scaled * scaled
        ).sum(dim=0)
    return (
        grad_v.to(v.dtype) if v.is_floating_point() else None,
        -(scaled.t() @ gp).to(W.dtype),
        grad_b.to(b.dtype),
        -gp.sum(dim=0).to(c.dtype),
        None if log_var is None or grad_log_var is None else grad_log_var.to(log_var.dtype),
        *(None,) * 4,
    )


_library.register(
    "free_energy",
    "(Tensor v, Tensor W, Tensor b, Tensor c, Tensor? log_var, float beta, Tensor? betas, "
    "str? backend, str? precision) -> Tensor",
    _run,
    _fake,
    _save,
    _backward,
)
