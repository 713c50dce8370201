"""Inputs of every shape, layout and dtype, and what is said of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import GPU_BACKENDS, each_backend
from support.errors import raises
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import backends

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in other memory; what lies between them is NaN (or 1 in bytes)."""
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "transposed" and t.dim() == 2:
        return t.T.contiguous().T
    shape = [2 * n + 1 for n in t.shape]
    fill: float = float("nan") if t.is_floating_point() else 1
    wide = torch.full(shape, fill, dtype=t.dtype)
    part = wide[tuple(slice(1, None, 2) for _ in shape)]
    part.copy_(t)
    return part


LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided"])


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    rows, n_visible, n_hidden = (
        draw(st.sampled_from([0, 1, 2, 5, 16, 17])),
        draw(st.sampled_from([1, 2, 3, 16, 33, 70])),
        draw(st.sampled_from([1, 2, 5, 16, 31, 65])),
    )
    dtype = draw(st.sampled_from(FLOATS))
    gaussian = draw(st.booleans())
    seed = draw(st.integers(0, 99))
    data_dtype = draw(st.sampled_from([*FLOATS, torch.uint8, torch.bool]))
    v = binary(rows, n_visible, seed=seed)
    if gaussian and data_dtype.is_floating_point:
        v = normal(rows, n_visible, seed=seed)
    return {
        "v": laid_out(v.to(data_dtype), draw(LAYOUTS)),
        "h": laid_out(binary(rows, n_hidden, seed=seed + 1).to(data_dtype), draw(LAYOUTS)),
        "W": laid_out(normal(n_visible, n_hidden, seed=seed + 2).to(dtype), draw(LAYOUTS)),
        "b": laid_out(normal(n_visible, seed=seed + 3).to(dtype), draw(LAYOUTS)),
        "c": laid_out(normal(n_hidden, seed=seed + 4).to(dtype), draw(LAYOUTS)),
        "log_var": laid_out(normal(n_visible, seed=seed + 5, scale=0.3).to(dtype), draw(LAYOUTS))
        if gaussian
        else None,
        "k": draw(st.integers(1, 3)),
        "seed": (draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 2**50))),
        "chain_offset": draw(st.integers(0, 2**32 - 64)),
        "beta": draw(st.sampled_from([1.0, 0.0 if not gaussian else 0.1, 0.5, 3, 2.0])),
        "out_dtype": draw(st.sampled_from([None, *FLOATS, torch.uint8, torch.bool])),
    }


def float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


