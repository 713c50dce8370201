"""One contract, the same bits: backends, batch splits, threads, instruction sets, exact sums."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.backends import EMULATED, GPU_BACKENDS, each_backend, needs_cpu
from support.operations import (
    SIZES,
    ZERO_UNIFORMS,
    assert_agree,
    digest,
    everything,
    integers,
    operands,
    worst_case,
)
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import arithmetic
from rbm_kernels.backends import cpu


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    module = cpu._cpu
    before = module.in_use()
    module.use(name)
    try:
        yield
    finally:
        module.use(before)


@needs_cpu
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kind", ["binary", "grey", "gaussian"])
def test_cpu_equals_reference(kind: str, precision: str) -> None:
    """Sample for sample, but for double rounding: fewer than one unit in a million."""
    different = total = 0
    for size in SIZES:
        t = operands(*size, kind)
        mine, real = everything(t, "cpu", precision)
        theirs, exact = everything(t, "reference", precision)
        for x, y in zip(mine, theirs, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            # A Gaussian state is real: double rounding moves its last place.
            differs = x != y if kind != "gaussian" else (x - y).abs() > 1e-5 * (1 + y.abs())
            different += int(differs.sum())
            total += x.numel()
        # The reference's free energies are plain float32; two digits of cpu are coarser than that.
        energies = 1e-6 * (1 + real[2].abs().max().item()) * (1 if precision == "highest" else 300)
        for x, y in zip(real, exact, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            of_energy = x is real[2] or x.dim() == 0
            if different == 0:
                atol = 4 * energies if of_energy else 3e-6
                torch.testing.assert_close(x, y, rtol=3e-6, atol=atol)
    print(f"{kind} {precision}: {different} of {total} units differ")
    assert different <= 1e-6 * total


AGREEING = [
    pytest.param(backend, kind, precision)
    for backend in GPU_BACKENDS
    for kind in ("binary", "grey", "gaussian")
    for precision in ("highest", "high")
] or [pytest.param("", "", "", marks=pytest.mark.skip(reason="neither triton nor cuda runs here"))]


@needs_cpu
@pytest.mark.parametrize(("backend", "kind", "precision"), AGREEING)
def test_backends_agree(backend: str, kind: str, precision: str) -> None:
    sizes = [size for size in SIZES if backend not in EMULATED or size[0] * size[1] < 10_000]
    for size in sizes:
        assert_agree(size, kind, precision, backend)


@needs_cpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_cpu_equals_reference_on_many_units(precision: str) -> None:
    """A million units, most of them undecided: not more than one may differ."""
    v, W, c = binary(2048, 100, seed=1), normal(100, 500, seed=2, scale=0.1), normal(500, seed=3)
    common = {"seed": 5, "precision": precision, "return_probs": True}
    h, p = rk.sample_hidden(v, W, c, backend="cpu", **common)
    h2, p2 = rk.sample_hidden(v, W, c, backend="reference", **common)
    states, probabilities = int((h != h2).sum()), int((p != p2).sum())
    print(f"{states} states and {probabilities} probabilities of {h.numel()} differ")
    assert states <= 1e-6 * h.numel()
    assert probabilities <= 1e-4 * h.numel()


@needs_cpu
@pytest.mark.parametrize("kind", ["binary", "grey"])
def test_gradients_of_cpu_are_the_references_bits(kind: str) -> None:
    """Statistics are exact integers, so from the same chains come the same gradients."""
    for size in SIZES:
        t = operands(*size, kind)
        for chains in (None, t["chains"]):
            for precision in ("highest", "high"):
                steps = [
                    rk.cd_step(
                        t["v"], t["W"], t["b"], t["c"], 1, chains=chains, seed=2, backend=backend,
                        precision=precision,
                    )
                    for backend in ("cpu", "reference")
                ]  # fmt: skip
                assert same(steps[0].chains, steps[1].chains)
                for x, y in zip(steps[0][:3], steps[1][:3], strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


@needs_cpu
@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_integer_sums_are_exact(name: str, digits: int) -> None:
    cases = []
    for rows, k, n in [(1, 1, 1), (5, 37, 20), (70, 241, 33), (3, 1000, 17)]:
        cases.append((binary(rows, k, seed=1), normal(k, n, seed=2)))
        cases.append((binary(rows, n, seed=1), normal(k, n, seed=2).T))  # column-major
    cases.append((torch.ones(2, 5000), worst_case(digits, 5000)))
    cases.append((torch.ones(2, 5000), -worst_case(digits, 5000)))
    cases.append((torch.ones(2, 70_000), worst_case(digits, 70_000)))
    for scale in (1e-38, 1e-20, 1e20, 1e37):
        cases.append((binary(4, 30, seed=1), normal(30, 20, seed=2, scale=scale)))
    # Halfway between two integers: ties go to even on every instruction set.
    ties = torch.arange(-40, 40).reshape(8, 10) + 0.5
    ties[0, 0] = float({2: 127 * 257, 3: 127 * 65793}[digits])
    cases.append((torch.eye(8), ties))
    with instruction_set(name):
        for states, W in cases:
            got = cpu.integer_sums(states, W, digits)
            expected = (states.double() @ integers(W, digits).double()).double()
            assert torch.equal(got, expected), (name, states.shape, W.shape)


@needs_cpu
@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_integer_sums_of_real_states_are_exact(name: str, digits: int) -> None:
    with instruction_set(name):
        for rows, k, n in [(1, 1, 1), (5, 37, 20), (9, 129, 16), (3, 1000, 17)]:
            states, W = normal(rows, k, seed=1), normal(k, n, seed=2)
            got = cpu.integer_sums(states, W, digits)
            fixed = torch.stack([integers(row, digits) for row in states])
            W_fixed = integers(W, digits)
            expected = torch.stack([(row[:, None] * W_fixed).sum(0) for row in fixed])
            assert torch.equal(got, expected.double()), (name, rows, k, n)


@pytest.mark.parametrize("digits", [2, 3])
def test_reference_integers_are_the_definition(digits: int) -> None:
    for scale in (1e-38, 1e-20, 0.3, 1.0, 1.001, 1e20, 1e37):
        W = normal(40, 30, seed=2, scale=scale)
        got = arithmetic.fixed_point(W, arithmetic.scale_of(W.abs().amax(), digits))
        assert torch.equal(got.long(), integers(W, digits))
    W = worst_case(digits, 10)
    got = arithmetic.fixed_point(W, arithmetic.scale_of(W.abs().amax(), digits))
    assert torch.equal(got, W.double())
    a, b = integers(normal(9, 500), digits), integers(normal(500, 7), digits)
    expected = torch.stack([(row[:, None] * b).sum(0) for row in a])
    assert torch.equal(arithmetic.exact_product(a.double(), b.double()), expected.double())


@needs_cpu
@pytest.mark.parametrize("kind", ["binary", "grey", "gaussian"])
def test_statistics_do_not_overflow(kind: str) -> None:
    """Thousands of chains whose probabilities are all one: the largest sums a gradient can hold."""
    n = 9000
    v = torch.ones(n, 3)
    if kind == "grey":
        v[0, 0] = 0.5
    extra = {"log_var": torch.zeros(3)} if kind == "gaussian" else {}
    W, b, c = torch.zeros(3, 17), torch.full((3,), -50.0), torch.full((17,), 50.0)
    for precision in ("highest", "high"):
        step = rk.cd_step(v, W, b, c, 1, seed=0, backend="cpu", precision=precision, **extra)
        expected = step.chains.double().mean(0) - v.double().mean(0)
        torch.testing.assert_close(
            step.grad_W.double(), expected[:, None].expand(3, 17), rtol=1e-6, atol=1e-6
        )
        assert (step.grad_c == 0).all()


@each_backend
@pytest.mark.parametrize("kind", ["binary", "grey", "gaussian"])
@pytest.mark.parametrize("cut", [1, 16, 50])
def test_a_batch_cut_in_two_draws_the_same(backend: str, kind: str, cut: int) -> None:
    t = operands(65, 40, 33, kind)
    W, b, c = t["W"], t["b"], t["c"]
    real = {"log_var": t["log_var"]}

    def parts(call: Callable[[slice, int], Tensor]) -> None:
        whole = call(slice(0, 65), 100)
        halves = [call(slice(0, cut), 100), call(slice(cut, 65), 100 + cut)]
        assert same(whole, torch.cat(halves))

    common = {"seed": (1, 2), "backend": backend, **real}
    parts(lambda rows, at: rk.sample_hidden(t["v"][rows], W, c, chain_offset=at, **common))
    parts(lambda rows, at: rk.sample_visible(t["h"][rows], W, b, chain_offset=at, **common))
    parts(
        lambda rows, at: rk.gibbs_sample(
            t["v"][rows], W, b, c, 2, beta=t["beta"][rows] + 0.1, clamp=t["mask"][rows],
            chain_offset=at, **common,
        )
    )  # fmt: skip
    parts(lambda rows, at: rk.cd_step(t["v"][rows], W, b, c, 2, chain_offset=at, **common).chains)


@each_backend
@pytest.mark.parametrize("kind", ["binary", "grey", "gaussian"])
def test_one_and_two_threads(backend: str, kind: str) -> None:
    for size in [(3, 5, 17), (700, 300, 200), (1, 2000, 300), (2500, 30, 17)]:
        if backend != "cpu" and size[0] * size[1] > 1000:
            continue
        t = operands(*size, kind)
        with threads(1):
            one = everything(t, backend, "highest")
        with threads(2):
            two = everything(t, backend, "highest")
        exact = one[0] + (one[1] if backend != "reference" else [])
        again = two[0] + (two[1] if backend != "reference" else [])
        assert all(same(x, y) for x, y in zip(exact, again, strict=True))


@needs_cpu
@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_instruction_sets_agree(name: str) -> None:
    with instruction_set("plain"):
        expected = digest()
    with instruction_set(name):
        assert cpu._cpu.in_use() == name
        assert digest() == expected


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(rk.__file__).parents[1]), str(Path(__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_cpu
def test_the_environment_forces_an_instruction_set() -> None:
    """Each in a process of its own, with one thread, against the widest in this one."""
    names = cpu.instruction_sets()
    assert "plain" in names
    code = (
        "import rbm_kernels.backends.cpu as cpu, support.operations as operations;"
        "print(cpu._cpu.in_use(), operations.digest())"
    )
    for name in {names[0], "plain"}:
        done = run_python(code, RBM_KERNELS_ISA=name, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [name, digest()]


@needs_cpu
def test_an_instruction_set_that_cannot_run() -> None:
    code = (
        "import torch, rbm_kernels as rk\n"
        "z = torch.zeros(2, 2)\n"
        "print(rk.sample_hidden(z, z, torch.zeros(2), seed=0).shape)\n"
        "try:\n"
        "    rk.sample_hidden(z, z, torch.zeros(2), seed=0, backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    print('refused:', error)\n"
    )
    done = run_python(code, RBM_KERNELS_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "mmx" in done.stdout


@needs_cpu
def test_layouts_do_not_change_a_bit() -> None:
    """Transposed and strided weights, expanded and strided rows, against contiguous ones."""
    t = operands(20, 33, 18, "binary")
    v, W, b, c = t["v"], t["W"], t["b"], t["c"]
    states, results = everything(t, "cpu", "highest")
    expected = states + results
    wide = torch.full((20, 70), float("nan"))
    wide[:, 3:36] = v
    strided = torch.full((40, 66), float("nan"))
    strided[::2, ::2] = v
    W_strided = torch.full((66, 40), float("nan"))
    W_strided[::2, 1:37:2] = W
    W_wide = torch.full((33, 50), float("nan"))
    W_wide[:, 5:23] = W
    for v2 in (wide[:, 3:36], strided[::2, ::2], v.T.contiguous().T):
        for W2 in (W.T.contiguous().T, W_strided[::2, 1:37:2], W_wide[:, 5:23]):
            b2, c2 = b.repeat_interleave(2)[::2], c.repeat_interleave(3)[::3]
            again = everything({**t, "v": v2, "W": W2, "b": b2, "c": c2}, "cpu", "highest")
            assert all(same(x, y) for x, y in zip(expected, again[0] + again[1], strict=True))
    one = v[:1].expand(20, -1)
    for backend in ("cpu", "reference"):
        h = rk.sample_hidden(one, W, c, seed=1, backend=backend)
        assert same(h, rk.sample_hidden(one.contiguous(), W, c, seed=1, backend=backend))


@each_backend
def test_seed_tensors_of_any_stride(backend: str) -> None:
    v, W, b, c = binary(9, 7), normal(7, 5), normal(7), normal(5)
    expected = rk.gibbs_sample(v, W, b, c, 2, seed=(5, 9), backend=backend)
    store = torch.tensor([5, 123, 9, 456])
    assert same(rk.gibbs_sample(v, W, b, c, 2, seed=store[::2], backend=backend), expected)
    assert store.tolist() == [5, 123, 13, 456]


@needs_cpu
def test_bytes_above_one_and_negative_zero() -> None:
    """uint8 beyond 0 and 1 are those numbers, of Gaussian units; -0.0 is zero."""
    W, b, c, log_var = normal(7, 5, scale=0.01), normal(7), normal(5), torch.zeros(7)
    v = torch.randint(0, 256, (9, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for dtype in (torch.uint8, torch.float32):
        mine, theirs = (
            rk.sample_hidden(
                v.to(dtype), W, c, log_var=log_var, return_probs=True, seed=1, backend=backend
            )[1]
            for backend in ("cpu", "reference")
        )
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)
    v = binary(9, 7)
    signed = torch.where(v == 0, -0.0, v)
    assert same(
        rk.gibbs_sample(v, W, b, c, 1, seed=1, backend="cpu"),
        rk.gibbs_sample(signed, W, b, c, 1, seed=1, backend="cpu"),
    )


@needs_cpu
@pytest.mark.parametrize("bias", [-1e30, -200.0, -87.0, -10.0, 0.0, 200.0])
def test_uniform_of_zero(bias: float) -> None:
    """u = 0 is below every probability; 0 times a large exponential must not become NaN."""
    for chain, unit in ZERO_UNIFORMS:
        W, c = torch.zeros(1, unit + 1), torch.full((unit + 1,), bias)
        common = {"seed": 0, "chain_offset": chain}
        for backend in ("cpu", "reference"):
            h = rk.sample_hidden(torch.zeros(1, 1), W, c, backend=backend, **common)
            assert h[0, unit] == 1
