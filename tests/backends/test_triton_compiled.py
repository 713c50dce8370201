"""The Triton kernels compiled for GPUs that are not there: registers, instructions, recompilation.

RBM_KERNELS_TRITON_RESOURCES names a JSON file to write registers and shared memory to.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rbm_kernels.backends.triton import interpreted

if interpreted():
    pytest.skip("TRITON_INTERPRET excludes the compiler", allow_module_level=True)

from support.operations import operands
from support.triton_compiled import Compiled, compiling
from triton import Config

import rbm_kernels as rk
from rbm_kernels.backends.triton import tuning

# Bytes of shared memory a block may have: sm_86 and sm_89, the least of all from sm_80 on.
SHARED_EVERYWHERE = 99 * 1024
SHARED = {80: 163 * 1024, 90: 227 * 1024}

_kept: dict[int, list[Compiled]] = {}


def kernels(arch: int) -> list[Compiled]:
    """Every kernel, in the variants that take most registers."""
    if arch in _kept:
        return _kept[arch]
    binary, gaussian = operands(64, 784, 500, "binary"), operands(64, 784, 500, "gaussian")
    real = {"log_var": gaussian["log_var"]}
    model = binary["W"], binary["b"], binary["c"]
    common: dict[str, Any] = {"seed": 1, "backend": "triton"}
    highest, high = {"precision": "highest", **common}, {"precision": "high", **common}
    energy = {"precision": "highest", "backend": "triton"}
    with compiling(arch, every_tile=True) as compiled:
        rk.cd_step(binary["v"], *model, 1, **highest)
        rk.cd_step(gaussian["v"], *model, 2, **real, **highest)
    with compiling(arch) as once:
        rk.cd_step(binary["v"].bool(), *model, 2, chains=binary["chains"].bool(), **highest)
        rk.cd_step(binary["v"], *model, 1, **high)
        rk.gibbs_sample(binary["v"], *model, 1, clamp=binary["mask"], **highest)
        rk.sample_hidden(
            binary["v"], model[0], model[2], beta=binary["beta"], return_probs=True, **highest
        )
        rk.sample_visible(
            binary["h"], *model[:2], beta=binary["beta"], return_probs=True, **real, **highest
        )
        rk.free_energy(gaussian["v"], *model, **real, **energy)
    _kept[arch] = compiled + [kernel for kernel in once if kernel not in compiled]
    return _kept[arch]


architectures = pytest.mark.parametrize("arch", [80, 90])


@architectures
def test_no_kernel_spills(arch: int) -> None:
    rows = []
    for kernel in kernels(arch):
        row = {name: value for name, value in asdict(kernel).items() if name != "ptx"}
        rows.append(row)
        print(json.dumps(row))
    path = os.environ.get("RBM_KERNELS_TRITON_RESOURCES")
    if path:
        others = json.loads(Path(path).read_text()) if Path(path).exists() else []
        others = [row for row in others if row["arch"] != arch]
        Path(path).write_text(json.dumps(others + rows, indent=1))
    assert {kernel.name for kernel in kernels(arch)} == {
        "_largest_kernel",
        "_weight_digits_kernel",
        "_state_digits_kernel",
        "half_sweep_kernel",
        "_softplus_kernel",
        "_energy_kernel",
        "_statistics_kernel",
        "_transpose_kernel",
        "_gradient_kernel",
        "_bias_kernel",
        "_mean_kernel",
    }
    for kernel in kernels(arch):
        assert kernel.stack == 0, f"{kernel} spills"
        assert kernel.shared <= SHARED[arch], kernel
    defaults = [config.all_kwargs() for config in (tuning.PRODUCT[0], tuning.GRADIENT[0])]
    for kernel in kernels(arch):
        tile = {k: v for k, v in kernel.options.items() if k != "LIMBS"}
        if any(tile.items() <= default.items() for default in defaults):
            assert kernel.shared <= SHARED_EVERYWHERE, kernel


@architectures
def test_products_are_int8_matrix_instructions(arch: int) -> None:
    products = [kernel for kernel in kernels(arch) if "BLOCK_K" in kernel.options]
    names = {"half_sweep_kernel", "_softplus_kernel", "_statistics_kernel", "_gradient_kernel"}
    products = [kernel for kernel in products if kernel.name in names]
    assert {kernel.name for kernel in products} == names
    for kernel in products:
        warp = re.findall(r"mma\.sync\S*\.s32\.[su]8\.[su]8\.s32", kernel.ptx)
        group = re.findall(r"wgmma\.mma_async\S*\.s32\.s8\.s8", kernel.ptx)
        wide = kernel.options.get("BLOCK_B", 64) >= 64
        assert group if arch == 90 and wide else warp, kernel
        assert "cp.async" in kernel.ptx, f"{kernel} waits for each load"


@architectures
def test_every_float_operation_rounds_once(arch: int) -> None:
    """What the chains' bits rest on: nothing fused, flushed or approximated."""
    for kernel in kernels(arch):
        for wrong in (
            r"\.ftz",
            r"\.approx",
            r"div\.full",
            r"\b(add|sub|mul)\.f(32|64)",  # without .rn ptxas may fuse them
            r"\bmad\.f32",
            r"fma\.rn\.f64",
        ):
            found = re.search(wrong, kernel.ptx)
            assert not found, f"{kernel.name}: {found and found.group()}"
    drawing = next(kernel for kernel in kernels(arch) if kernel.name == "half_sweep_kernel")
    assert "fma.rn.f32" in drawing.ptx
    assert any("sqrt.rn.f32" in kernel.ptx for kernel in kernels(arch))


