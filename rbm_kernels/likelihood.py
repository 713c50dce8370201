"""How good a model is: exact log Z, annealed importance sampling, pseudo-likelihood.

Energies and symbols as in docs/: v [B, V], h [B, H], W [V, H], visible bias b [V], hidden bias
c [H]; visible units are Gaussian where `log_var` [V] is given. Log-likelihoods are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.sample import sample_hidden, sample_visible
from .seeds import Seed, resolve

# softplus(x) = x to full float64 precision above this: exp(-40) is below half a last place.
_SOFTPLUS_LINEAR = 40.0


def log_partition_exact(
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    *,
    chunk: int = 2**18,
    max_units: int = 25,
) -> Tensor:
    """log Z by summing over all states of the smaller layer, the other layer in closed form.

    Streams: memory is O(`chunk`), time O(2^n m) for layers of n and m units, n enumerated (20
    units beside 784 take seconds, 25 some minutes). Every sum is in float64.

    Args:
        W: [V, H], any float dtype.
        b: [V].
        c: [H].
        log_var: [V] for Gaussian visible units: then the hidden layer is enumerated.
        chunk: elements of the working array; more is not faster past the cache.
        max_units: refuse to enumerate more units than this.

    Returns:
        0-dim float64.

    Raises:
        ValueError: shapes, non-finite parameters, or more than `max_units` units to enumerate.

    Example:
        >>> W = torch.zeros(3, 2)
        >>> log_partition_exact(W, W.new_zeros(3), W.new_zeros(2)).exp()  # 2^3 * 2^2 states
        tensor(32.0000, dtype=torch.float64)
    """
    W, b, c, log_var = _doubles("log_partition_exact", W, b, c, log_var)
    n_visible, n_hidden = W.shape
    enumerate_visible = log_var is None and n_visible < n_hidden
    n = n_visible if enumerate_visible else n_hidden
    if n > max_units:
        layer = "smaller" if log_var is None else "hidden"
        raise ValueError(
            f"log_partition_exact: the {layer} layer must have at most max_units = {max_units} "
            f"units, got {n}; use ais"
        )
    if chunk < 1:
        raise ValueError(f"log_partition_exact: chunk must be at least 1, got {chunk}")
    if enumerate_visible:
        W, b, c = W.T, c, b
    # The log-weight of a state s of the enumerated layer is c's, plus the other layer's log-sum at
    # the field W s. A state is a pair (high bits, low bits): the fields of the low bits are one
    # table, and each state of the high bits is one pass over it.
    low_bits = min(n, max(0, (chunk // max(W.shape[0], 1)).bit_length() - 1))
    low_states = _binary_states(low_bits, W.device)
    low_bias = low_states @ c[:low_bits]  # [2^low_bits]
    other_layer = _log_sum(low_states @ W.T[:low_bits], W[:, low_bits:], b, log_var)
    totals: list[Tensor] = []
    high_rows = 2**14
    for first in range(0, 2 ** (n - low_bits), high_rows):
        last = min(first + high_rows, 2 ** (n - low_bits))
        states = _binary_states(n - low_bits, W.device, first, last)
        for bias, field in zip(states @ c[low_bits:], states @ W.T[low_bits:], strict=True):
            totals.append((low_bias + bias + other_layer(field)).logsumexp(0))
        totals = [torch.stack(totals).logsumexp(0)]
    return totals[0]


def _log_sum(
    low: Tensor, W_high: Tensor, b: Tensor, log_var: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The log of the sum (or integral) over the other layer, as a function of the high field.

    Args:
        low: [S, m] fields of the low bits.
        W_high: [m, n_high] weights of the high bits, for the fields' range.
        b: [m].
        log_var: [m] or None.

    Returns:
        A function from a field [m] to [S].
    """
    if log_var is not None:
        # The integral of exp(-(v-b)^2/2s^2 + v a/s^2) is sqrt(2 pi s^2) exp((2ab + a^2)/2s^2).
        precision = torch.exp(-log_var)
        constant = 0.5 * (math.log(2 * math.pi) + log_var).sum()

        def integral(field: Tensor) -> Tensor:
            a = low + field
            return (a * (0.5 * a + b) * precision).sum(1) + constant

        return integral
    # sum softplus(x) is the log of the product of 1 + exp(low) exp(field): one exponential a column
    # and one logarithm for eight units, ten times faster, where nothing can overflow.
    most = low.amax(0) + W_high.clamp(min=0).sum(1) + b
    farthest = torch.maximum(low.abs().amax(0), W_high.abs().sum(1) + b.abs())
    if most.numel() == 0 or most.max() > 80 or farthest.max() > 300:
        return lambda field: F.softplus(low + (field + b), threshold=_SOFTPLUS_LINEAR).sum(1)
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
    """Rows `first` to `last` of all binary vectors of length n, float64."""
    numbers = torch.arange(first, 2**n if last is None else last, device=device)
    return ((numbers[:, None] >> torch.arange(n, device=device)) & 1).double()


