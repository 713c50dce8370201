"""Derivatives by function transforms and in forward mode, and torch.vmap, against loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import each_backend
from support.tensors import binary, normal
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import rbm_kernels as rk

V, H, B, MODELS = 6, 4, 5, 3
KINDS = ("bernoulli", "gaussian", "spin")
each_kind = pytest.mark.parametrize("kind", KINDS)


def states(kind: str, *rows: int) -> Tensor:
    if kind == "gaussian":
        return normal(*rows, V, seed=1)
    return 2 * binary(*rows, V, seed=1) - 1 if kind == "spin" else binary(*rows, V, seed=1)


def units(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The keywords of the kind of visible units."""
    log_var = normal(V, seed=5, scale=0.3).to(dtype) if kind == "gaussian" else None
    return {"visible": kind, "log_var": log_var}


def parameters(*models: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(*models, V, H, seed=2, scale=0.5),
        normal(*models, V, seed=3),
        normal(*models, H, seed=4),
    )


def energy(kind: str, dtype: torch.dtype, **options: Any) -> Callable[..., Tensor]:
    known = units(kind, dtype)
    return lambda v, W, b, c: rk.free_energy(v, W, b, c, **known, **options)


def double(kind: str) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in (states(kind, B), *parameters()))


@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.6, None])
def test_every_first_derivative_of_the_free_energy(kind: str, beta: float | None) -> None:
    """Reverse and forward mode, plain and batched, against finite differences."""
    inputs = tuple(x.requires_grad_() for x in double(kind))
    if kind == "spin":  # whose states cannot be moved by a little
        inputs = (inputs[0].detach(), *inputs[1:])
    betas = torch.linspace(0.2, 2.0, B).double() if beta is None else beta
    F = energy(kind, torch.float64, beta=betas)
    assert gradcheck(
        F, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@each_kind
def test_every_second_derivative_of_the_free_energy(kind: str) -> None:
    """All four orders of forward and reverse mode, against autograd applied twice."""
    v, *given = double(kind)
    F = energy(kind, torch.float64)

    def loss(W: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (F(v, W, b, c) ** 2).sum()

    every = (0, 1, 2)
    expected = torch.autograd.functional.hessian(loss, tuple(given))
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            got = outer(inner(loss, every), every)(*given)
            for row, expected_row in zip(got, expected, strict=True):
                for x, y in zip(row, expected_row, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@each_kind
@each_backend
def test_free_energies_over_data_and_models_and_both(backend: str, kind: str) -> None:
    """In float32 the formula stays within rounding of the kernels."""
    F = energy(kind, torch.float32, backend=backend)
    v, models = states(kind, MODELS, B), parameters(MODELS)
    one = tuple(x[0] for x in models)
    for in_dims, arguments in (
        ((0, None, None, None), (v, *one)),
        ((None, 0, 0, 0), (v[0], *models)),
        ((0, 0, 0, 0), (v, *models)),
        ((1, 0, 0, None), (v.transpose(0, 1), *models[:2], one[2])),
    ):
        got, pairs = (
            vmap(F, in_dims=in_dims)(*arguments),
            list(zip(arguments, in_dims, strict=True)),
        )
        loop = [
            F(*(x if dim is None else x.select(dim, i) for x, dim in pairs)) for i in range(MODELS)
        ]
        torch.testing.assert_close(got, torch.stack(loop), rtol=1e-5, atol=1e-5)


def test_models_are_batched_and_not_looped_over() -> None:
    """As many operations for many models as for a few, none of them a kernel's."""
    from torch.fx.experimental.proxy_tensor import make_fx

    v = states("bernoulli", B)
    each = vmap(energy("bernoulli", torch.float32), in_dims=(None, 0, 0, 0))
    few, many = (
        [str(node.target) for node in make_fx(each)(v, *parameters(n)).graph.nodes] for n in (2, 9)
    )
    assert few == many
    assert not any("rbm_kernels" in target for target in few)


@each_kind
def test_gradients_of_each_sample(kind: str) -> None:
    v, W, b, c = (states(kind, B), *parameters())
    F = energy(kind, torch.float32)
    got = vmap(grad(lambda x, W: F(x[None], W, b, c)[0], argnums=1), in_dims=(0, None))(v, W)
    for row, x in zip(got, v, strict=True):
        leaf = W.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F(x[None], leaf, b, c)[0], leaf)
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


@each_kind
def test_the_free_energy_has_a_derivative_for_a_learned_temperature(kind: str) -> None:
    """One number or one of each row; in forward mode a number is not read as a constant."""
    arguments = double(kind)

    def F(beta: Tensor) -> Tensor:
        return energy(kind, torch.float64, beta=beta)(*arguments)

    one = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for beta in (one, torch.linspace(0.2, 2.0, B).double().requires_grad_()):
        assert gradcheck(F, beta, check_forward_ad=True)
    expected = torch.autograd.functional.jacobian(F, one)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor(0.7), torch.tensor(1.0))
        narrow = energy(kind, torch.float32, beta=dual)(*(x.float() for x in arguments))
        tangent = forward_ad.unpack_dual(narrow).tangent
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "mean"), [("bernoulli", torch.sigmoid), ("spin", torch.tanh)])
def test_means_have_a_derivative_for_a_learned_temperature(
    kind: str, mean: Callable[[Tensor], Tensor]
) -> None:
    h, (W, b, _), beta = binary(B, H, seed=6), parameters(), torch.tensor(0.7)

    def got(beta: Tensor) -> Tensor:
        return rk.sample_visible(h, W, b, beta=beta, return_probs=True, seed=0, visible=kind)[1]

    def want(beta: Tensor) -> Tensor:
        return mean(beta * (b + h @ W.t()))

    for mode in (jacrev, jacfwd, lambda f: lambda x: torch.autograd.functional.jacobian(f, x)):
        torch.testing.assert_close(mode(got)(beta), mode(want)(beta), rtol=1e-5, atol=1e-6)


