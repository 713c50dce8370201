"""Exact mathematics of small RBMs in float64, by enumeration of all states.

Written from the definitions of the energies alone and independent of the package under test:
nothing here imports `rbm_kernels`. Sizes up to about 12 units a layer are practical.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def all_states(n: int) -> Tensor:
    """All binary vectors of length n, [2**n, n] float64; unit i is bit i of the row number."""
    numbers = torch.arange(2**n).unsqueeze(1)
    return ((numbers >> torch.arange(n)) & 1).double()


def state_number(states: Tensor) -> Tensor:
    """Row numbers in `all_states` of binary rows [B, n]."""
    bits = states.reshape(states.shape[0], -1).long()
    return (bits << torch.arange(bits.shape[1])).sum(1)


@dataclass(frozen=True)
class Exact:
    """A Bernoulli RBM at inverse temperature beta: its weight on (v, h) is exp(-beta E(v, h))."""

    W: Tensor  # [V, H] float64
    b: Tensor  # [V]
    c: Tensor  # [H]
    beta: float = 1.0

    @property
    def v_states(self) -> Tensor:
        return all_states(self.b.numel())

    @property
    def h_states(self) -> Tensor:
        return all_states(self.c.numel())

    def log_joint(self) -> Tensor:
        """-beta E(v, h) for all pairs of states, [2**V, 2**H]."""
        v, h = self.v_states, self.h_states
        return self.beta * (v @ self.W @ h.T + (v @ self.b)[:, None] + (h @ self.c)[None, :])

    def log_z(self) -> Tensor:
        return self.log_joint().flatten().logsumexp(0)

    def p_joint(self) -> Tensor:
        return (self.log_joint() - self.log_z()).exp()

    def p_v(self) -> Tensor:
        return self.p_joint().sum(1)

    def free_energy(self) -> Tensor:
        """F_beta of all visible states: minus the log of the sum over h, [2**V]."""
        return -self.log_joint().logsumexp(1)

    def p_h_given_v(self) -> Tensor:
        """p(h state | v state), [2**V, 2**H]."""
        return self.log_joint().softmax(1)

    def p_v_given_h(self) -> Tensor:
        """p(v state | h state), [2**H, 2**V]."""
        return self.log_joint().softmax(0).T

    def mean_h_given_v(self) -> Tensor:
        """p(h_j = 1 | v state), [2**V, H], summed over the joint rather than by a sigmoid."""
        return self.p_h_given_v() @ self.h_states

    def mean_v_given_h(self) -> Tensor:
        return self.p_v_given_h() @ self.v_states

    def v_transition(self) -> Tensor:
        """One Gibbs sweep v -> h -> v' as a matrix of rows summing to one, [2**V, 2**V]."""
        return self.p_h_given_v() @ self.p_v_given_h()

    def clamped_transition(self, mask: Tensor, values: Tensor) -> Tensor:
        """One sweep with the visible units of `mask` [V] held at `values` [V]."""
        allowed = (self.v_states[:, mask] == values[mask]).all(1)
        v_given_h = self.p_v_given_h() * allowed
        return self.p_h_given_v() @ (v_given_h / v_given_h.sum(1, keepdim=True))

    def p_v_clamped(self, mask: Tensor, values: Tensor) -> Tensor:
        """p(v | v_mask = values) on all visible states, zero where v disagrees, [2**V]."""
        p = self.p_v() * (self.v_states[:, mask] == values[mask]).all(1)
        return p / p.sum()

    def _statistics(self, p_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, p_h = self.v_states, self.mean_h_given_v()
        return (v * p_v[:, None]).T @ p_h, p_v @ v, p_v @ p_h

    def phase_difference(self, p_data: Tensor, p_chain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """<dF/dtheta>_data - <dF/dtheta>_chain for W, b, c, with distributions over v states."""
        data, chain = self._statistics(p_data), self._statistics(p_chain)
        grads = tuple(negative - positive for positive, negative in zip(data, chain, strict=True))
        return grads[0], grads[1], grads[2]

    def nll_gradient(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact gradient of the mean negative log-likelihood of binary rows v [B, V]."""
        return self.phase_difference(self.empirical(v), self.p_v())

    def cd_gradient(
        self, v: Tensor, k: int, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exact expectation of the CD-k estimate (chains from `start`, or from the data v)."""
        p_chain = self.empirical(v if start is None else start)
        p_chain = p_chain @ torch.linalg.matrix_power(self.v_transition(), k)
        return self.phase_difference(self.empirical(v), p_chain)

    def empirical(self, v: Tensor) -> Tensor:
        """The distribution over v states of binary rows [B, V]."""
        counts = torch.bincount(state_number(v), minlength=2 ** self.b.numel())
        return counts.double() / v.shape[0]


@dataclass(frozen=True)
class ExactSpin(Exact):
    """The same energy with visible units that are -1 or 1."""

    @property
    def v_states(self) -> Tensor:
        return 2 * all_states(self.b.numel()) - 1

    def empirical(self, v: Tensor) -> Tensor:
        return super().empirical((v + 1) / 2)


@dataclass(frozen=True)
class ExactGaussian:
    """A Gaussian-Bernoulli RBM: E = sum (v-b)^2/(2 s^2) - (v/s^2)'Wh - c'h, weight exp(-beta E).

    The visible integral is Gaussian for each h: v | h ~ Normal(b + Wh, s^2 / beta).
    """

    W: Tensor
    b: Tensor
    c: Tensor
    log_var: Tensor
    beta: float = 1.0

    @property
    def h_states(self) -> Tensor:
        return all_states(self.c.numel())

    @property
    def var(self) -> Tensor:
        return self.log_var.exp()

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h) of rows v [A, V] and h [C, H], [A, C]; written out term by term."""
        quadratic = (0.5 * (v - self.b) ** 2 / self.var).sum(1)
        return quadratic[:, None] - (v / self.var) @ self.W @ h.T - (h @ self.c)[None, :]

    def free_energy(self, v: Tensor) -> Tensor:
        """-log sum_h exp(-beta E(v, h)) of rows [A, V], [A]."""
        return -(-self.beta * self.energy(v, self.h_states)).logsumexp(1)

    def mean_h_given_v(self, v: Tensor) -> Tensor:
        return (-self.beta * self.energy(v, self.h_states)).softmax(1) @ self.h_states

    def means(self) -> Tensor:
        """E[v | h] of all hidden states, [2**H, V]."""
        return self.b + self.h_states @ self.W.T

    def log_h(self) -> Tensor:
        """Log of the integral over v of exp(-beta E), for all hidden states, [2**H]."""
        m = self.means()
        exponent = self.h_states @ self.c + (0.5 * (m**2 - self.b**2) / self.var).sum(1)
        return self.beta * exponent + 0.5 * (2 * math.pi * self.var / self.beta).log().sum()

    def log_z(self) -> Tensor:
        return self.log_h().logsumexp(0)

    def p_h(self) -> Tensor:
        return self.log_h().softmax(0)

    def v_moments(self, p_h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean [V] and second-moment matrix [V, V] of v under hidden weights (default: p(h))."""
        p = self.p_h() if p_h is None else p_h
        m = self.means()
        return p @ m, (m * p[:, None]).T @ m + torch.diag(self.var / self.beta)

    def hidden_transition(self) -> Tensor:
        """p(h' | h) through one draw of v: [2**H, 2**H]; by quadrature over v, so keep V <= 3."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        v_units = self.b.numel()
        grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * v_units).reshape(-1, v_units)
        w = torch.from_numpy(weights / weights.sum())
        w = torch.cartesian_prod(*[w] * v_units).reshape(-1, v_units).prod(1)
        rows = []
        for m in self.means():
            v = m + grid * (self.var / self.beta).sqrt()
            rows.append(w @ (-self.beta * self.energy(v, self.h_states)).softmax(1))
        return torch.stack(rows)

    def statistics(self, p_h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """<dF/dtheta> for W, b, c, log_var when v is drawn given hidden states weighted p_h.

        E[v_i p(h_j|v)] over v | h needs one-dimensional integrals only: by Stein's identity it is
        m_i E[s(a_j)] + var_i E[s'(a_j)] W_ij / var_i, with a_j = c_j + (v/var)'W_j Gaussian.
        Only for beta = 1.
        """
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        x, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
        m = self.means()  # [S, V]
        a_mean = self.c + (m / self.var) @ self.W  # [S, H]
        a_std = ((self.W**2 / self.var[:, None]).sum(0)).sqrt()  # [H]
        s = torch.sigmoid(a_mean[..., None] + a_std[:, None] * x)  # [S, H, nodes]
        p, slope = s @ w, (s * (1 - s)) @ w  # [S, H]
        vp = m[:, :, None] * p[:, None, :] + self.W * slope[:, None, :]  # [S, V, H]
        vp = torch.einsum("s,svh->vh", p_h, vp)
        centered = torch.einsum("s,sv->v", p_h, (m - self.b) ** 2 + self.var)
        grad_log_var = (-0.5 * centered + (self.W * vp).sum(1)) / self.var
        grad_b = -(p_h @ m - self.b) / self.var
        return -vp / self.var[:, None], grad_b, -(p_h @ p), grad_log_var

    def data_statistics(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean dF/dtheta over rows v [B, V], for W, b, c, log_var."""
        p = self.mean_h_given_v(v)
        n = v.shape[0]
        vp = v.T @ p / n
        grad_log_var = (-0.5 * ((v - self.b) ** 2).mean(0) + (self.W * vp).sum(1)) / self.var
        return -vp / self.var[:, None], -(v - self.b).mean(0) / self.var, -p.mean(0), grad_log_var

    def p_h_from(self, v: Tensor) -> Tensor:
        """Mean over rows v of p(h state | v), [2**H]."""
        return (-self.beta * self.energy(v, self.h_states)).softmax(1).mean(0)

    def cd_gradient(self, v: Tensor, k: int) -> tuple[Tensor, ...]:
        """Exact expectation of CD-k's estimate from data v (k > 1 by quadrature: V <= 3)."""
        p_h = self.p_h_from(v)
        if k > 1:
            p_h = p_h @ torch.linalg.matrix_power(self.hidden_transition(), k - 1)
        data, chain = self.data_statistics(v), self.statistics(p_h)
        return tuple(d - m for d, m in zip(data, chain, strict=True))

    def nll_gradient(self, v: Tensor) -> tuple[Tensor, ...]:
        """Exact gradient of the mean negative log-likelihood of rows v."""
        data, model = self.data_statistics(v), self.statistics(self.p_h())
        return tuple(d - m for d, m in zip(data, model, strict=True))


def small_bernoulli(
    n_visible: int = 6, n_hidden: int = 5, beta: float = 1.0, seed: int = 0, spread: float = 0.8
) -> Exact:
    """A random Bernoulli RBM whose units are neither frozen nor independent."""
    g = torch.Generator().manual_seed(seed)
    W = spread * torch.randn(n_visible, n_hidden, generator=g, dtype=torch.float64)
    b = 0.5 * torch.randn(n_visible, generator=g, dtype=torch.float64)
    c = 0.5 * torch.randn(n_hidden, generator=g, dtype=torch.float64)
    # Rounded to float32, so that the package and the enumeration hold the same numbers.
    return Exact(W.float().double(), b.float().double(), c.float().double(), beta)


def small_spin(
    n_visible: int = 6, n_hidden: int = 5, beta: float = 1.0, seed: int = 0, spread: float = 0.8
) -> ExactSpin:
    """A random RBM of spins, half as strong as Bernoulli units' for the same distribution."""
    model = small_bernoulli(n_visible, n_hidden, beta, seed, spread / 2)
    return ExactSpin(model.W, model.b / 2, model.c, beta)


def small_gaussian(
    n_visible: int = 4, n_hidden: int = 5, beta: float = 1.0, seed: int = 0, spread: float = 0.6
) -> ExactGaussian:
    """A random Gaussian-Bernoulli RBM with variances between about 0.3 and 3."""
    model = small_bernoulli(n_visible, n_hidden, beta, seed, spread)
    g = torch.Generator().manual_seed(seed + 1000)
    log_var = (1.2 * torch.rand(n_visible, generator=g) - 0.6).double()
    return ExactGaussian(model.W, model.b, model.c, log_var, beta)


def in_float32(model: Exact | ExactGaussian) -> tuple[Tensor, Tensor, Tensor]:
    """W, b and c as a float32 model would hold them; the small models' values are exact in it."""
    return model.W.float(), model.b.float(), model.c.float()
