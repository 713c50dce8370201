"""Log-likelihoods of rows, and the evaluation of a trained model by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rbm_kernels.inputs import as_rows
from rbm_kernels.textbook import BERNOULLI, free_energy

from . import _checks
from .ais import AIS, ais, reverse_ais
from .partition import log_partition_exact

if TYPE_CHECKING:
    from rbm_kernels.rbm import RBM


@torch.no_grad()
def log_likelihood(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_z: Tensor | float,
    log_var: Tensor | None = None,
    *,
    visible: str | None = None,
    chunk: int = 4096,
) -> Tensor:
    """log p(v) = -F(v) - log Z of every row, in float64 (a density for Gaussian units).

    Args:
        v: [B, V], binary for Bernoulli units.
        W: [V, H].
        b: [V].
        c: [H].
        log_z: From ``log_partition_exact``, or ``ais(...).log_z``.
        log_var: [V] for Gaussian visible units.
        visible: The kind of visible units, as for the operations.
        chunk: Rows at a time.

    Returns:
        [B] float64.

    Raises:
        TypeError: An argument of another kind (see ``rbm_kernels.inputs``).
        ValueError: A wrong shape, values that are not finite, or rows of values that the units do
            not take.
    """
    W, b, c, units = _checks.in_float64("log_likelihood", W, b, c, log_var, visible)
    v = _checks.rows("log_likelihood", "v", v, W, units)
    energies = torch.cat([free_energy(rows.double(), W, b, c, units) for rows in v.split(chunk)])
    return -energies - torch.as_tensor(log_z, dtype=torch.float64, device=W.device)


def log_odds(v: Tensor, pseudo_count: float = 1.0) -> Tensor:
    """Visible bias [V] of the independent-pixels model, float32: log-odds of each unit's mean.

    Args:
        v: [B, V] in [0, 1].
        pseudo_count: Added to the rows in which a unit is on and to those in which it is off, so
            that a constant unit's log-odds stay finite.

    Raises:
        TypeError: Data of another kind (see ``rbm_kernels.inputs``).
        ValueError: A wrong shape, or values that are not finite or lie outside [0, 1].
    """
    v = as_rows("log_odds", "v", v)
    _checks.values("log_odds", "v", v, BERNOULLI)
    on = v.sum(0, dtype=torch.float64).clamp(0, v.shape[0]) + pseudo_count
    off = v.shape[0] - on + 2 * pseudo_count
    return (on / off).log().float()


def independent_log_likelihood(v: Tensor, visible_bias: Tensor) -> Tensor:
    """log p(v) [B] of the RBM without hidden units, which any RBM must beat, in float64.

    Args:
        v: [B, V] binary.
        visible_bias: [V], from ``log_odds`` of the training data.

    Raises:
        TypeError: Arguments of another kind (see ``rbm_kernels.inputs``).
        ValueError: A wrong shape, or values that are not finite or lie outside [0, 1].
    """
    where = "independent_log_likelihood"
    v = as_rows(where, "v", v)
    _checks.values(where, "v", v, BERNOULLI)
    _checks.vector(where, "visible_bias", visible_bias, "V", v.shape[1])
    x = visible_bias.double()
    return v.double() @ x - BERNOULLI.log_partition(x, x).sum()


@dataclass(frozen=True)
class Evaluation:
    """Mean log-likelihoods in nats per row.

    Attributes:
        train: That of the training rows.
        held_out: That of the held-out rows.
        independent: That of the held-out rows under the independent-pixels model of the training
            rows.
        log_z: The log Z that the likelihoods are computed with.
        estimate: The AIS behind ``log_z``, or None where it is exact.
        reverse: Reverse AIS from the given chains, whose log Z is too high on average where that
            of ``estimate`` is too low. None where there are no chains or log Z is exact.
    """

    train: float
    held_out: float
    independent: float
    log_z: float
    estimate: AIS | None
    reverse: AIS | None = None


def evaluate(
    model: RBM,
    data: Tensor,
    held_out: Tensor,
    *,
    chains: Tensor | None = None,
    exact_units: int = 20,
    n_chains: int = 256,
    betas: int = 1000,
    seed: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Evaluation:
    """Log-likelihoods: exact where the smaller layer is small, by AIS otherwise.

    AIS is low for log Z on average, hence high for the likelihood: look at the estimate's
    ``effective_sample_size`` and ``interval``.

    Args:
        model: An RBM of Bernoulli units.
        data: [N, V] binary, the training rows.
        held_out: [M, V] binary.
        chains: [N, V], long-run samples of the model, such as its persistent chains.
        exact_units: The largest layer, in units, that is enumerated.
        n_chains: Number of chains of AIS.
        betas: Number of temperatures of AIS.
        seed: Seed of AIS.
        backend: Backend of the chains of AIS, as for the operations.
        precision: Precision of the chains of AIS, as for the operations.

    Returns:
        Mean log-likelihoods of both sets of rows, and what they rest on.

    Raises:
        TypeError: Data of another kind (see ``rbm_kernels.inputs``).
        ValueError: A model of other visible units (the estimates themselves take all kinds), rows
            of a wrong shape, or values that are not finite or lie outside [0, 1].
    """
    if model.visible != "bernoulli":
        raise ValueError(f"evaluate: model must have Bernoulli units, got {model.visible!r}")
    weights = (model.W.detach(), model.b.detach(), model.c.detach())
    # All that is given is looked at before hours of annealing.
    data = _checks.rows("evaluate", "data", data, model.W, BERNOULLI)
    held_out = _checks.rows("evaluate", "held_out", held_out, model.W, BERNOULLI)
    if chains is not None:
        chains = _checks.rows("evaluate", "chains", chains, model.W, BERNOULLI)
    bias = log_odds(data)
    estimate = reverse = None
    if min(model.n_visible, model.n_hidden) <= exact_units:
        log_z = log_partition_exact(*weights, max_units=exact_units).item()
    else:
        options: Any = {
            "base_visible_bias": bias,
            "betas": betas,
            "backend": backend,
            "precision": precision,
        }
        estimate = ais(*weights, n_chains=n_chains, seed=(seed, 0), **options)
        log_z = estimate.log_z
        if chains is not None:
            reverse = reverse_ais(chains, *weights, seed=(seed, 2 * betas), **options)

    def mean(rows: Tensor) -> float:
        return log_likelihood(rows, *weights, log_z).mean().item()

    return Evaluation(
        train=mean(data),
        held_out=mean(held_out),
        independent=independent_log_likelihood(held_out, bias).mean().item(),
        log_z=log_z,
        estimate=estimate,
        reverse=reverse,
    )
