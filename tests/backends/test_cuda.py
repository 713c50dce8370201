"""The CUDA backend: what it says without a device, its regimes and its results.

What runs whole operations needs a GPU or the emulated build (RBM_KERNELS_CUDA_EMULATED=1, while
building and while testing).
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import CUDA_REGIMES, EMULATED, GPU_BACKENDS
from support.errors import raises
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import arithmetic, info
from rbm_kernels.backends import cuda

built = info.build_info().get("cuda", {}).get("built", False)
reason = cuda.unavailable_reason()
runs = "cuda" in GPU_BACKENDS
needs_kernels = pytest.mark.skipif(
    not runs, reason=f"neither a GPU nor the emulated build is in use: {reason}"
)
device = torch.device("cpu" if "cuda" in EMULATED else "cuda:0")


@pytest.mark.skipif(built or reason is None, reason="the CUDA module is built")
def test_a_build_without_cuda_says_why() -> None:
    assert reason is not None
    assert reason.startswith("not built: ")


@pytest.mark.skipif(not built, reason=f"{reason}")
def test_the_module_imports_and_counts_devices_without_a_driver() -> None:
    from rbm_kernels import _cuda

    count, words = _cuda.device_count()
    assert count >= 0
    assert (count == 0) == bool(words)
    if count == 0 and "cuda" not in EMULATED:
        assert reason == f"no CUDA device: {words}"


def test_importing_the_package_leaves_the_device_alone() -> None:
    code = "import rbm_kernels, torch; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(reason is None, reason="the cuda backend runs here")
def test_without_a_device_the_backend_refuses() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: "):
        rk.sample_hidden(binary(2, 3), normal(3, 4), normal(4), backend="cuda")


@pytest.mark.parametrize(
    ("architectures", "capability", "need"),
    [(None, (7, 5), "8.0"), (["80", "90"], (8, 6), None), (["90"], (8, 0), "9.0"),
     (["90a"], (8, 9), "9.0"), (["90"], (10, 0), None)],
)  # fmt: skip
def test_devices_older_than_the_build_are_refused(
    architectures: list[str] | None,
    capability: tuple[int, int],
    need: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = {"cuda": {} if architectures is None else {"architectures": architectures}}
    monkeypatch.setattr(cuda, "_EMULATED", False)
    monkeypatch.setattr(info, "build_info", lambda: record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    refusal = cuda.runs_on.__wrapped__(torch.device("cuda:0"))
    if need is None:
        assert refusal is None
    else:
        assert refusal is not None and refusal.endswith(f"the kernels need {need}")


# Whole operations.


def outcomes(kind: str, rows: int, V: int, H: int, backend: str, precision: str) -> list[Tensor]:
    """Chains and gradients from binary or grey data, with and without clamps and own chains."""
    v = binary(rows, V, seed=1)
    if kind == "grey":
        v = torch.rand(rows, V, generator=torch.Generator().manual_seed(2))
    W, b, c = normal(V, H, seed=3, scale=2 / V**0.5), normal(V, seed=4), normal(H, seed=5)
    mask = binary(V, seed=6, p=0.3).bool()
    common: dict[str, Any] = {"seed": (5, 2**33), "backend": backend, "precision": precision}
    beta = torch.linspace(0.1, 2, rows)
    chains = binary(rows // 2 + 1, V, seed=7)
    results = [
        rk.gibbs_sample(v, W, b, c, 3, chain_offset=3, **common),
        rk.gibbs_sample(v.bool() if kind == "bool" else v, W, b, c, 2, beta=beta, **common),
        rk.gibbs_sample(v, W, b, c, 2, clamp=mask, **common),
        rk.gibbs_sample(v, W, b, c, 1, clamp=(mask, binary(rows, V, seed=8)), **common),
    ]
    for start in (None, chains, chains.bool(), chains * 0.5):
        results += rk.cd_step(v, W, b, c, 2, chains=start, **common)[:3]
        results.append(rk.cd_step(v, W, b, c, 2, chains=start, **common).chains)
    return results


def gaussian_outcomes(rows: int, V: int, H: int, backend: str, precision: str) -> list[Tensor]:
    """The same of Gaussian units, of states in several dtypes; only what is bound to the bit."""
    v = normal(rows, V + 3, seed=1, scale=2.0)[:, 1 : 1 + V]  # rows that are not aligned
    v[-1] *= 3e3
    W, b, c = normal(V, H, seed=3, scale=0.5), normal(V, seed=4), normal(H, seed=5)
    mask, masks = binary(V, seed=6, p=0.3).bool(), binary(rows, V, seed=7, p=0.3).bool()
    log_var, beta = normal(V, seed=8, scale=0.7), torch.linspace(0.1, 2, rows)
    common: dict[str, Any] = {"seed": (5, 2**33), "backend": backend, "precision": precision}
    common["log_var"] = log_var

    def sample(start: Tensor, k: int, **more: Any) -> Tensor:
        return rk.gibbs_sample(start, W, b, c, k, **more, **common)

    results = [
        sample(v, 3, chain_offset=3),
        sample(v.bfloat16(), 2, beta=beta),
        sample((v > 0).to(torch.uint8), 1, beta=0.7),
        sample(v, 2, clamp=mask),
        sample(v.half(), 2, clamp=(masks, normal(rows, V, seed=9).bfloat16()), beta=beta),
        sample(v, 1, clamp=(mask, normal(V, seed=9))),
    ]
    for data, chains in (
        (v, None),
        (v > 0, None),
        (v, normal(rows // 2 + 1, V, seed=10).half()),
        (v, normal(1, V, seed=11).expand(rows + 1, V)),
    ):
        step = rk.cd_step(data, W, b, c, 2, chains=chains, **common)
        results += [step.chains, step.grad_W, step.grad_c]
    return results


@needs_kernels
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kind", ["binary", "bool", "grey", "gaussian"])
def test_regimes_give_the_same_bits(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits, gaussian = arithmetic.digits_of("", precision), kind == "gaussian"
    run = gaussian_outcomes if gaussian else functools.partial(outcomes, kind)
    found = set()
    for rows, V, H in ((5, 3, 2), (70, 37, 50), (33, 130, 70)):
        expected = run(rows, V, H, "reference", precision)
        for name in CUDA_REGIMES:
            monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", name)
            regime = cuda.regime(rows, V, H, 2, digits, device, gaussian).split()[0]
            found.add(regime)
            if regime == name:
                for place, (x, y) in enumerate(
                    zip(run(rows, V, H, "cuda", precision), expected, strict=True)
                ):
                    assert same(x, y), f"{name} {rows} {V} {H}: {place} differs"
    # A device that is not Hopper has two of them.
    assert found in ({"resident", "tiled"}, set(CUDA_REGIMES))


@needs_kernels
def test_the_table_names_a_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RBM_KERNELS_CUDA_REGIME", raising=False)
    assert cuda.regime(10, 20, 10, 1, 3, device) == "resident"
    assert cuda.regime(10_000, 60_000, 60_000, 10, 3, device).startswith("tiled")
    if "cuda" in EMULATED:  # two clusters at a time: 128 chains
        assert cuda.regime(128, 784, 500, 2, 2, device) == "cluster of 16"
        assert cuda.regime(129, 784, 500, 2, 2, device) == "cluster of 8"
        assert cuda.regime(128, 784, 500, 1, 2, device) == "tiled"
        assert cuda.regime(128, 784, 500, 2, 2, device, gaussian=True) == "cluster of 16"
        assert cuda.regime(129, 784, 500, 2, 2, device, gaussian=True) == "tiled"
        assert cuda.regime(129, 224, 200, 1, 2, device, gaussian=True) == "resident"
        assert cuda.regime(128, 240, 200, 1, 2, device, gaussian=True) == "tiled"
        assert cuda.regime(128, 240, 200, 1, 2, device) == "resident"
    monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", "titled")
    raises(ValueError, "RBM_KERNELS_CUDA_REGIME", "'titled'")(
        lambda: rk.sample_hidden(binary(2, 3), normal(3, 4), normal(4), backend="cuda")
    )


@needs_kernels
@pytest.mark.skipif("cuda" not in EMULATED, reason="the order of threads is the GPU's own")
@pytest.mark.parametrize("kind", ["grey", "gaussian"])
@pytest.mark.parametrize("regime", ["resident", "cluster"])
def test_no_order_of_threads_changes_the_bits(
    regime: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, V, H, gaussian = 33, 130, 40, kind == "gaussian"
    run = gaussian_outcomes if gaussian else functools.partial(outcomes, kind)
    monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", regime)
    assert cuda.regime(rows, V, H, 2, 2, device, gaussian).split()[0] == regime
    expected = run(rows, V, H, "cuda", "high")
    for order in ("1", "2"):
        monkeypatch.setenv("RBM_EMULATED_SCHEDULE", order)
        found = run(rows, V, H, "cuda", "high")
        assert all(same(x, y) for x, y in zip(found, expected, strict=True))


def agree(operation: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """cuda's results are the reference's, bit for bit; a CDStep's but for its free energies."""
    mine, theirs = (
        operation(*arguments, backend=backend, **keywords) for backend in ("cuda", "reference")
    )
    if isinstance(mine, Tensor):
        mine, theirs = [mine], [theirs]
    for place, (x, y) in enumerate(zip(mine[:5], theirs[:5], strict=True)):
        assert (x is None) == (y is None)
        assert x is None or same(x, y), f"{operation.__name__}: {place} differs"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_stride(dtype: torch.dtype) -> None:
    rows, V, H = 9, 40, 24
    wide = normal(V, 2 * H, seed=1).to(dtype)
    b, c = normal(V, seed=2).to(dtype), normal(H, seed=3).to(dtype)
    v, mask = binary(rows, V, seed=4), binary(rows, V, seed=5, p=0.3).bool()
    grey = torch.rand(rows, V, generator=torch.Generator().manual_seed(6))
    layouts = (wide[:, :H], wide[:, ::2], wide[:, :H].t().contiguous().t())
    for W in layouts if dtype == torch.float32 else layouts[:1]:
        # Bytes of Gaussian units may be more than 1.
        start, log_var = (3 * v).byte().t().contiguous().t(), torch.zeros(V, dtype=dtype)
        agree(rk.sample_hidden, start, W, c, log_var=log_var, return_probs=True, seed=9)
        agree(rk.gibbs_sample, start, W, b, c, 2, log_var=log_var, seed=9)
        for states in (v.bool(), v.byte(), v.to(dtype), grey.to(dtype)):
            start = states.t().contiguous().t()
            h = binary(rows, H, seed=7).to(states.dtype)
            drawn = {"seed": 9, "out_dtype": torch.uint8 if states.dtype == torch.bool else None}
            agree(rk.sample_hidden, start, W, c, return_probs=True, **drawn)
            agree(rk.sample_visible, h, W, b, return_probs=True, **drawn)
            for values in (None, states, grey[0], v[1:2].expand(rows, V), v[0].bool()):
                clamp = mask if values is None else (mask, values)
                agree(rk.gibbs_sample, start, W, b, c, 2, clamp=clamp, **drawn)
            for chains in (None, states[:4], grey[:1].repeat(130, 1).to(dtype)):
                agree(rk.cd_step, start, W, b, c, 2, chains=chains, seed=9)


