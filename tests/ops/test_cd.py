"""cd_step and cd_loss: statistics, expectations, persistence, buffers, Gaussian units."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import draws, each_backend
from support.enumeration import Exact, ExactGaussian, small_bernoulli, small_gaussian
from support.statistics import SIGMAS
from support.tensors import binary, fp32, normal, same
from torch import Tensor

import rbm_kernels as rk

CHAINS = 120_000


def parameters(model: Exact | ExactGaussian) -> tuple[Tensor, ...]:
    return fp32(model.W, model.b, model.c)


def p_hidden(v: Tensor, W: Tensor, c: Tensor, log_var: Tensor | None = None) -> Tensor:
    v = v.double()
    if log_var is not None:
        v = v / log_var.double().exp()
    return torch.sigmoid(c.double() + v @ W.double())


def gradients(
    data: Tensor, chains: Tensor, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None = None
) -> list[Tensor]:
    """Gradient of mean F(data) - mean F(chains) in float64, by autograd of the formula."""
    leaves = [t.double().requires_grad_() for t in (W, b, c)]
    if log_var is not None:
        leaves.append(log_var.double().requires_grad_())

    def F(v: Tensor) -> Tensor:
        v = v.double()
        W, b, c = leaves[:3]
        if log_var is None:
            return -(v @ b) - torch.nn.functional.softplus(v @ W + c, threshold=1000).sum(1)
        var = leaves[3].exp()
        x = (v / var) @ W + c
        return ((v - b) ** 2 / (2 * var)).sum(1) - torch.nn.functional.softplus(x).sum(1)

    return list(torch.autograd.grad(F(data).mean() - F(chains).mean(), leaves))


def assert_within_spread(step: rk.CDStep, exact: tuple[Tensor, ...], terms: list[Tensor]) -> None:
    """Each gradient within SIGMAS standard errors; `terms` are the per-chain summands [N, ...]."""
    grads = [step.grad_W, step.grad_b, step.grad_c, step.grad_log_var][: len(exact)]
    for got, want, term in zip(grads, exact, terms, strict=True):
        assert got is not None
        error = term.std(0) / math.sqrt(term.shape[0]) + 1e-6
        z = ((got.double() - want) / error).abs().max().item()
        assert z < SIGMAS, f"off by {z:.1f} standard errors"


def bernoulli_terms(chains: Tensor, W: Tensor, c: Tensor) -> list[Tensor]:
    p, v = p_hidden(chains, W, c), chains.double()
    return [v[:, :, None] * p[:, None, :], v, p]


DATA = torch.tensor(
    [[1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1], [1, 0, 1, 1, 0, 0]]
).float()


@each_backend
@pytest.mark.parametrize("k", [1, 2, 5])
def test_mean_of_the_estimate_is_its_expectation(backend: str, k: int) -> None:
    model = small_bernoulli(spread=1.2)
    W, b, c = parameters(model)
    data = DATA.repeat(draws(CHAINS, backend) // 4, 1)
    step = rk.cd_step(data, W, b, c, k, seed=k, backend=backend)
    exact = model.cd_gradient(DATA.double(), k)
    terms = bernoulli_terms(step.chains, W, c)
    assert_within_spread(step, exact, terms)
    assert step.grad_log_var is None
    if k < 5:  # one sweep more or less is far outside the error
        with pytest.raises(AssertionError):
            assert_within_spread(step, model.cd_gradient(DATA.double(), k + 1), terms)


@each_backend
def test_many_sweeps_approach_the_likelihood_gradient(backend: str) -> None:
    model = small_bernoulli()
    W, b, c = parameters(model)
    step = rk.cd_step(
        DATA, W, b, c, 14, chains=torch.zeros(draws(60_000, backend), 6), seed=1, backend=backend
    )
    exact = model.nll_gradient(DATA.double())
    assert_within_spread(step, exact, bernoulli_terms(step.chains, W, c))


@each_backend
@pytest.mark.parametrize("k", [1, 3])
def test_persistent_chains_of_another_count(backend: str, k: int) -> None:
    """4 rows of data beside 90,000 chains, and a short last batch: each phase by its own count."""
    model = small_bernoulli()
    W, b, c = parameters(model)
    start = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).float()
    chains = start.repeat(draws(90_000, backend) // 3, 1)
    kept = chains.clone()
    step = rk.cd_step(DATA, W, b, c, k, chains=chains, seed=8, backend=backend)
    assert torch.equal(chains, kept), "the caller's chains were written"
    assert step.chains.shape == chains.shape and step.chains.data_ptr() != chains.data_ptr()
    exact = model.cd_gradient(DATA.double(), k, start=start.double())
    assert_within_spread(step, exact, bernoulli_terms(step.chains, W, c))
    # The short last batch: chains advance alike, whatever the data.
    short = rk.cd_step(DATA[:1], W, b, c, k, chains=chains, seed=8, backend=backend)
    assert same(short.chains, step.chains)
    exact = model.cd_gradient(DATA[:1].double(), k, start=start.double())
    assert_within_spread(short, exact, bernoulli_terms(short.chains, W, c))


@each_backend
@pytest.mark.parametrize(
    "n", [(1, 1), (7, 3), (3, 64), (64, 64), (65, 130), (128, 100), (33, None)]
)
@pytest.mark.parametrize("size", [(30, 17), (64, 64), (5, 70), (100, 1)])
@pytest.mark.parametrize("gaussian", [False, True])
def test_statistics_are_those_of_the_returned_chains(
    backend: str, n: tuple[int, int | None], size: tuple[int, int], gaussian: bool
) -> None:
    """Sampled v_k with p(h | v_k) of that same v_k, recomputed from `chains` in float64."""
    n_data, n_chains = n
    W, b, c = normal(*size, scale=0.3), normal(size[0], seed=1), normal(size[1], seed=2)
    v = normal(n_data, size[0], seed=3) if gaussian else binary(n_data, size[0], seed=3)
    log_var = normal(size[0], seed=4, scale=0.3) if gaussian else None
    chains = None if n_chains is None else binary(n_chains, size[0], seed=5)
    step = rk.cd_step(
        v, W, b, c, 2, chains=chains, log_var=log_var, seed=6, backend=backend, precision="highest"
    )
    expected = gradients(v, step.chains, W, b, c, log_var)
    grads = [step.grad_W, step.grad_b, step.grad_c, step.grad_log_var][: len(expected)]
    reach = 1.0 if log_var is None else (v.abs().max() + step.chains.abs().max()).item() ** 2
    for got, want in zip(grads, expected, strict=True):
        assert got is not None and got.dtype == torch.float32 and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * reach)


@each_backend
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_statistics_of_two_digits(backend: str, precision: str) -> None:
    v, W, b, c = binary(64, 50), normal(50, 40, scale=0.2), normal(50), normal(40)
    step = rk.cd_step(v, W, b, c, 1, seed=6, backend=backend, precision=precision)
    for got, want in zip(step[:3], gradients(v, step.chains, W, b, c), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=50 * 2**-16 * 0.25 + 2**-15)


@each_backend
def test_negative_statistics_are_not_those_of_probabilities(backend: str) -> None:
    """The classic mistake, p(v_k) in place of v_k, differs from what is returned."""
    W, b, c = normal(20, 10), normal(20), normal(10)
    v = binary(8, 20)
    step = rk.cd_step(v, W, b, c, 1, seed=0, backend=backend)
    assert ((step.chains == 0) | (step.chains == 1)).all()
    h = rk.sample_hidden(v, W, c, seed=(0, 0), backend=backend)
    _, mean = rk.sample_visible(h, W, b, return_probs=True, seed=(0, 1), backend=backend)
    wrong = gradients(v, mean, W, b, c)
    assert (step.grad_W.double() - wrong[0]).abs().max() > 0.02


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
def test_chains_are_those_of_gibbs_sample(backend: str, gaussian: bool) -> None:
    W, b, c = normal(20, 10), normal(20), normal(10)
    v, chains = binary(8, 20), binary(5, 20, seed=4)
    extra = {"log_var": normal(20, seed=9, scale=0.2)} if gaussian else {}
    common = {"seed": (4, 50), "chain_offset": 3, "backend": backend, **extra}
    step = rk.cd_step(v, W, b, c, 3, **common)
    assert same(step.chains, rk.gibbs_sample(v, W, b, c, 3, **common))
    step = rk.cd_step(v, W, b, c, 3, chains=chains, **common)
    assert same(step.chains, rk.gibbs_sample(chains, W, b, c, 3, **common))


@each_backend
@pytest.mark.parametrize("k", [1, 3])
def test_gaussian_estimate_by_enumeration(backend: str, k: int) -> None:
    model = small_gaussian(2, 3, spread=1.0)
    W, b, c, log_var = fp32(model.W, model.b, model.c, model.log_var)
    rows = torch.tensor([[1.5, -1.0], [0.2, 0.4], [-2.0, 1.0]])
    step = rk.cd_step(
        rows.repeat(draws(CHAINS, backend) // 3, 1),
        W,
        b,
        c,
        k,
        log_var=log_var,
        seed=k,
        backend=backend,
    )
    v, p = step.chains.double(), p_hidden(step.chains, W, c, log_var)
    vp = v[:, :, None] * p[:, None, :]
    terms = [
        vp / model.var[:, None],
        v / model.var,
        p,
        (-0.5 * (v - model.b) ** 2 + (model.W * vp).sum(2)) / model.var,
    ]
    assert_within_spread(step, model.cd_gradient(rows.double(), k), terms)


@each_backend
def test_gaussian_chains_approach_the_likelihood_gradient(backend: str) -> None:
    model = small_gaussian(3, 4)
    W, b, c, log_var = fp32(model.W, model.b, model.c, model.log_var)
    rows = normal(5, 3, seed=2)
    step = rk.cd_step(
        rows,
        W,
        b,
        c,
        24,
        chains=torch.zeros(draws(48_000, backend), 3),
        log_var=log_var,
        seed=3,
        backend=backend,
    )
    v, p = step.chains.double(), p_hidden(step.chains, W, c, log_var)
    vp = v[:, :, None] * p[:, None, :]
    terms = [
        vp / model.var[:, None],
        v / model.var,
        p,
        (-0.5 * (v - model.b) ** 2 + (model.W * vp).sum(2)) / model.var,
    ]
    assert_within_spread(step, model.nll_gradient(rows.double()), terms)


@each_backend
@pytest.mark.parametrize("grey", ["[0, 1]", "multiples of 1/255", "one grey pixel"])
def test_grey_data(backend: str, grey: str) -> None:
    v = torch.rand(40, 30, generator=torch.Generator().manual_seed(1))
    if grey == "multiples of 1/255":
        v = (v * 255).round() / 255
    if grey == "one grey pixel":
        v = v.round()
        v[3, 7] = 0.125
    W, b, c = normal(30, 12, seed=2, scale=0.3), normal(30, seed=3), normal(12, seed=4)
    step = rk.cd_step(v, W, b, c, 1, seed=0, backend=backend)
    assert ((step.chains == 0) | (step.chains == 1)).all()
    for got, want in zip(step[:3], gradients(v, step.chains, W, b, c), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
def test_diagnostics(backend: str, gaussian: bool) -> None:
    W, b, c = normal(30, 12, scale=0.3), normal(30, seed=3), normal(12, seed=4)
    v = normal(33, 30, seed=1) if gaussian else binary(33, 30, seed=1)
    extra = {"log_var": normal(30, seed=9, scale=0.2)} if gaussian else {}
    step = rk.cd_step(v, W, b, c, 2, chains=v[:9].round(), seed=0, backend=backend, **extra)
    for got, states in ((step.free_energy_data, v), (step.free_energy_chain, step.chains)):
        assert got.shape == () and got.dtype == torch.float32
        params = [t.double() for t in (states, W, b, c)]
        log_var = extra["log_var"].double() if extra else None
        exact = rk.free_energy(*params, log_var=log_var, backend="reference").mean()
        torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-5)


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
def test_out_and_accumulate(backend: str, gaussian: bool) -> None:
    W, b, c = normal(20, 10), normal(20), normal(10)
    v = normal(8, 20) if gaussian else binary(8, 20)
    extra = {"log_var": normal(20, seed=9, scale=0.2)} if gaussian else {}
    shapes = [(20, 10), (20,), (10,)] + [(20,)] * gaussian
    common = {"seed": 4, "backend": backend, **extra}
    plain = rk.cd_step(v, W, b, c, 1, **common)
    grads = [g for g in plain[:4] if g is not None]
    out = tuple(torch.full(s, float("nan")) for s in shapes)
    step = rk.cd_step(v, W, b, c, 1, out=out, **common)
    for buffer, returned, grad in zip(out, step, grads, strict=False):
        assert returned is buffer or returned.data_ptr() == buffer.data_ptr()
        assert same(buffer, grad)
    assert same(step.chains, plain.chains)
    out = tuple(normal(*s, seed=20) for s in shapes)
    before = [t.clone() for t in out]
    rk.cd_step(v, W, b, c, 1, out=out, accumulate=True, **common)
    for buffer, start, grad in zip(out, before, grads, strict=True):
        torch.testing.assert_close(buffer, start + grad, rtol=0, atol=1e-6)


@each_backend
def test_out_may_be_the_gradients_of_parameters(backend: str) -> None:
    v = binary(8, 20)
    params = [t.requires_grad_() for t in (normal(20, 10), normal(20), normal(10))]
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        rk.cd_step(
            v, *params, 1, out=tuple(p.grad for p in params), accumulate=True, seed=4,
            backend=backend,
        )  # fmt: skip
    once = rk.cd_step(v, *params, 1, seed=4, backend=backend)
    for p, grad in zip(params, once[:3], strict=True):
        torch.testing.assert_close(p.grad, 2 * grad, rtol=1e-6, atol=1e-7)
        assert not grad.requires_grad


@each_backend
def test_out_need_not_be_contiguous(backend: str) -> None:
    v, W, b, c = binary(8, 20), normal(20, 10), normal(20), normal(10)
    plain = rk.cd_step(v, W, b, c, 1, seed=4, backend=backend)
    storage = torch.full((10, 20), float("nan")), torch.full((40,), float("nan"))
    out = (storage[0].T, storage[1][::2], torch.full((10,), float("nan")))
    try:
        rk.cd_step(v, W, b, c, 1, out=out, seed=4, backend=backend)
    except ValueError as refused:
        assert "out" in str(refused)
    else:
        assert all(same(o, g) for o, g in zip(out, plain[:3], strict=True))
        assert storage[1][1::2].isnan().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    W, b, c = (t.to(dtype) for t in (normal(20, 10, scale=0.5), normal(20), normal(10)))
    v = binary(16, 20)
    step = rk.cd_step(v.to(dtype), W, b, c, 1, seed=4, backend=backend)
    assert step.chains.dtype == dtype
    tolerance = max(2e-6, torch.finfo(dtype).eps)
    for got, want in zip(step[:3], gradients(v, step.chains, W, b, c), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16])
def test_data_and_chains_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    v, W, b, c = binary(8, 20), normal(20, 10), normal(20), normal(10)
    chains = binary(5, 20, seed=4)
    common = {"seed": 4, "backend": backend}
    plain = rk.cd_step(v, W, b, c, 2, **common)
    step = rk.cd_step(v.to(dtype), W, b, c, 2, **common)
    assert all(same(x, y) for x, y in zip(plain[:3], step[:3], strict=True))
    assert torch.equal(plain.chains, step.chains.float())
    plain = rk.cd_step(v, W, b, c, 2, chains=chains, **common)
    step = rk.cd_step(v, W, b, c, 2, chains=chains.to(dtype), **common)
    assert all(same(x, y) for x, y in zip(plain[:3], step[:3], strict=True))
    assert torch.equal(plain.chains, step.chains.float())


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_loss_and_its_backward(backend: str, gaussian: bool, persistent: bool) -> None:
    params = [normal(20, 10, scale=0.4), normal(20, seed=1), normal(10, seed=2)]
    v = normal(8, 20) if gaussian else binary(8, 20)
    if gaussian:
        params.append(normal(20, seed=9, scale=0.2))
    chains = binary(5, 20, seed=4) if persistent else None
    extra = {"log_var": params[3]} if gaussian else {}
    common = {"seed": (4, 6), "backend": backend}
    step = rk.cd_step(v, *params[:3], 2, chains=chains, **extra, **common)

    leaves = [t.clone().requires_grad_() for t in params]
    extra = {"log_var": leaves[3]} if gaussian else {}
    moving = None if chains is None else chains.clone()
    loss = rk.cd_loss(v, *leaves[:3], 2, chains=moving, **extra, **common)
    assert loss.shape == () and loss.requires_grad
    expected = step.free_energy_data - step.free_energy_chain
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    if moving is not None:
        assert same(moving, step.chains), "chains must be advanced in place"
    (-3.0 * loss).backward()
    for leaf, grad in zip(leaves, step, strict=False):
        torch.testing.assert_close(leaf.grad, -3.0 * grad, rtol=1e-6, atol=1e-6)
    # The value alone, without gradients.
    with torch.no_grad():
        again = rk.cd_loss(
            v, *leaves[:3], 2, chains=None if chains is None else chains.clone(), **extra, **common
        )
    assert not again.requires_grad
    torch.testing.assert_close(again, loss.detach(), rtol=1e-6, atol=1e-6)


@each_backend
def test_loss_gives_gradients_only_where_asked(backend: str) -> None:
    v = binary(8, 20)
    for position in range(3):
        params = [normal(20, 10), normal(20), normal(10)]
        params[position].requires_grad_()
        rk.cd_loss(v, *params, 1, seed=0, backend=backend).backward()
        assert [p.grad is not None for p in params] == [i == position for i in range(3)]


@each_backend
def test_loss_accumulates_over_micro_batches(backend: str) -> None:
    params = [t.requires_grad_() for t in (normal(20, 10), normal(20), normal(10))]
    v = binary(8, 20)
    for rows in (slice(0, 4), slice(4, 8)):
        loss = rk.cd_loss(v[rows], *params, 1, seed=0, chain_offset=rows.start, backend=backend)
        (loss / 2).backward()
    whole = rk.cd_step(v, *params, 1, seed=0, backend=backend)
    for p, grad in zip(params, whole[:3], strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-6)


@each_backend
def test_loss_under_an_optimizer_learns(backend: str) -> None:
    """Exact log-likelihood of four patterns rises far above the independent-pixels model."""
    patterns = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).float()
    data = patterns.repeat(32, 1)
    W, b, c = (
        t.requires_grad_() for t in (normal(6, 5, scale=0.05), torch.zeros(6), torch.zeros(5))
    )
    optimizer = torch.optim.SGD([W, b, c], lr=0.4)
    chains = binary(64, 6)
    for i in range(150):
        optimizer.zero_grad()
        rk.cd_loss(data, W, b, c, 5, chains=chains, seed=(1, 10 * i), backend=backend).backward()
        optimizer.step()
    model = Exact(*(t.detach().double() for t in (W, b, c)))
    log_likelihood = -(model.empirical(data.double()) @ model.free_energy()) - model.log_z()
    independent = 6 * math.log(0.5)
    print(f"log-likelihood {log_likelihood:.3f}, independent pixels {independent:.3f}")
    assert log_likelihood > independent + 1.5


@each_backend
@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_encoder_gets_the_gradient_of_the_data(
    backend: str, visible: str, persistent: bool, dtype: torch.dtype
) -> None:
    """dF/dv / B by autograd of the formula in float64; all else is as without an encoder."""
    W, b, c = (t.to(dtype) for t in (normal(20, 10, scale=0.4), normal(20), normal(10, seed=1)))
    log_var = normal(20, seed=9, scale=0.2).to(dtype) if visible == "gaussian" else None
    code = torch.sigmoid(normal(8, 20, seed=2)).to(dtype)

    def loss(v: Tensor, *leaves: Tensor) -> Tensor:
        chains = binary(5, 20, seed=4) if persistent else None
        return rk.cd_loss(v, *leaves, 2, chains=chains, log_var=log_var, seed=3, backend=backend)

    plain = [t.clone().requires_grad_() for t in (W, b, c)]
    expected = loss(code, *plain)
    expected.backward()
    v = code.clone().requires_grad_()
    leaves = [t.clone().requires_grad_() for t in (W, b, c)]
    found = loss(v, *leaves)
    assert same(found.detach(), expected.detach())
    (2 * found).backward()
    for leaf, other in zip(leaves, plain, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert same(leaf.grad, 2 * other.grad)

    exact = code.double().clone().requires_grad_()
    x = c.double() + (exact if log_var is None else exact / log_var.double().exp()) @ W.double()
    own = -exact @ b.double()
    if log_var is not None:
        own = ((exact - b.double()).square() / (2 * log_var.double().exp())).sum(1)
    (own - torch.nn.functional.softplus(x).sum(1)).mean().backward()
    assert v.grad is not None and exact.grad is not None
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(v.grad.double(), 2 * exact.grad, rtol=tolerance, atol=tolerance)

    # An encoder alone may learn, with the machine held still.
    v = code.clone().requires_grad_()
    loss(v, W, b, c).backward()
    assert v.grad is not None
    torch.testing.assert_close(v.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_an_encoder_of_spins_gets_the_gradient_of_the_data() -> None:
    W, b, c = normal(6, 4), normal(6), normal(4)
    v = (2 * binary(8, 6) - 1).requires_grad_()
    rk.cd_loss(v, W, b, c, visible="spin", seed=0).backward()
    exact = v.detach().double().requires_grad_()
    x = c.double() + exact @ W.double()
    (-exact @ b.double() - torch.nn.functional.softplus(x).sum(1)).mean().backward()
    assert v.grad is not None and exact.grad is not None
    torch.testing.assert_close(v.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
