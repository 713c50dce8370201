"""The Triton kernels in Triton's interpreter, bit for bit against reference and cpu.

Not collected by name: test_triton_interpreted.py runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import CPU_RUNS
from support.operations import ZERO_UNIFORMS, everything, operands, worst_case
from support.tensors import binary, normal, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import Config

import rbm_kernels as rk
from rbm_kernels.arguments import Draw, Model
from rbm_kernels.backends import triton
from rbm_kernels.backends.triton import sample, tuning
from rbm_kernels.backends.triton.operands import Weights
from rbm_kernels.units import visible_units

assert triton.interpreted(), "run by test_triton_interpreted.py"

OTHERS = ["reference", *(["cpu"] if CPU_RUNS else [])]


def assert_same(mine: list[Tensor | None], theirs: list[Tensor | None], what: str = "") -> None:
    for place, (x, y) in enumerate(zip(mine, theirs, strict=True)):
        assert same(x, y), f"{what}: results {place} differ"


def assert_agrees(operation: Any, *arguments: Any, **keywords: Any) -> None:
    """One public function, against every other backend; free energies only nearly."""
    mine = operation(*arguments, backend="triton", **keywords)
    for backend in OTHERS:
        theirs = operation(*arguments, backend=backend, **keywords)
        if operation is rk.cd_step:
            torch.testing.assert_close(mine[5], theirs[5], rtol=1e-5, atol=1e-4)
            assert_same(list(mine[:5]), list(theirs[:5]), backend)
        else:
            pairs = [list(t) if isinstance(t, tuple) else [t] for t in (mine, theirs)]
            assert_same(*pairs, backend)


@pytest.mark.parametrize(
    ("size", "kind", "precision"),
    [
        ((1, 1, 1), "binary", "highest"),
        ((3, 5, 17), "binary", "high"),
        ((65, 63, 64), "binary", "highest"),
        ((33, 100, 50), "grey", "highest"),
        ((9, 3, 70), "grey", "high"),
        ((1, 1, 1), "gaussian", "high"),
        ((5, 7, 20), "gaussian", "high"),
        ((34, 30, 33), "gaussian", "highest"),
    ],
)
def test_every_operation(size: tuple[int, int, int], kind: str, precision: str) -> None:
    """States, probabilities and gradients are the others' bits; free energies nearly."""
    t = operands(*size, kind)
    states, results = everything(t, "triton", precision)
    for backend in OTHERS:
        states2, results2 = everything(t, backend, precision)
        assert_same(states, states2, f"states of {backend}")
        for place, (x, y) in enumerate(zip(results, results2, strict=True)):
            if place == 2 or x.dim() == 0:  # the reference sums its energies in float32
                loose = 1e-6 if precision == "highest" else 3e-4
                atol = loose * (4 + results[2].abs().max().item())
                torch.testing.assert_close(x, y, rtol=1e-5, atol=atol)
            else:
                assert same(x, y), f"{backend}: results {place} differ"


@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_a_batch_cut_in_two_draws_the_same(kind: str) -> None:
    t = operands(70, 20, 33, kind)
    common = {"seed": (1, 2), "backend": "triton", "log_var": t["log_var"]}

    def draw(rows: slice, chain: int) -> Tensor:
        return rk.gibbs_sample(
            t["v"][rows], t["W"], t["b"], t["c"], 1, beta=t["beta"][rows] + 0.1,
            clamp=t["mask"][rows], chain_offset=chain, **common,
        )  # fmt: skip

    parts = [draw(slice(0, 50), 2**32 - 60), draw(slice(50, 70), 2**32 - 10)]
    assert same(draw(slice(0, 70), 2**32 - 60), torch.cat(parts))


def test_clamped_units() -> None:
    t = operands(9, 20, 6, "binary")
    model = t["v"], t["W"], t["b"], t["c"]
    values = torch.linspace(0, 1, 20)
    mask = t["mask"]
    for clamp in (mask, mask[0], (mask, values), (mask[0], t["v"].bool()), (mask.T, values)):
        if isinstance(clamp, tuple) and clamp[0].shape == (20, 9):
            clamp = (mask.T.contiguous().T, values)
        assert_agrees(rk.gibbs_sample, *model, 2, clamp=clamp, seed=3)
    everywhere = torch.ones(20, dtype=torch.bool)
    held = rk.gibbs_sample(*model, 2, clamp=(everywhere, values), seed=3, backend="triton")
    assert same(held, values.expand(9, 20).contiguous())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16])