@needs_kernels
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_gaussian_units_are_the_references_bits(precision: str) -> None:
    rows, V, H = 35, 45, 20
    v, W = normal(rows, V, seed=1, scale=2.0), normal(V, H, seed=2, scale=0.3)
    b, c, log_var = normal(V, seed=3), normal(H, seed=4), normal(V, seed=5, scale=0.5)
    mask = binary(V, seed=6, p=0.3).bool()
    common: dict[str, Any] = {"seed": (3, 7), "log_var": log_var, "precision": precision}
    for clamp in (None, mask, (mask, v[0])):
        for beta in (0.7, torch.linspace(0.2, 1.5, rows)):
            agree(rk.gibbs_sample, v, W, b, c, 2, clamp=clamp, beta=beta, **common)
    for states in (v, binary(rows, V, seed=7)):
        for chains in (None, v[:7], v[:1].bfloat16()):
            mine, theirs = (
                rk.cd_step(states, W, b, c, 2, chains=chains, backend=backend, **common)
                for backend in ("cuda", "reference")
            )
            assert same(mine.chains, theirs.chains)
            assert same(mine.grad_W, theirs.grad_W)
            assert same(mine.grad_c, theirs.grad_c)
            # Sums of real numbers, whose order is free.
            torch.testing.assert_close(mine.grad_b, theirs.grad_b, rtol=3e-7, atol=1e-7)
            torch.testing.assert_close(mine.grad_log_var, theirs.grad_log_var)


