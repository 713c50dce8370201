"""free_energy: values against enumeration and float64, derivatives, extremes."""

from __future__ import annotations

import pytest
import torch
from support.backends import each_backend
from support.enumeration import Exact, ExactGaussian, small_bernoulli, small_gaussian
from support.tensors import binary, fp32, normal
from torch import Tensor

import rbm_kernels as rk

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def naive(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None = None, beta: float = 1.0
) -> Tensor:
    """The formula of the textbook in plain PyTorch."""
    if log_var is None:
        return -beta * (v @ b) - torch.nn.functional.softplus(
            beta * (v @ W + c), threshold=1000
        ).sum(1)
    var = log_var.exp()
    return beta * ((v - b) ** 2 / (2 * var)).sum(1) - torch.nn.functional.softplus(
        beta * ((v / var) @ W + c), threshold=1000
    ).sum(1)


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.4, 2.0])
def test_bernoulli_by_enumeration(backend: str, beta: float) -> None:
    model = small_bernoulli(beta=beta)
    W, b, c = fp32(model.W, model.b, model.c)
    F = rk.free_energy(model.v_states.float(), W, b, c, beta=beta, backend=backend)
    assert F.shape == (64,)
    torch.testing.assert_close(F.double(), model.free_energy(), rtol=1e-6, atol=1e-6)
    p = (-F.double()).softmax(0)
    torch.testing.assert_close(p, model.p_v(), rtol=1e-5, atol=1e-7)


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_gaussian_by_enumeration(backend: str, beta: float) -> None:
    model = small_gaussian(beta=beta)
    v = normal(50, 4, seed=3, scale=2.0)
    params = fp32(model.W, model.b, model.c)
    F = rk.free_energy(v, *params, log_var=model.log_var.float(), beta=beta, backend=backend)
    torch.testing.assert_close(F.double(), model.free_energy(v.double()), rtol=2e-6, atol=2e-6)


@each_backend
def test_beta_is_not_a_factor(backend: str) -> None:
    model = small_bernoulli()
    W, b, c = fp32(model.W, model.b, model.c)
    v = model.v_states.float()
    F = rk.free_energy(v, W, b, c, beta=0.5, backend=backend).double()
    tempered = Exact(model.W, model.b, model.c, 0.5).free_energy()
    torch.testing.assert_close(F, tempered, rtol=1e-6, atol=1e-6)
    assert (F - 0.5 * model.free_energy()).abs().max() > 0.1


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("shape", [(64, 784, 100), (3, 65, 33), (1, 1, 1), (7, 1, 5), (7, 5, 1)])
def test_error_is_that_of_float32(
    backend: str, gaussian: bool, shape: tuple[int, int, int]
) -> None:
    n, n_visible, n_hidden = shape
    W, b, c = normal(n_visible, n_hidden, scale=0.2), normal(n_visible, seed=1), normal(n_hidden)
    v = normal(n, n_visible, seed=4) if gaussian else binary(n, n_visible, seed=4)
    log_var = normal(n_visible, seed=5, scale=0.3) if gaussian else None
    exact = naive(
        *(t.double() for t in (v, W, b, c)), None if log_var is None else log_var.double()
    )
    F = rk.free_energy(v, W, b, c, log_var=log_var, backend=backend, precision="highest")
    assert F.dtype == torch.float32
    peer = (naive(v, W, b, c, log_var) - exact).abs().max().item()
    # Three times plain float32's error, or a few last places of the result where it is lucky.
    allowed = 3 * peer + 4 * 2**-23 * (1 + exact.abs().max().item())
    assert (F.double() - exact).abs().max().item() <= allowed


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gaussian", [False, True])
def test_dtypes_accumulate_in_float32_or_better(
    backend: str, dtype: torch.dtype, gaussian: bool
) -> None:
    W, b, c = (t.to(dtype) for t in (normal(300, 50, scale=0.2), normal(300), normal(50)))
    v = (normal(9, 300, seed=4) if gaussian else binary(9, 300, seed=4)).to(dtype)
    log_var = normal(300, seed=5, scale=0.3).to(dtype) if gaussian else None
    if dtype == torch.float64 and backend != "reference":
        backend = "auto"  # see test_float64_needs_the_reference
    F = rk.free_energy(v, W, b, c, log_var=log_var, backend=backend)
    exact = naive(
        *(t.double() for t in (v, W, b, c)), None if log_var is None else log_var.double()
    )
    assert F.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(F.double(), exact, rtol=tolerance, atol=100 * tolerance)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, *FLOATS])