def test_a_batch_and_a_temperature_are_values_of_a_run() -> None:
    """A ragged last batch, other temperatures, k, counts of chains and seeds compile nothing."""

    def run(rows: int, chains: int, beta: float, k: int, seed: int, chain_offset: int) -> None:
        t = operands(rows, 33, 50, "binary")
        fantasy = operands(2 * chains, 33, 50, "binary")["chains"]
        model = t["W"], t["b"], t["c"]
        common = {"seed": (seed, 2**34), "chain_offset": chain_offset, "backend": "triton"}
        for betas in (beta, torch.full((rows,), beta)):
            rk.sample_hidden(t["v"], t["W"], t["c"], beta=betas, **common)
            rk.gibbs_sample(t["v"], *model, k, beta=betas, **common)
            rk.free_energy(t["v"], *model, beta=betas, backend="triton")
        rk.cd_step(t["v"], *model, k, chains=fantasy, **common)
        rk.cd_step(t["v"], *model, k, **common)

    with compiling(90) as compiled:
        run(128, 100, 1.0, 2, 1, 0)
        first = len(compiled)
        for values in (
            (37, 100, 0.25, 3, 2, 17),
            (128, 16, 0.5, 5, 3, 2**32 - 1),
            (1, 1, 2.0, 2, 2**40, 1),
        ):
            run(*values)
        later = [kernel.name for kernel in compiled[first:]]
    assert first > 10
    assert later == []


def test_tiles_are_timed_once_and_never_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [Config({"BLOCK_B": block}, num_warps=4) for block in (64, 128, 16)]
    timed: list[int] = []
    launched: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **options: launched.append(options["BLOCK_B"])

    def seconds(run: Any, config: Config) -> float:
        timed.append(config.kwargs["BLOCK_B"])
        return abs(config.kwargs["BLOCK_B"] - 100)

    capturing = True
    monkeypatch.setattr(tuning, "_time", seconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    kernel = Kernel()

    def launch(rows: int, sizes: int = 0) -> Config:
        return tuning.launch(
            kernel, lambda tile: (tile["BLOCK_B"],), (torch.zeros(1),), {}, configs, rows, sizes
        )

    assert launch(200) is configs[0] and not timed
    capturing = False
    assert launch(200) is configs[1] and timed == [64, 128, 16]
    assert launch(37) is configs[1] and len(timed) == 3  # a ragged last batch
    capturing = True
    assert launch(200) is configs[1]
    capturing = False
    launch(200, sizes=1)
    assert len(timed) == 6
    assert launched == [64, 128, 128, 128, 128]