def log_likelihood(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_z: Tensor | float,
    log_var: Tensor | None = None,
    *,
    chunk: int = 4096,
) -> Tensor:
    """log p(v) = -F(v) - log Z of every row, in float64 (a density for Gaussian units).

    Args:
        v: [B, V], binary for Bernoulli units.
        log_z: from `log_partition_exact`, or `ais(...).log_z`.
        chunk: rows at a time.

    Returns:
        [B] float64.

    Raises:
        ValueError: shapes or non-finite parameters.
    """
    W, b, c, log_var = _doubles("log_likelihood", W, b, c, log_var)
    _check_rows("log_likelihood", v, W)
    parts = [_log_weight(rows.double(), W, b, c, log_var) for rows in v.split(chunk)]
    return torch.cat(parts) - torch.as_tensor(log_z, dtype=torch.float64, device=W.device)


def _log_weight(v: Tensor, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None) -> Tensor:
    """-F(v) of float64 rows [B, V], [B]."""
    if log_var is None:
        return v @ b + F.softplus(c + v @ W, threshold=_SOFTPLUS_LINEAR).sum(1)
    precision = torch.exp(-log_var)
    hidden = F.softplus(c + (v * precision) @ W, threshold=_SOFTPLUS_LINEAR).sum(1)
    return hidden - 0.5 * ((v - b) ** 2 * precision).sum(1)


def log_odds(v: Tensor, pseudo_count: float = 1.0) -> Tensor:
    """Visible bias of the independent-pixels model: log-odds of each unit's mean, [V] float32.

    Args:
        v: [B, V] in [0, 1].
        pseudo_count: added to the ons and to the offs, so that a constant unit stays finite.
    """
    on = v.sum(0, dtype=torch.float64) + pseudo_count
    off = v.shape[0] - on + 2 * pseudo_count
    return (on / off).log().float()


def independent_log_likelihood(v: Tensor, visible_bias: Tensor) -> Tensor:
    """log p(v) of the RBM without hidden units, what any RBM must beat; [B] float64.

    Args:
        v: [B, V] binary.
        visible_bias: [V], from `log_odds` of the training data.
    """
    x = visible_bias.double()
    return v.double() @ x - F.softplus(x, threshold=_SOFTPLUS_LINEAR).sum()


@dataclass(frozen=True)
class AIS:
    """An estimate of log Z from importance weights.

    Attributes:
        log_z: the estimate: log of the mean weight, plus the base model's log Z.
        std: standard error of `log_z`, by the delta method.
        interval: log of (mean weight -+ 3 standard errors); the lower end may be -inf.
        effective_sample_size: (sum w)^2 / sum w^2, from 1 to n_chains: near 1 the estimate hangs
            on a single chain and must not be trusted.
        log_weight_spread: standard deviation of the log weights between chains.
        log_weights: [n_chains] float64, the base model's log Z included.
        n_betas: temperatures used.
    """

    log_z: float
    std: float
    interval: tuple[float, float]
    effective_sample_size: float
    log_weight_spread: float
    log_weights: Tensor
    n_betas: int