def test_binary_data_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    v, W, b, c = binary(9, 7), normal(7, 5), normal(7), normal(5)
    F = rk.free_energy(v, W, b, c, backend=backend)
    again = rk.free_energy(v.to(dtype), W, b, c, backend=backend)
    torch.testing.assert_close(again, F, rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_at_large_weights(backend: str, sign: float) -> None:
    v, W = torch.ones(3, 40), torch.full((40, 30), sign * 1e4)
    b, c = torch.full((40,), sign * 1e4), torch.full((30,), sign * 1e4)
    F = rk.free_energy(v, W, b, c, backend=backend)
    exact = naive(v.double(), W.double(), b.double(), c.double())
    assert torch.isfinite(F).all()
    torch.testing.assert_close(F.double(), exact, rtol=1e-6, atol=1e-6)
    params = [t.requires_grad_() for t in (v.clone(), W, b, c)]
    grads = torch.autograd.grad(rk.free_energy(*params, backend=backend).sum(), params)
    assert all(torch.isfinite(g).all() for g in grads)


@each_backend
def test_softplus_keeps_its_digits(backend: str) -> None:
    """log1p(exp(-|x|)): at x = -15 softplus is 3.1e-7 and must not be rounded away, nor overflow.

    The steps cover the range where exp(x) leaves float32 (88.7) and where thresholds stand.
    """
    sizes = (0.0, 1e-4, 0.3, 5.0, 15.0, 19.0, 21.0, 50.0, 87.5, 89.0, 110.0, 500.0, 699.0, 701.0)
    for x in (*sizes, *(-s for s in sizes if s < 80)):
        c = torch.full((4,), x, requires_grad=True)
        F = rk.free_energy(torch.zeros(1, 2), torch.zeros(2, 4), torch.zeros(2), c, backend=backend)
        exact = -4 * torch.nn.functional.softplus(torch.tensor(x).double(), threshold=600)
        torch.testing.assert_close(F.detach().double()[0], exact, rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(F.sum(), c)
        torch.testing.assert_close(grad, -torch.sigmoid(c.detach()), rtol=2e-6, atol=0)


@each_backend
def test_beta_of_each_row(backend: str) -> None:
    v, W, b, c = binary(6, 7), normal(7, 5), normal(7), normal(5)
    betas = torch.tensor([0.0, 0.2, 0.5, 1.0, 2.0, 7.0])
    for log_var in (None, normal(7, seed=8, scale=0.3)):
        F = rk.free_energy(v, W, b, c, log_var=log_var, beta=betas, backend=backend)
        for row, beta in enumerate(betas.tolist()):
            one = rk.free_energy(
                v[row : row + 1], W, b, c, log_var=log_var, beta=beta, backend=backend
            )
            torch.testing.assert_close(F[row : row + 1], one, rtol=1e-6, atol=1e-6)


def test_float64_needs_the_reference() -> None:
    """The kernels compute in float32: "cpu" asked for by name refuses, auto falls back."""
    params = [t.double() for t in (binary(3, 4), normal(4, 2), normal(4), normal(2))]
    with pytest.raises(RuntimeError, match="free_energy: backend 'cpu'"):
        rk.free_energy(*params, backend="cpu")
    torch.testing.assert_close(rk.free_energy(*params), naive(*params), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_gradcheck_and_gradgradcheck(gaussian: bool, beta: float) -> None:
    arguments = [normal(3, 4, seed=1), normal(4, 2, seed=2), normal(4, seed=3), normal(2, seed=4)]
    if not gaussian:
        arguments[0] = arguments[0].sigmoid()
    if gaussian:
        arguments.append(normal(4, seed=5, scale=0.4))
    arguments = [t.double().requires_grad_() for t in arguments]

    def call(v: Tensor, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None = None) -> Tensor:
        return rk.free_energy(v, W, b, c, log_var=log_var, beta=beta)

    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
def test_float32_gradients(backend: str, gaussian: bool) -> None:
    arguments = [binary(20, 60, seed=1), normal(60, 30, scale=0.2), normal(60), normal(30)]
    if gaussian:
        arguments[0] = normal(20, 60, seed=1)
        arguments.append(normal(60, seed=5, scale=0.3))
    weights = normal(20, seed=9)
    for beta in (1.0, 0.5):
        leaves = [t.clone().requires_grad_() for t in arguments]
        log_var = leaves[4] if gaussian else None
        F = rk.free_energy(*leaves[:4], log_var=log_var, beta=beta, backend=backend)
        grads = torch.autograd.grad((F * weights).sum(), leaves)
        exact = [t.double().requires_grad_() for t in arguments]
        value = naive(*exact[:4], exact[4] if gaussian else None, beta)
        expected = torch.autograd.grad((value * weights.double()).sum(), exact)
        for got, want in zip(grads, expected, strict=True):
            scale = want.abs().max().item()
            torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6 * (1 + scale))


@each_backend
def test_gradient_only_where_asked(backend: str) -> None:
    v, W, b, c = binary(5, 6), normal(6, 4), normal(6), normal(4)
    for position in range(4):
        arguments = [t.clone() for t in (v, W, b, c)]
        arguments[position].requires_grad_()
        rk.free_energy(*arguments, backend=backend).sum().backward()
        assert [t.grad is not None for t in arguments] == [i == position for i in range(4)]
    assert not rk.free_energy(v, W, b, c, backend=backend).requires_grad
    with torch.no_grad():
        W_leaf = W.clone().requires_grad_()
        assert not rk.free_energy(v, W_leaf, b, c, backend=backend).requires_grad


@each_backend
def test_gradient_of_the_likelihood_by_enumeration(backend: str) -> None:
    """mean F(data) + log Z over enumerated states, differentiated through free_energy alone."""
    model = small_bernoulli()
    leaves = [t.requires_grad_() for t in fp32(model.W, model.b, model.c)]
    data = binary(40, 6, seed=3)
    log_z = (-rk.free_energy(model.v_states.float(), *leaves, backend=backend)).logsumexp(0)
    torch.testing.assert_close(log_z.double(), model.log_z(), rtol=1e-6, atol=1e-6)
    loss = rk.free_energy(data, *leaves, backend=backend).mean() + log_z
    grads = torch.autograd.grad(loss, leaves)
    for got, want in zip(grads, model.nll_gradient(data.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_gaussian_free_energy_is_a_density() -> None:
    """exp(-F) integrated over v is Z: the quadratic term and softplus agree on a scale."""
    model: ExactGaussian = small_gaussian(2, 3)
    W, b, c, log_var = (t for t in (model.W, model.b, model.c, model.log_var))
    grid = torch.linspace(-14, 14, 401, dtype=torch.float64)
    v = torch.cartesian_prod(grid, grid)
    F = rk.free_energy(v, W, b, c, log_var=log_var)
    log_z = (-F.double()).logsumexp(0) + 2 * (grid[1] - grid[0]).log()
    torch.testing.assert_close(log_z, model.log_z(), rtol=0, atol=1e-9)


@each_backend
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_two_digits_stay_within_their_bound(backend: str, precision: str) -> None:
    v, W, b, c = binary(64, 200), normal(200, 40, scale=0.2), normal(200), normal(40)
    F = rk.free_energy(v, W, b, c, backend=backend, precision=precision)
    exact = naive(v.double(), W.double(), b.double(), c.double())
    bound = 40 * v.sum(1).max().item() * W.abs().max().item() * 2**-15
    assert (F.double() - exact).abs().max().item() < bound
