"""The restricted Boltzmann machine in plain PyTorch, to be read beside a textbook.

Symbols: v [B, V] visible states, h [B, H] hidden states, W [V, H] weights, b [V] visible bias,
c [H] hidden bias. The layers' kinds are objects of ``rbm_kernels.units``, Bernoulli unless given:

- energy: ``E(v, h) = energy(v, b) - given(v)'W h - c'h``, where a layer's own term is
  ``energy(v, b) = -b'v`` and ``given(v) = v`` for Bernoulli units;
- probability: ``p(v, h) = exp(-E(v, h)) / Z``;
- free energy: ``F(v) = -log sum_h exp(-E(v, h))``, so that ``p(v) = exp(-F(v)) / Z``.

Given one layer, the units of the other are independent, so that both layers are drawn in turn
(Gibbs sampling). The functions have the names and arguments of the package's own, and are a
careful eager implementation for those to be measured against: bias fused into the product, no
product computed twice. States are floating point, in the dtype of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .units import Bernoulli, Units

BERNOULLI = Bernoulli()


def hidden_input(v: Tensor, W: Tensor, c: Tensor, units: Units = BERNOULLI) -> Tensor:
    """What the hidden units receive, c + given(v) W, [B, H]."""
    return torch.addmm(c, units.given(v), W)


def energy(
    v: Tensor, h: Tensor, W: Tensor, b: Tensor, c: Tensor, units: Units = BERNOULLI
) -> Tensor:
    """E(v, h) of pairs of rows, [B]."""
    return units.energy(v, b) - (hidden_input(v, W, c, units) * h).sum(1)


def free_energy(v: Tensor, W: Tensor, b: Tensor, c: Tensor, units: Units = BERNOULLI) -> Tensor:
    """F(v) = -log sum_h exp(-E(v, h)), [B]: the sum over h is a product over independent units.

    Example:
        >>> W, b, c = torch.zeros(3, 2), torch.ones(3), torch.zeros(2)
        >>> free_energy(torch.ones(1, 3), W, b, c)  # -3 - 2 log 2
        tensor([-4.3863])
    """
    return units.energy(v, b) - BERNOULLI.log_partition(hidden_input(v, W, c, units), c).sum(1)


def hidden_mean(v: Tensor, W: Tensor, c: Tensor, units: Units = BERNOULLI) -> Tensor:
    """p(h = 1 | v), [B, H]."""
    return BERNOULLI.mean(hidden_input(v, W, c, units))


def visible_mean(h: Tensor, W: Tensor, b: Tensor, units: Units = BERNOULLI) -> Tensor:
    """E[v | h], [B, V]; for Bernoulli units p(v = 1 | h)."""
    return units.mean(torch.addmm(b, h, W.t()))


def gibbs_sample(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int = 1,
    *,
    units: Units = BERNOULLI,
    hidden: Units = BERNOULLI,
) -> Tensor:
    """v after k sweeps: draw h given v, then v given h, [B, V].

    ``hidden`` is the Bernoulli layer that draws h, so that a caller may choose how it draws.
    """
    for _ in range(k):
        h = hidden.sample(hidden_mean(v, W, c, units))
        v = units.sample(visible_mean(h, W, b, units))
    return v


def cd_step(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int = 1,
    *,
    chains: Tensor | None = None,
    units: Units = BERNOULLI,
    hidden: Units = BERNOULLI,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradient of the mean negative log-likelihood by CD-k (Hinton 2002).

    The exact gradient is <dF/dtheta> of the data less <dF/dtheta> of the model. The model's
    average is taken over states k sweeps away from the data, or from persistent ``chains`` [N, V]
    (Tieleman 2008). No visible state is replaced by its mean.

    Returns:
        The gradients of W, b, c and of the units' own parameters, and the states v_k.
    """
    p_data = hidden_mean(v, W, c, units)
    p = p_data if chains is None else hidden_mean(chains, W, c, units)
    for _ in range(k):
        state, p = sweep(p, W, b, c, units, hidden)
    return gradients(v, p_data, state, p, W, b, units), state


def sweep(
    p: Tensor, W: Tensor, b: Tensor, c: Tensor, units: Units = BERNOULLI, hidden: Units = BERNOULLI
) -> tuple[Tensor, Tensor]:
    """One sweep from p(h = 1 | v), which is known already, to the next v and p of that v."""
    state = units.sample(visible_mean(hidden.sample(p), W, b, units))
    return state, hidden_mean(state, W, c, units)


def gradients(
    v: Tensor,
    p_data: Tensor,
    state: Tensor,
    p: Tensor,
    W: Tensor,
    b: Tensor,
    units: Units = BERNOULLI,
) -> tuple[Tensor, ...]:
    """The gradients of CD from v [B, V] and states [N, V] and the p(h = 1 | v) of both."""
    # Both phases in one buffer: <v p> of the chains less <v p> of the data.
    grad_W = torch.mm(v.t(), p_data)
    grad_W.addmm_(state.t(), p, beta=-1.0 / v.shape[0], alpha=1.0 / state.shape[0])
    grad_b = state.mean(0).sub_(v.mean(0))
    grad_c = p.mean(0).sub_(p_data.mean(0))
    grad_W, grad_b, *others = units.gradients(grad_W, grad_b, v, state, W, b)
    return grad_W, grad_b, grad_c, *others