def ais(
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    *,
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

    The path from the base-rate model (beta = 0) to the RBM (beta = 1) has the unnormalised
    p_beta(v) = exp((1-beta) b0'v + beta b'v + sum_j softplus(beta (c_j + v'W_j))), as in
    Salakhutdinov and Murray, On the quantitative analysis of deep belief networks, ICML 2008,
    eq. 16-18, after Neal, Annealed importance sampling, Statistics and Computing 11, 2001. The
    mean of the weights is unbiased for Z, so `log_z` is low on average, never high.

    Args:
        W: [V, H].
        b: [V].
        c: [H].
        log_var: [V] for Gaussian visible units.
        base_visible_bias: b0 [V], best `log_odds(data)` (Gaussian: the data's mean); default b.
        base_log_var: [V], Gaussian only: log-variance of the base model, best the data's;
            default `log_var`.
        n_chains: independent weights.
        betas: a number of temperatures, spaced evenly from 0 to 1, or the increasing
            temperatures themselves, from 0 to 1.
        seed: as for the operations; an int gives the same estimate every time.
        generator: as for the operations.
        backend: as for the operations.
        precision: as for the operations; concerns the chains, not the weights.

    Returns:
        The estimate with its spread.

    Raises:
        ValueError: shapes, non-finite parameters, n_chains < 1, or betas that do not rise from
            0 to 1.
    """
    path = _Path.check("ais", W, b, c, log_var, base_visible_bias, base_log_var)
    schedule = _schedule("ais", betas)
    if n_chains < 1:
        raise ValueError(f"ais: n_chains must be at least 1, got {n_chains}")
    state = resolve("ais", seed, generator, W.device)
    nothing = path.W.new_zeros(n_chains, path.W.shape[1])
    W0, b0, _, log_var0 = path.parameters(0.0)
    v = _states(
        sample_visible(
            nothing, W0, b0, log_var=log_var0, seed=state, backend=backend, precision=precision
        )
    )
    log_weights = torch.full((n_chains,), path.base_log_z(), dtype=torch.float64, device=W.device)
    for before, beta in zip(schedule[:-1], schedule[1:], strict=True):
        log_weights += path.log_ratio(v, before, beta)
        if beta < 1.0:
            v = path.sweep(v, beta, state, backend, precision)
    return _summary(log_weights, len(schedule))


def reverse_ais(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    *,
    base_visible_bias: Tensor | None = None,
    base_log_var: Tensor | None = None,
    betas: int | Sequence[float] | Tensor = 2000,
    seed: Seed | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> AIS:
    """log Z by annealing from samples of the model down to the base model: the other bound.

    With exact samples the mean weight is unbiased for Z_base / Z, so `log_z` is high on average
    where `ais` is low: the two enclose log Z (Burda, Grosse and Salakhutdinov, Accurate and
    conservative estimates of MRF log-likelihood using reverse annealing, AISTATS 2015). With
    samples of a short chain it is an estimate, and no bound.

    Args:
        v: [n_chains, V], samples of the model: long-run chains.
        W: and the rest as for `ais`.

    Returns:
        As `ais`; `log_weights` are of log Z, one a chain, and `log_z` is minus the log of the
        mean of exp(-log_weights).

    Raises:
        ValueError: as `ais`.
    """
    path = _Path.check("reverse_ais", W, b, c, log_var, base_visible_bias, base_log_var)
    _check_rows("reverse_ais", v, W)
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
    """log(mean(exp(x))) along `dim`, without overflow."""
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
    log_var: Tensor | None
    b0: Tensor
    log_var0: Tensor | None

    @staticmethod
    def check(
        where: str,
        W: Tensor,
        b: Tensor,
        c: Tensor,
        log_var: Tensor | None,
        b0: Tensor | None,
        log_var0: Tensor | None,
    ) -> _Path:
        _check_parameters(where, W, b, c, log_var)
        if b0 is not None:
            _check_vector(where, "base_visible_bias", b0, "V", W.shape[0])
        if log_var0 is not None:
            if log_var is None:
                raise ValueError(f"{where}: base_log_var is for Gaussian units: give log_var too")
            _check_vector(where, "base_log_var", log_var0, "V", W.shape[0])
        # Half-precision weights are exact in float32, the chains' type.
        dtype = torch.promote_types(W.dtype, torch.float32)
        W, b, c = (x.detach().to(dtype) for x in (W, b, c))
        log_var = None if log_var is None else log_var.detach().to(dtype)
        b0 = b if b0 is None else b0.detach().to(dtype)
        log_var0 = log_var if log_var0 is None else log_var0.detach().to(dtype)
        return _Path(W, b, c, log_var, b0, log_var0)

    def parameters(self, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """W, b, c, log_var of the RBM whose Gibbs sampling leaves p_beta invariant."""
        if self.log_var is None or self.log_var0 is None:
            return beta * self.W, torch.lerp(self.b0, self.b, beta), beta * self.c, None
        # Precisions mix linearly; completing the square gives the mean and the weights.
        base, model = (1 - beta) * torch.exp(-self.log_var0), beta * torch.exp(-self.log_var)
        share = model / (base + model)
        b = torch.lerp(self.b0, self.b, share)
        return share[:, None] * self.W, b, beta * self.c, -torch.log(base + model)

    def sweep(
        self, v: Tensor, beta: float, state: Tensor, backend: str | None, precision: str | None
    ) -> Tensor:
        W, b, c, log_var = self.parameters(beta)
        options: Any = {
            "log_var": log_var, "seed": state, "backend": backend, "precision": precision,
        }  # fmt: skip
        h = _states(sample_hidden(v, W, c, **options))
        return _states(sample_visible(h, W, b, **options))

    def log_ratio(self, v: Tensor, before: float, after: float) -> Tensor:
        """log p_after(v) - log p_before(v), unnormalised, [n_chains] float64."""
        if after < before:
            return -self.log_ratio(v, after, before)
        step = after - before
        if self.log_var is None or self.log_var0 is None:
            x = self.c + v @ self.W
            linear = (v @ (self.b - self.b0)).double()
        else:
            x = self.c + (v * torch.exp(-self.log_var)) @ self.W
            squares = (v - self.b0) ** 2 * torch.exp(-self.log_var0)
            squares = squares - (v - self.b) ** 2 * torch.exp(-self.log_var)
            linear = 0.5 * squares.sum(1).double()
        # softplus(after x) - softplus(before x), written without the difference of two large
        # numbers, so that thousands of float32 steps add up: with y = |x|, it is
        # step max(x, 0) + log1p(sigmoid(-before y) expm1(-step y)).
        y = x.abs()
        change = torch.log1p(torch.sigmoid(-before * y) * torch.expm1(-step * y))
        change += step * x.clamp(min=0)
        return change.sum(1, dtype=torch.float64) + step * linear

    def base_log_z(self) -> float:
        hidden = self.W.shape[1] * math.log(2)
        if self.log_var0 is None:
            return hidden + F.softplus(self.b0.double(), threshold=_SOFTPLUS_LINEAR).sum().item()
        return hidden + 0.5 * (math.log(2 * math.pi) + self.log_var0.double()).sum().item()


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


def _states(drawn: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The states alone, for the type checker: probabilities come only when asked for."""
    assert isinstance(drawn, Tensor)
    return drawn


class PseudoLikelihood(NamedTuple):
    """log p(v_i | all other visible units), in float64.

    Attributes:
        total: [B], summed over units (estimated as V times one unit's, for units="random").
        per_unit: [B, V], or None for units="random".
    """

    total: Tensor
    per_unit: Tensor | None


def pseudo_likelihood(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    units: str = "all",
    generator: torch.Generator | None = None,
    chunk: int = 2**22,
) -> PseudoLikelihood:
    """Log pseudo-likelihood of binary rows: each unit given all others (Besag 1975).

    It needs no log Z: log p(v_i | v_-i) = log sigmoid(F(v^i) - F(v)), with v^i the row whose
    unit i is flipped.

    Args:
        v: [B, V] of zeros and ones, any dtype.
        W: [V, H].
        b: [V].
        c: [H].
        units: "all": every unit exactly, O(B V H); "random": one random unit a row, whose value
            times V estimates the total without bias, O(B (V + H)) after one product.
        generator: for units="random".
        chunk: elements of the working array.

    Returns:
        Totals and, for "all", every unit's value.

    Raises:
        ValueError: shapes, units, values other than 0 and 1 (it is not defined for real values).
    """
    W, b, c, _ = _doubles("pseudo_likelihood", W, b, c, None)
    _check_rows("pseudo_likelihood", v, W)
    if units not in ("all", "random"):
        raise ValueError(f"pseudo_likelihood: units must be 'all' or 'random', got {units!r}")
    v = v.double()
    if not ((v == 0) | (v == 1)).all():
        raise ValueError("pseudo_likelihood: v must hold only 0 and 1, got other values")
    # float32 for the O(B V H) part: a softplus there is good to 1e-7, and sums are in float64.
    x = c + v @ W  # [B, H]
    hidden = F.softplus(x, threshold=_SOFTPLUS_LINEAR).sum(1)  # [B]
    sign = 1 - 2 * v  # [B, V], the change of each unit when flipped
    batch, n_visible = v.shape
    if units == "random":
        unit = torch.randint(n_visible, (batch,), generator=generator).to(v.device)
        step = sign.gather(1, unit[:, None])  # [B, 1]
        flipped = F.softplus(x + step * W[unit], threshold=_SOFTPLUS_LINEAR).sum(1)
        rise = flipped - hidden + step[:, 0] * b[unit]  # F(v) - F(v^i)
        return PseudoLikelihood(n_visible * F.logsigmoid(-rise), None)
    per_unit = torch.empty_like(v)
    x32, W32, sign32 = x.float(), W.float(), sign.float()
    base = F.softplus(x32)
    rows = max(1, chunk // max(1, W.shape[1]))
    for i in range(n_visible):
        for first in range(0, batch, rows):
            part = slice(first, first + rows)
            moved = x32[part] + sign32[part, i, None] * W32[i]
            change = (F.softplus(moved) - base[part]).sum(1, dtype=torch.float64)
            rise = change + sign[part, i] * b[i]
            per_unit[part, i] = F.logsigmoid(-rise)
    return PseudoLikelihood(per_unit.sum(1), per_unit)


def _doubles(
    where: str, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_parameters(where, W, b, c, log_var)
    W, b, c = (x.detach().double() for x in (W, b, c))
    return W, b, c, None if log_var is None else log_var.detach().double()


def _check_parameters(where: str, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None) -> None:
    if W.dim() != 2:
        raise ValueError(f"{where}: W must be [V, H], got {list(W.shape)}")
    _check_vector(where, "b", b, "V", W.shape[0])
    _check_vector(where, "c", c, "H", W.shape[1])
    if log_var is not None:
        _check_vector(where, "log_var", log_var, "V", W.shape[0])
    for name, x in (("W", W), ("b", b), ("c", c), ("log_var", log_var)):
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinite values")


def _check_vector(where: str, name: str, x: Tensor, letter: str, size: int) -> None:
    if x.shape != (size,):
        raise ValueError(f"{where}: {name} must be [{letter}] = [{size}], got {list(x.shape)}")


def _check_rows(where: str, v: Tensor, W: Tensor) -> None:
    if v.dim() != 2 or v.shape[1] != W.shape[0]:
        raise ValueError(f"{where}: v must be [B, V] = [B, {W.shape[0]}], got {list(v.shape)}")
