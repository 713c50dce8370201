"""Spin units in every operation and on every backend, against enumeration of their own energy."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import draws, each_backend
from support.enumeration import ExactSpin, small_spin, state_number
from support.statistics import SIGMAS, assert_chi_square, assert_mean
from support.tensors import binary, fp32, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels.units.spin import SpinChange

SPIN = {"visible": "spin"}
DATA = torch.tensor([[1, -1, 1, 1, -1, -1], [1, 1, 1, -1, -1, -1], [-1, -1, 1, -1, 1, 1]]).float()
MASK = torch.tensor([True, False, False, True, False, False])
VALUES = torch.tensor([1.0, -1, -1, -1, -1, -1])


def parameters(model: ExactSpin) -> tuple[Tensor, ...]:
    return fp32(model.W, model.b, model.c)


def spins(*shape: int, seed: int = 0) -> Tensor:
    return 2 * binary(*shape, seed=seed) - 1


def counts_of(v: Tensor) -> Tensor:
    assert (v.abs() == 1).all()
    return torch.bincount(state_number((v + 1) / 2), minlength=2 ** v.shape[1])


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_free_energies_of_all_states(backend: str, beta: float) -> None:
    model = small_spin(beta=beta)
    v = model.v_states.float()
    F = rk.free_energy(v, *parameters(model), beta=beta, backend=backend, **SPIN)
    assert F.dtype == torch.float32
    torch.testing.assert_close(F.double(), model.free_energy(), rtol=0, atol=2e-5)
    each = torch.full((len(v),), beta)
    F = rk.free_energy(v, *parameters(model), beta=each, backend=backend, **SPIN)
    torch.testing.assert_close(F.double(), model.free_energy(), rtol=0, atol=2e-5)


def test_free_energy_is_differentiable_twice() -> None:
    model = small_spin(3, 2)
    v = torch.tensor([[1.0, -1, 1], [-1.0, -1, 1]]).double()
    leaves = [t.clone().requires_grad_() for t in (model.W, model.b, model.c)]
    beta = torch.tensor([1.0, 0.5])

    def energy(*tensors: Tensor) -> Tensor:
        return rk.free_energy(v, *tensors, beta=beta, **SPIN)

    torch.testing.assert_close(
        rk.free_energy(model.v_states, *leaves, **SPIN).detach(), model.free_energy()
    )
    assert torch.autograd.gradcheck(energy, leaves)
    assert torch.autograd.gradgradcheck(energy, leaves)
    # In v the formula's own derivative, at a state: -b - W p(h | v).
    state = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rk.free_energy(state, *leaves, **SPIN).sum(), state)
    p = torch.sigmoid(model.c + v @ model.W)
    torch.testing.assert_close(grad, -(model.b + p @ model.W.t()))


@each_backend
def test_half_sweeps(backend: str) -> None:
    model = small_spin(spread=1.2)
    W, b, c = parameters(model)
    n = draws(48_000, backend)
    options = {"return_probs": True, "backend": backend, **SPIN}
    h, p = rk.sample_hidden(model.v_states.float(), W, c, seed=1, **options)
    torch.testing.assert_close(p.double(), model.mean_h_given_v(), rtol=0, atol=1e-5)
    v, mean = rk.sample_visible(model.h_states.float(), W, b, seed=1, **options)
    torch.testing.assert_close(mean.double(), model.mean_v_given_h(), rtol=0, atol=1e-5)
    assert v.abs().eq(1).all() and h.dtype == v.dtype == torch.float32

    start = model.v_states[41].float().expand(n, -1)
    h = rk.sample_hidden(start, W, c, seed=2, backend=backend, **SPIN)
    counts = torch.bincount(state_number(h), minlength=32)
    assert_chi_square(counts, model.p_h_given_v()[41])
    start = model.h_states[13].float().expand(n, -1)
    v = rk.sample_visible(start, W, b, seed=2, backend=backend, **SPIN)
    assert_chi_square(counts_of(v), model.p_v_given_h()[13])


def test_probabilities_are_differentiable() -> None:
    W, b, c = normal(4, 3), normal(4, seed=1), normal(3, seed=2)
    v, h = spins(5, 4), binary(5, 3)
    for t in (W, b, c):
        t.requires_grad_()
    options = {"seed": 0, "return_probs": True, **SPIN}
    weight = normal(5, 3, seed=3)
    got = torch.autograd.grad((rk.sample_hidden(v, W, c, **options)[1] * weight).sum(), [W, c])
    want = torch.autograd.grad((torch.sigmoid(c + v @ W) * weight).sum(), [W, c])
    torch.testing.assert_close(got, want)
    weight = normal(5, 4, seed=3)
    got = torch.autograd.grad((rk.sample_visible(h, W, b, **options)[1] * weight).sum(), [W, b])
    want = torch.autograd.grad((torch.tanh(b + h @ W.t()) * weight).sum(), [W, b])
    torch.testing.assert_close(got, want)


@each_backend
@pytest.mark.parametrize("k", [1, 3])
def test_k_sweeps_are_k_transitions(backend: str, k: int) -> None:
    model, start = small_spin(spread=1.2), 41
    v0 = model.v_states[start].float().expand(draws(144_000, backend), -1)
    v = rk.gibbs_sample(v0, *parameters(model), k, seed=k, backend=backend, **SPIN)
    T = model.v_transition()
    assert_chi_square(counts_of(v), torch.linalg.matrix_power(T, k)[start])
    with pytest.raises(AssertionError):
        assert_chi_square(counts_of(v), torch.linalg.matrix_power(T, k + 1)[start])


@each_backend
def test_beta_of_each_chain(backend: str) -> None:
    model = small_spin()
    betas = torch.tensor([0.0, 0.3, 1.0, 2.0])
    beta = betas.repeat(draws(48_000, backend))
    start = model.v_states[9].float().expand(beta.numel(), -1)
    v = rk.gibbs_sample(start, *parameters(model), 2, beta=beta, seed=5, backend=backend, **SPIN)
    for i, value in enumerate(betas.tolist()):
        exact = ExactSpin(model.W, model.b, model.c, value)
        assert_chi_square(counts_of(v[i::4]), torch.matrix_power(exact.v_transition(), 2)[9])


@each_backend
@pytest.mark.parametrize("form", ["mask", "mask and values"])
def test_clamped_sampling_from_the_conditional(backend: str, form: str) -> None:
    model = small_spin()
    n = draws(48_000, backend)
    started = torch.tensor([1.0, 1, 1, -1, -1, 1])
    if form == "mask":
        v0, clamp = started.expand(n, -1), MASK
    else:  # the start disagrees with the values on both clamped units
        v0 = torch.tensor([-1.0, 1, 1, 1, -1, 1]).expand(n, -1)
        clamp = (MASK, VALUES.expand(n, -1))
    options = {"clamp": clamp, "backend": backend, **SPIN}
    v = rk.gibbs_sample(v0, *parameters(model), 1, seed=2, **options)
    T = model.clamped_transition(MASK, VALUES.double())
    assert_chi_square(counts_of(v), T[state_number((started[None] + 1) / 2)[0]])
    v = rk.gibbs_sample(v0, *parameters(model), 12, seed=3, **options)
    assert_chi_square(counts_of(v), model.p_v_clamped(MASK, VALUES.double()))


def assert_is_expected(step: rk.CDStep, exact: tuple[Tensor, ...], W: Tensor, c: Tensor) -> None:
    v = step.chains.double()
    p = torch.sigmoid(c.double() + v @ W.double())
    for got, want, term in zip(step[:3], exact, (v[:, :, None] * p[:, None], v, p), strict=True):
        error = term.std(0) / math.sqrt(term.shape[0]) + 1e-6
        assert ((got.double() - want) / error).abs().max() < SIGMAS


@each_backend
@pytest.mark.parametrize("persistent", [False, True])
def test_mean_of_the_estimate_is_its_expectation(backend: str, persistent: bool) -> None:
    model = small_spin(spread=1.2)
    W, b, c = parameters(model)
    n = draws(120_000, backend)
    data, start = DATA.repeat(n // 3, 1), DATA[:2].flip(1) if persistent else None
    chains = None if start is None else start.repeat(n // 2, 1)
    kept = None if chains is None else chains.clone()
    step = rk.cd_step(data, W, b, c, 2, chains=chains, seed=3, backend=backend, **SPIN)
    assert same(chains, kept) and step.grad_log_var is None
    exact_start = None if start is None else start.double()
    assert_is_expected(step, model.cd_gradient(DATA.double(), 2, exact_start), W, c)
    with pytest.raises(AssertionError):
        assert_is_expected(step, model.cd_gradient(DATA.double(), 3, exact_start), W, c)
    numbers = state_number((torch.cat([DATA, step.chains]) + 1) / 2)
    F = model.free_energy()[numbers]
    expected = torch.stack([F[:3].mean(), F[3:].mean()])
    torch.testing.assert_close(step.free_energies.double(), expected, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_those_of_the_returned_chains(backend: str, dtype: torch.dtype) -> None:
    W, b, c = (t.to(dtype) for t in (normal(30, 17, scale=0.3), normal(30), normal(17)))
    v, chains = spins(7, 30, seed=3).to(dtype), spins(5, 30, seed=4)
    step = rk.cd_step(v, W, b, c, 2, chains=chains, seed=6, backend=backend, **SPIN)
    assert step.grad_W.dtype == step.grad_b.dtype == step.grad_c.dtype == dtype
    assert step.chains.dtype == torch.float32

    leaves = [t.detach().double().clone().requires_grad_() for t in (W, b, c)]

    def F(v: Tensor) -> Tensor:
        W, b, c = leaves
        return -(v.double() @ b) - torch.nn.functional.softplus(c + v.double() @ W).sum(1)

    expected = torch.autograd.grad(F(v).mean() - F(step.chains).mean(), leaves)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(step[:3], expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)

    out = tuple(torch.ones_like(g, dtype=torch.float32) for g in step[:3])
    options = {"chains": chains, "seed": 6, "backend": backend, **SPIN}
    written = rk.cd_step(v, W, b, c, 2, out=out, **options)
    assert all(a is b for a, b in zip(written[:3], out, strict=True))
    # Buffers take float32, and gradients without buffers W's dtype: compare in the narrower one.
    narrow = torch.float32 if dtype == torch.float64 else dtype
    for buffer, grad in zip(out, step[:3], strict=True):
        assert same(buffer.to(narrow), grad.to(narrow))
    rk.cd_step(v, W, b, c, 2, out=out, accumulate=True, **options)
    for buffer, grad in zip(out, step[:3], strict=True):
        assert same((buffer / 2).to(narrow), grad.to(narrow))

    leaves = [t.detach().clone().requires_grad_() for t in (W, b, c)]
    advanced = chains.clone()
    loss = rk.cd_loss(v, *leaves, 2, chains=advanced, seed=6, backend=backend, **SPIN)
    loss.backward()
    assert same(advanced, step.chains)
    F_data, F_chain = step.free_energy_data, step.free_energy_chain
    torch.testing.assert_close(loss.detach(), F_data - F_chain, rtol=1e-4, atol=1e-4)
    for leaf, grad in zip(leaves, step[:3], strict=True):
        assert same(leaf.grad, grad)


@each_backend
@pytest.mark.parametrize("size", [(3, 5, 17), (65, 63, 64), (33, 300, 50)])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_backends_agree_bit_for_bit(
    backend: str, size: tuple[int, int, int], precision: str
) -> None:
    rows, n_visible, n_hidden = size
    W = normal(n_visible, n_hidden, seed=5, scale=2.0 / n_visible**0.5)
    b, c = normal(n_visible, seed=6), normal(n_hidden, seed=7)
    v, h, chains = spins(rows, n_visible), binary(rows, n_hidden), spins(rows + 1, n_visible)
    mask = binary(rows, n_visible, seed=11, p=0.2).bool()

    def everything(backend: str) -> list[Tensor]:
        common = {
            "seed": (77, 2**34), "chain_offset": 11, "precision": precision, "backend": backend,
            **SPIN,
        }  # fmt: skip
        up = rk.sample_hidden(v, W, c, beta=0.9, return_probs=True, **common)
        down = rk.sample_visible(h, W, b, beta=0.9, return_probs=True, **common)
        held = rk.gibbs_sample(v, W, b, c, 3, clamp=mask, **common)
        cd = rk.cd_step(v, W, b, c, 2, **common)
        pcd = rk.cd_step(v, W, b, c, 1, chains=chains, **common)
        return [*up, *down, held, *cd[:3], cd.chains, *pcd[:3], pcd.chains]

    for got, want in zip(everything(backend), everything("reference"), strict=True):
        assert same(got, want)


def test_the_seed_advances_as_for_other_units() -> None:
    seed = torch.tensor([7, 0])
    model = small_spin()
    W, b, c = parameters(model)
    rk.cd_step(DATA, W, b, c, 2, seed=seed, **SPIN)
    rk.gibbs_sample(DATA, W, b, c, 3, seed=seed, **SPIN)
    rk.sample_hidden(DATA, W, c, seed=seed, **SPIN)
    assert seed.tolist() == [7, 4 + 6 + 1]


def test_the_bias_of_the_change_has_the_same_bits_in_any_order() -> None:
    W, b, c = normal(3000, 40, scale=0.1), normal(3000), normal(40)
    W[5] = 1e-9
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    bias = SpinChange().hidden_bias(c, W)
    assert same(bias, SpinChange().hidden_bias(c, W[order]))
    expected = c.double() - W.double().sum(0)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-7, atol=1e-6)
    half = SpinChange().model(W.bfloat16(), b.bfloat16(), c.bfloat16())
    assert all(parameter.dtype == torch.float32 for parameter in half)


BAD = [0.0, 0.5, -2.0, math.nan, math.inf]


@pytest.mark.parametrize("value", BAD)
def test_other_values_are_refused_by_name(value: float) -> None:
    W, b, c = parameters(small_spin())
    bad = DATA.clone()
    bad[1, 2] = value
    words = f"of spin units must be -1 or 1, got {value}"
    buffers = (torch.zeros(6, 5), torch.zeros(6), torch.zeros(5))
    calls = {
        "sample_hidden: v": lambda: rk.sample_hidden(bad, W, c, **SPIN),
        "gibbs_sample: v": lambda: rk.gibbs_sample(bad, W, b, c, **SPIN),
        "gibbs_sample: clamp's values": lambda: rk.gibbs_sample(
            DATA, W, b, c, clamp=(MASK, bad), **SPIN
        ),
        "free_energy: v": lambda: rk.free_energy(bad, W, b, c, **SPIN),
        "cd_step: v": lambda: rk.cd_step(bad, W, b, c, out=buffers, **SPIN),
        "cd_step: chains": lambda: rk.cd_step(DATA, W, b, c, chains=bad, out=buffers, **SPIN),
        "cd_loss: v": lambda: rk.cd_loss(bad, W, b, c, **SPIN),
        "cd_loss: chains": lambda: rk.cd_loss(DATA, W, b, c, chains=bad, **SPIN),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} {words}"):
            call()
    assert not any(buffer.any() for buffer in buffers)
    # On a GPU the values are not read beforehand: the kernels see NaN, which they refuse.
    marked = SpinChange().states(bad)
    assert marked.isnan().sum() == 1 and marked[1, 2].isnan()


def test_what_spins_do_not_take() -> None:
    W, b, c = parameters(small_spin())
    with pytest.raises(TypeError, match="out_dtype of spin units must be a float dtype"):
        rk.gibbs_sample(DATA, W, b, c, out_dtype=torch.bool, **SPIN)
    with pytest.raises(TypeError, match="out_dtype of spin units must be a float dtype"):
        rk.sample_visible(binary(3, 5), W, b, out_dtype=torch.uint8, **SPIN)
    assert rk.sample_hidden(DATA, W, c, out_dtype=torch.bool, **SPIN).dtype == torch.bool
    with pytest.raises(TypeError, match="chains of spin units must be floating point"):
        rk.cd_step(DATA, W, b, c, chains=DATA > 0, **SPIN)
    for function in (rk.free_energy, rk.gibbs_sample, rk.cd_step, rk.cd_loss):
        with pytest.raises(
            ValueError, match=rf"{function.__name__}: spin units have .* got \['log_var'\]"
        ):
            function(DATA, W, b, c, log_var=b, **SPIN)
    with pytest.raises(ValueError, match="sample_hidden: W must be"):
        rk.sample_hidden(DATA, W.t(), c, **SPIN)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    W, b, c = parameters(small_spin())

    def both(v: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return rk.free_energy(v, W, b, c, **SPIN), rk.gibbs_sample(v, W, b, c, 2, seed=seed, **SPIN)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(DATA, torch.tensor([3, 0])), both(DATA, torch.tensor([3, 0])), strict=True
    ):
        assert same(got, want)


@each_backend
def test_long_chains_reach_the_model(backend: str) -> None:
    model = small_spin()
    start = spins(draws(84_000, backend), 6)
    v = rk.gibbs_sample(start, *parameters(model), 12, seed=3, backend=backend, **SPIN)
    assert_chi_square(counts_of(v), model.p_v())
    assert_mean(v, model.p_v() @ model.v_states)
