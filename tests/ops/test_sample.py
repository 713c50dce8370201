"""sample_hidden and sample_visible against exact conditionals and frequencies."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from support.backends import draws, each_backend
from support.enumeration import Exact, ExactGaussian, small_bernoulli, small_gaussian, state_number
from support.statistics import P_VALUE, assert_chi_square, assert_mean
from support.tensors import binary, fp32, normal, same
from torch import Tensor

import rbm_kernels as rk

# At 252,000 draws, five standard errors of a fair coin are 1% of its probability.
DRAWS = 252_000
STATES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool)


def logit(p: Tensor) -> Tensor:
    return p.log() - (1 - p).log()


def assert_bernoulli(states: Tensor, p_states: Tensor, mean: Tensor) -> None:
    """Units' frequencies and, over all joint states, independence."""
    assert ((states == 0) | (states == 1)).all()
    counts = torch.bincount(state_number(states), minlength=p_states.numel())
    assert_chi_square(counts, p_states)
    z = (states.double().mean(0) - mean) / (mean * (1 - mean) / states.shape[0]).sqrt()
    assert z.abs().max() < 5


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.4, 2.5])
def test_hidden_states_follow_the_conditional(backend: str, beta: float) -> None:
    model = small_bernoulli(beta=beta)
    W, c = fp32(model.W, model.c)
    for row in (0, 21, 63):
        v = model.v_states[row].float()
        h = rk.sample_hidden(
            v.expand(draws(DRAWS, backend), -1), W, c, beta=beta, seed=row, backend=backend
        )
        assert h.shape == (draws(DRAWS, backend), 5) and h.dtype == torch.float32
        assert_bernoulli(h, model.p_h_given_v()[row], model.mean_h_given_v()[row])


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.4, 2.5])
def test_visible_states_follow_the_conditional(backend: str, beta: float) -> None:
    model = small_bernoulli(beta=beta)
    W, b = fp32(model.W, model.b)
    for row in (0, 13, 31):
        h = model.h_states[row].float()
        v = rk.sample_visible(
            h.expand(draws(DRAWS, backend), -1), W, b, beta=beta, seed=row, backend=backend
        )
        assert v.shape == (draws(DRAWS, backend), 6) and v.dtype == torch.float32
        assert_bernoulli(v, model.p_v_given_h()[row], model.mean_v_given_h()[row])


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.3, 1.7])
def test_returned_probabilities(backend: str, beta: float) -> None:
    model = small_bernoulli(beta=beta)
    W, b, c = fp32(model.W, model.b, model.c)
    common = {"beta": beta, "seed": 1, "backend": backend, "precision": "highest"}
    h, p = rk.sample_hidden(model.v_states.float(), W, c, return_probs=True, **common)
    torch.testing.assert_close(p.double(), model.mean_h_given_v(), rtol=0, atol=2e-6)
    v, q = rk.sample_visible(model.h_states.float(), W, b, return_probs=True, **common)
    torch.testing.assert_close(q.double(), model.mean_v_given_h(), rtol=0, atol=2e-6)
    # Asking for probabilities changes no state.
    assert same(h, rk.sample_hidden(model.v_states.float(), W, c, **common))
    assert same(v, rk.sample_visible(model.h_states.float(), W, b, **common))


@each_backend
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("shape", [(3, 784, 70), (17, 130, 65), (2, 1, 1), (5, 33, 1), (5, 1, 33)])
def test_probabilities_of_larger_models(
    backend: str, precision: str, shape: tuple[int, int, int]
) -> None:
    n, n_visible, n_hidden = shape
    v, W = binary(n, n_visible), normal(n_visible, n_hidden, seed=1, scale=0.3)
    b, c, h = normal(n_visible, seed=2), normal(n_hidden, seed=3), binary(n, n_hidden, seed=4)
    # Half a unit of the last place for each active unit: the scale is a power of two, so it is at
    # most 2^-22 (2^-14) of the largest weight. Plus float32 rounding of bias, sum and sigmoid.
    bits = 23 if precision == "highest" else 15
    W_max = W.abs().max().item()
    common = {"return_probs": True, "seed": 0, "backend": backend, "precision": precision}
    _, p = rk.sample_hidden(v, W, c, **common)
    x = v.double() @ W.double() + c.double()
    bound = v.sum(1).max().item() * W_max * 2.0**-bits + 2**-22 * (1 + x.abs().max().item())
    torch.testing.assert_close(p.double(), torch.sigmoid(x), rtol=0, atol=0.25 * bound + 2e-7)
    _, q = rk.sample_visible(h, W, b, **common)
    x = h.double() @ W.double().T + b.double()
    bound = h.sum(1).max().item() * W_max * 2.0**-bits + 2**-22 * (1 + x.abs().max().item())
    torch.testing.assert_close(q.double(), torch.sigmoid(x), rtol=0, atol=0.25 * bound + 2e-7)