@needs_kernels
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_go_into_the_callers_buffers(accumulate: bool) -> None:
    rows, V, H = 20, 33, 18
    v, W, b, c = binary(rows, V, seed=1), normal(V, H, seed=2), normal(V, seed=3), normal(H, seed=4)

    def run(backend: str) -> list[Tensor]:
        whole = torch.full((V, H + 5), 0.25)
        out = (whole[:, 2 : 2 + H], torch.full((V,), 0.5), torch.full((H,), 0.75))
        step = rk.cd_step(v, W, b, c, seed=1, out=out, accumulate=accumulate, backend=backend)
        assert step.grad_W.data_ptr() == out[0].data_ptr()
        return [whole, *out]

    for x, y in zip(run("cuda"), run("reference"), strict=True):
        assert same(x, y)


@needs_kernels
@pytest.mark.parametrize("where", ["W", "b", "c", "log_var"])
def test_a_parameter_that_is_not_finite_is_seen(where: str) -> None:
    """It cannot be refused without waiting for the device, so that results must not look valid."""
    v, W, b, c = binary(9, 40, seed=1), normal(40, 24, seed=2), normal(40, seed=3), normal(24)
    log_var = normal(40, seed=4)
    for bad in (float("nan"), float("-inf")):
        {"W": W, "b": b, "c": c, "log_var": log_var}[where].view(-1)[7] = bad
        for states in (v, v.bool(), v * 0.5):
            if where in ("W", "c"):
                _, p = rk.sample_hidden(states, W, c, return_probs=True, backend="cuda")
                assert p.isnan().all()
            for gaussian in (log_var,) if where == "log_var" else (None, log_var):
                energies = rk.free_energy(states, W, b, c, log_var=gaussian, backend="cuda")
                assert energies.isnan().all()
                step = rk.cd_step(states, W, b, c, log_var=gaussian, backend="cuda")
                for result in (*step[:4], step.free_energies):
                    assert result is None or result.isnan().all()


