"""What benchmarks/ says of its cases, and the benchmark of the GPU on a machine without one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from support.backends import needs_cpu
from torch.utils.flop_counter import FlopCounterMode

from rbm_kernels import textbook
from rbm_kernels.cli import bench_table as bench


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of benchmarks/, which is no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    v = (torch.rand(9, 6, generator=generator) < 0.5).float()
    return v, torch.randn(6, 4, generator=generator), torch.zeros(6), torch.zeros(4)


def counted_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("k", [1, 3])
def test_work_of_a_case(benchmarks, k):
    """Operations as torch counts them in the baseline; bytes and draws by the tensors' sizes."""
    work, baselines = benchmarks("work"), benchmarks("baselines")
    v, W, b, c = operands()
    chains = v[:5].clone()
    hidden, grad = torch.empty(9, 4), torch.empty(6, 4)
    size = {"batch": 9, "n_visible": 6, "n_hidden": 4}
    cd = bench.Case("cd_step", **size, k=k)
    pcd = bench.Case("cd_step", **size, k=k, chains=5)
    gibbs = bench.Case("gibbs_sample", **size, k=k)
    energy = bench.Case("free_energy", **size)
    in_place = [2 * rows * 6 * 4 for rows in (9, 5)]  # addmm_ of the chains, which torch misses
    assert work.flops(cd) == counted_flops(lambda: textbook.cd_step(v, W, b, c, k)) + in_place[0]
    assert work.flops(cd) == counted_flops(
        lambda: baselines.products("cd_step", k)(v, W, hidden, grad)
    )
    persistent = counted_flops(lambda: textbook.cd_step(v, W, b, c, k, chains=chains))
    assert work.flops(pcd) == persistent + in_place[1]
    assert work.flops(gibbs) == counted_flops(lambda: textbook.gibbs_sample(v, W, b, c, k))
    assert work.flops(energy) == counted_flops(lambda: torch.addmm(c, v, W))
    drawn = [work.unit_updates(case) for case in (cd, pcd, gibbs, energy)]
    assert drawn == [9 * k * 10, 5 * k * 10, 9 * k * 10, 0]
    parameters = sum(t.numel() for t in (W, b, c))
    assert work.least_bytes(cd) == 4 * (2 * v.numel() + 2 * parameters)
    assert work.least_bytes(pcd) == 4 * (v.numel() + 2 * chains.numel() + 2 * parameters)
    assert work.least_bytes(gibbs) == 4 * (2 * v.numel() + parameters)
    assert work.least_bytes(energy) == 4 * (v.numel() + parameters + 9)
    assert (cd.label, pcd.label) == (f"CD-{k}", f"PCD-{k}")


