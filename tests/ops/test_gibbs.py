"""gibbs_sample: distributions of chains, beta per chain, clamped units."""

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

# Second eigenvalues of these models' sweeps are 0.1 to 0.4: a dozen sweeps from any start leave
# less than 1e-5 of it.
SWEEPS = 12
CHAINS = 144_000


def parameters(model: Exact | ExactGaussian) -> tuple[Tensor, ...]:
    return fp32(model.W, model.b, model.c)


def counts_of(v: Tensor) -> Tensor:
    return torch.bincount(state_number(v), minlength=2 ** v.shape[1])


@each_backend
@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_sweeps_are_k_transitions(backend: str, k: int) -> None:
    """From one state, the exact distribution after k sweeps; k - 1 or k + 1 would be seen."""
    model, start = small_bernoulli(spread=1.2), 41
    v0 = model.v_states[start].float().expand(draws(CHAINS, backend), -1)
    v = rk.gibbs_sample(v0, *parameters(model), k, seed=k, backend=backend)
    T = model.v_transition()
    assert_chi_square(counts_of(v), torch.linalg.matrix_power(T, k)[start])
    with pytest.raises(AssertionError):
        assert_chi_square(counts_of(v), torch.linalg.matrix_power(T, k + 1)[start])


@each_backend
def test_a_long_chain_reaches_the_model(backend: str) -> None:
    model = small_bernoulli()
    v = rk.gibbs_sample(
        torch.zeros(draws(84_000, backend), 6), *parameters(model), SWEEPS, seed=3, backend=backend
    )
    assert_chi_square(counts_of(v), model.p_v())


@each_backend
def test_one_chain_along_its_time(backend: str) -> None:
    """A few chains over many calls with one seed tensor: time averages, thinned to independence."""
    model = small_bernoulli(spread=0.4)
    W, b, c = parameters(model)
    seed, v = torch.tensor([7, 0]), torch.zeros(draws(300, backend), 6)
    counts = torch.zeros(64, dtype=torch.int64)
    for _ in range(80):
        v = rk.gibbs_sample(v, W, b, c, 5, seed=seed, backend=backend)
        counts += counts_of(v)
    assert seed.tolist() == [7, 80 * 10]
    assert_chi_square(counts, model.p_v())


@each_backend
def test_beta_of_each_chain(backend: str) -> None:
    model = small_bernoulli()
    betas = torch.tensor([0.0, 0.3, 1.0, 2.0])
    beta = betas.repeat(draws(48_000, backend))
    start = model.v_states[9].float().expand(beta.numel(), -1)
    v = rk.gibbs_sample(start, *parameters(model), 2, beta=beta, seed=5, backend=backend)
    for i, value in enumerate(betas.tolist()):
        exact = Exact(model.W, model.b, model.c, value)
        p = torch.linalg.matrix_power(exact.v_transition(), 2)[9]
        assert_chi_square(counts_of(v[i::4]), p)


@each_backend
def test_beta_of_each_chain_equals_beta_of_the_call(backend: str) -> None:
    v, W, b, c = binary(10, 7), normal(7, 5), normal(7), normal(5)
    log_var = normal(7, seed=8, scale=0.3)
    for extra in ({}, {"log_var": log_var}):
        for value in (0.7, 1.0):
            one = rk.gibbs_sample(v, W, b, c, 3, beta=value, seed=2, backend=backend, **extra)
            each = rk.gibbs_sample(
                v, W, b, c, 3, beta=torch.full((10,), value), seed=2, backend=backend, **extra
            )
            assert same(one, each)


@each_backend
def test_a_sweep_is_two_half_sweeps(backend: str) -> None:
    """Half-sweep t of a call draws at offset + t, so the calls compose."""
    v, W, b, c = binary(10, 7), normal(7, 5), normal(7), normal(5)
    for extra in ({}, {"log_var": normal(7, seed=8, scale=0.3)}):
        common = {"backend": backend, "beta": 0.8, **extra}
        state = v
        for t in range(0, 6, 2):
            h = rk.sample_hidden(state, W, c, seed=(11, 100 + t), **common)
            state = rk.sample_visible(h, W, b, seed=(11, 101 + t), **common)
        assert same(state, rk.gibbs_sample(v, W, b, c, 3, seed=(11, 100), **common))
        first = rk.gibbs_sample(v, W, b, c, 1, seed=(11, 100), **common)
        rest = rk.gibbs_sample(first, W, b, c, 2, seed=(11, 102), **common)
        assert same(state, rest)


