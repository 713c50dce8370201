"""The mathematics in plain PyTorch: any dtype, any device, and the oracle of every other backend.

Nothing else defines what is right. Symbols as in the README: v [B, V] visible, h [B, H] hidden,
W [V, H], b [V], c [H]; Gaussian visible units have a log-variance log_var [V].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_kernels import arithmetic

Beta = float | Tensor


def unavailable_reason() -> str | None:
    """The reference runs wherever PyTorch does."""
    return None


def _preactivation(
    states: Tensor, weight: Tensor, bias: Tensor, log_var: Tensor | None, beta: Beta, limbs: int
) -> Tensor:
    """``beta * (bias + (states / s^2) weight)`` in float32, from one exact integer product.

    Args:
        states: [B, K]; weight: [K, N]; bias: [N]; log_var: [K] if these states are Gaussian units.
    """
    w = weight.float()
    weight_scale = arithmetic.scale_of(w.abs().amax() if w.numel() else w.new_zeros(()), limbs)
    a = states.float()
    if log_var is not None:
        a = a * arithmetic.exp_neg(log_var.float())
    row_scale = a.new_ones(a.shape[0])
    if not _binary(a):
        row_scale = arithmetic.scale_of(a.abs().amax(dim=1), limbs)
    total = arithmetic.exact_product(
        arithmetic.fixed_point(a, row_scale[:, None]), arithmetic.fixed_point(w, weight_scale)
    ).float()
    x = arithmetic.fma(
        total, (row_scale * weight_scale)[:, None].expand_as(total), bias.float().expand_as(total)
    )
    return _column(beta, x) * x


def _binary(states: Tensor) -> bool:
    return bool(((states == 0) | (states == 1)).all())


def _largest(states: Tensor) -> Tensor:
    return states.new_ones(()) if _binary(states) else states.abs().amax()


def _column(beta: Beta, like: Tensor) -> Tensor:
    if isinstance(beta, Tensor):
        return beta.to(like.device, torch.float32)[:, None]
    return torch.tensor(beta, dtype=torch.float32, device=like.device)


def _require_finite(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{op}: {name} must be finite, got values that are NaN or infinite")


def _words(seed: Tensor, step: int, chain_offset: int, rows: int, units: int) -> Tensor:
    chains = torch.arange(chain_offset, chain_offset + rows, device=seed.device)
    return arithmetic.random_words(seed, step, chains, units)


def _draw_bernoulli(x: Tensor, seed: Tensor, step: int, chain_offset: int) -> Tensor:
    return arithmetic.bernoulli(x, _words(seed, step, chain_offset, *x.shape))


def _draw_normal(
    mean: Tensor, log_var: Tensor, beta: Beta, seed: Tensor, step: int, chain_offset: int
) -> Tensor:
    rows, units = mean.shape
    words = _words(seed, step, chain_offset, rows, units + units % 2)
    noise = arithmetic.normal(words)[:, :units]
    sigma = arithmetic.exp_neg(-0.5 * log_var.float()) / arithmetic.sqrt(_column(beta, mean))
    return arithmetic.fma(sigma.expand_as(mean), noise, mean)


def _hidden(
    v: Tensor, W: Tensor, c: Tensor, log_var: Tensor | None, beta: Beta, limbs: int
) -> Tensor:
    return _preactivation(v, W, c, log_var, beta, limbs)


def _draw_visible(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    seed: Tensor,
    step: int,
    chain_offset: int,
    limbs: int,
) -> tuple[Tensor, Tensor]:
    """float32 states of v given h, and their conditional means."""
    if log_var is None:
        x = _preactivation(h, W.t(), b, None, beta, limbs)
        return _draw_bernoulli(x, seed, step, chain_offset).float(), arithmetic.sigmoid(x)
    mean = _preactivation(h, W.t(), b, None, 1.0, limbs)
    return _draw_normal(mean, log_var, beta, seed, step, chain_offset), mean


@torch.no_grad()
def sample_hidden(
    v: Tensor,
    W: Tensor,
    c: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    return_probs: bool,
    seed: Tensor,
    chain_offset: int,
    out_dtype: torch.dtype,
    limbs: int,
) -> tuple[Tensor, Tensor]:
    _require_finite("sample_hidden", W=W, c=c, v=v, log_var=log_var)
    x = _hidden(v, W, c, log_var, beta, limbs)
    h = _draw_bernoulli(x, seed, 0, chain_offset)
    p = arithmetic.sigmoid(x).to(W.dtype) if return_probs else W.new_empty(0)
    return h.to(out_dtype), p


@torch.no_grad()
def sample_visible(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    return_probs: bool,
    seed: Tensor,
    chain_offset: int,
    out_dtype: torch.dtype,
    limbs: int,
) -> tuple[Tensor, Tensor]:
    _require_finite("sample_visible", W=W, b=b, h=h, log_var=log_var)
    v, mean = _draw_visible(h, W, b, log_var, beta, seed, 0, chain_offset, limbs)
    return v.to(out_dtype), mean.to(W.dtype) if return_probs else W.new_empty(0)


@torch.no_grad()
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
    _require_finite(
        "gibbs_sample", W=W, b=b, c=c, v=v, log_var=log_var, **{"clamp's values": values}
    )
    state = v.float()
    if mask is not None and values is not None:
        state = torch.where(mask, values.float(), state)
    held = state
    for sweep in range(k):
        x = _hidden(state, W, c, log_var, beta, limbs)
        h = _draw_bernoulli(x, seed, 2 * sweep, chain_offset)
        state, _ = _draw_visible(h, W, b, log_var, beta, seed, 2 * sweep + 1, chain_offset, limbs)
        if mask is not None:
            state = torch.where(mask, held, state)
    return state.to(out_dtype)


def free_energy(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None,
    beta: Beta,
    limbs: int = 3,
) -> Tensor:
    """F_beta(v), float32 or wider; differentiable twice by PyTorch's own autograd."""
    _require_finite("free_energy", W=W, b=b, c=c, v=v, log_var=log_var)
    dtype = torch.promote_types(W.dtype, torch.float32)
    v, W, b, c = v.to(dtype), W.to(dtype), b.to(dtype), c.to(dtype)
    if log_var is None:
        visible = -(v @ b)
        x = c + v @ W
    else:
        precision = torch.exp(-log_var.to(dtype))
        visible = ((v - b).square() * precision).sum(dim=1) / 2
        x = c + (v * precision) @ W
    factor = beta.to(dtype) if isinstance(beta, Tensor) else torch.tensor(beta, dtype=dtype)
    factor = factor.to(v.device)
    column = factor[:, None] if factor.dim() else factor
    # -logsigmoid(-x) is max(x, 0) + log1p(exp(-|x|)); torch's softplus turns into x above 20.
    return factor * visible + F.logsigmoid(-column * x).sum(dim=1)