@each_backend
def test_every_unit_of_a_wide_layer_draws_alone(backend: str) -> None:
    """37 units cover vector tails; a lane that reused random words would correlate two units."""
    n, p = draws(60_000, backend), torch.linspace(0.02, 0.98, 37).double()
    c, W = logit(p).float(), torch.zeros(3, 37)
    h = rk.sample_hidden(torch.zeros(n, 3), W, c, seed=5, backend=backend).double()
    z = (h.mean(0) - p) * (n / (p * (1 - p))).sqrt()
    assert z.abs().max() < 5
    normed = (h - p) / (p * (1 - p)).sqrt()
    correlation = normed.T @ normed / n - torch.eye(37)
    correlation.fill_diagonal_(0)
    # Rare-by-rare products have heavy tails; 7 standard errors keep the pair (0.02, 0.02) safe.
    assert correlation.abs().max() < 7 / n**0.5
    # Neighbouring chains are independent too.
    serial = (normed[1:] * normed[:-1]).mean(0)
    assert serial.abs().max() < 7 / n**0.5


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_hidden_states_of_gaussian_data(backend: str, beta: float) -> None:
    model = small_gaussian(beta=beta)
    W, c, log_var = fp32(model.W, model.c, model.log_var)
    v = normal(3, 4, seed=3, scale=1.5)
    mean = model.mean_h_given_v(v.double())
    for row in range(3):
        h, p = rk.sample_hidden(
            v[row].expand(draws(DRAWS, backend), -1), W, c, log_var=log_var, beta=beta,
            return_probs=True, seed=row, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(p[0].double(), mean[row], rtol=0, atol=3e-6)
        p_states = (-beta * model.energy(v[row : row + 1].double(), model.h_states)).softmax(1)[0]
        assert_bernoulli(h, p_states, mean[row])


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_gaussian_visible_units_agree_with_their_energy(backend: str, beta: float) -> None:
    model = small_gaussian(5, 4, beta=beta)
    W, b, log_var = fp32(model.W, model.b, model.log_var)
    for row in (0, 11):
        h = model.h_states[row].float().expand(draws(DRAWS, backend), -1)
        v, mean = rk.sample_visible(
            h, W, b, log_var=log_var, beta=beta, return_probs=True, seed=row, backend=backend
        )
        torch.testing.assert_close(mean[0].double(), model.means()[row], rtol=0, atol=2e-6)
        noise = (v.double() - model.means()[row]) / (model.var / beta).sqrt()
        assert_mean(noise, torch.zeros(5))
        assert_mean(noise**2, torch.ones(5))
        assert_mean(noise**3, torch.zeros(5))
        assert_mean(noise**4, torch.full((5,), 3.0))
        products = noise[:, :, None] * noise[:, None, :]
        assert_mean(products, torch.eye(5))
        assert_mean(
            (noise**2)[:, :, None] * (noise**2)[:, None, :], torch.ones(5, 5) + 2 * torch.eye(5)
        )
        for unit in range(5):
            p_value = stats.kstest(noise[:, unit].numpy(), "norm").pvalue
            assert p_value > P_VALUE


@each_backend
@pytest.mark.parametrize("dtype", STATES)
def test_out_dtype(backend: str, dtype: torch.dtype) -> None:
    v, W, b, c = binary(9, 7), normal(7, 5), normal(7), normal(5)
    common = {"seed": 4, "backend": backend}
    h = rk.sample_hidden(v, W, c, **common)
    cast = rk.sample_hidden(v, W, c, out_dtype=dtype, **common)
    assert cast.dtype == dtype and torch.equal(cast.float(), h)
    down = rk.sample_visible(h, W, b, **common)
    cast = rk.sample_visible(h, W, b, out_dtype=dtype, **common)
    assert cast.dtype == dtype and torch.equal(cast.float(), down)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_states_come_back_in_the_weights_dtype(backend: str, dtype: torch.dtype) -> None:
    v, W, b, c = (t.to(dtype) for t in (binary(9, 7), normal(7, 5), normal(7), normal(5)))
    h, p = rk.sample_hidden(v, W, c, return_probs=True, seed=4, backend=backend)
    assert h.dtype == dtype
    expected = torch.sigmoid(v.double() @ W.double() + c.double())
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=max(2e-6, torch.finfo(dtype).eps))
    v1, q = rk.sample_visible(h, W, b, return_probs=True, seed=4, backend=backend)
    assert v1.dtype == dtype
    expected = torch.sigmoid(h.double() @ W.double().T + b.double())
    torch.testing.assert_close(q.double(), expected, rtol=0, atol=max(2e-6, torch.finfo(dtype).eps))


