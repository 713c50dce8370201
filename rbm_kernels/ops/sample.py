"""One half-sweep of Gibbs sampling: hidden units given visible ones, and the reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from rbm_kernels import seeds
from rbm_kernels.arguments import Beta, Draw, Layer
from rbm_kernels.ops import _checks
from rbm_kernels.ops._dispatch import Operation, define, needs_grad, run
from rbm_kernels.units import Bernoulli, visible_units

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """The keywords of both functions that do not change what they return."""

    log_var: Tensor | None
    visible: str | None
    beta: Beta
    out_dtype: torch.dtype | None
    seed: seeds.Seed | None
    generator: torch.Generator | None
    chain_offset: int
    backend: str | None
    precision: str | None


@overload
def sample_hidden(
    v: Tensor,
    W: Tensor,
    c: Tensor,
    *,
    return_probs: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sample_hidden(
    v: Tensor, W: Tensor, c: Tensor, *, return_probs: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def sample_hidden(
    v: Tensor,
    W: Tensor,
    c: Tensor,
    *,
    log_var: Tensor | None = None,
    visible: str | None = None,
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

    States have no derivative; probabilities have those that ``free_energy`` describes, likewise in
    plain PyTorch under ``torch.func``, in forward mode and where ``beta`` requires a gradient.
    ``torch.vmap`` draws in one call for each element: with ``seed`` each has the states that the
    call alone would have, without one it needs ``randomness="different"`` or ``"same"``.

    Args:
        v: [B, V] visible states, binary or real: a tensor, a NumPy array, a table or lists (see
            ``rbm_kernels.inputs``).
        W: [V, H] weights, any float dtype.
        c: [H] hidden biases.
        log_var: [V] log-variances; given exactly when the visible units are Gaussian, and then
            (v / s^2)'W_j takes the place of v'W_j.
        visible: The kind of visible units, by its name in docs/units.md; None means Gaussian units
            where ``log_var`` is given and Bernoulli units otherwise.
        beta: Inverse temperature, one number or float32 [B].
        return_probs: Also return the probabilities, differentiable in v, W, c, log_var and beta.
        out_dtype: Dtype of the states; W's by default, uint8 and bool also serve.
        seed: int, (seed, offset), or int64[2] tensor whose offset is advanced by 1. Calls that
            share a seed and an offset share their uniform numbers, whichever layer they draw.
        generator: Source of the seed where none is given; torch's default generator otherwise.
        chain_offset: Global index of row 0, so that a batch cut in parts draws the same.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium"; default
            ``torch.get_float32_matmul_precision()``.

    Returns:
        h [B, H], or (h, p) with p [B, H] in W's dtype.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A wrong shape or device, or values that are not finite or that the units do
            not take (docs/units.md).
        RuntimeError: An explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> v, W, c = torch.ones(2, 3), torch.zeros(3, 4), torch.full((4,), 50.0)
        >>> sample_hidden(v, W, c, seed=0)
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    op, units = "sample_hidden", visible_units(log_var, visible, "sample_hidden")
    _checks.weight(op, W)
    n_visible, n_hidden = W.shape
    try:
        v = _checks.states(op, "v", v, n_visible, "V", W)
        _checks.vector(op, "c", c, n_hidden, "H", W.dtype, W.device)
        _checks.unit_parameters(op, units, n_visible, W.dtype, W.device)
    except ValueError:
        _checks.transposed(op, W, v, c)
        raise
    _checks.values(op, "v", v, units)
    return _sample(
        _HIDDEN, v, Layer(W, c, units, _BERNOULLI), beta, return_probs, out_dtype, seed, generator,
        chain_offset, backend, precision,
    )  # fmt: skip


@overload
def sample_visible(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    return_probs: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sample_visible(
    h: Tensor, W: Tensor, b: Tensor, *, return_probs: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


def sample_visible(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    log_var: Tensor | None = None,
    visible: str | None = None,
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
    given) are Normal(b_i + W_i h, s_i^2 / beta). docs/units.md has the
    equations of all kinds of visible units.

    Args:
        h: [B, H] hidden states, binary or real, of the kinds that ``sample_hidden`` takes.
        W: [V, H] weights.
        b: [V] visible biases.
        log_var: [V] log-variances of Gaussian visible units.
        return_probs: Also return the conditional means [B, V] (for Bernoulli units, the
            probabilities), differentiable in h, W, b and beta.

    The other arguments, errors and the order of results are those of ``sample_hidden``.
    """
    op, units = "sample_visible", visible_units(log_var, visible, "sample_visible")
    _checks.weight(op, W)
    n_visible, n_hidden = W.shape
    try:
        h = _checks.states(op, "h", h, n_hidden, "H", W)
        _checks.vector(op, "b", b, n_visible, "V", W.dtype, W.device)
        _checks.unit_parameters(op, units, n_visible, W.dtype, W.device)
    except ValueError:
        _checks.transposed(op, W, b, h)
        raise
    _checks.values(op, "h", h, _BERNOULLI)
    return _sample(
        _VISIBLE, h, Layer(W.t(), b, _BERNOULLI, units), beta, return_probs, out_dtype, seed,
        generator, chain_offset, backend, precision,
    )  # fmt: skip


