"""Registration with torch: opcheck, torch.compile without graph breaks, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import each_backend
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk

ops = torch.ops.rbm_kernels


def parameters(gaussian: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    return {
        "v": (normal(6, 9, seed=1) if gaussian else binary(6, 9, seed=1)).to(dtype),
        "h": binary(6, 4, seed=2).to(dtype),
        "W": normal(9, 4, seed=3, scale=0.5).to(dtype),
        "b": normal(9, seed=4).to(dtype),
        "c": normal(4, seed=5).to(dtype),
        "log_var": normal(9, seed=6, scale=0.3).to(dtype) if gaussian else None,
        "chains": binary(3, 9, seed=7).to(dtype),
    }


def calls(gaussian: bool, backend: str, grad: bool) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each registered operator with arguments in the order of its schema."""
    t = parameters(gaussian)
    if grad:
        for name in ("v", "h", "W", "b", "c", "log_var"):
            if t[name] is not None:
                t[name] = t[name].clone().requires_grad_()
    betas, mask = torch.full((6,), 0.7), binary(6, 9, seed=8).bool()
    common = {
        **{name: t[name] for name in ("v", "W", "b", "c", "log_var")},
        **{"k": 2, "beta": 0.8, "betas": None, "return_probs": True, "mask": None, "values": None},
        **{"chains": None, "seed": torch.tensor([5, 6]), "chain_offset": 2, "backend": backend},
        **{"out_dtype": torch.float32, "digits": 3},
    }
    tempered = {"beta": 1.0, "betas": betas}
    up = {"given": t["v"], "bias": t["c"], "given_log_var": t["log_var"], "drawn_log_var": None}
    down = {"given": t["h"], "bias": t["b"], "given_log_var": None, "drawn_log_var": t["log_var"]}
    down["W"] = t["W"].detach().t().requires_grad_(grad)
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "sample_hidden": ("sample_hidden", up),
        "sample_hidden betas": ("sample_hidden", {**up, **tempered}),
        "sample_hidden states": ("sample_hidden", {**up, "return_probs": False}),
        "sample_visible": ("sample_visible", down),
        "gibbs_sample": ("gibbs_sample", {}),
        "gibbs_sample clamped": (
            "gibbs_sample", {"mask": mask, "values": binary(6, 9, seed=9), **tempered},
        ),
        "free_energy": ("free_energy", {}),
        "free_energy betas": ("free_energy", tempered),
        "cd_step": ("cd_step", {}),
        "cd_step chains": ("cd_step", {"chains": t["chains"]}),
        "cd_loss": ("cd_loss", {}),
        "cd_loss chains": ("cd_loss", {"chains": t["chains"]}),
    }  # fmt: skip
    result = {}
    for variant, (name, changes) in variants.items():
        op, values = getattr(ops, name).default, common | changes
        result[variant] = (op, tuple(values[a.name] for a in op._schema.arguments))
    return result


@each_backend
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("name", list(calls(False, "reference", False)))
def test_opcheck(backend: str, gaussian: bool, name: str) -> None:
    """Schema, fake kernel and registration; with gradients wherever the operator has them."""
    op, arguments = calls(gaussian, backend, grad=False)[name]
    torch.library.opcheck(op, arguments)
    if name.startswith(("free_energy", "cd_loss", "sample")) and "states" not in name:
        op, arguments = calls(gaussian, backend, grad=True)[name]
        torch.library.opcheck(op, arguments)


def public(backend: str, gaussian: bool) -> dict[str, Callable[..., Any]]:
    """The public functions over (v, h, W, b, c, log_var, chains, seed)."""

    def real(log_var: Tensor | None) -> dict[str, Any]:
        return {"log_var": log_var, "backend": backend, "seed": (3, 4)}

    return {
        "sample_hidden": lambda v, h, W, b, c, s, m: rk.sample_hidden(v, W, c, **real(s)) * 1,
        "sample_hidden with probabilities": lambda v, h, W, b, c, s, m: rk.sample_hidden(
            v, W, c, return_probs=True, out_dtype=torch.uint8, **real(s)
        ),
        "sample_visible": lambda v, h, W, b, c, s, m: rk.sample_visible(h, W, b, **real(s)) * 1,
        "gibbs_sample": lambda v, h, W, b, c, s, m: rk.gibbs_sample(
            v, W, b, c, 2, clamp=v > 0.5, beta=0.9, **real(s)
        ),
        "free_energy": lambda v, h, W, b, c, s, m: rk.free_energy(
            v, W, b, c, log_var=s, backend=backend
        ).mean(),
        "cd_step": lambda v, h, W, b, c, s, m: rk.cd_step(v, W, b, c, 2, **real(s)),
        "cd_step with chains": lambda v, h, W, b, c, s, m: rk.cd_step(
            v, W, b, c, 2, chains=m, **real(s)
        ),
        "cd_loss": lambda v, h, W, b, c, s, m: rk.cd_loss(v, W, b, c, 2, **real(s)) * 2,
        "cd_loss with chains": lambda v, h, W, b, c, s, m: rk.cd_loss(
            v, W, b, c, 2, chains=m, **real(s)
        ),
    }


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if t is not None]


