"""The textbook against exact enumeration: energies, conditionals, Gibbs sampling, CD."""

from __future__ import annotations

import math

import pytest
import torch
from support.enumeration import (
    Exact,
    ExactGaussian,
    all_states,
    small_bernoulli,
    small_gaussian,
    state_number,
)
from support.statistics import SIGMAS, assert_chi_square, assert_mean
from torch import Tensor

from rbm_kernels import textbook
from rbm_kernels.units import Bernoulli, Gaussian, Units

CHAINS = 60_000
DATA = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1]]).double()


def parameters(model: Exact | ExactGaussian) -> tuple[Tensor, Tensor, Tensor]:
    return model.W, model.b, model.c


def rows() -> Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_energies_of_all_states() -> None:
    model = small_bernoulli()
    v, h = model.v_states, model.h_states
    pairs = v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)
    energies = textbook.energy(*pairs, *parameters(model)).reshape(len(v), len(h))
    torch.testing.assert_close(energies, -model.log_joint())
    torch.testing.assert_close(textbook.free_energy(v, *parameters(model)), model.free_energy())


def test_energies_of_gaussian_rows() -> None:
    model, v = small_gaussian(), rows()
    h = model.h_states
    units = Gaussian(model.log_var)
    pairs = v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)
    energies = textbook.energy(*pairs, *parameters(model), units).reshape(len(v), len(h))
    torch.testing.assert_close(energies, model.energy(v, h))
    free = textbook.free_energy(v, *parameters(model), units)
    torch.testing.assert_close(free, model.free_energy(v))


def test_conditional_means() -> None:
    model = small_bernoulli()
    W, b, c = parameters(model)
    h = textbook.hidden_mean(model.v_states, W, c)
    torch.testing.assert_close(h, model.mean_h_given_v())
    torch.testing.assert_close(textbook.visible_mean(model.h_states, W, b), model.mean_v_given_h())
    gaussian = small_gaussian()
    W, b, c = parameters(gaussian)
    units = Gaussian(gaussian.log_var)
    h = textbook.hidden_mean(rows(), W, c, units)
    torch.testing.assert_close(h, gaussian.mean_h_given_v(rows()))
    torch.testing.assert_close(textbook.visible_mean(all_states(5), W, b, units), gaussian.means())


@pytest.mark.parametrize("k", [1, 3])
def test_k_sweeps_are_k_transitions(k: int) -> None:
    model, start = small_bernoulli(spread=1.2), 41
    torch.manual_seed(k)
    v = textbook.gibbs_sample(model.v_states[start].expand(CHAINS, -1), *parameters(model), k)
    counts = torch.bincount(state_number(v), minlength=64)
    T = model.v_transition()
    assert_chi_square(counts, torch.linalg.matrix_power(T, k)[start])
    with pytest.raises(AssertionError):
        assert_chi_square(counts, torch.linalg.matrix_power(T, k + 1)[start])


def test_long_gaussian_chains_reach_the_model() -> None:
    model = small_gaussian()
    torch.manual_seed(0)
    start = torch.zeros(CHAINS, 4, dtype=torch.float64)
    v = textbook.gibbs_sample(start, *parameters(model), 15, units=Gaussian(model.log_var))
    mean, second = model.v_moments()
    assert_mean(v, mean)
    assert_mean(v[:, :, None] * v[:, None, :], second)


def assert_is_expected(
    gradients: tuple[Tensor, ...], exact: tuple[Tensor, ...], terms: list[Tensor]
) -> None:
    """Within ``SIGMAS`` standard errors; ``terms`` are the chains' own summands [N, ...]."""
    for got, want, term in zip(gradients, exact, terms, strict=True):
        error = term.std(0) / math.sqrt(term.shape[0]) + 1e-6
        assert ((got - want) / error).abs().max() < SIGMAS


def terms_of(v: Tensor, model: Exact | ExactGaussian, units: Units) -> list[Tensor]:
    """Each chain's derivative of its free energy, by autograd of the sum over chains' weights."""
    p = textbook.hidden_mean(v, model.W, model.c, units)
    given = units.given(v)
    terms = [given[:, :, None] * p[:, None, :], given, p]
    if units.continuous:
        distance = (v - model.b).square() / 2 - (p @ model.W.t()) * v
        terms.append(units.given(distance))
    return terms


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_cd_gradients_have_their_expectation(k: int, persistent: bool) -> None:
    model = small_bernoulli(spread=1.2)
    start = DATA[:2].flip(1) if persistent else None
    torch.manual_seed(k)
    gradients, state = textbook.cd_step(
        DATA.repeat(CHAINS // 3, 1),
        *parameters(model),
        k,
        chains=None if start is None else start.repeat(CHAINS // 4, 1),
    )
    terms = terms_of(state, model, Bernoulli())
    assert_is_expected(gradients, model.cd_gradient(DATA, k, start), terms)
    with pytest.raises(AssertionError):
        assert_is_expected(gradients, model.cd_gradient(DATA, k + 1, start), terms)


@pytest.mark.parametrize("k", [1, 2])
def test_gaussian_cd_gradients_have_their_expectation(k: int) -> None:
    model = small_gaussian(n_visible=3, spread=1.2)
    units = Gaussian(model.log_var)
    data = rows()[:, :3]
    torch.manual_seed(k)
    gradients, state = textbook.cd_step(
        data.repeat(CHAINS // 9, 1), *parameters(model), k, units=units
    )
    assert len(gradients) == 4
    assert_is_expected(gradients, model.cd_gradient(data, k), terms_of(state, model, units))


def test_another_way_to_draw() -> None:
    """A layer may draw in its own way, as the benchmarks' naive baselines do."""

    class Drawn(Bernoulli):
        def sample(self, mean: Tensor, beta: float | Tensor = 1.0) -> Tensor:
            return torch.ones_like(mean)

    W, b, c = torch.zeros(3, 2), torch.full((3,), -50.0), torch.zeros(2)
    v = torch.zeros(4, 3)
    assert textbook.gibbs_sample(v, W, b, c, units=Drawn()).all()
    assert not textbook.gibbs_sample(v, W, b, c, hidden=Drawn()).any()
    W += 100
    assert textbook.gibbs_sample(v, W, b, c, hidden=Drawn()).all()
    _, state = textbook.cd_step(v, W, b, c, hidden=Drawn())
    assert state.all()
