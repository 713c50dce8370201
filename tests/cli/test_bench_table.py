"""The baselines do the work that they are compared for, and the table comes out whole."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rbm_kernels import cd_step, free_energy, textbook
from rbm_kernels.cli import bench_table as bench


def make_model(n_visible: int = 6, n_hidden: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n_visible, n_hidden, generator=generator)
    b = torch.randn(n_visible, generator=generator)
    c = torch.randn(n_hidden, generator=generator)
    v = (torch.rand(9, n_visible, generator=generator) < 0.5).float()
    return v, W, b, c


def expected_gradients(v, chains, W, c):
    v, chains, W, c = (t.double() for t in (v, chains, W, c))
    p, q = torch.sigmoid(c + v @ W), torch.sigmoid(c + chains @ W)
    grad_W = chains.t() @ q / len(chains) - v.t() @ p / len(v)
    return grad_W, chains.mean(0) - v.mean(0), q.mean(0) - p.mean(0)


@pytest.mark.parametrize("units", bench.DRAWS.values(), ids=bench.DRAWS)
@pytest.mark.parametrize("persistent", [False, True])
def test_naive_step_is_the_gradient_that_cd_step_returns(units, persistent):
    v, W, b, c = make_model()
    chains = v[:5].flip(1).contiguous() if persistent else None
    before = v.clone()
    naive, state = textbook.cd_step(v, W, b, c, 3, chains=chains, units=units, hidden=units)
    assert torch.equal(v, before)
    assert state.shape == (5 if persistent else 9, 6)
    assert set(state.unique().tolist()) <= {0.0, 1.0}
    for grad, expected in zip(naive, expected_gradients(v, state, W, c), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-6)
    step = cd_step(v, W, b, c, 3, chains=chains, seed=0, precision="highest")
    ours = (step.grad_W, step.grad_b, step.grad_c)
    for grad, expected in zip(ours, expected_gradients(v, step.chains, W, c), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("units", bench.DRAWS.values(), ids=bench.DRAWS)
def test_naive_gibbs_samples_the_conditionals(units):
    torch.manual_seed(0)
    _, W, b, c = make_model()
    # One hidden unit that is always on makes the visible units independent of the start.
    drawn = textbook.gibbs_sample(
        torch.zeros(20000, 6), W[:, :1], b, c[:1] + 50, 2, units=units, hidden=units
    )
    expected = torch.sigmoid(b + W[:, 0])
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.02)


def counted_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_naive_free_energy():
    v, W, b, c = make_model()
    torch.testing.assert_close(textbook.free_energy(v, W, b, c), free_energy(v, W, b, c))


def test_interleave_counts_rounds_and_prepares():
    calls = []
    timings = bench.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        seconds=0.0,
        min_rounds=3,
        prepare=lambda: calls.append("prepare"),
    )
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert calls == ["prepare", "a", "prepare", "b"] * 2 + [
        *("prepare", "b", "prepare", "a"),
        *("prepare", "a", "prepare", "b"),
    ]
    assert timings["a"].p20 <= timings["a"].p50 <= timings["a"].p80


def test_percentiles():
    timing = bench.summarize([float(i) for i in range(11)])
    assert (timing.p20, timing.p50, timing.p80, timing.rounds) == (2.0, 5.0, 8.0, 11)
    assert bench.summarize([4.0]).p80 == 4.0


def test_main_table():
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    seen = []
    text = bench.main_table([(4, 5, 3)], [1, 2], seconds=0.0, compile=False, progress=seen.append)
    lines = text.splitlines()
    assert [case.label for case in seen] == ["CD-1", "CD-2", "1 sweep", "2 sweeps", "free energy"]
    assert len(lines) == 2 + 2 + len(seen)
    assert len({len(line) for line in lines[2:]}) == 1
    assert "4 x 5 x 3" in lines[-1]
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == settings


@pytest.mark.parametrize("operation", ["cd_step", "gibbs_sample", "free_energy"])
@pytest.mark.parametrize("k", [1, 2])
def test_variants_are_calls_of_one_operation(operation, k):
    """Each is a call that works, on the same operands; the textbook's way of drawing is told."""
    case = bench.Case(operation, 4, 5, 3, k)
    variants = bench.build_variants(case, compile=False, backend="reference")
    assert list(variants.calls) == ["naive", "naive medium", "high", "highest"]
    shape = {"cd_step": (5, 3), "gibbs_sample": (4, 5), "free_energy": (4,)}[operation]
    for call in variants.calls.values():
        variants.prepare()
        result = call()
        if operation == "cd_step":
            result = result[0][0] if isinstance(result[0], tuple) else result[0]
        assert result.shape == shape
    assert variants.baseline in (*bench.DRAWS, "softplus")
    assert set(variants.tried) == (set() if operation == "free_energy" else set(bench.DRAWS))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_compiled_does_the_textbooks_work(monkeypatch, k):
    """With torch.compile out of the way, the pieces do as many operations as the whole."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for operation in ("cd_step", "gibbs_sample", "free_energy"):
        case = bench.Case(operation, 4, 5, 3, k)
        operands = bench.build_variants(case, compile=False, probe=False).operands
        whole = counted_flops(bench.naive(case, *operands, bench.DRAWS["torch.rand < p"]))
        assert counted_flops(bench.compiled(case, *operands)) == whole > 0
