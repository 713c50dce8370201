"""The free energy of visible configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rbm_kernels.arguments import Model
from rbm_kernels.arithmetic import digits_of
from rbm_kernels.ops import _checks
from rbm_kernels.ops._dispatch import define, needs_grad, run
from rbm_kernels.textbook import BERNOULLI, hidden_input
from rbm_kernels.units import visible_units
from rbm_kernels.units.base import tempered


def free_energy(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    log_var: Tensor | None = None,
    visible: str | None = None,
    beta: float | Tensor = 1.0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """F(v) = -log sum_h exp(-beta E(v, h)), differentiable in every tensor argument.

    Bernoulli visible units: F = -beta b'v - sum_j softplus(beta (c_j + v'W_j)); note that this is
    not beta F_1. Gaussian ones (log_var given): F = beta sum_i (v_i - b_i)^2 / (2 s_i^2)
    - sum_j softplus(beta (c_j + (v / s^2)'W_j)). docs/units.md has the equations of all
    kinds of visible units.

    Derivatives of the first and second order are to be had in reverse mode, and of every order in
    forward mode and by ``torch.func``. Under a transform of ``torch.func``, within a level of
    forward mode, and where ``beta`` requires a gradient, no kernel runs: F is computed in plain
    PyTorch, in float32 or the wider dtype of W, within rounding of what the kernels return, and
    nothing looks at the values of v. ``torch.vmap`` over data, parameters or both is then one
    batched product.

    Args:
        v: [B, V] visible states, binary or real: a tensor, a NumPy array, a table or lists (see
            ``rbm_kernels.inputs``).
        W: [V, H] weights.
        b: [V] visible biases.
        c: [H] hidden biases.
        log_var: [V] log-variances of Gaussian visible units.
        visible: The kind of visible units, by its name in docs/units.md; None means Gaussian units
            where ``log_var`` is given and Bernoulli units otherwise.
        beta: Inverse temperature, one number or [B]. A tensor has a derivative too.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium". float64 weights are computed in float64.

    Returns:
        F [B] in nats, float32 (float64 for float64 weights).

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A wrong shape or device, or values that are not finite or that the units do
            not take (docs/units.md).
        RuntimeError: An explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> W, b, c = torch.zeros(3, 2), torch.ones(3), torch.zeros(2)
        >>> free_energy(torch.ones(1, 3), W, b, c)  # -3 - 2 log 2
        tensor([-4.3863])
    """
    op = "free_energy"
    v, model = _checks.model(op, v, W, b, c, log_var, visible)
    given_beta, beta = beta, _checks.temperature(op, beta, v.shape[0], W)
    value, betas = (1.0, beta) if isinstance(beta, Tensor) else (beta, None)
    learned = isinstance(given_beta, Tensor) and needs_grad(given_beta)
    if learned or (betas is not None and W.dtype is torch.float64):
        # As it is given, not rounded to float32.
        value, betas = 1.0, W.new_ones(v.shape[0], dtype=torch.float64) * given_beta
    if (change := model.units.change) is not None:
        v, model = change.states(v), Model(*change.model(W, b, c), change.units)
    energy: Tensor
    if learned:
        energy = _formula(None, v, model, value, betas)
    else:
        energy = run(
            _FREE_ENERGY, backend, v, model, value, betas, digits_of(op, precision),
            record=needs_grad(v, *model[:3], log_var),
        )  # fmt: skip
    if change is not None:
        factor = value if betas is None else betas.to(energy.dtype)
        energy = energy + factor * change.free_energy(b).to(energy.dtype)
    return energy


def _body(
    free_energies: Callable[..., Tensor],
    op: str,
    v: Tensor,
    model: Model,
    beta: float,
    betas: Tensor | None,
    digits: int,
) -> Tensor:
    return free_energies(op, v, model, beta if betas is None else betas, digits)


def _formula(
    constants: object, v: Tensor, model: Model, beta: float, betas: Tensor | None, digits: int = 0
) -> Tensor:
    W, b, c, units = model
    dtype = torch.promote_types(W.dtype, torch.float32)
    v, W, b, c, units = v.to(dtype), W.to(dtype), b.to(dtype), c.to(dtype), units.to(dtype)
    factor = beta if betas is None else betas.to(dtype)
    x = tempered(hidden_input(v, W, c, units), factor)
    return factor * units.energy(v, b) - BERNOULLI.log_partition(x, c).sum(dim=1)


def _fake(v: Tensor, model: Model, beta: float, betas: Tensor | None, digits: int) -> Tensor:
    dtype = torch.promote_types(model.W.dtype, torch.float32)
    return model.W.new_empty(v.shape[0], dtype=dtype)


def _save(arguments: tuple[Any, ...], result: Tensor) -> tuple[Any, ...]:
    v, model, beta, betas, _ = arguments
    return v, *model[:3], model.units.log_var, beta, betas


def backward(saved: list[Any], grad: Tensor) -> tuple[Any, ...]:
    """Gradients of v, W, b, c and log_var, given v, W, b, c, log_var, beta, betas and its own."""
    # Plain tensor operations on the saved arguments, so that autograd can differentiate again.
    v, W, b, c, log_var, beta, betas = saved
    dtype = grad.dtype
    units = visible_units(log_var).to(dtype)
    states, weights, bias = v.to(dtype), W.to(dtype), b.to(dtype)
    factor = beta if betas is None else betas.to(dtype)[:, None]
    grad_energy = grad * (beta if betas is None else betas.to(dtype))
    seen = units.given(states)
    grad_x = -grad_energy[:, None] * torch.sigmoid(factor * (c.to(dtype) + seen @ weights))
    grad_v, grad_b, *of_energy = units.energy_backward(grad_energy, states, bias)
    grad_seen, *of_given = units.given_backward(grad_x @ weights.t(), states)
    return (
        (grad_v + grad_seen).to(v.dtype) if v.is_floating_point() else None,
        (seen.t() @ grad_x).to(W.dtype),
        grad_b.to(b.dtype),
        grad_x.sum(dim=0).to(c.dtype),
        *((x + y).to(W.dtype) for x, y in zip(of_energy, of_given, strict=True)),
    )


_FREE_ENERGY = define(
    "free_energy",
    "Tensor v, Model model, float beta, Tensor? betas, int digits",
    "Tensor",
    "free_energies",
    _body,
    _fake,
    _save,
    backward,
    formula=_formula,
)