@each_backend
@quick
@given(call=calls())
def test_any_layout_and_dtype_is_the_plain_call(backend: str, call: dict[str, Any]) -> None:
    """States equal those of contiguous float32 tensors with the same values."""
    v, h, W, b, c, log_var = (call[n] for n in ("v", "h", "W", "b", "c", "log_var"))
    before = [None if t is None else t.clone() for t in (v, h, W, b, c, log_var)]
    common = {n: call[n] for n in ("seed", "chain_offset")} | {"backend": backend}
    tempered = common | {"beta": call["beta"]}
    out_dtype = call["out_dtype"]
    if out_dtype is not None and not out_dtype.is_floating_point and log_var is not None:
        out_dtype = None
    rows, n_visible, n_hidden = v.shape[0], *W.shape
    v2, h2, W2, b2, c2, log_var2 = (float32(t) for t in (v, h, W, b, c, log_var))

    def agree(got: Tensor, plain: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        assert got.shape == shape and got.dtype == dtype and got.is_contiguous()
        assert same(got, plain.to(dtype))

    dtype = out_dtype or W.dtype
    up = rk.sample_hidden(v, W, c, log_var=log_var, out_dtype=out_dtype, **tempered)
    agree(up, rk.sample_hidden(v2, W2, c2, log_var=log_var2, **tempered), (rows, n_hidden), dtype)
    down = rk.sample_visible(h, W, b, log_var=log_var, out_dtype=out_dtype, **tempered)
    plain = rk.sample_visible(h2, W2, b2, log_var=log_var2, **tempered)
    agree(down, plain, (rows, n_visible), dtype)
    k = call["k"]
    chain = rk.gibbs_sample(v, W, b, c, k, log_var=log_var, out_dtype=out_dtype, **tempered)
    plain = rk.gibbs_sample(v2, W2, b2, c2, k, log_var=log_var2, **tempered)
    agree(chain, plain, (rows, n_visible), dtype)
    F = rk.free_energy(v, W, b, c, log_var=log_var, beta=call["beta"], backend="reference")
    F_plain = rk.free_energy(v2, W2, b2, c2, log_var=log_var2, beta=call["beta"], backend=backend)
    assert F.shape == (rows,)
    torch.testing.assert_close(F.float(), F_plain, rtol=3e-6, atol=3e-5)
    if rows:
        step = rk.cd_step(v, W, b, c, k, log_var=log_var, **common)
        plain_step = rk.cd_step(v2, W2, b2, c2, k, log_var=log_var2, **common)
        agree(step.chains, plain_step.chains, (rows, n_visible), W.dtype)
        for got, want in zip(step[:4], plain_step[:4], strict=True):
            if got is not None and want is not None:
                assert got.dtype == W.dtype
                torch.testing.assert_close(got, want.to(W.dtype), rtol=1e-6, atol=1e-6)
    for t, kept in zip((v, h, W, b, c, log_var), before, strict=True):
        assert (t is None and kept is None) or same(t, kept)


@each_backend
def test_empty_batches_of_samplers(backend: str) -> None:
    W, b, c = normal(7, 5), normal(7), normal(5)
    common = {"seed": 1, "backend": backend}
    none = torch.zeros(0, 7)
    h, p = rk.sample_hidden(none, W, c, return_probs=True, **common)
    assert h.shape == p.shape == (0, 5)
    v, p = rk.sample_visible(torch.zeros(0, 5), W, b, return_probs=True, **common)
    assert v.shape == p.shape == (0, 7)
    assert rk.gibbs_sample(none, W, b, c, 2, **common).shape == (0, 7)
    mask = torch.ones(7).bool()
    assert rk.gibbs_sample(none, W, b, c, 2, clamp=mask, beta=torch.ones(0), **common).shape == (
        0,
        7,
    )
    assert rk.free_energy(none, W, b, c, backend=backend).shape == (0,)
    gaussian = {"log_var": normal(7), **common}
    assert rk.sample_visible(torch.zeros(0, 5), W, b, **gaussian).shape == (0, 7)
    assert rk.gibbs_sample(none, W, b, c, 2, **gaussian).shape == (0, 7)


@each_backend
def test_a_beta_of_any_kind(backend: str) -> None:
    v, W, b, c = binary(4, 7), normal(7, 5), normal(7), normal(5)
    expected = rk.gibbs_sample(v, W, b, c, 2, beta=2.0, seed=1, backend=backend)
    for beta in (2, torch.tensor(2.0), torch.full((4,), 2), torch.full((4,), 2.0).double(),
                 torch.full((8,), 2.0)[::2]):  # fmt: skip
        assert same(expected, rk.gibbs_sample(v, W, b, c, 2, beta=beta, seed=1, backend=backend))


def skip_unread(backend: str) -> None:
    """On a GPU nobody reads the values of arguments: that would wait for the device."""
    if backend in GPU_BACKENDS:
        pytest.skip("GPU backends do not look for NaN or infinity")


# Every function with its arguments, and the arguments each one takes.
def arguments() -> dict[str, Any]:
    return {
        "v": binary(4, 7), "h": binary(4, 5), "W": normal(7, 5), "b": normal(7), "c": normal(5),
        "log_var": None, "k": 1, "chains": None, "out": None, "accumulate": False, "clamp": None,
        "beta": 1.0, "seed": 1, "backend": None, "precision": None, "out_dtype": None,
        "chain_offset": 0, "generator": None, "return_probs": False,
    }  # fmt: skip


DRAWN = ("seed", "generator", "chain_offset", "backend", "precision")
HALF = ("log_var", "beta", "return_probs", "out_dtype", *DRAWN)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "sample_hidden": (rk.sample_hidden, ("v", "W", "c"), HALF),
    "sample_visible": (rk.sample_visible, ("h", "W", "b"), HALF),
    "gibbs_sample": (
        rk.gibbs_sample, ("v", "W", "b", "c", "k"),
        ("log_var", "beta", "clamp", "out_dtype", *DRAWN),
    ),
    "free_energy": (
        rk.free_energy, ("v", "W", "b", "c"), ("log_var", "beta", "backend", "precision"),
    ),
    "cd_step": (
        rk.cd_step, ("v", "W", "b", "c", "k"),
        ("chains", "log_var", "out", "accumulate", *DRAWN),
    ),
    "cd_loss": (rk.cd_loss, ("v", "W", "b", "c", "k"), ("chains", "log_var", *DRAWN)),
}  # fmt: skip


