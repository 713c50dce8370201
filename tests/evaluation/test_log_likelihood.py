"""Log-likelihoods of rows against enumeration, and what any RBM must beat."""

from __future__ import annotations

import pytest
import torch
from support.enumeration import in_float32, small_bernoulli, small_gaussian

from rbm_kernels import RBM, data, evaluation, training
from rbm_kernels.training import Settings


def test_log_likelihood():
    model = small_bernoulli()
    log_z = evaluation.log_partition_exact(*in_float32(model))
    v = model.v_states
    for rows in (v.bool(), v.byte(), v.float()):
        log_p = evaluation.log_likelihood(rows, *in_float32(model), log_z, chunk=7)
        torch.testing.assert_close(log_p, model.p_v().log(), rtol=0, atol=1e-12)


def test_log_likelihood_gaussian_is_a_density():
    model = small_gaussian(1, 4)
    log_var = model.log_var.float()
    log_z = evaluation.log_partition_exact(*in_float32(model), log_var)
    v = torch.linspace(-30, 30, 20001, dtype=torch.float64)[:, None]
    p = evaluation.log_likelihood(v, *in_float32(model), log_z, log_var).exp()
    assert torch.trapezoid(p, v[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_independent_pixels():
    v = (torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) < 0.3).byte()
    v[:, 0] = 0
    bias = evaluation.log_odds(v)
    assert torch.isfinite(bias).all()
    p = (v.double().sum(0) + 1) / 52
    expected = (v * p.log() + (1 - v) * (1 - p).log()).sum(1)
    torch.testing.assert_close(
        evaluation.independent_log_likelihood(v, bias), expected, rtol=0, atol=1e-5
    )


def test_evaluate_by_ais():
    train, held_out = data.split(data.load("digits"), 0.1)
    digits = (train.values, held_out.values)
    settings = Settings(n_hidden=18, epochs=10, batch_size=64, n_chains=64, learning_rate=0.1)
    run = training.train(*digits, training.start(digits[0], settings))
    result = evaluation.evaluate(run.model, *digits, chains=run.chains, betas=500, exact_units=17)
    exact = evaluation.evaluate(run.model, *digits)
    assert result.estimate is not None and result.reverse is not None
    assert exact.estimate is None and exact.reverse is None
    assert result.reverse.log_z == pytest.approx(exact.log_z, abs=1.0)
    assert result.held_out == pytest.approx(exact.held_out, abs=0.3)
    assert result.independent == exact.independent < exact.held_out


@pytest.mark.parametrize("visible", ["gaussian", "spin"])
def test_evaluate_is_of_bernoulli_units(visible):
    with pytest.raises(ValueError, match=f"evaluate: model must have Bernoulli .* got '{visible}'"):
        evaluation.evaluate(RBM(6, 5, visible), torch.zeros(2, 6), torch.zeros(2, 6))
