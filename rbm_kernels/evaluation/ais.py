"""Annealed importance sampling: log Z of an RBM that is too large to enumerate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rbm_kernels.ops.gibbs import gibbs_sample
from rbm_kernels.ops.sample import sample_visible
from rbm_kernels.seeds import Seed, resolve
from rbm_kernels.textbook import hidden_input
from rbm_kernels.units import Units, visible_units

from . import _checks


@dataclass(frozen=True)
class AIS:
    """An estimate of log Z from importance weights.

    Attributes:
        log_z: The estimate: log of the mean weight, plus the base model's log Z.
        std: Standard error of ``log_z``, by the delta method.
        interval: log of (mean weight -+ 3 standard errors); the lower end may be -inf.
        effective_sample_size: (sum w)^2 / sum w^2, from 1 to n_chains. Near 1 the estimate hangs
            on a single chain and must not be trusted.
        log_weight_spread: Standard deviation of the log weights between chains.
        log_weights: [n_chains] float64, the base model's log Z included.
        n_betas: Number of temperatures used.
    """

    log_z: float
    std: float
    interval: tuple[float, float]
    effective_sample_size: float
    log_weight_spread: float
    log_weights: Tensor
    n_betas: int


@torch.no_grad()
def ais(
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    *,
    visible: str | None = None,
    base_visible_bias: Tensor | None = None,
    base_log_var: Tensor | None = None,
    n_chains: int = 128,
    betas: int | Sequence[float] | Tensor = 2000,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> AIS:
    """log Z by annealed importance sampling from a model of independent units.

    The path from the base-rate model (beta = 0) to the RBM (beta = 1) has the unnormalized
    p_beta(v) = exp((1-beta) b0'v + beta b'v + sum_j softplus(beta (c_j + v'W_j))), as in
    Salakhutdinov and Murray, On the quantitative analysis of deep belief networks, ICML 2008,
    eq. 16-18, after Neal, Annealed importance sampling, Statistics and Computing 11, 2001. The
    mean of the weights is unbiased for Z, so ``log_z`` is low on average, never high.

    Args:
        W: [V, H].
        b: [V].
        c: [H].
        log_var: [V] for Gaussian visible units.
        visible: The kind of visible units, as for the operations.
        base_visible_bias: [V], the base model's visible bias b0, best ``log_odds(data)``, or the
            data's mean for Gaussian units; b by default.
        base_log_var: [V], the base model's log-variance for Gaussian units, best the data's;
            ``log_var`` by default.
        n_chains: Number of independent weights.
        betas: A number of temperatures, spaced evenly from 0 to 1, or the increasing temperatures
            themselves, from 0 to 1.
        seed: As for the operations; an int gives the same estimate every time.
        generator: As for the operations.
        backend: As for the operations.
        precision: As for the operations; it concerns the chains, not the weights.

    Returns:
        The estimate with its spread.

    Raises:
        ValueError: A wrong shape, parameters that are not finite, ``n_chains`` below 1, or
            ``betas`` that do not rise from 0 to 1.
    """
    path = _Path.check("ais", W, b, c, log_var, visible, base_visible_bias, base_log_var)
    schedule = _schedule("ais", betas)
    if n_chains < 1:
        raise ValueError(f"ais: n_chains must be at least 1, got {n_chains}")
    state = resolve("ais", seed, generator, W.device)
    off = path.W.new_zeros(n_chains, path.W.shape[1])
    W0, b0, _, units = path.parameters(0.0)
    v = sample_visible(
        off,
        W0,
        b0,
        log_var=units.log_var,
        visible=units.kind,
        seed=state,
        backend=backend,
        precision=precision,
    )
    log_weights = torch.full((n_chains,), path.base_log_z(), dtype=torch.float64, device=W.device)
    for before, beta in zip(schedule[:-1], schedule[1:], strict=True):
        log_weights += path.log_ratio(v, before, beta)
        if beta < 1.0:
            v = path.sweep(v, beta, state, backend, precision)
    return _summary(log_weights, len(schedule))


@torch.no_grad()
def reverse_ais(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    *,
    visible: str | None = None,
    base_visible_bias: Tensor | None = None,
    base_log_var: Tensor | None = None,
    betas: int | Sequence[float] | Tensor = 2000,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> AIS:
    """log Z by annealing from samples of the model down to the base model: the other bound.

    With exact samples the mean weight is unbiased for Z_base / Z, so ``log_z`` is high on average
    where ``ais`` is low: the two enclose log Z (Burda, Grosse and Salakhutdinov, Accurate and
    conservative estimates of MRF log-likelihood using reverse annealing, AISTATS 2015). With
    samples of a short chain it is an estimate, and no bound.

    Args:
        v: [n_chains, V], samples of the model: the states of long chains.

    The other arguments and errors are those of ``ais``.

    Returns:
        The estimate as by ``ais``; ``log_weights`` has a value of log Z from each chain, and
        ``log_z`` is minus the log of the mean of exp(-log_weights).
    """
    path = _Path.check("reverse_ais", W, b, c, log_var, visible, base_visible_bias, base_log_var)
    v = _checks.rows("reverse_ais", "v", v, W, path.units)
    schedule = _schedule("reverse_ais", betas)
    if v.shape[0] < 1:
        raise ValueError("reverse_ais: v must have at least one row, got an empty batch")
    state = resolve("reverse_ais", seed, generator, W.device)
    v = v.to(path.W.dtype)
    log_weights = torch.full(
        (v.shape[0],), -path.base_log_z(), dtype=torch.float64, device=W.device
    )
    for beta, after in zip(reversed(schedule[1:]), reversed(schedule[:-1]), strict=True):
        # One more sweep at beta leaves its distribution alone: the transition of the reversed path.
        v = path.sweep(v, beta, state, backend, precision)
        log_weights += path.log_ratio(v, beta, after)
    down = _summary(log_weights, len(schedule))
    low, high = down.interval
    return AIS(
        log_z=-down.log_z,
        std=down.std,
        interval=(-high, -low),
        effective_sample_size=down.effective_sample_size,
        log_weight_spread=down.log_weight_spread,
        log_weights=-down.log_weights,
        n_betas=down.n_betas,
    )


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    """log(mean(exp(x))) along a dimension, without overflow."""
    return x.logsumexp(dim) - math.log(x.shape[dim])


def _summary(log_weights: Tensor, n_betas: int) -> AIS:
    n = log_weights.numel()
    log_z = log_mean_exp(log_weights).item()
    relative = (log_weights - log_z).exp()  # mean 1
    error = (relative.std(correction=1) / math.sqrt(n)).item() if n > 1 else math.inf
    low = math.log(1 - 3 * error) if 3 * error < 1 else -math.inf
    return AIS(
        log_z=log_z,
        std=error,
        interval=(log_z + low, log_z + math.log1p(3 * error)),
        effective_sample_size=(relative.sum() ** 2 / (relative**2).sum()).item(),
        log_weight_spread=log_weights.std(correction=1).item() if n > 1 else math.inf,
        log_weights=log_weights,
        n_betas=n_betas,
    )


@dataclass(frozen=True)
class _Path:
    """The geometric path between independent units and the RBM; each point of it is an RBM."""

    W: Tensor
    b: Tensor
    c: Tensor
    units: Units
    base_b: Tensor
    base_units: Units

    @staticmethod
    def check(
        where: str,
        W: Tensor,
        b: Tensor,
        c: Tensor,
        log_var: Tensor | None,
        visible: str | None,
        base_b: Tensor | None,
        base_log_var: Tensor | None,
    ) -> _Path:
        units = _checks.parameters(where, W, b, c, log_var, visible)
        base_units = units if base_log_var is None else visible_units(base_log_var)
        if type(base_units) is not type(units):
            raise ValueError(f"{where}: base_log_var is for Gaussian units: give log_var too")
        for name, value in base_units.parameters():
            _checks.vector(where, f"base_{name}", value, "V", W.shape[0])
        base_b = b if base_b is None else base_b
        _checks.vector(where, "base_visible_bias", base_b, "V", W.shape[0])
        # Half-precision weights are exact in float32, the chains' type.
        dtype = torch.promote_types(W.dtype, torch.float32)
        W, b, c, base_b = (x.to(dtype) for x in (W, b, c, base_b))
        return _Path(W, b, c, units.to(dtype), base_b, base_units.to(dtype))

    def parameters(self, beta: float) -> tuple[Tensor, Tensor, Tensor, Units]:
        """W, b, c and units of the RBM whose Gibbs sampling leaves p_beta invariant."""
        W, b, units = self.base_units.between(self.units, self.base_b, self.b, self.W, beta)
        return W, b, beta * self.c, units

    def sweep(
        self, v: Tensor, beta: float, state: Tensor, backend: str | None, precision: str | None
    ) -> Tensor:
        """The chains [N, V] after one sweep at an inverse temperature."""
        W, b, c, units = self.parameters(beta)
        return gibbs_sample(
            v,
            W,
            b,
            c,
            1,
            log_var=units.log_var,
            visible=units.kind,
            seed=state,
            backend=backend,
            precision=precision,
        )

    def log_ratio(self, v: Tensor, before: float, after: float) -> Tensor:
        """log p_after(v) - log p_before(v), unnormalized, [n_chains] float64."""
        if after < before:
            return -self.log_ratio(v, after, before)
        step = after - before
        x = hidden_input(v, self.W, self.c, self.units)
        visible = self.base_units.energy(v, self.base_b) - self.units.energy(v, self.b)
        # softplus(after x) - softplus(before x), written without the difference of two large
        # numbers, so that thousands of float32 steps add up: with y = |x|, it is
        # step max(x, 0) + log1p(sigmoid(-before y) expm1(-step y)).
        y = x.abs()
        change = torch.log1p(torch.sigmoid(-before * y) * torch.expm1(-step * y))
        change += step * x.clamp(min=0)
        return change.sum(1, dtype=torch.float64) + step * visible.double()

    def base_log_z(self) -> float:
        """log Z of the base model, whose hidden units are on half of the time."""
        b = self.base_b.double()
        visible = self.base_units.to(torch.float64).log_partition(b, b).sum().item()
        return visible + self.W.shape[1] * math.log(2)


def _schedule(where: str, betas: int | Sequence[float] | Tensor) -> list[float]:
    if isinstance(betas, int):
        if betas < 2:
            raise ValueError(f"{where}: betas must be at least 2 temperatures, got {betas}")
        return torch.linspace(0, 1, betas, dtype=torch.float64).tolist()
    schedule = [float(beta) for beta in betas]
    rises = all(a < b for a, b in zip(schedule, schedule[1:], strict=False))
    if len(schedule) < 2 or schedule[0] != 0.0 or schedule[-1] != 1.0 or not rises:
        raise ValueError(f"{where}: betas must rise from 0 to 1, got {schedule[:4]}...")
    return schedule
