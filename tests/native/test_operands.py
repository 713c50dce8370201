"""The kernels of csrc/cuda/operands, emulated, against their definitions in plain PyTorch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support import native
from support.tensors import binary, normal
from torch import Tensor

from rbm_kernels import arithmetic


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("operands") / "operands.so"
    flags = ("-fPIC", "-shared")
    library = native.compile_emulated(output, "operands.cu", "operands/*.cu", flags=flags)
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
    """Integers [terms, rows] as csrc/include/rbm/operand_layout.h lays their digits out."""
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