@each_backend
@pytest.mark.parametrize("dtype", STATES)
def test_binary_data_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    v, W, c = binary(9, 7), normal(7, 5), normal(5)
    h, p = rk.sample_hidden(v, W, c, return_probs=True, seed=4, backend=backend)
    h2, p2 = rk.sample_hidden(v.to(dtype), W, c, return_probs=True, seed=4, backend=backend)
    assert same(h, h2) and same(p, p2)


@each_backend
def test_grey_data(backend: str) -> None:
    v = torch.rand(40, 30, generator=torch.Generator().manual_seed(1))
    v[0], v[1] = 0, 1
    W, c = normal(30, 12, seed=2, scale=0.3), normal(12, seed=3)
    _, p = rk.sample_hidden(v, W, c, return_probs=True, seed=0, backend=backend)
    expected = torch.sigmoid(v.double() @ W.double() + c.double())
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=3e-6)
    row = v[7].expand(draws(96_000, backend), -1)
    h = rk.sample_hidden(row, W, c, seed=1, backend=backend)
    q = expected[7]
    z = (h.double().mean(0) - q) * (row.shape[0] / (q * (1 - q))).sqrt()
    assert z.abs().max() < 5


@each_backend
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 30.0, 1e4, 1e30])
def test_weights_of_any_size(backend: str, scale: float) -> None:
    v, W, c = binary(50, 20), normal(20, 9, scale=scale), normal(9, seed=1)
    h, p = rk.sample_hidden(v, W, c, return_probs=True, seed=4, backend=backend)
    x = v.double() @ W.double() + c.double()
    assert torch.isfinite(p).all() and ((h == 0) | (h == 1)).all()
    certain = x.abs() > 30
    assert torch.equal(h[certain] == 1, x[certain] > 0)
    bound = 20 * W.abs().max().item() * 2.0**-24 + 1e-6
    clear = x.abs() > 10 * bound if scale > 1e3 else torch.ones_like(x, dtype=torch.bool)
    atol = 3e-6 + min(0.25 * bound, 1.0) * (scale <= 1e3)
    torch.testing.assert_close(p.double()[clear], torch.sigmoid(x)[clear], rtol=0, atol=atol)


@each_backend
def test_zero_weights_and_certain_biases(backend: str) -> None:
    W, c = torch.zeros(4, 6), torch.tensor([0.0, 200.0, -200.0, 88.0, -104.0, 1e30])
    h, p = rk.sample_hidden(binary(2000, 4), W, c, return_probs=True, seed=4, backend=backend)
    assert torch.isfinite(p).all()
    assert torch.equal(h[:, [1, 3, 5]], torch.ones(2000, 3))
    assert torch.equal(h[:, [2, 4]], torch.zeros(2000, 2))
    assert 0.4 < h[:, 0].mean() < 0.6


@each_backend
def test_small_weights_beside_a_large_one(backend: str) -> None:
    """Fixed point has one scale: the error stays below the bound that is known beforehand."""
    W = normal(30, 20, scale=0.05)
    W[3, 4] = 5.0
    v, c = binary(64, 30, seed=2), normal(20, seed=3)
    _, p = rk.sample_hidden(
        v, W, c, return_probs=True, seed=0, backend=backend, precision="highest"
    )
    expected = torch.sigmoid(v.double() @ W.double() + c.double())
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=0.25 * 30 * 5 * 2**-23 + 3e-7)


@each_backend
def test_tempering_is_not_a_rescaled_free_energy(backend: str) -> None:
    """Gibbs at beta has the marginal F_beta; beta times F_1 is a different distribution."""
    beta, model = 0.5, small_bernoulli()
    tempered = Exact(model.W, model.b, model.c, beta)
    W, b, c = fp32(model.W, model.b, model.c)
    v = rk.gibbs_sample(
        torch.zeros(draws(96_000, backend), 6), W, b, c, 8, beta=beta, seed=1, backend=backend
    )
    counts = torch.bincount(state_number(v), minlength=64)
    assert_chi_square(counts, tempered.p_v())
    with pytest.raises(AssertionError):
        assert_chi_square(counts, (-beta * model.free_energy()).softmax(0))


@each_backend
def test_gaussian_noise_does_not_depend_on_the_batch(backend: str) -> None:
    model: ExactGaussian = small_gaussian(5, 4)
    W, b, log_var = fp32(model.W, model.b, model.log_var)
    h = binary(33, 4)
    whole = rk.sample_visible(h, W, b, log_var=log_var, seed=3, backend=backend)
    for rows in (1, 7, 32):
        part = rk.sample_visible(h[:rows], W, b, log_var=log_var, seed=3, backend=backend)
        assert same(part, whole[:rows])
