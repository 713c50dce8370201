"""The randomness and fixed-point contract of every backend, in plain PyTorch.

Each function computes exactly the bits that ``csrc/include/rbm`` computes: an fp32 fused
multiply-add has one rounding here too (see ``fma``), and sums of fixed-point products are exact
integers. ``docs/arithmetic.md`` states the contract and its measured error.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The largest integer that 2 and 3 signed base-256 digits in [-128, 127] can write.
_LARGEST = {2: 127 * 257, 3: 127 * 65793}
# The largest layer of the GPU backends: the sums of two digits then fit in an int32
# (127 * 257 * 65535 < 2^31), and those of the products of three in an int64.
MOST_UNITS = 65_535
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds a float32 to an integer
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860682030941723e-06
_EXP = (
    1.0,
    1.0,
    0.49999991059303284,
    0.16666419804096222,
    0.04166822507977486,
    0.008374824188649654,
    0.0013836835278198123,
)
_LOG = (0.6666666269302368, 0.4000033438205719, 0.28537285327911377, 0.23582600057125092)
_SIN = (1.5707963705062866, -0.6459634900093079, 0.07968003302812576, -0.00460165785625577)
_COS = (
    1.0,
    -1.2337005138397217,
    0.2536691725254059,
    -0.020859936252236366,
    0.0009033629903569818,
)


def digits_of(op: str, precision: str | None) -> int:
    """Base-256 digits of a fixed-point operand: 3 for ``highest``, 2 for ``high`` and ``medium``.

    A compiled function holds the number as a constant. It is compiled anew when torch's precision
    changes from ``highest`` to the others or back, because torch guards what that stands for.

    Args:
        op: The calling function, for error messages.
        precision: One of the three names, or None for ``torch.get_float32_matmul_precision()``.

    Raises:
        ValueError: For any other name.
    """
    name = torch.get_float32_matmul_precision() if precision is None else precision
    if name == "highest":
        return 3
    if name in ("high", "medium"):
        return 2
    raise ValueError(f"{op}: precision must be 'highest', 'high' or 'medium', got {precision!r}")


# All that torch.compiler.assume_constant_result does, which would import the compiler, and with it
# triton, whenever this package is imported.
digits_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors with a single rounding.

    The product is exact in fp64; the sum is rounded to odd there, which makes the second rounding,
    to fp32, the only one that counts (Boldo and Melquiond, IEEE Trans. Computers 57, 2008).
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    to_odd = (error != 0) & (bits & 1 == 0)
    return torch.where(to_odd, bits + step, bits).view(torch.float64).float()


def _constant(like: Tensor, value: float) -> Tensor:
    # Filled on the device: torch.tensor copies from host memory, which waits for a GPU.
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = _constant(x, coefficients[-1]).expand_as(x)
    for coefficient in reversed(coefficients[:-1]):
        result = fma(result, x, _constant(x, coefficient))
    return result


def exp_neg(x: Tensor) -> Tensor:
    """``exp(-x)`` in float32, x clamped to [-87, 87]; relative error about 1e-7."""
    t = (-x).clamp(-87.0, 87.0)
    n = fma(t, _constant(x, 1.44269504088896341), _constant(x, _MAGIC)) - _MAGIC
    r = fma(n, _constant(x, -_LN2_HIGH), t)
    r = fma(n, _constant(x, -_LN2_LOW), r)
    bits = _polynomial(r, _EXP).view(torch.int32) + (n.to(torch.int32) << 23)
    return bits.view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` in float32, by ``exp_neg`` and one division."""
    return 1.0 / (1.0 + exp_neg(x))


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root; PyTorch's own can be off by one unit (MKL's VML)."""
    return x.double().sqrt().float()


def random_words(seed: Tensor, step: int, chains: Tensor, n_units: int, stream: int = 0) -> Tensor:
    """Philox4x32-10 words of one half-sweep (Salmon et al., SC 2011).

    Args:
        seed: int64 [2], the key and the offset.
        step: Half-sweep index within the call; the offset is added to it.
        chains: int64 [B], global indices of the chains.
        n_units: Units of the layer drawn.
        stream: Number of the stream, 0 to 255.

    Returns:
        int64 [B, n_units] of values in [0, 2^32): unit u of a chain uses word ``u % 4`` of the
        counter ``(u // 4, chain, step, stream)``.
    """
    mask = 0xFFFFFFFF
    at = seed[1] + step
    blocks = (n_units + 3) // 4
    shape = (chains.numel(), blocks)
    c0 = torch.arange(blocks, device=chains.device).expand(shape)
    c1 = (chains & mask).unsqueeze(1).expand(shape)
    c2 = (at & mask).expand(shape)
    c3 = ((((at >> 32) & 0xFFFFFF) << 8) | stream).expand(shape)
    key0, key1 = seed[0] & mask, (seed[0] >> 32) & mask
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, as the int64 product wraps
        c0 = ((p1 >> 32) & mask) ^ c1 ^ key0
        c2 = ((p0 >> 32) & mask) ^ c3 ^ key1
        c1, c3 = p1 & mask, p0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=2).reshape(chains.numel(), 4 * blocks)[:, :n_units]


def uniform(words: Tensor) -> Tensor:
    """float32 in [0, 1) from the high 24 bits of each word."""
    return (words >> 8).float() * 2.0**-24


def bernoulli(x: Tensor, words: Tensor) -> Tensor:
    """bool: the unit is on when ``u < sigmoid(x)``, decided without a division."""
    u = uniform(words)
    return fma(u, exp_neg(x), u) < 1.0


def _log(x: Tensor) -> Tensor:
    i = x.view(torch.int32) - 0x3F3504F3
    e = (i >> 23).float()
    m = ((i & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    z = (m - 1.0) / (m + 1.0)
    t = z * z
    log_m = fma(z * t, _polynomial(t, _LOG), z + z)
    return fma(e, _constant(x, _LN2_HIGH), fma(e, _constant(x, _LN2_LOW), log_m))


def normal(words: Tensor) -> Tensor:
    """Standard normals from words [B, N], N even: two from each pair (Box and Muller 1958)."""
    first, second = words[:, 0::2], words[:, 1::2]
    u = ((first >> 8) + 1).float() * 2.0**-24  # in (0, 1]
    radius = sqrt(-2.0 * _log(u))
    turns = uniform(second) * 4.0
    n = turns.round()
    f = turns - n
    t = f * f
    s, c = f * _polynomial(t, _SIN), _polynomial(t, _COS)
    k = n.to(torch.int32)
    odd = (k & 1).bool()
    cos = torch.where(odd, s, c) * torch.where(((k + 1) & 2).bool(), -1.0, 1.0)
    sin = torch.where(odd, c, s) * torch.where((k & 2).bool(), -1.0, 1.0)
    return torch.stack((radius * cos, radius * sin), dim=2).flatten(1)


def scale_of(largest: Tensor, digits: int) -> Tensor:
    """The power of two that makes ``largest / scale`` just fit in ``digits`` signed digits.

    Args:
        largest: float32, any shape: the largest magnitudes to be represented.
        digits: 2 or 3.

    Returns:
        float32 of the same shape; 1 where ``largest`` is 0.
    """
    _, exponent = torch.frexp(largest)
    exponent = (exponent - (8 * digits - 1)).clamp(min=-120)
    unit = torch.ones_like(largest)
    too_large = torch.round(torch.ldexp(largest, -exponent)) > _LARGEST[digits]
    scale = torch.ldexp(unit, exponent + too_large.to(exponent.dtype))
    return torch.where(largest == 0, unit, scale)


def fixed_point(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` rounded to integers (half to even), as float64. The scale is a power of two."""
    return torch.round(x * (1.0 / scale)).double()


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of integers below 2^24 held in float64: the exact sum, rounded once to float64.

    The left operand is cut in two halves of 12 bits, whose products stay exact below 2^53.
    """
    high = torch.floor(a * 2.0**-12)
    low = a - high * 2.0**12
    total = (high @ b).to(torch.int64) * 4096 + (low @ b).to(torch.int64)
    return total.double()