@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_derivatives_of_probabilities(kind: str, beta: float) -> None:
    """Both layers, all orders and modes, plain and per model, against the textbook's formula."""
    v, h, (W, b, c) = states(kind, B), binary(B, H, seed=6), parameters()
    known = units(kind)
    log_var = known["log_var"]
    options = {"beta": beta, "return_probs": True, "seed": 0, **known}
    mean = {"bernoulli": torch.sigmoid, "gaussian": lambda x: x / beta, "spin": torch.tanh}[kind]

    def pairs(W: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen = v if log_var is None else v / log_var.exp()
        return [
            (rk.sample_hidden(v, W, c, **options)[1], torch.sigmoid(beta * (c + seen @ W))),
            (rk.sample_visible(h, W, b, **options)[1], mean(beta * (b + h @ W.t()))),
        ]

    tangent = normal(V, H, seed=8)
    for layer in (0, 1):
        derivatives = []
        for which in (0, 1):

            def p(W: Tensor, which: int = which, layer: int = layer) -> Tensor:
                return pairs(W)[layer][which]

            def square(W: Tensor, p: Callable[[Tensor], Tensor] = p) -> Tensor:
                return (p(W) ** 2).sum()

            leaf = W.clone().requires_grad_()
            (first,) = torch.autograd.grad(square(leaf), leaf, create_graph=True)
            with forward_ad.dual_level():
                dual = p(forward_ad.make_dual(W, tangent))
                in_forward_mode = forward_ad.unpack_dual(dual).tangent
            derivatives.append([
                in_forward_mode, jvp(p, (W,), (tangent,))[1], grad(square)(W), hessian(square)(W),
                torch.autograd.grad((first * tangent).sum(), leaf)[0],
                vmap(grad(square))(parameters(MODELS)[0]),
            ])  # fmt: skip
        for got, want in zip(*derivatives, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@each_kind
def test_cd_loss_under_transforms_has_the_gradient_of_cd_step(kind: str) -> None:
    v, (W, b, c) = states(kind, B), parameters()
    known = units(kind)
    options = {"seed": 3, "visible": kind}
    step = rk.cd_step(v, W, b, c, 2, **options, log_var=known["log_var"])
    given = tuple(x for x in (W, b, c, known["log_var"]) if x is not None)
    expected = [x for x in step[:4] if x is not None]
    every = tuple(range(len(given)))

    def loss(W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None = None) -> Tensor:
        return rk.cd_loss(v, W, b, c, 2, **options, log_var=log_var)

    tangents = tuple(normal(*x.shape, seed=9) for x in given)
    value, tangent = jvp(loss, given, tangents)
    torch.testing.assert_close(value, loss(*given))
    along = sum((x * y).sum() for x, y in zip(expected, tangents, strict=True))
    torch.testing.assert_close(tangent, along, rtol=1e-4, atol=1e-5)
    models = tuple(torch.stack([x, 2 * x]) for x in given)
    per_model = vmap(grad(loss, every))(*models)
    for i, got in enumerate(grad(loss, every)(*given)):
        torch.testing.assert_close(got, expected[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(per_model[i][0], expected[i], rtol=1e-5, atol=1e-6)


@each_kind
def test_cd_loss_has_the_derivative_of_the_data_phase_for_v(kind: str) -> None:
    v, (W, b, c) = states(kind, B), parameters()
    options = units(kind)
    got = grad(lambda x: rk.cd_loss(x, W, b, c, seed=0, **options))(v)
    want = grad(lambda x: rk.free_energy(x, W, b, c, **options).mean())(v)
    torch.testing.assert_close(got, want)


def test_what_has_no_derivative_raises_and_is_not_zero() -> None:
    v, (W, b, c) = states("bernoulli", B), parameters()

    def loss(W: Tensor) -> Tensor:
        return rk.cd_loss(v, W, b, c, seed=0)

    def step(W: Tensor) -> Tensor:
        return rk.cd_step(v, W, b, c, seed=0).grad_W

    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            with pytest.raises(RuntimeError, match="cd_loss: only its first derivatives"):
                outer(inner(loss))(W)
        with pytest.raises(RuntimeError, match="cd_step: its results have no derivatives"):
            outer(step)(W)
    leaf = W.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(first, step(W))
    with pytest.raises(RuntimeError, match="cd_loss: only its first derivatives"):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(RuntimeError, match="cd_loss: only its first derivatives"):
        first.sum().backward()


def test_the_registered_operator_drops_no_derivative() -> None:
    """An exported program calls it: it has reverse mode, and says where the other modes are."""
    v, (W, b, c) = states("bernoulli", B), parameters()

    def F(W: Tensor) -> Tensor:
        return torch.ops.rbm_kernels.free_energy(v, W, b, c, None, 1.0, None, 3, None)

    for derivative in (
        lambda: jvp(F, (W,), (W,)),
        lambda: grad(lambda W: F(W).sum())(W),
        lambda: jacfwd(F)(W),
    ):
        with pytest.raises(RuntimeError, match="rbm_kernels.free_energy has them"):
            derivative()
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="rbm_kernels.free_energy has them"):
            F(forward_ad.make_dual(W, W))
        assert torch.equal(F(W), F(W.clone()))


@each_kind
def test_draws_of_several_models(kind: str) -> None:
    """Given a seed, the states of a loop; without one torch asks what randomness is meant."""
    v, models, known = states(kind, B), parameters(MODELS), units(kind)

    def chain(W: Tensor, b: Tensor, c: Tensor, **seed: int) -> Tensor:
        h = rk.sample_hidden(v, W, c, **known, **seed)
        start = rk.sample_visible(h, W, b, **known, **seed)
        return rk.gibbs_sample(start, W, b, c, 2, **known, **seed)

    got = vmap(lambda *model: chain(*model, seed=4))(*models)
    loop = [chain(*model, seed=4) for model in zip(*models, strict=True)]
    assert torch.equal(got, torch.stack(loop))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(chain)(*models)
    same = tuple(x[:1].expand_as(x) for x in models)
    drawn = vmap(chain, randomness="different")(*same)
    assert not torch.equal(drawn[0], drawn[1])
    drawn = vmap(chain, randomness="same")(*same)
    assert torch.equal(drawn[0], drawn[1])


def test_transforms_inside_a_compiled_function() -> None:
    torch._dynamo.reset()
    v, (W, b, c) = states("bernoulli", B), parameters()

    def per_sample(W: Tensor) -> tuple[Tensor, Tensor]:
        def F(x: Tensor, W: Tensor) -> Tensor:
            return rk.free_energy(x[None], W, b, c)[0]

        return vmap(grad(F, argnums=1), in_dims=(0, None))(v, W), grad(
            lambda W: rk.cd_loss(v, W, b, c, seed=0)
        )(W)

    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(W), per_sample(W), strict=True):
        torch.testing.assert_close(got, want)