MASK = torch.tensor([True, False, False, True, False, False])
VALUES = torch.tensor([1.0, 0, 0, 0, 0, 0])


@each_backend
@pytest.mark.parametrize("form", ["mask", "mask of each chain", "mask and values"])
def test_clamped_sampling_from_the_conditional(backend: str, form: str) -> None:
    model = small_bernoulli()
    n = draws(48_000, backend)
    mask = MASK.expand(n, -1) if form == "mask of each chain" else MASK
    if form == "mask and values":  # the start disagrees with the values on both clamped units
        v0 = torch.tensor([0.0, 1, 1, 1, 0, 1]).expand(n, -1)
        clamp: object = (MASK, VALUES.expand(n, -1))
    else:
        v0 = torch.tensor([1.0, 1, 1, 0, 0, 1]).expand(n, -1)
        clamp = mask
    T = model.clamped_transition(MASK, VALUES.double())
    started = torch.tensor([1.0, 1, 1, 0, 0, 1]).double()
    v = rk.gibbs_sample(v0, *parameters(model), 1, clamp=clamp, seed=2, backend=backend)
    assert_chi_square(counts_of(v), T[state_number(started[None])[0]])
    v = rk.gibbs_sample(v0, *parameters(model), SWEEPS, clamp=clamp, seed=3, backend=backend)
    assert_chi_square(counts_of(v), model.p_v_clamped(MASK, VALUES.double()))


@each_backend
def test_masks_that_differ_between_chains(backend: str) -> None:
    model = small_bernoulli()
    n = draws(72_000, backend)
    masks = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    values = torch.tensor([[0.0, 1, 0, 0, 0, 0], [1.0, 1, 1, 0, 1, 0], [1.0, 0, 0, 1, 1, 1]])
    which = torch.arange(n) % 3
    v = rk.gibbs_sample(
        values[which], *parameters(model), SWEEPS, clamp=masks[which], seed=3, backend=backend
    )
    for i in range(3):
        assert_chi_square(counts_of(v[i::3]), model.p_v_clamped(masks[i], values[i].double()))


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
def test_clamped_units_keep_their_value(backend: str, gaussian: bool) -> None:
    n, n_visible = 37, 70
    W, b, c = normal(n_visible, 33), normal(n_visible), normal(33)
    mask = binary(n, n_visible, seed=1).bool()
    v = normal(n, n_visible, seed=2) if gaussian else binary(n, n_visible, seed=2)
    extra = {"log_var": normal(n_visible, scale=0.2)} if gaussian else {}
    common = {"seed": 0, "backend": backend, **extra}
    kept = v.clone()
    out = rk.gibbs_sample(v, W, b, c, 3, clamp=mask, **common)
    assert torch.equal(out[mask], v[mask]) and (out[~mask] != v[~mask]).any()
    row = mask[0]
    out = rk.gibbs_sample(v, W, b, c, 3, clamp=row, **common)
    assert torch.equal(out[:, row], v[:, row])
    other = v.flip(0)
    out = rk.gibbs_sample(v, W, b, c, 3, clamp=(mask, other), **common)
    assert torch.equal(out[mask], other[mask])
    # The free units are what they would be had the chain started from the values.
    start = torch.where(mask, other, v)
    assert same(out, rk.gibbs_sample(start, W, b, c, 3, clamp=mask, **common))
    assert torch.equal(v, kept)
    # Nothing clamped, and everything clamped.
    free = rk.gibbs_sample(v, W, b, c, 3, **common)
    assert same(free, rk.gibbs_sample(v, W, b, c, 3, clamp=torch.zeros(n_visible).bool(), **common))
    full = rk.gibbs_sample(v, W, b, c, 3, clamp=torch.ones(n_visible).bool(), **common)
    assert torch.equal(full, v)


