"""The partition function of a small RBM, summed exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rbm_kernels.units import Bernoulli, Units

from . import _checks


@torch.no_grad()
def log_partition_exact(
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    *,
    visible: str | None = None,
    chunk: int = 2**18,
    max_units: int = 25,
) -> Tensor:
    """log Z by summing over all states of the smaller layer, the other layer in closed form.

    Memory is O(``chunk``) and time O(2^n m) for layers of n and m units, n of them enumerated: 20
    units beside 784 take seconds, 25 some minutes. Every sum is in float64.

    Args:
        W: [V, H], any float dtype.
        b: [V].
        c: [H].
        log_var: [V] for Gaussian visible units, whose hidden layer is then enumerated.
        visible: The kind of visible units, as for the operations.
        chunk: Elements of the working array; more is not faster once it has left the cache.
        max_units: The largest number of units that is enumerated.

    Returns:
        A 0-dim float64 tensor.

    Raises:
        ValueError: A wrong shape, parameters that are not finite, or more than ``max_units`` units
            to enumerate.

    Example:
        >>> W = torch.zeros(3, 2)
        >>> log_partition_exact(W, W.new_zeros(3), W.new_zeros(2)).exp()  # 2^3 * 2^2 states
        tensor(32.0000, dtype=torch.float64)
    """
    W, b, c, units = _checks.in_float64("log_partition_exact", W, b, c, log_var, visible)
    constant = W.new_zeros(())
    if (change := units.change) is not None:
        constant, units = change.free_energy(b), change.units
        W, b, c = change.model(W, b, c)
    n_visible, n_hidden = W.shape
    binary = isinstance(units, Bernoulli)
    enumerate_visible = binary and n_visible < n_hidden
    n = n_visible if enumerate_visible else n_hidden
    if n > max_units:
        layer = "smaller" if binary else "hidden"
        raise ValueError(
            f"log_partition_exact: the {layer} layer must have at most max_units = {max_units} "
            f"units, got {n}; use ais"
        )
    if chunk < 1:
        raise ValueError(f"log_partition_exact: chunk must be at least 1, got {chunk}")
    if enumerate_visible:
        W, b, c = W.T, c, b
        units = Bernoulli()  # the hidden units are now the other layer
    # The log-weight of a state s of the enumerated layer is c's, plus the other layer's log-sum at
    # the field W s. A state is a pair (high bits, low bits): the fields of the low bits are one
    # table, and each state of the high bits is one pass over it.
    low_bits = min(n, max(0, (chunk // max(W.shape[0], 1)).bit_length() - 1))
    low_states = _binary_states(low_bits, W.device)
    low_bias = low_states @ c[:low_bits]  # [2^low_bits]
    other_layer = _log_sum(low_states @ W.T[:low_bits], W[:, low_bits:], b, units)
    totals: list[Tensor] = []
    high_rows = 2**14
    for first in range(0, 2 ** (n - low_bits), high_rows):
        last = min(first + high_rows, 2 ** (n - low_bits))
        states = _binary_states(n - low_bits, W.device, first, last)
        for bias, field in zip(states @ c[low_bits:], states @ W.T[low_bits:], strict=True):
            totals.append((low_bias + bias + other_layer(field)).logsumexp(0))
        totals = [torch.stack(totals).logsumexp(0)]
    return totals[0] - constant


def _log_sum(low: Tensor, W_high: Tensor, b: Tensor, units: Units) -> Callable[[Tensor], Tensor]:
    """The log of the sum (or integral) over the other layer, as a function of the high field.

    Args:
        low: [S, m], the fields of the low bits.
        W_high: [m, n_high], the weights of the high bits, from which the fields' range is known.
        b: [m], the other layer's bias.
        units: The other layer's units.

    Returns:
        A function from a field [m] to [S].
    """
    # sum softplus(x) is the log of the product of 1 + exp(low) exp(field): one exponential a column
    # and one logarithm for eight units, ten times faster, where nothing can overflow.
    most = low.amax(0) + W_high.clamp(min=0).sum(1) + b
    farthest = torch.maximum(low.abs().amax(0), W_high.abs().sum(1) + b.abs())
    binary = isinstance(units, Bernoulli)
    if not binary or most.numel() == 0 or most.max() > 80 or farthest.max() > 300:
        return lambda field: units.log_partition(low + (field + b), b).sum(1)
    m = low.shape[1]
    padded = -(-m // 8) * 8
    exponentials = low.new_zeros(low.shape[0], padded)
    torch.exp(low, out=exponentials[:, :m])
    buffer = torch.empty_like(exponentials)
    factor = low.new_zeros(padded)

    def product(field: Tensor) -> Tensor:
        torch.exp(field + b, out=factor[:m])
        x = torch.mul(exponentials, factor, out=buffer).add_(1)
        for half in (padded // 2, padded // 4, padded // 8):
            x = x[:, :half].mul_(x[:, half : 2 * half])
        return x.log_().sum(1)

    return product


def _binary_states(n: int, device: torch.device, first: int = 0, last: int | None = None) -> Tensor:
    """Rows ``first`` to ``last`` of all binary vectors of length n, float64."""
    numbers = torch.arange(first, 2**n if last is None else last, device=device)
    return ((numbers[:, None] >> torch.arange(n, device=device)) & 1).double()