# The hidden units of every model.
_BERNOULLI = Bernoulli()


def _sample(
    op: Operation,
    given: Tensor,
    layer: Layer,
    beta: Beta,
    return_probs: bool,
    out_dtype: torch.dtype | None,
    seed: seeds.Seed | None,
    generator: torch.Generator | None,
    chain_offset: int,
    backend: str | None,
    precision: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    name, W = op.name, layer.W
    dtype = _checks.state_dtype(name, out_dtype, W, layer.drawn)
    given_beta, beta = beta, _checks.temperature(name, beta, given.shape[0], W, layer.drawn)
    draw = _checks.draw(name, W, beta, seed, generator, chain_offset, backend, precision)
    if (change := layer.given.change) is not None:
        given = change.states(given)
        layer = Layer(*change.hidden_layer(W, layer.bias), change.units, layer.drawn)
    if (drawn := layer.drawn.change) is not None:
        seen, bias = drawn.visible_layer(W.t(), layer.bias)
        layer = Layer(seen.t(), bias, layer.given, drawn.units)
    record = return_probs and needs_grad(
        given, layer.W, layer.bias, layer.given.log_var, layer.drawn.log_var
    )
    states, probs = run(op, backend, given, layer, draw, return_probs, dtype, record=record)
    if return_probs and isinstance(given_beta, Tensor) and needs_grad(given_beta):
        probs = _means(given, layer, given_beta.expand(given.shape[0]))
    seeds.advance(seed, 1)
    if drawn is not None:
        states, probs = drawn.restored(states), drawn.restored(probs) if return_probs else None
    return (states, probs.to(W.dtype)) if return_probs else states


def _body(
    sample_layer: Callable[..., tuple[Tensor, Tensor | None]],
    op: str,
    given: Tensor,
    layer: Layer,
    draw: Draw,
    return_probs: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    states, probs = sample_layer(op, given, layer, draw, return_probs, out_dtype)
    if states.dtype is not out_dtype:
        states = states.to(out_dtype)
    return states, None if probs is None else probs.to(layer.W.dtype)


def _formula(
    constants: Callable[[], tuple[Tensor, Tensor]],
    given: Tensor,
    layer: Layer,
    draw: Draw,
    return_probs: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    states, probs = constants()
    if return_probs:
        probs = _means(given, layer, draw.beta).to(layer.W.dtype)
    return states, probs


def _means(given: Tensor, layer: Layer, beta: Beta) -> Tensor:
    """The conditional means [B, N] in plain PyTorch."""
    W, bias, units, drawn = layer
    dtype = torch.promote_types(W.dtype, torch.float32)
    seen = units.to(dtype).given(given.to(dtype))
    return drawn.mean(torch.addmm(bias.to(dtype), seen, W.to(dtype)), beta)


def _fake(
    given: Tensor, layer: Layer, draw: Draw, return_probs: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (given.shape[0], layer.bias.shape[0])
    probs = layer.W.new_empty(shape) if return_probs else layer.W.new_empty(0)
    return layer.W.new_empty(shape, dtype=out_dtype), probs


def _save(arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    given, layer, draw = arguments[:3]
    return given, layer.W, layer.given.log_var, layer.drawn.log_var, draw.beta, results[1]


def _backward(saved: list[Any], grad: Tensor) -> tuple[Any, ...]:
    given, W, given_log_var, drawn_log_var, beta, probs = saved
    units, drawn = visible_units(given_log_var), visible_units(drawn_log_var)
    beta = beta.to(grad.dtype) if isinstance(beta, Tensor) else beta
    states = given.to(W.dtype)
    grad_x = drawn.mean_backward(grad, probs, beta)
    grad_states, *grad_units = units.given_backward(grad_x @ W.t(), states)
    return (
        grad_states if given.is_floating_point() else None,
        units.given(states).t() @ grad_x,
        grad_x.sum(dim=0),
        *grad_units,
    )


_HIDDEN, _VISIBLE = (
    define(
        name,
        "Tensor given, Layer layer, Draw draw, bool return_probs, ScalarType out_dtype",
        "(Tensor, Tensor)",
        "sample_layer",
        _body,
        _fake,
        _save,
        _backward,
        differentiable=1,
        formula=_formula,
    )
    for name in ("sample_hidden", "sample_visible")
)
