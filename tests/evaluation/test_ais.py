"""AIS and its reverse against exact log Z."""

from __future__ import annotations

import pytest
import torch
from support.enumeration import in_float32, small_bernoulli, small_gaussian

from rbm_kernels import evaluation


@pytest.mark.parametrize("gaussian", [False, True])
def test_ais_against_exact(gaussian):
    model = small_gaussian(8, 6) if gaussian else small_bernoulli(8, 6, spread=1.5)
    log_var = model.log_var.float() if gaussian else None
    base = {"base_visible_bias": torch.linspace(-1, 1, 8)}
    if gaussian:
        base["base_log_var"] = torch.full((8,), 1.0)
    result = evaluation.ais(*in_float32(model), log_var, n_chains=400, betas=150, seed=1, **base)
    exact = model.log_z().item()
    low, high = result.interval
    print(f"exact {exact:.4f}, AIS {result.log_z:.4f} +- {result.std:.4f}")
    assert low < exact < high and result.std < 0.05
    assert 100 < result.effective_sample_size <= 400 and result.log_weight_spread > 0
    assert result.log_weights.shape == (400,) and result.n_betas == 150
    again = evaluation.ais(*in_float32(model), log_var, n_chains=400, betas=150, seed=1, **base)
    assert torch.equal(again.log_weights, result.log_weights)


@pytest.mark.parametrize("gaussian", [False, True])
def test_reverse_ais_from_exact_samples(gaussian):
    model = small_gaussian(5, 6) if gaussian else small_bernoulli(8, 6, spread=1.5)
    generator = torch.Generator().manual_seed(0)
    if gaussian:
        log_var = model.log_var.float()
        h = torch.multinomial(model.p_h(), 400, replacement=True, generator=generator)
        noise = torch.randn(400, 5, generator=generator, dtype=torch.float64)
        v = (model.means()[h] + noise * model.var.sqrt()).float()
    else:
        log_var = None
        rows = torch.multinomial(model.p_v(), 400, replacement=True, generator=generator)
        v = model.v_states[rows].float()
    result = evaluation.reverse_ais(v, *in_float32(model), log_var, betas=150, seed=2)
    exact = model.log_z().item()
    print(f"exact {exact:.4f}, reverse AIS {result.log_z:.4f} +- {result.std:.4f}")
    assert result.interval[0] < exact < result.interval[1] and result.std < 0.05
    # One chain's log-weight is high on average: the other bound.
    assert result.log_weights.mean() > exact - 3 * result.log_weight_spread / 20


def test_ais_of_few_temperatures_says_so():
    """A hard path must show in the spread and the effective sample size."""
    model = small_bernoulli(10, 8, spread=4.0)
    rough = evaluation.ais(*in_float32(model), n_chains=200, betas=2, seed=0)
    fine = evaluation.ais(*in_float32(model), n_chains=200, betas=400, seed=0)
    assert rough.effective_sample_size < 0.5 * fine.effective_sample_size
    assert rough.log_weight_spread > 2 * fine.log_weight_spread
    assert abs(fine.log_z - model.log_z().item()) < 4 * fine.std + 0.05


def test_ais_schedule_and_errors():
    W, b, c = in_float32(small_bernoulli())
    schedule = torch.linspace(0, 1, 30) ** 0.5
    assert evaluation.ais(W, b, c, betas=schedule, seed=0).n_betas == 30
    for betas in ([0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0]):
        with pytest.raises(ValueError, match="ais: betas must rise from 0 to 1"):
            evaluation.ais(W, b, c, betas=betas)
    with pytest.raises(ValueError, match="betas must be at least 2 temperatures, got 1"):
        evaluation.ais(W, b, c, betas=1)
    with pytest.raises(ValueError, match="n_chains must be at least 1, got 0"):
        evaluation.ais(W, b, c, n_chains=0)
    with pytest.raises(ValueError, match=r"base_visible_bias must be \[V\] = \[6\], got \[5\]"):
        evaluation.ais(W, b, c, base_visible_bias=c)
    with pytest.raises(ValueError, match="give log_var too"):
        evaluation.ais(W, b, c, base_log_var=b)
    with pytest.raises(ValueError, match=r"v must be \[B, V\] = \[B, 6\], got \[2, 5\]"):
        evaluation.reverse_ais(torch.zeros(2, 5), W, b, c)
    with pytest.raises(ValueError, match="at least one row"):
        evaluation.reverse_ais(torch.zeros(0, 6), W, b, c)


def test_ais_generator_governs_when_no_seed_is_given():
    W, b, c = in_float32(small_bernoulli())
    runs = [
        evaluation.ais(W, b, c, betas=20, generator=torch.Generator().manual_seed(s)).log_z
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