def call(function: str, **changes: Any) -> Any:
    target, positional, keywords = FUNCTIONS[function]
    values = arguments() | changes
    return target(*(values[n] for n in positional), **{n: values[n] for n in keywords})


def takes(function: str, argument: str) -> bool:
    return argument in FUNCTIONS[function][1] + FUNCTIONS[function][2]


def everywhere(argument: str, **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(name, changes) for name in FUNCTIONS if takes(name, argument)]


NAN, INF = float("nan"), float("inf")


def with_value(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


META = torch.device("meta")
BAD: list[tuple[str, type[Exception], list[str], list[tuple[str, dict[str, Any]]]]] = [
    # what is wrong, error, words of the message, calls
    ("W transposed", ValueError, ["W must be [V, H] = [7, 5], got [5, 7]"],
     everywhere("W", W=normal(5, 7))),
    ("W a vector", ValueError, ["W", "[7]"], everywhere("W", W=normal(7))),
    ("W 3-d", ValueError, ["W", "[1, 7, 5]"], everywhere("W", W=normal(1, 7, 5))),
    ("W integer", TypeError, ["W", "int64"], everywhere("W", W=torch.ones(7, 5).long())),
    ("W a list", TypeError, ["W", "list", "torch.as_tensor"], everywhere("W", W=[[0.0] * 5] * 7)),
    ("W None", TypeError, ["W", "NoneType"], everywhere("W", W=None)),
    ("W complex", TypeError, ["W", "complex64"], everywhere("W", W=torch.ones(7, 5) * 1j)),
    ("v too wide", ValueError, ["v", "7", "[4, 8]"], everywhere("v", v=binary(4, 8))),
    ("v a vector", ValueError, ["v", "[7]"], everywhere("v", v=binary(7))),
    ("v 3-d", ValueError, ["v", "[2, 2, 7]"], everywhere("v", v=binary(2, 2, 7))),
    ("v complex", TypeError, ["v", "complex64"], everywhere("v", v=binary(4, 7) * 1j)),
    ("v a string", TypeError, ["v", "str"], everywhere("v", v="0110")),
    ("h too wide", ValueError, ["h", "5", "[4, 7]"], everywhere("h", h=binary(4, 7))),
    ("h complex", TypeError, ["h", "complex64"], everywhere("h", h=binary(4, 5) * 1j)),
    ("b too long", ValueError, ["b", "[7]", "[8]"], everywhere("b", b=normal(8))),
    ("b a matrix", ValueError, ["b", "[1, 7]"], everywhere("b", b=normal(1, 7))),
    ("b double", TypeError, ["b", "float64", "float32"], everywhere("b", b=normal(7).double())),
    ("c short", ValueError, ["c", "[5]", "[1]"], everywhere("c", c=normal(1))),
    ("c half", TypeError, ["c", "float16"], everywhere("c", c=normal(5).half())),
    ("log_var short", ValueError, ["log_var", "[7]", "[5]"],
     everywhere("log_var", log_var=normal(5))),
    ("log_var a number", TypeError, ["log_var"], everywhere("log_var", log_var=0.0)),
    ("v on meta", ValueError, ["v", "meta"], everywhere("v", v=torch.zeros(4, 7, device=META))),
    ("W on meta", ValueError, ["W", "meta"], everywhere("W", W=torch.zeros(7, 5, device=META))),
    ("b on meta", ValueError, ["b", "meta"], everywhere("b", b=torch.zeros(7, device=META))),
    ("c on meta", ValueError, ["c", "meta"], everywhere("c", c=torch.zeros(5, device=META))),
    ("W NaN", ValueError, ["W", "finite"], everywhere("W", W=with_value(normal(7, 5), NAN))),
    ("W infinite", ValueError, ["W", "finite"], everywhere("W", W=with_value(normal(7, 5), -INF))),
    ("b NaN", ValueError, ["b", "finite"], everywhere("b", b=with_value(normal(7), NAN))),
    ("c infinite", ValueError, ["c", "finite"], everywhere("c", c=with_value(normal(5), INF))),
    ("v NaN", ValueError, ["v", "finite"], everywhere("v", v=with_value(binary(4, 7), NAN))),
    ("v infinite", ValueError, ["v", "finite"], everywhere("v", v=with_value(binary(4, 7), INF))),
    ("h NaN", ValueError, ["h", "finite"], everywhere("h", h=with_value(binary(4, 5), NAN))),
    ("log_var NaN", ValueError, ["log_var", "finite"],
     everywhere("log_var", log_var=with_value(normal(7), NAN))),
    ("k zero", ValueError, ["k", "0"], everywhere("k", k=0)),
    ("k negative", ValueError, ["k", "-3"], everywhere("k", k=-3)),
    ("k a float", TypeError, ["k", "float"], everywhere("k", k=1.5)),
    ("beta negative", ValueError, ["beta", "-1"], everywhere("beta", beta=-1.0)),
    ("beta NaN", ValueError, ["beta", "nan"], everywhere("beta", beta=NAN)),
    ("beta of three chains", ValueError, ["beta", "[4]", "[3]"],
     everywhere("beta", beta=torch.ones(3))),
    ("beta of a chain NaN", ValueError, ["beta", "finite"],
     everywhere("beta", beta=with_value(torch.ones(4), NAN))),
    ("beta of a chain negative", ValueError, ["beta", "negative"],
     everywhere("beta", beta=with_value(torch.ones(4), -1.0))),
    ("chain_offset a float", TypeError, ["chain_offset", "float"],
     everywhere("chain_offset", chain_offset=1.5)),
    ("beta a string", TypeError, ["beta", "str"], everywhere("beta", beta="hot")),
    ("seed a float", TypeError, ["seed", "float"], everywhere("seed", seed=1.0)),
    ("seed three numbers", TypeError, ["seed"], everywhere("seed", seed=(1, 2, 3))),
    ("seed too large", ValueError, ["seed"], everywhere("seed", seed=2**64)),
    ("seed tensor of floats", (TypeError, ValueError), ["seed", "float32"],
     everywhere("seed", seed=torch.zeros(2))),
    ("seed tensor too long", ValueError, ["seed", "[3]"],
     everywhere("seed", seed=torch.zeros(3).long())),
    ("seed and generator", ValueError, ["seed", "generator"],
     everywhere("seed", generator=torch.Generator())),
    ("backend unknown", ValueError, ["backend", "'gpu'"], everywhere("backend", backend="gpu")),
    ("precision unknown", ValueError, ["precision", "'low'"],
     everywhere("precision", precision="low")),
    ("out_dtype integer", TypeError, ["out_dtype", "int64"],
     everywhere("out_dtype", out_dtype=torch.int64)),
    ("empty data", ValueError, ["v", "[0, 7]"],
     [(n, {"v": torch.zeros(0, 7)}) for n in ("cd_step", "cd_loss")]),
    ("empty chains", ValueError, ["chains", "[0, 7]"],
     everywhere("chains", chains=torch.zeros(0, 7))),
    ("chains too wide", ValueError, ["chains", "7", "[4, 8]"],
     everywhere("chains", chains=binary(4, 8))),
    ("chains complex", TypeError, ["chains", "complex64"],
     everywhere("chains", chains=binary(4, 7) * 1j)),
    ("chains a list", TypeError, ["chains", "list", "in place", "torch.as_tensor"],
     [("cd_loss", {"chains": [[0.0] * 7]})]),
    ("chains NaN", ValueError, ["chains", "finite"],
     everywhere("chains", chains=with_value(binary(4, 7), NAN))),
    ("clamp a float mask", TypeError, ["clamp", "float32"],
     everywhere("clamp", clamp=torch.ones(7))),
    ("clamp of hidden units", ValueError, ["clamp", "[5]"],
     everywhere("clamp", clamp=torch.ones(5).bool())),
    ("clamp values too short", ValueError, ["clamp", "[5]"],
     everywhere("clamp", clamp=(torch.ones(7).bool(), torch.ones(5)))),
    ("clamp values a string", TypeError, ["clamp", "values", "str"],
     everywhere("clamp", clamp=(torch.ones(7).bool(), "0000000"))),
    ("clamp value NaN", ValueError, ["clamp", "finite"],
     everywhere("clamp", clamp=(torch.ones(7).bool(), with_value(torch.ones(7), NAN)))),
    ("clamp of three", (TypeError, ValueError), ["clamp"],
     everywhere("clamp", clamp=(torch.ones(7).bool(), torch.ones(7), torch.ones(7)))),
    ("out of two", ValueError, ["out"], everywhere("out", out=(torch.ones(7, 5), torch.ones(7)))),
    ("out transposed", ValueError, ["out", "grad_W", "[7, 5]", "[5, 7]"],
     everywhere("out", out=(torch.ones(5, 7), torch.ones(7), torch.ones(5)))),
    ("out integer", TypeError, ["out", "grad_b"],
     everywhere("out", out=(torch.ones(7, 5), torch.ones(7).long(), torch.ones(5)))),
    ("out a tensor", (TypeError, ValueError), ["out"], everywhere("out", out=torch.ones(7, 5))),
    ("out a number", (TypeError, ValueError), ["out"], everywhere("out", out=3)),
    ("out on meta", ValueError, ["out", "meta"],
     everywhere("out", out=(torch.ones(7, 5, device=META), torch.ones(7), torch.ones(5)))),
    ("accumulate into nothing", ValueError, ["accumulate", "out"],
     everywhere("accumulate", accumulate=True)),
]  # fmt: skip


def bad_cases() -> list[Any]:
    return [
        pytest.param(name, kind, words, changes, id=f"{what}-{name}")
        for what, kind, words, where in BAD
        for name, changes in where
    ]


@each_backend
@pytest.mark.parametrize(("function", "kind", "words", "changes"), bad_cases())
def test_errors_name_what_came(
    backend: str,
    function: str,
    kind: type[Exception],
    words: list[str],
    changes: dict[str, Any],
) -> None:
    """Function, argument, received, expected; and nothing of the caller's has changed."""
    if "finite" in words and "beta" not in words:
        skip_unread(backend)
    changes = {"backend": backend, **changes}
    watched: dict[str, Any] = {}
    if takes(function, "seed") and not {"seed", "generator"} & changes.keys():
        changes["seed"] = watched["seed"] = torch.tensor([3, 4])
    if function == "cd_step" and not {"out", "accumulate"} & changes.keys():
        changes["out"] = (torch.full((7, 5), 2.0), torch.full((7,), 3.0), torch.full((5,), 4.0))
        if changes.get("log_var") is not None:
            changes["out"] += (torch.full((7,), 5.0),)
        changes["accumulate"] = True
    if takes(function, "chains") and "chains" not in changes:
        changes["chains"] = watched["chains"] = binary(3, 7, seed=5)
    buffers = changes.get("out")
    if isinstance(buffers, tuple):
        watched |= {f"out {i}": t for i, t in enumerate(buffers) if t.device != META}
    for name, t in arguments().items():
        if isinstance(t, Tensor) and takes(function, name) and name not in changes:
            changes[name] = watched[name] = t
    before = {name: t.clone() for name, t in watched.items()}
    raises(kind, function, *words)(lambda: call(function, **changes))
    for name, t in watched.items():
        assert same(t, before[name]), f"{name} was changed"


@each_backend
@pytest.mark.parametrize("value", [NAN, INF])
def test_every_position_of_a_bad_value_is_found(backend: str, value: float) -> None:
    """Vector tails, transposed weights, later rows and threads."""
    skip_unread(backend)
    for rows, n_visible, n_hidden in ((3, 33, 18), (40, 17, 3), (600, 130, 20)):
        v, W, c = binary(rows, n_visible), normal(n_visible, n_hidden), normal(n_hidden)
        for name, t in (("v", v), ("W", W), ("c", c)):
            places = {0, t.numel() // 2, t.numel() - 1, min(16, t.numel() - 1), t.numel() // 3}
            for place in places:
                bad = t.clone()
                bad.view(-1)[place] = value
                given = {"v": v, "W": W, "c": c, name: bad}
                for W_layout in (given["W"], given["W"].T.contiguous().T):
                    raises(ValueError, f"sample_hidden: {name} ", "finite")(
                        lambda g=given, w=W_layout: rk.sample_hidden(
                            g["v"], w, g["c"], seed=0, backend=backend
                        )
                    )


@each_backend
def test_a_failing_loss_changes_nothing(backend: str) -> None:
    """A NaN that only the kernel finds, after all arguments were accepted."""
    skip_unread(backend)
    chains, seed = binary(3, 7), torch.tensor([3, 4])
    W = with_value(normal(7, 5), NAN).requires_grad_()
    kept = chains.clone()
    raises(ValueError, "cd_loss: W", "finite")(
        lambda: rk.cd_loss(
            binary(4, 7), W, normal(7), normal(5), 2, chains=chains, seed=seed, backend=backend
        )
    )
    assert same(chains, kept) and seed.tolist() == [3, 4] and W.grad is None


def test_a_backend_that_cannot_run_says_why() -> None:
    for backend in {"triton", "cuda"} - set(GPU_BACKENDS):
        for name in FUNCTIONS:
            raises(RuntimeError, name, backend)(lambda n=name, b=backend: call(n, backend=b))


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cuda, "unavailable_reason", lambda: "it is being tested")
    monkeypatch.setenv("RBM_KERNELS_BACKEND", "cuda")
    raises(RuntimeError, "sample_hidden", "cuda", "tested")(lambda: call("sample_hidden"))
    call("sample_hidden", backend="reference")
    monkeypatch.setenv("RBM_KERNELS_BACKEND", "nonsense")
    raises(ValueError, "sample_hidden", "nonsense")(lambda: call("sample_hidden"))


def test_the_precision_of_torch_governs() -> None:
    """torch.set_float32_matmul_precision chooses; precision= overrides."""
    v, W, c = binary(9, 300), normal(300, 20), normal(20)

    def p(precision: str | None) -> Tensor:
        return rk.sample_hidden(v, W, c, return_probs=True, seed=0, precision=precision)[1]

    before = torch.get_float32_matmul_precision()
    three, two = p("highest"), p("high")
    assert not torch.equal(three, two) and torch.equal(two, p("medium"))
    try:
        for name, expected in (("highest", three), ("high", two), ("medium", two)):
            torch.set_float32_matmul_precision(name)
            assert torch.equal(p(None), expected) and torch.equal(p("highest"), three)
    finally:
        torch.set_float32_matmul_precision(before)
