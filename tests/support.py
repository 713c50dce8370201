"""What the tests of the operations share: backends to run on, draws, thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import rbm_kernels as rk

# A correct sampler fails a test below this p-value once in a million fixed seeds.
P_VALUE = 1e-6
# The two-sided normal deviate of that p-value is 4.9; sums of products get a little more.
SIGMAS = 5.0


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here, or None."""
    probe = torch.zeros(1, 1)
    try:
        rk.sample_hidden(probe, probe, torch.zeros(1), seed=0, backend=backend)
    except RuntimeError as reason:
        return str(reason)
    return None


def _backends() -> list[Any]:
    params = []
    for name in ("reference", "cpu"):
        reason = unavailable(name) if name != "reference" else None
        mark = pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")
        params.append(pytest.param(name, marks=mark))
    return params


CPU_RUNS = unavailable("cpu") is None
BACKENDS = _backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_cpu = pytest.mark.skipif(not CPU_RUNS, reason=f"cpu backend: {unavailable('cpu')}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and lose much where the cores are shared.

    Autouse in the modules that import it; test_bitwise.py compares thread counts.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draws(n: int, backend: str) -> int:
    """How many chains a statistical test takes: n, or a sixth on the plain PyTorch backend.

    The reference is an order of magnitude slower, and test_bitwise.py shows that it draws what cpu
    draws; where there is no cpu backend it does all the work itself.
    """
    return n // 6 // 12 * 12 if backend == "reference" and CPU_RUNS else n


def assert_chi_square(counts: Tensor, p: Tensor, min_expected: float = 20.0) -> None:
    """Pearson's test of observed counts against probabilities, rare cells pooled."""
    counts, p = counts.double().flatten(), p.double().flatten()
    n = counts.sum()
    assert counts[p == 0].sum() == 0, "states of probability zero were drawn"
    rare = p * n < min_expected
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        p = torch.cat([p[~rare], p[rare].sum()[None]])
        if p[-1] * n < 1e-6:
            counts, p = counts[:-1], p[:-1]
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    p_value = stats.chi2.sf(statistic, counts.numel() - 1)
    assert p_value > P_VALUE, f"chi2 = {statistic:.1f} on {counts.numel() - 1} cells"


def assert_mean(samples: Tensor, mean: Tensor, sigmas: float = SIGMAS) -> None:
    """Column means of independent rows [N, ...] against exact means, by their own spread."""
    samples = samples.double()
    error = samples.std(0) / math.sqrt(samples.shape[0])
    z = (samples.mean(0) - mean).abs() / error.clamp_min(1e-12)
    assert z.max() < sigmas, f"off by {z.max():.1f} standard errors"


def fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() for t in tensors)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit, NaN and the sign of zero included, except that both may be None."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        view = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
        a, b = a.contiguous().view(view), b.contiguous().view(view)
    return torch.equal(a, b)


def binary(*shape: int, seed: int = 0, p: float = 0.5) -> Tensor:
    """Random zeros and ones, float32."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g) < p).float()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g)


def raises(kind: type[Exception], *words: str) -> Callable[[Callable[[], object]], None]:
    """A check that a call raises exactly this family of error with all words in its message."""

    def check(call: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        for word in words:
            assert word in message, f"{word!r} is missing in: {message}"

    return check
