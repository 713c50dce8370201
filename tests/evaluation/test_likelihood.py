"""Exact log Z against enumeration of both layers, AIS against exact, pseudo-likelihood by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.enumeration import Exact, small_bernoulli, small_gaussian

from rbm_kernels import likelihood


def parameters(model):
    return model.W.float(), model.b.float(), model.c.float()


@pytest.mark.parametrize(("n_visible", "n_hidden"), [(6, 5), (5, 6), (1, 7), (9, 1), (8, 8)])
@pytest.mark.parametrize("chunk", [1, 64, 2**16])
@pytest.mark.parametrize("spread", [0.5, 2.0, 200.0])
def test_log_partition_exact(n_visible, n_hidden, chunk, spread):
    model = small_bernoulli(n_visible, n_hidden, seed=n_visible, spread=spread)
    log_z = likelihood.log_partition_exact(*parameters(model), chunk=chunk)
    assert log_z.dtype == torch.float64 and log_z.dim() == 0
    torch.testing.assert_close(log_z, model.log_z(), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_log_partition_exact_gaussian(chunk):
    model = small_gaussian(7, 5)
    log_z = likelihood.log_partition_exact(
        *parameters(model), model.log_var.float().double(), chunk=chunk
    )
    expected = type(model)(model.W, model.b, model.c, model.log_var.float().double()).log_z()
    torch.testing.assert_close(log_z, expected, rtol=0, atol=1e-11)


def test_log_partition_exact_of_large_weights_is_finite():
    W = torch.full((3, 4), 1e4)
    log_z = likelihood.log_partition_exact(W, torch.full((3,), -1e4), torch.zeros(4))
    assert log_z.item() == pytest.approx(3 * 4 * 1e4 - 3e4, rel=1e-12)


def test_more_states_than_one_pass():
    """18 units in steps of 2 states, against independent units whose log Z is known."""
    c = torch.linspace(-1, 1, 18, dtype=torch.float64)
    log_z = likelihood.log_partition_exact(torch.zeros(40, 18), torch.zeros(40), c, chunk=40 * 8)
    expected = 40 * math.log(2) + torch.nn.functional.softplus(c).sum()
    torch.testing.assert_close(log_z, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": torch.zeros(30, 28)}, "smaller layer .* at most max_units = 25 units, got 28"),
        ({"W": torch.zeros(5)}, r"W must be \[V, H\], got \[5\]"),
        ({"b": torch.zeros(3)}, r"b must be \[V\] = \[30\], got \[3\]"),
        ({"c": torch.full((4,), math.nan)}, "c must be finite"),
        ({"log_var": torch.zeros(4)}, r"log_var must be \[V\] = \[30\], got \[4\]"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_log_partition_exact_errors(changes, message):
    W = changes.pop("W", torch.zeros(30, 4))
    arguments = {"b": torch.zeros(30), "c": torch.zeros(W.shape[-1]), **changes}
    with pytest.raises(ValueError, match="log_partition_exact: .*" + message):
        likelihood.log_partition_exact(W, **arguments)


def test_log_likelihood():
    model = small_bernoulli()
    log_z = likelihood.log_partition_exact(*parameters(model))
    v = model.v_states
    for rows in (v.bool(), v.byte(), v.float()):
        log_p = likelihood.log_likelihood(rows, *parameters(model), log_z, chunk=7)
        torch.testing.assert_close(log_p, model.p_v().log(), rtol=0, atol=1e-12)


def test_log_likelihood_gaussian_is_a_density():
    model = small_gaussian(1, 4)
    log_var = model.log_var.float()
    log_z = likelihood.log_partition_exact(*parameters(model), log_var)
    v = torch.linspace(-30, 30, 20001, dtype=torch.float64)[:, None]
    p = likelihood.log_likelihood(v, *parameters(model), log_z, log_var).exp()
    assert torch.trapezoid(p, v[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_independent_pixels():
    v = (torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) < 0.3).byte()
    v[:, 0] = 0
    bias = likelihood.log_odds(v)
    assert torch.isfinite(bias).all()
    p = (v.double().sum(0) + 1) / 52
    expected = (v * p.log() + (1 - v) * (1 - p).log()).sum(1)
    torch.testing.assert_close(
        likelihood.independent_log_likelihood(v, bias), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("gaussian", [False, True])
def test_ais_against_exact(gaussian):
    model = small_gaussian(8, 6) if gaussian else small_bernoulli(8, 6, spread=1.5)
    log_var = model.log_var.float() if gaussian else None
    base = {"base_visible_bias": torch.linspace(-1, 1, 8)}
    if gaussian:
        base["base_log_var"] = torch.full((8,), 1.0)
    result = likelihood.ais(*parameters(model), log_var, n_chains=400, betas=150, seed=1, **base)
    exact = model.log_z().item()
    low, high = result.interval
    print(f"exact {exact:.4f}, AIS {result.log_z:.4f} +- {result.std:.4f}")
    assert low < exact < high and result.std < 0.05
    assert 100 < result.effective_sample_size <= 400 and result.log_weight_spread > 0
    assert result.log_weights.shape == (400,) and result.n_betas == 150
    again = likelihood.ais(*parameters(model), log_var, n_chains=400, betas=150, seed=1, **base)
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
    result = likelihood.reverse_ais(v, *parameters(model), log_var, betas=150, seed=2)
    exact = model.log_z().item()
    print(f"exact {exact:.4f}, reverse AIS {result.log_z:.4f} +- {result.std:.4f}")
    assert result.interval[0] < exact < result.interval[1] and result.std < 0.05
    # One chain's log-weight is high on average: the other bound.
    assert result.log_weights.mean() > exact - 3 * result.log_weight_spread / 20


def test_ais_of_few_temperatures_says_so():
    """A hard path must show in the spread and the effective sample size."""
    model = small_bernoulli(10, 8, spread=4.0)
    rough = likelihood.ais(*parameters(model), n_chains=200, betas=2, seed=0)
    fine = likelihood.ais(*parameters(model), n_chains=200, betas=400, seed=0)
    assert rough.effective_sample_size < 0.5 * fine.effective_sample_size
    assert rough.log_weight_spread > 2 * fine.log_weight_spread
    assert abs(fine.log_z - model.log_z().item()) < 4 * fine.std + 0.05


def test_ais_schedule_and_errors():
    W, b, c = parameters(small_bernoulli())
    schedule = torch.linspace(0, 1, 30) ** 0.5
    assert likelihood.ais(W, b, c, betas=schedule, seed=0).n_betas == 30
    for betas in ([0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0]):
        with pytest.raises(ValueError, match="ais: betas must rise from 0 to 1"):
            likelihood.ais(W, b, c, betas=betas)
    with pytest.raises(ValueError, match="betas must be at least 2 temperatures, got 1"):
        likelihood.ais(W, b, c, betas=1)
    with pytest.raises(ValueError, match="n_chains must be at least 1, got 0"):
        likelihood.ais(W, b, c, n_chains=0)
    with pytest.raises(ValueError, match=r"base_visible_bias must be \[V\] = \[6\], got \[5\]"):
        likelihood.ais(W, b, c, base_visible_bias=c)
    with pytest.raises(ValueError, match="give log_var too"):
        likelihood.ais(W, b, c, base_log_var=b)
    with pytest.raises(ValueError, match=r"v must be \[B, V\] = \[B, 6\], got \[2, 5\]"):
        likelihood.reverse_ais(torch.zeros(2, 5), W, b, c)
    with pytest.raises(ValueError, match="at least one row"):
        likelihood.reverse_ais(torch.zeros(0, 6), W, b, c)


def test_ais_generator_governs_when_no_seed_is_given():
    W, b, c = parameters(small_bernoulli())
    runs = [
        likelihood.ais(W, b, c, betas=20, generator=torch.Generator().manual_seed(s)).log_z
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def exact_pseudo_likelihood(model: Exact) -> torch.Tensor:
    """log p(v_i | v_-i) of every state from the table of p(v), [2**V, V]."""
    p = model.p_v()
    numbers = torch.arange(p.numel())
    columns = [(p / (p + p[numbers ^ (1 << i)])).log() for i in range(model.b.numel())]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_pseudo_likelihood(chunk):
    model = small_bernoulli(seed=2, spread=1.5)
    result = likelihood.pseudo_likelihood(model.v_states, *parameters(model), chunk=chunk)
    expected = exact_pseudo_likelihood(model)
    torch.testing.assert_close(result.per_unit, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.total, expected.sum(1), rtol=0, atol=1e-5)


def test_pseudo_likelihood_of_random_units_is_unbiased():
    model = small_bernoulli(seed=2)
    v = model.v_states[37:38].repeat(20000, 1).bool()
    result = likelihood.pseudo_likelihood(
        v, *parameters(model), units="random", generator=torch.Generator().manual_seed(0)
    )
    assert result.per_unit is None
    error = result.total.mean() - exact_pseudo_likelihood(model)[37].sum()
    assert error.abs() < 4 * result.total.std() / math.sqrt(20000)
    # Every value is one of V times the exact conditionals.
    gaps = (result.total[:, None] / 6 - exact_pseudo_likelihood(model)[37]).abs().min(1).values
    assert gaps.max() < 1e-12


def test_pseudo_likelihood_errors():
    W, b, c = parameters(small_bernoulli())
    with pytest.raises(ValueError, match="v must hold only 0 and 1"):
        likelihood.pseudo_likelihood(torch.full((2, 6), 0.5), W, b, c)
    with pytest.raises(ValueError, match="units must be 'all' or 'random', got 'some'"):
        likelihood.pseudo_likelihood(torch.zeros(2, 6), W, b, c, units="some")
    with pytest.raises(ValueError, match=r"v must be \[B, V\] = \[B, 6\], got \[6\]"):
        likelihood.pseudo_likelihood(torch.zeros(6), W, b, c)