@each_backend
@pytest.mark.parametrize("name", list(public("reference", False)))
def test_compile_without_graph_breaks(backend: str, name: str) -> None:
    """fullgraph=True, the same bits as eager; aot_eager runs the traced graph without inductor."""
    torch._dynamo.reset()
    for gaussian in (False, True):
        function = public(backend, gaussian)[name]
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        values = {n: t if t is None else t.clone() for n, t in parameters(gaussian).items()}
        again = {n: t if t is None else t.clone() for n, t in parameters(gaussian).items()}
        for x, y in zip(
            leaves(function(*values.values())), leaves(compiled(*again.values())), strict=True
        ):
            assert same(x, y)
        for n, t in values.items():  # chains moved in place move alike
            assert same(t, again[n])


def test_compile_with_inductor() -> None:
    """One pass through the default compiler: a training step with a seed tensor that advances."""
    torch._dynamo.reset()

    def step(v: Tensor, W: Tensor, b: Tensor, c: Tensor, seed: Tensor) -> Tensor:
        h = rk.sample_hidden(v, W, c, seed=seed)
        loss = rk.cd_loss(v, W, b, c, 1, seed=seed)
        return loss + rk.free_energy(v, W, b, c).sum() + h.sum()

    t = parameters(False)
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        params = [t[n].clone().requires_grad_() for n in ("W", "b", "c")]
        seed = torch.tensor([8, 9])
        for _ in range(2):
            loss = function(t["v"], *params, seed)
            loss.backward()
        assert seed.tolist() == [8, 15]
        results.append([loss.detach(), *(p.grad for p in params)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@each_backend
def test_compile_does_not_freeze_a_drawn_seed(backend: str) -> None:
    """Without seed= each call draws anew, and torch.manual_seed still governs."""
    torch._dynamo.reset()
    W, c, v = normal(9, 40), normal(40), binary(6, 9)
    draw = torch.compile(
        lambda: rk.sample_hidden(v, W, c, backend=backend), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(3)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, draw()) and torch.equal(second, draw())


@each_backend
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_compile_of_another_batch_size(backend: str, batch: int) -> None:
    compiled = torch.compile(
        lambda v, W, b, c: rk.cd_step(v, W, b, c, 1, seed=1, backend=backend),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    t = parameters(False)
    v = binary(batch, 9)
    expected = rk.cd_step(v, t["W"], t["b"], t["c"], 1, seed=1, backend=backend)
    got = compiled(v, t["W"], t["b"], t["c"])
    assert all(same(x, y) for x, y in zip(expected, got, strict=True))


@each_backend
def test_functional_transforms_see_the_operator(backend: str) -> None:
    """make_fx traces one node, not the body of a kernel."""
    from torch.fx.experimental.proxy_tensor import make_fx

    t = parameters(False)
    graph = make_fx(
        lambda v, W, b, c: rk.free_energy(v, W, b, c, backend=backend), tracing_mode="fake"
    )(t["v"], t["W"], t["b"], t["c"])
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == ["rbm_kernels.free_energy.default"]


@each_backend
def test_tracing_leaves_nothing_behind(backend: str) -> None:
    """No fake tensor of a trace stays in a cache to be met by the next real call."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    v, W, b, c = binary(4, 9), normal(9, 4), normal(9), normal(4)
    for seed in (torch.tensor([1, 2]), 31, (5, 77)):
        tensors = (v, W, b, c) + ((seed,) if isinstance(seed, Tensor) else ())

        def call(v: Tensor, W: Tensor, b: Tensor, c: Tensor, s: Any = seed) -> Tensor:
            return rk.gibbs_sample(v, W, b, c, 7, seed=s, backend=backend)

        with FakeTensorMode() as fake:
            assert call(*(fake.from_tensor(t) for t in tensors)).shape == (4, 9)
        assert type(call(*tensors)) is Tensor


@each_backend
@pytest.mark.parametrize("beta", [1.0, 0.6, None])
@pytest.mark.parametrize("gaussian", [False, True])
def test_gradient_of_probabilities(backend: str, gaussian: bool, beta: float | None) -> None:
    """Returned probabilities are differentiable: against autograd of the formula in float64."""
    t = parameters(gaussian)
    betas = torch.rand(6, generator=torch.Generator().manual_seed(0)) if beta is None else beta
    factor = betas[:, None].double() if isinstance(betas, Tensor) else betas
    names = ["v", "h", "W", "b", "c"] + ["log_var"] * gaussian
    mine = {n: t[n].clone().requires_grad_() for n in names}
    real = {n: t[n].double().requires_grad_() for n in names}
    common = {"beta": betas, "return_probs": True, "seed": 0, "backend": backend}

    def losses(x: dict[str, Tensor], exact: bool) -> tuple[Tensor, Tensor]:
        log_var = x.get("log_var")
        if not exact:
            _, p = rk.sample_hidden(x["v"], x["W"], x["c"], log_var=log_var, **common)
            _, q = rk.sample_visible(x["h"], x["W"], x["b"], log_var=log_var, **common)
        else:
            scaled = x["v"] if log_var is None else x["v"] / log_var.exp()
            p = torch.sigmoid(factor * (x["c"] + scaled @ x["W"]))
            mean = x["b"] + x["h"] @ x["W"].T
            q = mean if gaussian else torch.sigmoid(factor * mean)
        return (p**2 * p.detach().cos()).sum(), (q**2).sum()

    for got, want in zip(losses(mine, False), losses(real, True), strict=True):
        grads = torch.autograd.grad(got, list(mine.values()), allow_unused=True)
        exact = torch.autograd.grad(want, list(real.values()), allow_unused=True)
        for x, y in zip(grads, exact, strict=True):
            if y is None:
                assert x is None or (x == 0).all()
            else:
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@each_backend
def test_sampled_states_carry_no_gradient(backend: str) -> None:
    W = normal(9, 4).requires_grad_()
    b, c = normal(9).requires_grad_(), normal(4).requires_grad_()
    v = binary(6, 9)
    common = {"seed": 0, "backend": backend}
    assert not rk.sample_hidden(v, W, c, **common).requires_grad
    assert not rk.gibbs_sample(v, W, b, c, 1, **common).requires_grad
    h, p = rk.sample_hidden(v, W, c, return_probs=True, **common)
    assert not h.requires_grad and p.requires_grad
    step = rk.cd_step(v, W, b, c, 1, **common)
    assert not any(t.requires_grad for t in leaves(step))


def test_gradcheck_in_double() -> None:
    """free_energy through the registered operator: gradcheck and gradgradcheck in float64.

    (The float32 draws of the other operators have no finite differences; their gradients are
    compared with autograd of the formulas above and in test_cd.py.)
    """
    for gaussian in (False, True):
        t = parameters(gaussian, torch.float64)
        arguments = [t[n].requires_grad_() for n in ("v", "W", "b", "c")]
        arguments += [t["log_var"].requires_grad_()] if gaussian else []
        for betas in (None, torch.rand(6, generator=torch.Generator().manual_seed(0))):

            def call(v: Tensor, W: Tensor, b: Tensor, c: Tensor, s: Any = None, q=betas) -> Tensor:
                beta = 0.7 if q is None else 1.0
                return ops.free_energy(v, W, b, c, s, beta, q, 3, "reference")

            assert torch.autograd.gradcheck(call, arguments)
            assert torch.autograd.gradgradcheck(call, arguments)


@each_backend
def test_autocast_leaves_results_alone(backend: str) -> None:
    """AMP: the loss is float32 and its gradients those of full precision."""
    t = parameters(False)
    grads = []
    for enabled in (False, True):
        W, b, c = (t[n].clone().requires_grad_() for n in ("W", "b", "c"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = rk.cd_loss(t["v"], W, b, c, 1, seed=1, backend=backend)
            F = rk.free_energy(t["v"], W, b, c, backend=backend)
        assert loss.dtype == F.dtype == torch.float32
        (loss + F.sum()).backward()
        grads.append([W.grad, b.grad, c.grad])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@each_backend
def test_in_inference_mode(backend: str) -> None:
    t = parameters(False)
    with torch.inference_mode():
        step = rk.cd_step(t["v"], t["W"], t["b"], t["c"], 1, seed=1, backend=backend)
        seed = torch.tensor([1, 0])
        rk.gibbs_sample(step.chains, t["W"], t["b"], t["c"], 1, seed=seed, backend=backend)
        rk.cd_loss(t["v"], t["W"], t["b"], t["c"], 1, chains=t["chains"].clone(), backend=backend)
    assert seed.tolist() == [1, 2]
