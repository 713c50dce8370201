"""The baselines do the work that they are compared for, and the table comes out whole."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from support.backends import needs_cpu
from torch.utils.flop_counter import FlopCounterMode

from rbm_kernels import benchmark as bench
from rbm_kernels import cd_step, free_energy


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


@pytest.mark.parametrize("draw", [bench.draw_rand, bench.draw_bernoulli])
@pytest.mark.parametrize("persistent", [False, True])
def test_naive_step_is_the_gradient_that_cd_step_returns(draw, persistent):
    v, W, b, c = make_model()
    chains = v[:5].flip(1).contiguous() if persistent else None
    before = v.clone()
    *naive, state = bench.naive_cd_step(v, W, b, c, 3, chains, draw)
    assert torch.equal(v, before)
    assert state.shape == (5 if persistent else 9, 6)
    assert set(state.unique().tolist()) <= {0.0, 1.0}
    for grad, expected in zip(naive, expected_gradients(v, state, W, c), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-6)
    step = cd_step(v, W, b, c, 3, chains=chains, seed=0, precision="highest")
    ours = (step.grad_W, step.grad_b, step.grad_c)
    for grad, expected in zip(ours, expected_gradients(v, step.chains, W, c), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("draw", [bench.draw_rand, bench.draw_bernoulli])
def test_naive_gibbs_samples_the_conditionals(draw):
    torch.manual_seed(0)
    _, W, b, c = make_model()
    # One hidden unit that is always on makes the visible units independent of the start.
    drawn = bench.naive_gibbs(torch.zeros(20000, 6), W[:, :1], b, c[:1] + 50, 2, draw)
    expected = torch.sigmoid(b + W[:, 0])
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.02)


def counted_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("k", [1, 3])
def test_work_of_a_case(k):
    """Operations as torch counts them in the baseline; bytes and draws by the tensors' sizes."""
    v, W, b, c = make_model()
    chains = v[:5].clone()
    hidden, grad = torch.empty(9, 4), torch.empty(6, 4)
    size = {"batch": 9, "n_visible": 6, "n_hidden": 4}
    cd = bench.Case("cd_step", **size, k=k)
    pcd = bench.Case("cd_step", **size, k=k, chains=5)
    gibbs = bench.Case("gibbs_sample", **size, k=k)
    energy = bench.Case("free_energy", **size)
    in_place = [2 * rows * 6 * 4 for rows in (9, 5)]  # addmm_ of the chains, which torch misses
    assert cd.flops == counted_flops(lambda: bench.naive_cd_step(v, W, b, c, k)) + in_place[0]
    assert cd.flops == counted_flops(lambda: bench.products("cd_step", k)(v, W, hidden, grad))
    persistent = counted_flops(lambda: bench.naive_cd_step(v, W, b, c, k, chains))
    assert pcd.flops == persistent + in_place[1]
    assert gibbs.flops == counted_flops(lambda: bench.naive_gibbs(v, W, b, c, k))
    assert energy.flops == counted_flops(lambda: torch.addmm(c, v, W))
    assert (cd.unit_updates, pcd.unit_updates, gibbs.unit_updates, energy.unit_updates) == (
        9 * k * 10, 5 * k * 10, 9 * k * 10, 0,
    )  # fmt: skip
    parameters = sum(t.numel() for t in (W, b, c))
    assert cd.least_bytes == 4 * (2 * v.numel() + 2 * parameters)
    assert pcd.least_bytes == 4 * (v.numel() + 2 * chains.numel() + 2 * parameters)
    assert gibbs.least_bytes == 4 * (2 * v.numel() + parameters)
    assert energy.least_bytes == 4 * (v.numel() + parameters + 9)
    assert (cd.label, pcd.label) == (f"CD-{k}", f"PCD-{k}")


def test_naive_free_energy():
    v, W, b, c = make_model()
    torch.testing.assert_close(bench.naive_free_energy(v, W, b, c), free_energy(v, W, b, c))


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
    timing = bench.summarise([float(i) for i in range(11)])
    assert (timing.p20, timing.p50, timing.p80, timing.rounds) == (2.0, 5.0, 8.0, 11)
    assert bench.summarise([4.0]).p80 == 4.0


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


def test_environment_names_what_a_figure_needs():
    found = bench.environment()
    assert {"cpu", "torch", "commit", "rbm_kernels", "date"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch):
    """benchmarks/bench_gpu.py, which is no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("bench_gpu")


def test_without_a_gpu_nothing_is_measured(bench_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())


@needs_cpu
def test_dry_run_of_the_gpu_benchmark(bench_gpu, tmp_path, capsys):
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert bench_gpu.main(["--dry-run", "--seconds", "0", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert list(found["lines"]) == list(bench_gpu.LINES)
    for word, line in found["lines"].items():
        assert not line["left_out"], line["left_out"]
        if word not in ("memory", "regimes"):
            assert {"naive", "cpu high", "cpu highest"} <= set(line["timings"])
            assert all(t["p20"] <= t["p50"] <= t["p80"] for t in line["timings"].values())
            assert line["targets"] and all(t["value"] > 0 for t in line["targets"])
        if word in ("sampling", "small", "large"):
            assert line["equals_cpu"] == {"cpu high": True, "cpu highest": True}
    training = found["lines"]["training"]["figures"]["cpu high, captured"]
    updates, seconds = training["measured updates"], training["measured seconds"]
    assert updates == bench_gpu.TINY.updates
    assert training["extrapolated seconds"] == pytest.approx(seconds / updates * 97_500)
    assert "of floor" in capsys.readouterr().out
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == settings


def test_a_backend_that_draws_other_bits_is_not_timed(bench_gpu, monkeypatch, tmp_path):
    step = bench_gpu.rbm_kernels.cd_step

    def wrong(*arguments, precision, seed, **keywords):
        return step(*arguments, precision="high", seed=next(numbers), **keywords)

    numbers = iter(range(10**6))
    monkeypatch.setattr(bench_gpu.rbm_kernels, "cd_step", wrong)
    assert bench_gpu.main(["--dry-run", "--only", "small", "--seconds", "0", str(tmp_path)]) == 1
    line = json.loads((tmp_path / "bench_gpu.json").read_text())["lines"]["small"]
    assert set(line["timings"]) == {"naive", "naive TF32"}
    assert set(line["left_out"]) == {"cpu high", "cpu highest"}


def test_ratios_floor_and_targets(bench_gpu):
    case = bench.Case("cd_step", 128, 784, 500)
    line = bench_gpu.Line("a line", case)
    for name, seconds in (("ours", 2.0), ("naive", 30.0), ("graph", 8.0)):
        line.timings[name] = bench.summarise([seconds])
    assert line.ratio("ours", ["naive"]) == 15.0
    assert line.ratio("ours", ["naive", "graph", "missing"]) == 4.0
    assert line.ratio("ours", ["missing"]) is None and line.ratio("missing", ["naive"]) is None
    for value, most in ((15.0, False), (15.0, True), (None, False)):
        line.aim("times naive", value, 10.0, most)
    assert [target.met for target in line.targets] == [True, False]
    rates = {"bf16 operations per second": 1e15, "copy bytes per second": 1e9}
    assert bench_gpu.floor_seconds(case, rates) == case.least_bytes / 1e9
    rates = {"bf16 operations per second": 1e9, "copy bytes per second": 1e15}
    assert bench_gpu.floor_seconds(case, rates) == case.flops / 1e9
