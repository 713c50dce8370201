"""One contract for every kind of visible unit, from its energy alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rbm_kernels import arithmetic
from rbm_kernels.units import KINDS, Bernoulli, Gaussian, Spin, Units, visible_units

_LOG_VAR = torch.tensor([-0.5, 0.0, 0.7], dtype=torch.float64)


def _bernoulli_states() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)


def _spin_states() -> tuple[Tensor, Tensor]:
    return torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)


def _quadrature() -> tuple[Tensor, Tensor]:
    """Points on the real line and their weights: the trapezoid rule, exact for such integrands."""
    points = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    return points, torch.full_like(points, (points[1] - points[0]).item())


@dataclass(frozen=True)
class Kind:
    """A kind of unit for three visible units, and how to sum or integrate over one unit."""

    units: Units
    states: Callable[[], tuple[Tensor, Tensor]]


CASES = {
    "bernoulli": Kind(Bernoulli(), _bernoulli_states),
    "gaussian": Kind(Gaussian(_LOG_VAR), _quadrature),
    "spin": Kind(Spin(), _spin_states),
}
each_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rows(units: Units, n: int = 7, seed: int = 5) -> Tensor:
    """States [n, 3] that such units take."""
    torch.manual_seed(seed)
    return units.sample(units.mean(_numbers(3, seed=11).expand(n, 3)))


def _log_terms(case: Kind, x: Tensor, b: Tensor, unit: int, beta: float = 1.0) -> Tensor:
    """beta (-energy + given(v)'(x - b)) and the log weight, for all states of one unit.

    The energy is the unit's own, since the states and biases of the others are 0.
    """
    points, weights = case.states()
    v = torch.zeros(points.numel(), 3, dtype=torch.float64)
    v[:, unit] = points
    bias = torch.zeros_like(b)
    bias[unit] = b[unit]
    energy = case.units.energy(v, bias)
    return beta * (case.units.given(v)[:, unit] * (x - b)[unit] - energy) + weights.log()


def test_every_kind_is_tested_here() -> None:
    assert set(CASES) == set(KINDS)
    for name, case in CASES.items():
        assert type(case.units) is KINDS[name]
        names = tuple(name for name, _ in case.units.parameters())
        assert names == case.units.parameter_names


@each_kind
def test_log_partition_is_the_sum_over_states(case: Kind) -> None:
    x, b = _numbers(3, seed=1), _numbers(3, seed=2)
    expected = torch.stack([_log_terms(case, x, b, i).logsumexp(0) for i in range(3)])
    torch.testing.assert_close(case.units.log_partition(x[None], b)[0], expected)


@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_mean_is_that_of_the_states(case: Kind, beta: float) -> None:
    x, b = _numbers(3, seed=1), _numbers(3, seed=2)
    points, _ = case.states()
    expected = [_log_terms(case, x, b, i, beta).softmax(0) @ points for i in range(3)]
    torch.testing.assert_close(case.units.mean(x[None], beta)[0], torch.stack(expected))


@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("how", ["sample", "draw"])
def test_samples_have_the_moments_of_the_states(case: Kind, how: str, beta: float) -> None:
    n = 40_000
    x, b = _numbers(3, seed=1), _numbers(3, seed=2)
    rows = x.expand(n, 3)
    betas = torch.full((n,), beta)  # one a row, as of parallel chains
    if how == "sample":
        torch.manual_seed(0)
        v = case.units.sample(case.units.mean(rows, betas.double()), betas.double())
    else:
        words = arithmetic.random_words(torch.tensor([3, 0]), 0, torch.arange(n), 4)
        v, mean = case.units.draw(rows.float(), words, betas)
        torch.testing.assert_close(mean.double(), case.units.mean(rows, beta), rtol=0, atol=1e-6)
    assert v.shape == (n, 3)
    points, _ = case.states()
    for unit in range(3):
        p = _log_terms(case, x, b, unit, beta).softmax(0)
        mean, square = p @ points, p @ points**2
        fourth = p @ points**4
        for got, expected, second in ((v, mean, square), (v**2, square, fourth)):
            error = math.sqrt(max(second - expected**2, 1e-12) / n)
            assert abs(got[:, unit].double().mean() - expected) < 5 * error + 1e-6


def _leaves(case: Kind) -> tuple[Units, Tensor, Tensor, list[Tensor]]:
    """The units, v and b with gradients, and all leaves in the order of the backward methods."""
    v = _rows(case.units).requires_grad_()
    b = _numbers(3, seed=3).requires_grad_()
    parameters = [p.clone().requires_grad_() for _, p in case.units.parameters()]
    return type(case.units)(*parameters), v, b, parameters


@each_kind
def test_backward_methods_are_autograds(case: Kind) -> None:
    units, v, b, parameters = _leaves(case)
    grad = _numbers(7, seed=4)
    expected = torch.autograd.grad(units.energy(v, b), [v, b, *parameters], grad)
    for got, want in zip(units.energy_backward(grad, v, b), expected, strict=True):
        torch.testing.assert_close(got, want)

    grad = _numbers(7, 3, seed=4)
    given = units.given(v) * 1.0  # a leaf itself is no function of v
    expected = torch.autograd.grad(given, [v, *parameters], grad)
    for got, want in zip(units.given_backward(grad, v), expected, strict=True):
        torch.testing.assert_close(got, want)

    x = _numbers(7, 3, seed=6).requires_grad_()
    beta = torch.linspace(0.5, 1.5, 7, dtype=torch.float64)
    mean = units.mean(x, beta) * 1.0
    (expected_x,) = torch.autograd.grad(mean, x, grad)
    torch.testing.assert_close(units.mean_backward(grad, mean, beta), expected_x)


@each_kind
@pytest.mark.parametrize("exp_neg", [None, arithmetic.exp_neg], ids=["torch", "contract"])
def test_gradients_are_those_of_the_free_energies(
    case: Kind, exp_neg: Callable[[Tensor], Tensor] | None
) -> None:
    units, _, b, parameters = _leaves(case)
    data, chains = _rows(units, 7).detach(), _rows(units, 4, seed=8).detach()
    W, c = _numbers(3, 5, seed=9).requires_grad_(), _numbers(5, seed=10)

    def hidden(v: Tensor) -> Tensor:
        return c + units.given(v) @ W

    def mean_free_energy(v: Tensor) -> Tensor:
        softplus = Bernoulli().log_partition(hidden(v), c).sum(1)
        return (units.energy(v, b) - softplus).mean()

    loss = mean_free_energy(data) - mean_free_energy(chains)
    expected = torch.autograd.grad(loss, [W, b, *parameters])

    with torch.no_grad():
        averages = [(v.t() @ hidden(v).sigmoid() / v.shape[0], v.mean(0)) for v in (data, chains)]
        differences = [negative - positive for positive, negative in zip(*averages, strict=True)]
        options = {} if exp_neg is None else {"exp_neg": exp_neg}
        if exp_neg is not None:  # the contract computes in float32
            units, differences = units.to(torch.float32), [d.float() for d in differences]
        got = units.gradients(*differences, data, chains, W, b, **options)
    tolerance = {} if exp_neg is None else {"rtol": 1e-5, "atol": 1e-5}
    for gradient, want in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient.double(), want, **tolerance)


@each_kind
def test_units_fitted_to_data_have_its_means(case: Kind) -> None:
    data = _rows(case.units, 2000)
    b, units = type(case.units).fit("test", data, torch.float64)
    torch.testing.assert_close(units.mean(b[None])[0], data.mean(0), rtol=0, atol=1e-3)
    for (_, got), (_, true) in zip(units.parameters(), case.units.parameters(), strict=True):
        torch.testing.assert_close(got, true, rtol=0, atol=0.15)


@each_kind
def test_parameters_follow_to_another_dtype(case: Kind) -> None:
    units = case.units.to(torch.float32)
    assert type(units) is type(case.units)
    for (_, got), (_, was) in zip(units.parameters(), case.units.parameters(), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, was.float())


def test_what_a_log_variance_means() -> None:
    assert isinstance(visible_units(None), Bernoulli)
    units = visible_units(_LOG_VAR)
    assert isinstance(units, Gaussian)
    assert units.log_var is _LOG_VAR
    assert Bernoulli().log_var is None


def test_bernoulli_log_partition_is_exact_in_float64() -> None:
    x = torch.tensor([-800.0, -30.0, 0.0, 19.0, 21.0, 39.0, 41.0, 800.0], dtype=torch.float64)
    expected = np.logaddexp(0, x.numpy())
    got = Bernoulli().log_partition(x, x).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-15, atol=0)


@each_kind
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_between_mixes_energies(case: Kind, share: float) -> None:
    """Of any hidden state, up to a constant that does not depend on v."""
    units, rows = case.units, _rows(case.units)
    b, other_b, field = _numbers(3, seed=1), _numbers(3, seed=2), _numbers(3, 1, seed=3)
    other = units
    for name, value in units.parameters():
        assert name == "log_var"
        other = Gaussian(value + 0.4)
    W, middle_b, middle = units.between(other, b, other_b, field, share)
    found = middle.energy(rows, middle_b) - (middle.given(rows) @ W)[:, 0]
    end = other.energy(rows, other_b) - (other.given(rows) @ field)[:, 0]
    difference = found - (1 - share) * units.energy(rows, b) - share * end
    torch.testing.assert_close(difference, difference[:1].expand(len(rows)), rtol=0, atol=1e-12)