def test_environment_names_what_a_figure_needs(benchmarks):
    found = benchmarks("tables").environment()
    assert {"cpu", "torch", "commit", "rbm_kernels", "date", "openmp"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.fixture
def bench_gpu(benchmarks):
    """benchmarks/bench_gpu.py."""
    return benchmarks("bench_gpu")


def test_without_a_gpu_nothing_is_measured(bench_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert bench_gpu.main([str(tmp_path), "--backends", "cuda"]) == 1


@needs_cpu
def test_dry_run_of_the_gpu_benchmark(bench_gpu, tmp_path, capsys):
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert bench_gpu.main(["--dry-run", "--seconds", "0", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert list(found["lines"]) == list(bench_gpu.LINES)
    for word, line in found["lines"].items():
        assert not line["left_out"], line["left_out"]
        if word not in ("memory", *bench_gpu.REGIMES):
            assert {"naive", "cpu high", "cpu highest"} <= set(line["timings"])
            assert all(t["p20"] <= t["p50"] <= t["p80"] for t in line["timings"].values())
            assert all(t["value"] > 0 for t in line["targets"])
            assert line["targets"] or word == "compiled"  # nothing is compiled without a GPU
        if word in ("sampling", "small", "large", "compiled"):
            assert line["equals_cpu"] == {"cpu high": True, "cpu highest": True}
    training = found["lines"]["training"]["figures"]["cpu high, captured"]
    updates, seconds = training["measured updates"], training["measured seconds"]
    assert updates == bench_gpu.TINY.updates
    assert training["extrapolated seconds"] == pytest.approx(seconds / updates * 97_500)
    assert "of floor" in capsys.readouterr().out
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == settings


def test_a_backend_that_draws_other_bits_is_timed_and_told(
    bench_gpu, monkeypatch, tmp_path, capsys
):
    step = bench_gpu.rbm_kernels.cd_step

    def wrong(*arguments, precision, seed, **keywords):
        return step(*arguments, precision="high", seed=next(numbers), **keywords)

    numbers = iter(range(10**6))
    monkeypatch.setattr(bench_gpu.rbm_kernels, "cd_step", wrong)
    assert bench_gpu.main(["--dry-run", "--only", "small", "--seconds", "0", str(tmp_path)]) == 1
    line = json.loads((tmp_path / "bench_gpu.json").read_text())["lines"]["small"]
    assert {"naive", "naive TF32", "cpu high", "cpu highest"} <= set(line["timings"])
    assert line["equals_cpu"] == {"cpu high": False, "cpu highest": False}
    assert "OTHER BITS than cpu's: cpu high\n" in capsys.readouterr().out


@needs_cpu
@pytest.mark.parametrize("row", [0, 450, 899])
def test_chains_in_the_middle_and_at_the_end_are_compared(bench_gpu, monkeypatch, row):
    """A kernel's later chains run in what its earlier ones left behind."""
    sample = bench_gpu.rbm_kernels.gibbs_sample

    def wrong(v, *arguments, **keywords):
        drawn = sample(v, *arguments, **keywords)
        if len(v) == 900:
            drawn[row, 3] = 1 - drawn[row, 3]
        return drawn

    case = bench.Case("gibbs_sample", 900, 20, 12, k=2)
    arguments = (case, bench_gpu.Device("cpu"), "cpu", "high")
    assert bench_gpu.equals_cpu(*arguments)
    monkeypatch.setattr(bench_gpu.rbm_kernels, "gibbs_sample", wrong)
    assert not bench_gpu.equals_cpu(*arguments)


@needs_cpu
def test_lines_of_several_processes_meet_in_one_file(bench_gpu, monkeypatch, tmp_path):
    common = ["--dry-run", "--seconds", "0", str(tmp_path)]
    assert bench_gpu.main([*common, "--only", "small", "--backends", "cpu"]) == 0
    monkeypatch.setattr(bench_gpu, "ceilings", None)  # measured once, and read by the others
    assert bench_gpu.main([*common, "--only", "memory"]) == 0
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert list(found["lines"]) == ["small of cpu", "memory"]


def test_ratios_floor_and_targets(bench_gpu, benchmarks):
    work = benchmarks("work")
    case = bench.Case("cd_step", 128, 784, 500)
    line = bench_gpu.Line("a line", case)
    for name, seconds in (("ours", 2.0), ("naive", 30.0), ("graph", 8.0)):
        line.timings[name] = bench.summarize([seconds])
    assert line.ratio("ours", ["naive"]) == 15.0
    assert line.ratio("ours", ["naive", "graph", "missing"]) == 4.0
    assert line.ratio("ours", ["missing"]) is None and line.ratio("missing", ["naive"]) is None
    for value, most in ((15.0, False), (15.0, True), (None, False)):
        line.aim("times naive", value, 10.0, most)
    assert [target.met for target in line.targets] == [True, False]
    rates = {"bf16 operations per second": 1e15, "copy bytes per second": 1e9}
    assert bench_gpu.floor_seconds(case, rates) == work.least_bytes(case) / 1e9
    rates = {"bf16 operations per second": 1e9, "copy bytes per second": 1e15}
    assert bench_gpu.floor_seconds(case, rates) == work.flops(case) / 1e9
