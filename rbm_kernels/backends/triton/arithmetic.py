"""The contract of ``rbm_kernels/arithmetic.py`` as device functions, rounding for rounding.

Compiled with ``enable_fp_fusion=False``, every float operation here rounds once, as written. The
interpreter has no fused multiply-add, so there it is emulated as ``arithmetic.fma`` does.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rbm_kernels.backends.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())

LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.42860682030941723e-06)
ROUNDING_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
TO_UNIFORM = tl.constexpr(2.0**-24)
# The largest integers that two and three signed base-256 digits can write.
LARGEST_OF_TWO = tl.constexpr(127 * 257)
LARGEST_OF_THREE = tl.constexpr(127 * 65793)


@triton.jit
def fma(a, b, c):
    """``a * b + c`` in float32, rounded once."""
    if INTERPRETED:
        product = tl.cast(a, tl.float64) * tl.cast(b, tl.float64)
        addend = tl.cast(c, tl.float64)
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = total.to(tl.int64, bitcast=True)
        step = tl.where((error > 0) == (total > 0), 1, -1)
        bits = tl.where((error != 0) & ((bits & 1) == 0), bits + step, bits)
        result = bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def exp_neg(x):
    """``exp(-x)``, x clamped to [-87, 87]; NaN stays NaN."""
    t = -x
    t = tl.where(t < -87.0, -87.0, t)
    t = tl.where(t > 87.0, 87.0, t)
    n = fma(t, 1.44269504088896341, ROUNDING_MAGIC) - ROUNDING_MAGIC
    r = fma(n, -LN2_HIGH, t)
    r = fma(n, -LN2_LOW, r)
    p = fma(r, 0.0013836835278198123, 0.008374824188649654)
    p = fma(p, r, 0.04166822507977486)
    p = fma(p, r, 0.16666419804096222)
    p = fma(p, r, 0.49999991059303284)
    p = fma(p, r, 1.0)
    p = fma(p, r, 1.0)
    bits = p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exp_neg(x))


@triton.jit
def softplus(x):
    """``log(1 + exp(x))`` as max(x, 0) + 2 atanh(y / (2 + y)), y = exp(-|x|); see rbm/math.h."""
    e = exp_neg(x)
    z = tl.div_rn(tl.minimum(e, 1.0), tl.maximum(e + 2.0, fma(e, 2.0, 1.0)))
    t = z * z
    q = fma(t, 0.24300934374332428, 0.21427658200263977)
    q = fma(q, t, 0.2861688435077667)
    q = fma(q, t, 0.3999887704849243)
    q = fma(q, t, 0.6666667461395264)
    return tl.maximum(x, 0.0) + fma(z * t, q, z + z)


@triton.jit
def log_positive(x):
    """log(x) of positive normal floats."""
    i = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (i >> 23).to(tl.float32)
    m = ((i & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    z = tl.div_rn(m - 1.0, m + 1.0)
    t = z * z
    q = fma(t, 0.23582600057125092, 0.28537285327911377)
    q = fma(q, t, 0.4000033438205719)
    q = fma(q, t, 0.6666666269302368)
    log_m = fma(z * t, q, z + z)
    return fma(e, LN2_HIGH, fma(e, LN2_LOW, log_m))


@triton.jit
def uniform(words):
    """float32 in [0, 1) from the high 24 bits of uint32 words."""
    return (words >> 8).to(tl.float32) * TO_UNIFORM


@triton.jit
def normal_pair(first, second):
    """Two standard normals from two words (Box and Muller 1958)."""
    u = ((first >> 8) + 1).to(tl.float32) * TO_UNIFORM  # in (0, 1]
    radius = tl.sqrt_rn(-2.0 * log_positive(u))
    turns = uniform(second) * 4.0
    n = (turns + ROUNDING_MAGIC) - ROUNDING_MAGIC
    f = turns - n
    t = f * f
    s = fma(t, -0.00460165785625577, 0.07968003302812576)
    s = fma(s, t, -0.6459634900093079)
    s = f * fma(s, t, 1.5707963705062866)
    c = fma(t, 0.0009033629903569818, -0.020859936252236366)
    c = fma(c, t, 0.2536691725254059)
    c = fma(c, t, -1.2337005138397217)
    c = fma(c, t, 1.0)
    k = n.to(tl.int32)
    odd = (k & 1) != 0
    cos = tl.where(odd, s, c) * tl.where(((k + 1) & 2) != 0, -1.0, 1.0)
    sin = tl.where(odd, c, s) * tl.where((k & 2) != 0, -1.0, 1.0)
    return radius * cos, radius * sin


@triton.jit
def random_words(seed, step, chain_offset, rows, first_unit, BLOCK_N: tl.constexpr):
    """The four Philox words of each counter (unit // 4, chain, step, stream 0) of a tile.

    seed: int64 [2] in memory, key and offset; step: half-sweep index within the call;
    rows: int32 [BLOCK_B]; first_unit: a multiple of 4.

    Returns four uint32 [BLOCK_B, BLOCK_N / 4]: word i belongs to units 4 * column + i.
    """
    key = tl.load(seed)
    at = tl.load(seed + 1) + step
    block = (first_unit // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    chain = (rows + chain_offset)[:, None]
    low = (at & 0xFFFFFFFF).to(tl.uint32)
    high = (((at >> 32) & 0xFFFFFF) << 8).to(tl.uint32)
    return tl.philox(key, block, chain, low, high)


@triton.jit
def interleave4(a, b, c, d, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four [BLOCK_B, BLOCK_N / 4] as one [BLOCK_B, BLOCK_N], column 4 j + i from the i-th."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_B, BLOCK_N))


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, whose order as int32 is that of the magnitudes, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def integer_of(x):
    """Float32 of magnitude below 2^23 rounded to int32, half to even."""
    # Adding 2^23 leaves the rounded magnitude in the low bits.
    magnitude = (tl.abs(x) + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest_bits, DIGITS: tl.constexpr):
    """The power of two that makes the largest magnitude just fit in DIGITS signed digits.

    largest_bits: int32, magnitude_bits of the largest. 1 for 0; NaN for infinity and NaN, so that
    they spoil everything computed from the integers and cannot pass unseen.
    """
    largest = largest_bits.to(tl.float32, bitcast=True)
    exponent = tl.maximum((largest_bits >> 23) - (126 + 8 * DIGITS - 1), -120)
    most = LARGEST_OF_THREE if DIGITS == 3 else LARGEST_OF_TWO
    too_large = integer_of(largest * power_of_two(-exponent)) > most
    scale = power_of_two(exponent + too_large.to(tl.int32))
    scale = tl.where(largest_bits == 0, 1.0, scale)
    return tl.where(largest_bits >= 0x7F800000, float("nan"), scale)


@triton.jit
def fixed_point(x, scale):
    """``x / scale`` rounded to int32, half to even. The scale is a power of two."""
    inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return integer_of(x * inverse)


@triton.jit
def split_digit(q):
    """The low signed base-256 digit of q, int8, and what is left of q above it."""
    digit = ((q + 128) & 255) - 128
    return digit.to(tl.int8), (q - digit) >> 8