@needs_kernels
def test_sizes_beyond_the_accumulators_are_refused() -> None:
    many, one = torch.zeros(1, 65_536), torch.zeros(1)
    W, real = torch.zeros(65_536, 1), many[:, :43_001]
    rows = torch.zeros(1, 1).expand(8_000_001, 1)
    on = {"backend": "cuda"}
    raises(ValueError, "sample_hidden", "65535 units", "65536 and 1")(
        lambda: rk.sample_hidden(many, W, one, **on)
    )
    raises(ValueError, "gibbs_sample", "65535 units", "1 and 65536")(
        lambda: rk.gibbs_sample(one[None], W.t(), one, many[0], **on)
    )
    raises(ValueError, "free_energy", "43000 units", "torch.float32", "bool")(
        lambda: rk.free_energy(real, W[:43_001], real[0], one, **on)
    )
    raises(ValueError, "cd_step", "8000000 rows", "chains")(
        lambda: rk.cd_step(one[None], one[None], one, one, chains=rows, **on)
    )
    h = rk.sample_hidden(real.bool(), W[:43_001], one, seed=1, **on)
    assert h.shape == (1, 1)


# Gaussian chains in a cluster: resident/gaussian_cluster_sm90a.cu.

LIMITS = {"high": 127 * 257, "highest": 127 * 65793}  # the largest integer of two and three digits