@torch.no_grad()
def cd_step(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int,
    chains: Tensor | None,
    log_var: Tensor | None,
    out: tuple[Tensor, ...] | None,
    accumulate: bool,
    seed: Tensor,
    chain_offset: int,
    limbs: int,
    op: str = "cd_step",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    _require_finite(op, W=W, b=b, c=c, v=v, chains=chains, log_var=log_var)
    data = v.float()
    state = data if chains is None else chains.float()
    state = gibbs_sample(
        state, W, b, c, k, log_var, 1.0, None, None, seed, chain_offset, torch.float32, limbs
    )
    p_data = arithmetic.sigmoid(_hidden(data, W, c, log_var, 1.0, limbs))
    p_chain = arithmetic.sigmoid(_hidden(state, W, c, log_var, 1.0, limbs))

    # Phases are fixed-point integers; each is divided by its own count through the least common
    # multiple, so that equal counts give one exact integer difference.
    n_data, n_chain = data.shape[0], state.shape[0]
    common = math.lcm(n_data, n_chain)
    one = 2.0**23 if limbs == 3 else 2.0**15
    real = not (_binary(data) and _binary(state))
    largest = torch.maximum(_largest(data), _largest(state))
    scale = arithmetic.scale_of(largest, limbs) if real else torch.ones_like(largest)

    def sums(states: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        fixed = torch.round(p * one).double()
        return (
            arithmetic.exact_product(arithmetic.fixed_point(states, scale).t(), fixed),
            fixed.sum(dim=0),
        )

    weight_data, weight_chain = common // n_data, common // n_chain
    vh_data, h_data = sums(data, p_data)
    vh_chain, h_chain = sums(state, p_chain)
    unit = torch.tensor(1.0 / one / common, dtype=torch.float32, device=v.device)
    grad_W = (vh_chain * weight_chain - vh_data * weight_data).float() * (scale * unit)
    grad_c = (h_chain * weight_chain - h_data * weight_data).float() * unit
    v_data, v_chain = data.double().sum(dim=0), state.double().sum(dim=0)
    grad_b = ((v_chain * weight_chain - v_data * weight_data) / common).float()
    grads = finish_gradients(grad_W, grad_b, grad_c, data, state, W, b, log_var, out, accumulate)
    energies = [
        free_energy(s, W, b, c, log_var, 1.0).mean(dtype=torch.float64).float()
        for s in (data, state)
    ]
    dtype = W.dtype if chains is None else chains.dtype
    return (*grads, state.to(dtype), torch.stack(energies))


def finish_gradients(
    grad_W: Tensor,
    grad_b: Tensor,
    grad_c: Tensor,
    data: Tensor,
    state: Tensor,
    W: Tensor,
    b: Tensor,
    log_var: Tensor | None,
    out: tuple[Tensor, ...] | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gaussian factors, then the caller's buffers.

    grad_W and grad_b arrive as differences of <v p> and of <v>. For Gaussian units both carry a
    factor 1 / s^2, and the log-variance's gradient follows from them:
    (<(v - b)^2>_chain - <(v - b)^2>_data) / (2 s^2) - sum_j W_ij grad_W_ij.
    """
    grad_log_var = None
    if log_var is not None:
        precision = arithmetic.exp_neg(log_var.float())
        center = b.float()
        spread = [(s.float() - center).square_().mean(dim=0) for s in (state, data)]
        grad_W = grad_W * precision[:, None]
        grad_b = grad_b * precision
        grad_log_var = (spread[0] - spread[1]) * precision / 2 - (W.float() * grad_W).sum(dim=1)
    grads = (grad_W, grad_b, grad_c, grad_log_var)
    if out is None:
        return tuple(g if g is None else g.to(W.dtype) for g in grads)  # type: ignore[return-value]
    for buffer, grad in zip(out, grads, strict=False):
        assert grad is not None
        if accumulate:
            buffer.add_(grad.to(buffer.dtype))
        else:
            buffer.copy_(grad)
    return (out[0], out[1], out[2], out[3] if log_var is not None else None)
