"""The mathematics in plain PyTorch, for any dtype, device and kind of unit: the backends' oracle.

Nothing else defines what is right. Symbols as in the README: v [B, V] visible, h [B, H] hidden,
W [V, H], b [V], c [H].

The four operations below are what every backend offers, with these arguments and results. All of a
call's tensors are on one device, ``rbm_kernels/ops`` has checked their shapes and dtypes, and an
operation changes no argument but the buffers that it is told to fill. ``op`` is the public function
that errors name. States come back in a dtype of the backend's choice that holds them exactly; the
caller converts them. Backends on the CPU raise ValueError for values that are not finite, and for
states that Bernoulli units do not take, before they write.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_kernels import arithmetic
from rbm_kernels.arguments import Beta, Draw, Layer, Model
from rbm_kernels.units import Bernoulli, Units

_HIDDEN = Bernoulli()


def unavailable_reason() -> str | None:
    """The reference runs wherever PyTorch does."""
    return None


def _preactivation(states: Tensor, layer: Layer, digits: int) -> Tensor:
    """``bias + given(states) W`` in float32 [B, N], from one exact integer product."""
    w = layer.W.float()
    weight_scale = arithmetic.scale_of(w.abs().amax() if w.numel() else w.new_zeros(()), digits)
    a = layer.given.given(states.float(), arithmetic.exp_neg)
    row_scale = a.new_ones(a.shape[0])
    if not _binary(a):
        row_scale = arithmetic.scale_of(a.abs().amax(dim=1), digits)
    total = arithmetic.exact_product(
        arithmetic.fixed_point(a, row_scale[:, None]), arithmetic.fixed_point(w, weight_scale)
    ).float()
    bias = layer.bias.float().expand_as(total)
    return arithmetic.fma(total, (row_scale * weight_scale)[:, None].expand_as(total), bias)


def _binary(states: Tensor) -> bool:
    return bool(((states == 0) | (states == 1)).all())


def _largest(states: Tensor) -> Tensor:
    return states.new_ones(()) if _binary(states) else states.abs().amax()


def _require_finite(op: str, units: Units, **tensors: Tensor | None) -> None:
    for name, tensor in (*tensors.items(), *units.parameters()):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{op}: {name} must be finite, got values that are NaN or infinite")


def _half_sweep(given: Tensor, layer: Layer, draw: Draw, step: int) -> tuple[Tensor, Tensor]:
    """float32 states [B, N] of the drawn layer, and their conditional means."""
    x = _preactivation(given, layer, draw.digits)
    rows, units = x.shape
    chains = torch.arange(draw.chain_offset, draw.chain_offset + rows, device=x.device)
    words = arithmetic.random_words(draw.seed, step, chains, units + units % 2)
    return layer.drawn.draw(x, words, draw.beta)


def _layers(model: Model) -> tuple[Layer, Layer]:
    """The hidden layer as the visible one sees it, and the reverse."""
    W, b, c, units = model
    return Layer(W, c, units, _HIDDEN), Layer(W.t(), b, _HIDDEN, units)


@torch.no_grad()
def sample_layer(
    op: str, given: Tensor, layer: Layer, draw: Draw, return_means: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Draw one layer given the other: a half-sweep, number 0 of the draw.

    Args:
        op: "sample_hidden" or "sample_visible".
        given: [B, K] states of the given layer, of any dtype that holds states.
        layer: W [K, N] and bias [N] towards the drawn layer, and the kinds of both layers' units.
        draw: How the states are drawn.
        return_means: Whether the conditional means are wanted too.
        out_dtype: The dtype that the caller will convert the states to.

    Returns:
        The drawn states [B, N], and their means, float32 [B, N], or None.
    """
    states_name, bias_name = ("v", "c") if op == "sample_hidden" else ("h", "b")
    named = {"W": layer.W, bias_name: layer.bias, states_name: given}
    for units in (layer.given, layer.drawn):
        _require_finite(op, units, **named)
    layer.given.check(op, states_name, given)
    states, means = _half_sweep(given, layer, draw, 0)
    return states, means if return_means else None