@each_backend
def test_clamped_grey_values_are_kept(backend: str) -> None:
    """In-painting: clamped pixels are grey, free ones binary; the condition is on the grey."""
    model = small_bernoulli()
    n, mask = draws(96_000, backend), torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    v = torch.tensor([0.25, 0.9, 0.5, 0.1, 0.7, 0.0]).expand(n, -1)
    out = rk.gibbs_sample(v, *parameters(model), 1, clamp=mask, seed=1, backend=backend)
    assert torch.equal(out[:, :5], v[:, :5])
    x = model.c + torch.cat([v[0, :5].double(), torch.zeros(1).double()]) @ model.W
    p_h = torch.where(model.h_states == 1, torch.sigmoid(x), 1 - torch.sigmoid(x)).prod(1)
    p = p_h @ torch.sigmoid(model.b[5] + model.h_states @ model.W[5])
    assert_mean(out[:, 5:], p[None])


@each_backend
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_gaussian_chains(backend: str, k: int, beta: float) -> None:
    """Moments and the whole marginal after k sweeps: a mixture of normals over hidden states."""
    model = small_gaussian(2, 3, beta=beta, spread=1.0)
    W, b, c, log_var = fp32(model.W, model.b, model.c, model.log_var)
    v0 = torch.tensor([[1.5, -1.0]])
    v = rk.gibbs_sample(
        v0.expand(draws(CHAINS, backend), -1),
        W,
        b,
        c,
        k,
        log_var=log_var,
        beta=beta,
        seed=4,
        backend=backend,
    ).double()
    p_h = model.p_h_from(v0.double()) @ torch.linalg.matrix_power(model.hidden_transition(), k - 1)
    mean, second = model.v_moments(p_h)
    assert_mean(v, mean)
    assert_mean(v[:, :, None] * v[:, None, :], second)
    std = (model.var / beta).sqrt()
    for unit in range(2):
        centers = model.means()[:, unit].numpy()

        def cdf(x, centers=centers, s=std[unit]):  # type: ignore[no-untyped-def]
            return stats.norm.cdf((x[:, None] - centers) / s.item()) @ p_h.numpy()

        assert stats.kstest(v[:, unit].numpy(), cdf).pvalue > P_VALUE


@each_backend
def test_gaussian_clamped_sampling(backend: str) -> None:
    model = small_gaussian(3, 3, spread=0.5)
    W, b, c, log_var = fp32(model.W, model.b, model.c, model.log_var)
    n, mask = draws(48_000, backend), torch.tensor([False, True, False])
    v = torch.tensor([0.0, 1.25, 0.0]).expand(n, -1)
    out = rk.gibbs_sample(
        v, W, b, c, 16, log_var=log_var, clamp=mask, seed=4, backend=backend
    ).double()
    assert (out[:, 1] == 1.25).all()
    free, h = ~mask, model.h_states
    m = model.means()
    log_p = h @ model.c + 1.25 / model.var[1] * (h @ model.W[1])
    log_p = log_p + (0.5 * (m**2 - model.b**2) / model.var)[:, free].sum(1)
    mean, second = model.v_moments(log_p.softmax(0))
    assert_mean(out[:, free], mean[free])
    assert_mean(out[:, 0] * out[:, 2], second[0, 2])
    assert_mean(out[:, free] ** 2, second.diag()[free])


@each_backend
def test_input_is_untouched_and_output_is_new(backend: str) -> None:
    v, W, b, c = binary(10, 7), normal(7, 5), normal(7), normal(5)
    kept = v.clone()
    out = rk.gibbs_sample(v, W, b, c, 2, seed=0, backend=backend)
    assert torch.equal(v, kept) and out.data_ptr() != v.data_ptr()
    for dtype in (torch.uint8, torch.bool, torch.float16):
        cast = rk.gibbs_sample(v, W, b, c, 2, seed=0, out_dtype=dtype, backend=backend)
        assert cast.dtype == dtype and torch.equal(cast.float(), out)
        again = rk.gibbs_sample(v.to(dtype), W, b, c, 2, seed=0, backend=backend)
        assert same(again, out)
