"""Every regime of the cuda backend, forced, against the bits of the CPU.

On a GPU, or on the emulated build with sizes that it can take. The first thing to run on a new GPU:
each regime in a process and a time limit of its own (benchmarks/gpu_check.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import CUDA_REGIMES, EMULATED, GPU_BACKENDS, needs_cpu
from support.operations import assert_agree
from support.tensors import binary, normal, same

import rbm_kernels as rk
from rbm_kernels.arithmetic import digits_of
from rbm_kernels.backends import cuda

pytestmark = [
    needs_cpu,
    pytest.mark.skipif(
        "cuda" not in GPU_BACKENDS, reason=f"cuda does not run here: {cuda.unavailable_reason()}"
    ),
]
emulated = "cuda" in EMULATED
DEVICE = "cpu" if emulated else "cuda:0"
SIZES = (
    [(70, 37, 50), (33, 130, 70)]
    if emulated
    else [(1000, 60, 40), (300, 784, 500), (2000, 300, 1030)]
)
each_regime = pytest.mark.parametrize("regime", CUDA_REGIMES)
each_precision = pytest.mark.parametrize("precision", ["highest", "high"])


def force(
    monkeypatch: pytest.MonkeyPatch, regime: str, size: tuple[int, int, int], kind: str, digits: int
) -> None:
    """Forces a regime; the test is skipped where the model or the device does not take it."""
    monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", regime)
    found = cuda.regime(*size, 2, digits, torch.device(DEVICE), kind == "gaussian")
    if found.split()[0] != regime:
        pytest.skip(f"{size}, {kind}, {digits} digits run {found}")


@each_regime
@each_precision
@pytest.mark.parametrize("kind", ["binary", "grey", "gaussian"])
@pytest.mark.parametrize("size", SIZES)
def test_every_regime_has_the_bits_of_the_cpu(
    regime: str,
    size: tuple[int, int, int],
    kind: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, regime, size, kind, digits_of("", precision))
    assert_agree(size, kind, precision, "cuda", DEVICE)


@each_regime
@each_precision
@pytest.mark.parametrize("gaussian", [False, True])
def test_the_last_chains_that_a_warp_runs(
    regime: str, precision: str, gaussian: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warp runs chains one group after the other, and its barriers' phases go on from each to the
    next: of more chains than run at a time, the first, middle and last are the cpu backend's."""
    rows, V, H = (900, 34, 40) if emulated else (6000, 784, 500)
    if not emulated and regime == "resident":
        V, H = 128, 100
    elif not emulated and precision == "highest":
        V, H = 512, 512  # Gaussian chains of 784 x 500 fit no cluster with three digits
    kind = "gaussian" if gaussian else "binary"
    force(monkeypatch, regime, (rows, V, H), kind, digits_of("", precision))
    v = normal(rows, V, seed=1, scale=1.5) if gaussian else binary(rows, V, seed=1)
    beta = torch.linspace(0.2, 1.5, rows)
    W, b, c = normal(V, H, seed=2, scale=2 / V**0.5), normal(V, seed=3), normal(H, seed=4)
    log_var = normal(V, seed=5, scale=0.4) if gaussian else None

    def sample(part: slice, device: str, backend: str) -> torch.Tensor:
        tensors = [t.to(device) for t in (v[part], W, b, c)]
        common: dict[str, Any] = {"seed": (5, 2**33), "precision": precision, "backend": backend}
        if log_var is not None:
            common["log_var"] = log_var.to(device)
        first = part.start or 0
        return rk.gibbs_sample(
            *tensors, 5, beta=beta[part].to(device), chain_offset=first, **common
        ).cpu()

    drawn = sample(slice(0, rows), DEVICE, "cuda")
    for first in (0, rows // 2 - 64, rows - 128):
        part = slice(first, first + 128)
        assert same(drawn[part], sample(part, "cpu", "cpu")), f"rows from {first} on differ"