def chains_in_a_cluster(
    monkeypatch: pytest.MonkeyPatch, rows: int, V: int, H: int, precision: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """States, W and the other arguments of chains for which the cluster is certain to run."""
    monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", "cluster")
    digits = arithmetic.digits_of("", precision)
    if not cuda.regime(rows, V, H, 2, digits, device, gaussian=True).startswith("cluster"):
        assert "cuda" not in EMULATED
        pytest.skip("this device runs no clusters")
    v, W = normal(rows, V, seed=1, scale=2.0), normal(V, H, seed=2, scale=2 / V**0.5)
    rest: dict[str, Any] = {"b": normal(V, seed=3), "c": normal(H, seed=4)}
    rest |= {"log_var": normal(V, seed=5, scale=0.5), "precision": precision, "seed": (3, 2**33)}
    return v, W, rest


@needs_kernels
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    ("rows", "V", "H"),
    [(420, 37, 50),  # more chains than run at a time
     (9, 46, 260),  # hidden slices in pieces
     (70, 190, 150),
     (5, 600, 20)],  # blocks without hidden units
)  # fmt: skip
def test_gaussian_chains_in_a_cluster(
    rows: int, V: int, H: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, W, rest = chains_in_a_cluster(monkeypatch, rows, V, H, precision)
    for beta in (0.7, torch.linspace(0.2, 1.5, rows)):
        agree(rk.gibbs_sample, v, W, k=3, beta=beta, chain_offset=2**31, **rest)


@needs_kernels
def test_gaussian_clamps_in_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, V, H = 21, 101, 40
    v, W, rest = chains_in_a_cluster(monkeypatch, rows, V, H, "high")
    wide = normal(rows, 2 * V, seed=8, scale=3.0)
    masks = binary(rows, V, seed=6, p=0.3).bool()
    for mask in (masks, masks[0], torch.ones(V).bool()):
        for values in (wide[:, 1 : 1 + V], wide.half()[:, 3 : 3 + V], wide[0, :V].bfloat16()):
            for start in (v, values.expand(rows, V)):
                agree(rk.gibbs_sample, start, W, k=2, clamp=(mask, values), **rest)
        agree(rk.gibbs_sample, (10 * v).abs().byte(), W, k=2, clamp=mask, **rest)


@needs_kernels
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_gaussian_gradients_by_way_of_a_cluster(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, W, rest = chains_in_a_cluster(monkeypatch, 40, 98, 70, precision)
    for chains in (None, v[:9] * 2, v[:1].bfloat16().expand(150, 98)):
        mine, theirs = (
            rk.cd_step(v, W, k=3, chains=chains, backend=backend, **rest)
            for backend in ("cuda", "reference")
        )
        for name in ("chains", "grad_W", "grad_c"):
            assert same(getattr(mine, name), getattr(theirs, name)), name


@needs_kernels
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_blocks_of_a_cluster_agree_on_scales(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit decides a chain's scale, wherever in the cluster its block is."""
    rows, V, H = 34, 130, 40
    v, W, rest = chains_in_a_cluster(monkeypatch, rows, V, H, precision)
    rest["log_var"] = torch.zeros(V)
    v *= torch.logspace(-36, 36, rows)[:, None]
    v[3] = 0
    # On either side of where the largest integer would no longer fit, after rounding half to even.
    for row, part in enumerate((-0.5, 0.0, 0.25, 0.5, 0.75), start=10):
        v[row] = normal(V, seed=row)
        v[row, 31 * (row - 10) + 3] = (LIMITS[precision] + part) * 2.0**-9
    # Clamped, so that they are the states of all sweeps.
    mask = (torch.arange(V) % 31 == 3) | (binary(V, seed=6, p=0.8) > 0)
    for k in (1, 3):
        agree(rk.gibbs_sample, v, W, k=k, clamp=mask, **rest)


@needs_kernels
@pytest.mark.skipif("cuda" not in EMULATED, reason="the order of threads is the GPU's own")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_no_order_of_threads_changes_a_gaussian_cluster(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, V, H = 300, 98, 70
    v, W, rest = chains_in_a_cluster(monkeypatch, rows, V, H, precision)
    expected = rk.gibbs_sample(v, W, k=3, backend="reference", **rest)
    for order in range(8):
        monkeypatch.setenv("RBM_EMULATED_SCHEDULE", str(order))
        assert same(rk.gibbs_sample(v, W, k=3, backend="cuda", **rest), expected), order
