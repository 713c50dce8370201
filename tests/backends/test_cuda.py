"""The CUDA backend: what it says without a device, its operands, its regimes and its results.

The operands' kernels are compiled for the emulator here. What runs whole operations needs a GPU or
the emulated build (RBM_KERNELS_CUDA_EMULATED=1, while building and while testing).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import EMULATED, GPU_BACKENDS
from support.errors import raises
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import arithmetic, info
from rbm_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"

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


# The operands' kernels, against their definitions in plain PyTorch.


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not CUDA.exists():
        pytest.skip("the source tree is not here")
    named = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if not shutil.which(named[0]):
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("operands") / "operands.so"
    command = [*named, "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
    command += ["-DRBM_EMULATED", f"-I{CUDA}", f"-I{ROOT / 'csrc' / 'include'}", "-x", "c++"]
    command += [str(ROOT / "tests" / "native" / "operand_kernels.cu"), str(CUDA / "operands.cu")]
    command += [*map(str, CUDA.glob("emulated*.cpp")), "-o", str(library)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.test_phase_partials.restype = ctypes.c_int64
    return loaded


def arguments(*values: Tensor | int | None) -> list[ctypes.c_void_p | ctypes.c_int64]:
    """Tensors as addresses, and integers; an int parameter takes the low half of 64 bits."""
    return [
        ctypes.c_int64(x)
        if isinstance(x, int)
        else ctypes.c_void_p(None if x is None else x.data_ptr())
        for x in values
    ]


def padded(n: int) -> int:
    return (n + 127) // 128 * 128


def expected_planes(q: Tensor, digits: int, permuted: bool) -> Tensor:
    """Integers [terms, rows] as csrc/include/rbm/tiles.h lays their digits out."""
    terms, rows = q.shape
    whole = torch.zeros(padded(terms), padded(rows), dtype=torch.int64)
    whole[:terms, :rows] = q.to(torch.int64)
    term, unit = torch.arange(whole.shape[0]), torch.arange(whole.shape[1])
    byte = 4 * (term % 8) + term % 32 // 8  # byte 4 r + s is term 8 s + r
    row = unit
    if permuted:  # unit 4 q + 2 s + e lies in row 8 s + 2 q + e
        row = unit // 16 * 16 + 8 * (unit // 2 % 2) + 2 * (unit % 16 // 4) + unit % 2
    planes = torch.empty(digits, whole.shape[0] // 16, whole.shape[1], 16, dtype=torch.int8)
    for d in range(digits):
        digit = (whole + 128) % 256 - 128
        whole = (whole - digit) // 256
        chunk = term // 32 * 2 + byte // 16
        planes[d, chunk[:, None], row[None], (byte % 16)[:, None]] = digit.to(torch.int8)
    assert not whole.any()
    return planes


ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}


def filled(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """What a kernel writes into: no byte of it is right before."""
    return torch.full(shape, 85, dtype=dtype)


def weight_planes(
    kernels: ctypes.CDLL, W: Tensor, digits: int
) -> tuple[Tensor, Tensor, float, float]:
    rows, cols = W.shape
    up = filled(digits, padded(rows) // 16, padded(cols), 16)
    down = filled(digits, padded(cols) // 16, padded(rows), 16)
    scale, one = torch.zeros(1), torch.zeros(1)
    status = kernels.test_weights(
        *arguments(W, ELEMENTS[W.dtype], rows, cols, *W.stride(), digits, up, down, scale, one)
    )
    assert status == 0
    return up, down, scale.item(), one.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("digits", [2, 3])
def test_digits_of_weights(kernels: ctypes.CDLL, digits: int, dtype: torch.dtype) -> None:
    for rows, cols in ((1, 1), (5, 130), (129, 67), (64, 64)):
        wide = normal(2 * rows, 2 * cols, seed=rows).to(dtype)
        for W in (wide[:rows, :cols], wide[:rows, :cols].t().contiguous().t(), wide[:, :cols]):
            scale = arithmetic.scale_of(W.float().abs().amax(), digits)
            q = arithmetic.fixed_point(W.float(), scale)
            up, down, found, one = weight_planes(kernels, W, digits)
            assert (found, one) == (scale.item(), 1.0)
            assert torch.equal(up, expected_planes(q, digits, True))
            assert torch.equal(down, expected_planes(q.t(), digits, True))


@pytest.mark.parametrize("digits", [2, 3])
def test_scales_of_weights(kernels: ctypes.CDLL, digits: int) -> None:
    limit = arithmetic._LARGEST[digits]
    magnitudes = [2.0**e * m for e in (-149, -127, -126, -100, -3, 0, 100, 127) for m in (1.0, 1.5)]
    # Where rounding to the largest integer decides: half to even, so that limit + 0.5 rounds up.
    magnitudes += [(limit + part) * 2.0**-7 for part in (-0.5, 0.0, 0.25, 0.5, 0.75)]
    for magnitude in magnitudes:
        W = torch.tensor([[-magnitude]], dtype=torch.float32)
        assert weight_planes(kernels, W, digits)[2] == arithmetic.scale_of(W.abs()[0, 0], digits)
    up, _, scale, one = weight_planes(kernels, torch.zeros(3, 3), digits)
    assert (scale, one) == (1.0, 1.0)
    assert not up.any()
    for bad in (float("nan"), float("inf"), float("-inf")):
        W = normal(40, 70)
        W[33, 65] = bad
        *_, scale, one = weight_planes(kernels, W, digits)
        assert scale != scale and one != one


def packed(states: Tensor) -> Tensor:
    """Bits [rows, units] as int32 words [rows, units / 32], whole blocks of 128."""
    rows, units = states.shape
    whole = torch.zeros(rows, padded(units), dtype=torch.int64)
    whole[:, :units] = states != 0
    words = (whole.view(rows, -1, 32) << torch.arange(32)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_packed_states(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for rows, units in ((1, 1), (33, 130), (300, 67)):
        states = binary(rows, units + 3, seed=units).to(dtype)[:, 1 : 1 + units]
        if dtype.is_floating_point:
            states[0, 0] = -0.0
        word = 4  # the terms start behind 128 others
        terms_words = word + padded(rows) // 32
        bits, real = filled(rows, padded(units) // 32, dtype=torch.int32), torch.zeros(1).int()
        terms = filled(units, terms_words, dtype=torch.int32)
        sums = torch.zeros(units, dtype=torch.int64)
        status = kernels.test_pack(
            *arguments(
                states, ELEMENTS[dtype], rows, units, states.stride(0), bits, real, terms,
                terms_words, word, sums,
            )
        )  # fmt: skip
        assert status == 0
        assert torch.equal(bits, packed(states))
        assert torch.equal(terms[:, word:], packed(states.t()))
        assert (terms[:, :word] == 85).all()
        assert torch.equal(sums, (states != 0).sum(dim=0))
        assert real.item() == 0


@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_real_states_are_found(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    values = [2.0] if dtype == torch.uint8 else [2.0, 0.5, -1.0, float("nan"), float("inf")]
    for place, value in enumerate(values):
        states = binary(140, 150, seed=place).to(dtype)
        states[31 * place, 149 - place] = value
        bits, real = filled(140, 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        kernels.test_pack(
            *arguments(states, ELEMENTS[dtype], 140, 150, 150, bits, real, None, 0, 0, None)
        )
        assert real.item() == 1


@pytest.mark.parametrize("digits", [2, 3])
def test_values_in_fixed_point(kernels: ctypes.CDLL, digits: int) -> None:
    for rows, units in ((1, 1), (130, 67), (20, 200)):
        states = normal(rows, units, seed=units) * torch.logspace(-3, 3, rows)[:, None]
        states[0] = 0
        for factor in (None, normal(units, seed=9).exp()):
            for dtype in (torch.float32, torch.bfloat16):
                given = states.to(dtype)
                a = given.float() if factor is None else given.float() * factor
                scales = arithmetic.scale_of(a.abs().amax(dim=1), digits)
                q = arithmetic.fixed_point(a, scales[:, None])
                planes = filled(digits, padded(units) // 16, padded(rows), 16)
                found = torch.empty(rows)
                status = kernels.test_values(
                    *arguments(
                        given, ELEMENTS[dtype], rows, units, units, factor, digits, planes, found
                    )
                )
                assert status == 0
                assert torch.equal(found, scales)
                assert torch.equal(planes, expected_planes(q.t(), digits, False))


@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("kinds", ["real real", "real binary", "binary real", "binary binary"])
def test_values_of_both_phases(kernels: ctypes.CDLL, kinds: str, digits: int) -> None:
    """Their sums, and v along the terms of a gradient with one scale."""
    for counts, units in (((1, 1), 1), ((130, 40), 67), ((600, 700), 33)):
        phases = [
            normal(n, units, seed=n) * 0.3 if kind == "real" else binary(n, units, seed=n)
            for kind, n in zip(kinds.split(), counts, strict=True)
        ]
        largest = max(x.abs().max() if k == "real" else torch.tensor(1.0)
                      for k, x in zip(kinds.split(), phases, strict=True))  # fmt: skip
        expected = arithmetic.scale_of(largest, digits) if "real" in kinds else torch.tensor(1.0)
        terms = padded(counts[0]) + counts[1]
        stacked = torch.zeros(terms, units)
        stacked[: counts[0]], stacked[padded(counts[0]) :] = phases
        center, scale = normal(units, seed=3), torch.empty(1)
        totals = torch.empty(2, units, dtype=torch.float64)
        spreads = torch.empty_like(totals)
        partial = torch.empty(kernels.test_phase_partials(*arguments(*counts, units)))
        partial = partial.double()
        counters = torch.zeros(4 + 2 * ((units + 31) // 32), dtype=torch.int32)
        planes = filled(digits, padded(terms) // 16, padded(units), 16)
        status = kernels.test_phases(
            *arguments(phases[0], counts[0], phases[1], counts[1], units, center, digits)
            + arguments(totals, spreads, partial, counters, planes, scale)
        )
        assert status == 0
        assert scale.item() == expected.item()
        q = arithmetic.fixed_point(stacked, expected)
        assert torch.equal(planes, expected_planes(q, digits, False))
        for phase, x in enumerate(phases):
            torch.testing.assert_close(totals[phase], x.double().sum(dim=0), rtol=0, atol=1e-12)
            spread = (x.double() - center.double()).square().sum(dim=0)
            torch.testing.assert_close(spreads[phase], spread, rtol=1e-14, atol=0)


# Whole operations.

REGIMES = ("resident", "cluster", "tiled", "tiled_sm90a")


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
    limbs, gaussian = arithmetic.limbs_of("", precision), kind == "gaussian"
    run = gaussian_outcomes if gaussian else functools.partial(outcomes, kind)
    found = set()
    for rows, V, H in ((5, 3, 2), (70, 37, 50), (33, 130, 70)):
        expected = run(rows, V, H, "reference", precision)
        for name in REGIMES:
            monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", name)
            regime = cuda.regime(rows, V, H, 2, limbs, device, gaussian).split()[0]
            found.add(regime)
            if regime == name:
                for place, (x, y) in enumerate(
                    zip(run(rows, V, H, "cuda", precision), expected, strict=True)
                ):
                    assert same(x, y), f"{name} {rows} {V} {H}: {place} differs"
    # A device that is not Hopper has two of them.
    assert found in ({"resident", "tiled"}, set(REGIMES))


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
        for states in (v.bool(), v.byte(), (3 * v).byte(), v.to(dtype), grey.to(dtype)):
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


# Gaussian chains in a cluster: gaussian_chain_sm90a.cu.

LIMITS = {"high": 127 * 257, "highest": 127 * 65793}  # the largest integer of two and three digits


def chains_in_a_cluster(
    monkeypatch: pytest.MonkeyPatch, rows: int, V: int, H: int, precision: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """States, W and the other arguments of chains for which the cluster is certain to run."""
    monkeypatch.setenv("RBM_KERNELS_CUDA_REGIME", "cluster")
    limbs = arithmetic.limbs_of("", precision)
    if not cuda.regime(rows, V, H, 2, limbs, device, gaussian=True).startswith("cluster"):
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
