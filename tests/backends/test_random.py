"""Random numbers: Philox4x32-10, uniforms, normals, and the counter each draw uses."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from support.backends import each_backend
from support.statistics import P_VALUE
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import arithmetic

U32 = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. (2011), section 4.3, on counters [..., 4] of uint64."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & U32,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & U32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, -1)


def words_of(seed: int, step: int, chains: range, units: int) -> np.ndarray:
    """The contract of docs and design: counter (unit // 4, chain, step, stream), word unit % 4.

    The step's bits above 32 lie above the eight of the stream, which is 0 for states.
    """
    blocks = (units + 3) // 4
    counter = np.zeros((len(chains), blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = (np.array(list(chains)) % 2**32)[:, None]
    counter[..., 2] = step % 2**32
    counter[..., 3] = ((step >> 32) % 2**24) << 8
    key = (seed % 2**32, (seed >> 32) % 2**32)
    return philox(counter, key).reshape(len(chains), -1)[:, :units]


KNOWN = [  # Random123 1.14, tests/kat_vectors: philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers_of_this_file(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(philox(np.array(counter, np.uint64), key).tolist()) == expected


@pytest.mark.parametrize(
    ("seed", "offset", "chain"),
    [
        (0, 0, 0), (-1, 0, 7), (0x299F31D0A4093822, 5, 0x85A308D3), (2**63 - 1, 2**32, 2**32 - 1),
        (-(2**63), 2**40 + 3, 1), (12345, 2**55 + 2**32 - 1, 2),
    ],
)  # fmt: skip
def test_random_words_follow_the_contract(seed: int, offset: int, chain: int) -> None:
    chains = torch.tensor([chain, (chain + 1) % 2**32])
    got = arithmetic.random_words(torch.tensor([seed, offset]), 3, chains, 11)
    for row in range(2):
        expected = words_of(
            seed % 2**64, offset + 3, range(int(chains[row]), int(chains[row]) + 1), 11
        )
        assert got[row].tolist() == expected[0].tolist()


def test_philox_known_answers_of_the_package() -> None:
    """The first two published vectors can be reached through the counters that draws use."""
    zero = arithmetic.random_words(torch.tensor([0, 0]), 0, torch.tensor([0]), 4)
    assert tuple(zero[0].tolist()) == KNOWN[0][2]
    # Counter words 2 and 3 all ones: a step of 56 ones, and stream 255.
    top = torch.tensor([-1, 2**56 - 1])
    blocks = (
        2  # unit // 4 cannot reach 2^32 - 1 here, so word 0 is compared with this file's Philox
    )
    got = arithmetic.random_words(top, 0, torch.tensor([2**32 - 1]), 4 * blocks, stream=255)
    counter = np.array([[b, 2**32 - 1, 2**32 - 1, 2**32 - 1] for b in range(blocks)], np.uint64)
    assert got[0].tolist() == philox(counter, (2**32 - 1, 2**32 - 1)).flatten().tolist()


@each_backend
@pytest.mark.parametrize("seed", [(0, 0), (2**62 + 12345, 2**33 + 1), (-3, 17)])
@pytest.mark.parametrize("chain_offset", [0, 5, 2**31 - 3, 2**32 - 20])
def test_states_use_their_counter(backend: str, seed: tuple[int, int], chain_offset: int) -> None:
    """u < p for the very u of the contract; only a u within rounding of p may differ."""
    rows, units = 40, 37
    p = torch.linspace(0.01, 0.99, units).double()
    c, W = (p / (1 - p)).log().float(), torch.zeros(units, units)
    p = torch.sigmoid(c.double())
    common = {"chain_offset": chain_offset, "backend": backend}
    chains = range(chain_offset, chain_offset + rows)
    for k in (0, 1, 3):
        if k == 0:
            drawn = rk.sample_hidden(torch.zeros(rows, units), W, c, seed=seed, **common)
        else:  # without weights v_k depends on the last half-sweep, 2k - 1, alone
            v0, zeros = torch.zeros(rows, units), torch.zeros(units)
            drawn = rk.gibbs_sample(v0, W, c, zeros, k, seed=seed, **common)
        words = words_of(seed[0] % 2**64, seed[1] + max(2 * k - 1, 0), chains, units)
        u = torch.from_numpy((words >> np.uint64(8)).astype(np.float64)) * 2.0**-24
        clear = (u - p).abs() > 3e-7
        assert clear.float().mean() > 0.99
        assert torch.equal((u < p)[clear], drawn[clear] == 1)


def box_muller(words: np.ndarray) -> np.ndarray:
    """float64 normals of word pairs: u in (0, 1] for the radius, the second word for the angle."""
    u = ((words[..., 0::2] >> np.uint64(8)).astype(np.float64) + 1) * 2.0**-24
    turn = (words[..., 1::2] >> np.uint64(8)).astype(np.float64) * 2.0**-24
    radius = np.sqrt(-2 * np.log(u))
    pair = radius * np.cos(2 * np.pi * turn), radius * np.sin(2 * np.pi * turn)
    return np.stack(pair, -1).reshape(*words.shape[:-1], -1)


@each_backend
@pytest.mark.parametrize("units", [1, 2, 7, 37])
def test_gaussian_states_use_their_counter(backend: str, units: int) -> None:
    zeros = torch.zeros(units)
    v = rk.sample_visible(
        torch.zeros(50, 3), torch.zeros(units, 3), zeros, log_var=zeros, seed=(9, 4),
        chain_offset=6, backend=backend,
    )  # fmt: skip
    words = words_of(9, 4, range(6, 56), units + units % 2)
    expected = torch.from_numpy(box_muller(words)[:, :units])
    torch.testing.assert_close(v.double(), expected, rtol=0, atol=3e-6)


@pytest.fixture(scope="module")
def words() -> Tensor:
    """[4096, 256] words of one half-sweep: a million."""
    return arithmetic.random_words(torch.tensor([2024, 0]), 0, torch.arange(4096), 256)


def assert_uniform(counts: np.ndarray) -> None:
    assert stats.chisquare(counts.flatten()).pvalue > P_VALUE


def test_uniforms_are_uniform(words: Tensor) -> None:
    u = arithmetic.uniform(words)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert torch.equal((u.double() * 2**24).long(), words >> 8)
    assert_uniform(np.histogram(u.numpy(), bins=1024, range=(0, 1))[0])
    for bit in range(32):
        ones = ((words >> bit) & 1).sum().item()
        assert abs(ones - words.numel() / 2) < 5 * (words.numel() / 4) ** 0.5


def test_neighbors_are_independent(words: Tensor) -> None:
    """Pairs across units, counters, chains, half-sweeps and seeds, on a 32 by 32 grid."""
    chains = torch.arange(4096)
    later = arithmetic.random_words(torch.tensor([2024, 0]), 1, chains, 256)
    other = arithmetic.random_words(torch.tensor([2025, 0]), 0, chains, 256)
    pairs = [
        (words[:, :-1], words[:, 1:]), (words[:, :-4], words[:, 4:]), (words[:-1], words[1:]),
        (words, later), (words, other),
    ]  # fmt: skip
    for first, second in pairs:
        cells = (first >> 27) * 32 + (second >> 27)
        assert_uniform(torch.bincount(cells.flatten(), minlength=1024).numpy())


def test_normals(words: Tensor) -> None:
    z = arithmetic.normal(words)
    assert z.dtype == torch.float32 and torch.isfinite(z).all()
    exact = torch.from_numpy(box_muller(words.numpy().astype(np.uint64)))
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=3e-6)
    flat = z.double().flatten()
    n = flat.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((flat**power).mean().item() - moment) < 5 * (variance / n) ** 0.5
    assert stats.kstest(flat.numpy(), "norm").pvalue > P_VALUE
    for offset in (1, 2, 3):
        product = (z[:, offset:] * z[:, :-offset]).double()
        assert abs(product.mean().item()) < 5 / product.numel() ** 0.5
        squares = ((z[:, offset:] ** 2 - 1) * (z[:, :-offset] ** 2 - 1)).double()
        assert abs(squares.mean().item()) < 5 * 2 / squares.numel() ** 0.5


def test_normals_at_the_ends_of_the_words() -> None:
    ends = torch.tensor(
        [0, 1, 255, 256, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 256, 2**32 - 1]
    )
    pairs = torch.cartesian_prod(ends, ends)
    z = arithmetic.normal(pairs)
    assert torch.isfinite(z).all()
    exact = torch.from_numpy(box_muller(pairs.numpy().astype(np.uint64)))
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=3e-6)
    assert z.abs().max() > 5.7  # sqrt(2 * 24 log 2) = 5.77


def test_fused_multiply_add_rounds_once() -> None:
    """Against exact rationals, with sums that lie just beside the middle of two floats."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3000, generator=g)
    b = torch.randn(3000, generator=g) * torch.logspace(-12, 12, 3000)
    c = torch.randn(3000, generator=g)
    one = torch.tensor(1.0)
    tiny = torch.tensor(2.0**-24)
    eps = torch.tensor(2.0**-23)
    hard = [
        (one + eps, tiny, one), (one - tiny, tiny, one), (tiny, one, one), (tiny, one, one + eps),
        (-one - eps, tiny, -one), (one + eps, one + eps, -one), (tiny, tiny, one),
        (tiny * (1 + 2**-20), one, one), (tiny, tiny * tiny, one + eps), (-tiny / 2, one, one),
        (torch.tensor(2.0**-70), torch.tensor(2.0**-70), tiny),
    ]  # fmt: skip
    a = torch.cat([a, torch.stack([t[0] for t in hard])])
    b = torch.cat([b, torch.stack([t[1] for t in hard])])
    c = torch.cat([c, torch.stack([t[2] for t in hard])])
    got = arithmetic.fma(a, b, c)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        mine = abs(Fraction(r) - exact)
        for side in (-np.inf, np.inf):
            other = abs(Fraction(float(np.nextafter(np.float32(r), np.float32(side)))) - exact)
            assert mine <= other, (x, y, z, r)
            if mine == other:  # a tie goes to the even significand
                assert np.float32(r).view(np.int32) % 2 == 0, (x, y, z, r)


def test_exponential_and_sigmoid_keep_their_digits() -> None:
    x = torch.linspace(-87, 87, 2_000_001)
    exact = torch.exp(-x.double())
    error = (arithmetic.exp_neg(x).double() - exact).abs() / exact
    assert error.max() < 3e-7, error.max()
    p = arithmetic.sigmoid(x)
    exact = torch.sigmoid(x.double())
    assert ((p.double() - exact).abs() / exact).max() < 4e-7
    far = arithmetic.sigmoid(torch.tensor([-1e30, -100.0, 100.0, 1e30]))
    assert torch.isfinite(far).all() and far[0] < 1e-37 and far[3] == 1


@each_backend
def test_int_seed_is_pure_and_tensor_seed_advances(backend: str) -> None:
    v, h, W, b, c = binary(9, 7), binary(9, 5), normal(7, 5), normal(7), normal(5)
    calls = {
        1: [
            lambda s: rk.sample_hidden(v, W, c, seed=s, backend=backend),
            lambda s: rk.sample_visible(h, W, b, seed=s, backend=backend),
        ],
        6: [
            lambda s: rk.gibbs_sample(v, W, b, c, 3, seed=s, backend=backend),
            lambda s: rk.cd_step(v, W, b, c, 3, seed=s, backend=backend).chains,
            lambda s: rk.cd_loss(v, W, b, c, 3, seed=s, backend=backend),
        ],
    }
    for half_sweeps, functions in calls.items():
        for call in functions:
            assert same(call(3), call(3)) and same(call(3), call((3, 0)))
            assert not same(call(3), call(4)) and not same(call((3, 0)), call((3, half_sweeps)))
            seed = torch.tensor([3, 100])
            first, second = call(seed), call(seed)
            assert seed.tolist() == [3, 100 + 2 * half_sweeps]
            assert same(first, call((3, 100)))
            assert same(second, call((3, 100 + half_sweeps)))


@each_backend
def test_free_energy_draws_nothing(backend: str) -> None:
    state = torch.get_rng_state()
    rk.free_energy(binary(9, 7), normal(7, 5), normal(7), normal(5), backend=backend)
    assert torch.equal(state, torch.get_rng_state())


@each_backend
def test_generators(backend: str) -> None:
    v, W, b, c = binary(9, 7), normal(7, 5), normal(7), normal(5)

    def draw(generator: torch.Generator | None = None) -> Tensor:
        return rk.gibbs_sample(v, W, b, c, 2, generator=generator, backend=backend)

    torch.manual_seed(5)
    first, second = draw(), draw()
    assert not same(first, second)
    torch.manual_seed(5)
    assert same(draw(), first) and same(draw(), second)
    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    assert same(draw(generator), first) and same(draw(generator), second)
    assert torch.equal(state, torch.get_rng_state()), "the default generator was touched"
    assert not same(draw(torch.Generator().manual_seed(6)), first)
    torch.manual_seed(5)  # an explicit seed takes nothing from the generator
    state = torch.get_rng_state()
    rk.gibbs_sample(v, W, b, c, 2, seed=1, backend=backend)
    assert torch.equal(state, torch.get_rng_state())