@torch.no_grad()
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
    """Run k sweeps, hidden given visible and visible given hidden, of half-sweeps 0 to 2k - 1.

    Args:
        op: The calling function.
        v: [B, V] visible states to start from.
        model: The parameters.
        k: Sweeps, at least 1.
        draw: How the states are drawn.
        mask: bool [V] or [B, V], the units to hold still, or None for none.
        values: [V] or [B, V] values of the held units; None holds them at what they are in v.
        out_dtype: The dtype that the caller will convert the states to.

    Returns:
        The visible states [B, V] after the last sweep.
    """
    W, b, c, units = model
    _require_finite(op, units, W=W, b=b, c=c, v=v, **{"clamp's values": values})
    state = v.float()
    if mask is not None and values is not None:
        held = torch.where(mask, values.float(), torch.zeros_like(state))
        units.check(op, "clamp's values", held)
        state = torch.where(mask, values.float(), state)
    units.check(op, "v", state)
    held = state
    hidden, visible = _layers(model)
    for sweep in range(k):
        h, _ = _half_sweep(state, hidden, draw, 2 * sweep)
        state, _ = _half_sweep(h, visible, draw, 2 * sweep + 1)
        if mask is not None:
            state = torch.where(mask, held, state)
    return state


def free_energies(op: str, v: Tensor, model: Model, beta: Beta, digits: int) -> Tensor:
    """F_beta(v) of each row.

    Args:
        op: The calling function.
        v: [B, V] visible states.
        model: The parameters.
        beta: Inverse temperature, a float or a contiguous float32 [B].
        digits: Base-256 digits of the fixed-point weights. Here nothing is in fixed point, so that
            they change nothing.

    Returns:
        Free energies [B] in nats, float32, or here in the weights' dtype where that is wider.
    """
    W, b, c, units = model
    _require_finite(op, units, W=W, b=b, c=c, v=v)
    units.check(op, "v", v)
    dtype = torch.promote_types(W.dtype, torch.float32)
    v, W, b, c, units = v.to(dtype), W.to(dtype), b.to(dtype), c.to(dtype), units.to(dtype)
    x = c + units.given(v) @ W
    factor = beta.to(dtype) if isinstance(beta, Tensor) else torch.tensor(beta, dtype=dtype)
    factor = factor.to(v.device)
    column = factor[:, None] if factor.dim() else factor
    # -logsigmoid(-x) is max(x, 0) + log1p(exp(-|x|)); torch's softplus turns into x above 20.
    return factor * units.energy(v, b) + F.logsigmoid(-column * x).sum(dim=1)


@torch.no_grad()
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
    """Advance chains by k sweeps and compare them with data.

    Args:
        op: The calling function.
        v: [B, V] data, B at least 1.
        model: The parameters.
        k: Sweeps, at least 1.
        chains: [N, V] where the chains start, N at least 1; None starts them from v.
        draw: How the states are drawn; its beta is 1.
        averages: Buffers that belong to the caller: float32 [V, H], [V] and [H], the values of a
            row side by side. They receive <v p(h|v)>, <v> and <p(h|v)> of the advanced chains less
            those of the data, where p(h|v) belongs to that same v.
        accumulate: Whether to add to the buffers instead of overwriting them.

    Returns:
        The advanced chains [N, V], and float32 [2], the mean free energies of data and chains.
    """
    W, b, c, units = model
    _require_finite(op, units, W=W, b=b, c=c, v=v, chains=chains)
    units.check(op, "v", v)
    if chains is not None:
        units.check(op, "chains", chains)
    digits = draw.digits
    data = v.float()
    start = data if chains is None else chains
    state = gibbs_sample(op, start, model, k, draw, None, None, torch.float32)
    hidden, _ = _layers(model)
    p_data = arithmetic.sigmoid(_preactivation(data, hidden, digits))
    p_chain = arithmetic.sigmoid(_preactivation(state, hidden, digits))

    # Phases are fixed-point integers; each is divided by its own count through the least common
    # multiple, so that equal counts give one exact integer difference.
    n_data, n_chain = data.shape[0], state.shape[0]
    common = math.lcm(n_data, n_chain)
    one = 2.0**23 if digits == 3 else 2.0**15
    real = not (_binary(data) and _binary(state))
    largest = torch.maximum(_largest(data), _largest(state))
    scale = arithmetic.scale_of(largest, digits) if real else torch.ones_like(largest)

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
    for buffer, difference in zip(averages, (grad_W, grad_b, grad_c), strict=True):
        if accumulate:
            buffer.add_(difference)
        else:
            buffer.copy_(difference)
    energies = [
        free_energies(op, s, model, 1.0, digits).mean(dtype=torch.float64).float()
        for s in (data, state)
    ]
    return state, torch.stack(energies)