def test_states_of_any_dtype(dtype: torch.dtype) -> None:
    """bool skips the search for real states; bytes of Gaussian units may be more than 1."""
    v, W, b, c = binary(9, 20, seed=1).to(dtype), normal(20, 6), normal(20), normal(6)
    chains = binary(4, 20, seed=2).to(dtype)
    assert_agrees(rk.sample_hidden, v, W, c, out_dtype=dtype, return_probs=True, seed=1)
    assert_agrees(rk.gibbs_sample, v, W, b, c, 2, out_dtype=dtype, seed=1)
    assert_agrees(rk.cd_step, v, W, b, c, 1, chains=chains, seed=1)
    if dtype == torch.uint8:
        log_var = torch.zeros(20)
        assert_agrees(rk.cd_step, v * 200, W * 0.01, b, c, 1, log_var=log_var, seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    W, b, c = normal(20, 6).to(dtype), normal(20).to(dtype), normal(6).to(dtype)
    log_var, v = normal(20, seed=3, scale=0.3).to(dtype), normal(9, 20, seed=1)
    assert_agrees(rk.sample_hidden, v, W, c, log_var=log_var, return_probs=True, seed=1)
    assert_agrees(rk.cd_step, v, W, b, c, 1, log_var=log_var, seed=1)


def test_binary_rows_among_real_ones() -> None:
    """Binary rows keep a single digit, also where their tile is summed as real; -0.0 is zero."""
    v = torch.where(binary(12, 20, seed=1) == 0, -0.0, 1.0)
    v[::3] = normal(4, 20, seed=2).sigmoid()
    W, b, c = normal(20, 6), normal(20), normal(6)
    assert_agrees(rk.sample_hidden, v, W, c, return_probs=True, seed=1)
    assert_agrees(rk.cd_step, v, W, b, c, 1, seed=1)
    assert_agrees(rk.cd_step, v, W, b, c, 1, chains=v[:5] / 3, seed=1)
    assert_agrees(rk.cd_step, v.abs() * 2.0**-20, W * 2.0**20, b, c, 1, seed=1)


@pytest.mark.parametrize(("accumulate", "gaussian"), [(False, False), (True, True)])
def test_buffers(accumulate: bool, gaussian: bool) -> None:
    v, W, b, c = binary(9, 20, seed=1), normal(20, 6), normal(20), normal(6)
    extra = {"log_var": normal(20, seed=3)} if gaussian else {}

    def step(backend: str) -> list[Tensor]:
        out = [torch.ones(6, 20).T, torch.ones(20), torch.ones(6), torch.ones(20)]
        out = out[: 4 if gaussian else 3]
        arguments = {"out": tuple(out), "accumulate": accumulate, "seed": 1, **extra}
        got = rk.cd_step(v, W, b, c, 1, backend=backend, **arguments)
        assert all(x is y for x, y in zip(got, out, strict=False))
        return out

    for backend in OTHERS:
        assert_same(step("triton"), step(backend), backend)


def test_layouts_and_seeds() -> None:
    """Transposed and strided weights, strided and expanded rows, a seed tensor that advances."""
    v, W, b, c = binary(9, 20, seed=1), normal(20, 6), normal(20), normal(6)
    seed = torch.tensor([-5, 2**40 - 1])
    expected = rk.cd_step(v, W, b, c, 1, seed=seed.clone(), backend="reference")[:5]
    wide = torch.full((18, 41), float("nan"))
    wide[::2, 1::2] = v
    W_wide = torch.full((41, 14), float("nan"))
    W_wide[1::2, ::2][:, :6] = W
    for v2, W2 in (
        (wide[::2, 1::2], W.T.contiguous().T),
        (v.T.contiguous().T, W_wide[1::2, ::2][:, :6]),
    ):
        advanced = seed.clone()
        b2, c2 = b.repeat_interleave(2)[::2], c.repeat_interleave(3)[::3]
        got = rk.cd_step(v2, W2, b2, c2, 1, seed=advanced, backend="triton")
        assert_same(list(got[:5]), list(expected))
        assert advanced.tolist() == [-5, 2**40 + 1]
    row = v[:1].expand(9, -1)
    assert_agrees(rk.sample_hidden, row, W, c, seed=(2**63 - 1, -1), chain_offset=2**32 - 4)


@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("real", [False, True])
def test_sums_at_their_limits(digits: int, real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """65535 units of the largest weight, where the int32 and int64 sums are fullest."""
    deep = Config({"BLOCK_B": 1, "BLOCK_N": 4, "BLOCK_K": 8192})
    monkeypatch.setattr(tuning, "PRODUCT", [deep])
    W = worst_case(digits, 65535)
    W[:, 1] *= -1
    # All digits of the largest integer are 127; the kernel that finds them is slow for so many.
    planes = torch.zeros(digits, 128, 65536, dtype=torch.int8)
    planes[:, :3, :65535] = 127
    planes[:, 1] *= -1
    made = Weights(torch.ones(1), planes, None)
    monkeypatch.setattr(sample, "quantize", lambda *_, **__: made)
    v = torch.ones(1, 65535)
    if real:
        v *= W[0, 0] * 2.0 ** (1 - 8 * digits)  # just below 1, with all digits at their largest
    # x of the order of 1, and not of the order of 2^60, shows an error in its last place.
    beta = 2.0 ** -(8 * digits + 15 + (1 if real else 0))
    precision = {2: "high", 3: "highest"}[digits]
    common = {"beta": beta, "precision": precision, "return_probs": True, "seed": 1}
    assert_agrees(rk.sample_hidden, v, W, torch.zeros(3), **common)
    p = rk.sample_hidden(v, W, torch.zeros(3), backend="triton", **common)[1]
    assert 0.55 < p[0, 0] < 0.99


def test_a_layer_too_large_is_refused() -> None:
    with pytest.raises(RuntimeError, match="at most 65535 units, got 65536"):
        rk.sample_hidden(
            torch.zeros(1, 65536), torch.zeros(65536, 1), torch.zeros(1), seed=0, backend="triton"
        )


@pytest.mark.parametrize("size", [(0, 5, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_layers_and_batches(size: tuple[int, int, int]) -> None:
    rows, n_visible, n_hidden = size
    v, h = torch.zeros(rows, n_visible), torch.zeros(rows, n_hidden)
    W, b, c = torch.zeros(n_visible, n_hidden), torch.ones(n_visible), torch.ones(n_hidden)
    assert_agrees(rk.sample_hidden, v, W, c, return_probs=True, seed=1)
    assert_agrees(rk.sample_visible, h, W, b, seed=1)
    assert_agrees(rk.gibbs_sample, v, W, b, c, 2, seed=1)
    if rows:
        assert_agrees(rk.cd_step, v, W, b, c, 1, seed=1)
    energies = [rk.free_energy(v, W, b, c, backend=name) for name in ("triton", "reference")]
    torch.testing.assert_close(*energies)


@pytest.mark.parametrize("bias", [-200.0, -10.0, 0.0])
def test_uniform_of_zero(bias: float) -> None:
    """u = 0 is below every probability."""
    chain, unit = ZERO_UNIFORMS[0]
    W, c = torch.zeros(1, unit + 1), torch.full((unit + 1,), bias)
    h = rk.sample_hidden(torch.zeros(1, 1), W, c, seed=0, chain_offset=chain, backend="triton")
    assert h[0, unit] == 1


@pytest.mark.parametrize(
    ("name", "bad"), [("v", float("nan")), ("W", float("inf")), ("c", float("nan"))]
)
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    """Nothing is checked, as that would wait for a GPU; but a NaN does not vanish in integers."""
    t = operands(5, 7, 6, "binary")
    t[name].view(-1)[3] = bad
    step = rk.cd_step(t["v"], t["W"], t["b"], t["c"], 1, seed=1, backend="triton")
    assert step.grad_W.isnan().all() and step.grad_c.isnan().all()
    assert step.free_energies[0].isnan()
    energies = rk.free_energy(t["v"], t["W"], t["b"], t["c"], backend="triton")
    assert energies.isnan().any()


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which on a GPU waits for it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        assert "_local_scalar_dense" not in name and "nonzero" not in name, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_no_value_is_waited_for(kind: str) -> None:
    t = operands(5, 7, 6, kind)
    seed = torch.tensor([1, 2])
    model = Model(t["W"], t["b"], t["c"], visible_units(t["log_var"]))
    averages = tuple(torch.empty_like(x) for x in model[:3])
    with NoWaiting():
        triton.cd_step(
            "cd_step", t["v"], model, 2, t["chains"], Draw(seed, 0, 1.0, 3), averages, False
        )
        triton.gibbs_sample(
            "gibbs_sample", t["v"], model, 2, Draw(seed, 0, t["beta"], 2), t["mask"], None,
            torch.float32,
        )  # fmt: skip
        triton.free_energies("free_energy", t["v"], model, 0.5, 2)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(seed[0] == 1)
