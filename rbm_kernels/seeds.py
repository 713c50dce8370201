"""Where random numbers come from: a seed and an offset in one int64[2] tensor."""

from __future__ import annotations

import operator
from typing import SupportsIndex, TypeAlias

import torch
from torch import Tensor

Seed: TypeAlias = int | tuple[int, int] | Tensor

_LIMIT = 2**63
_ONE_HALF_SWEEP = torch.tensor((0, 1), dtype=torch.int64)


def resolve(
    name: str, seed: Seed | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """The int64[2] tensor (seed, offset) of one call.

    Args:
        name: The calling function, for error messages.
        seed: An int (offset 0), a pair (seed, offset), or an int64[2] tensor on ``device``, which
            the caller then advances; None draws both from ``generator``.
        generator: None means torch's default generator, so that ``torch.manual_seed`` governs.
        device: Where the tensor must live.

    Raises:
        TypeError: If ``seed`` is of another kind.
        ValueError: If both are given, or ``seed`` has another shape, dtype or device, or is a
            tensor that cannot be advanced.
    """
    if seed is None:
        where = device if generator is None else generator.device
        drawn = torch.randint(0, 2**48, (2,), generator=generator, device=where)
        return drawn if where == device else drawn.to(device)
    if generator is not None:
        raise ValueError(f"{name}: give seed or generator, not both")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,) or seed.device != device:
            raise ValueError(
                f"{name}: a seed tensor must be int64 [2] on {device}, "
                f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
        contiguous = seed.is_contiguous()
        if not torch.compiler.is_compiling():
            _check_advances(name, seed, contiguous)
        return seed if contiguous else seed.contiguous()
    try:
        given = seed if isinstance(seed, tuple) else (seed, 0)
        first, second = given
        pair = (_index(first), _index(second))
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: seed must be an int, a pair of ints (seed, offset) or an int64[2] tensor, "
            f"got {type(seed).__name__} {seed!r}"
        ) from None
    for value in pair:
        if not -_LIMIT <= value < _LIMIT:
            raise ValueError(f"{name}: seed and offset must fit in 64 bits, got {value}")
    if device.type == "cpu":
        return torch.tensor(pair, dtype=torch.int64)
    # Filled on the device: a copy from host memory would wait for it, and end a graph capture.
    key = torch.full((2,), pair[1], dtype=torch.int64, device=device)
    key[0].fill_(pair[0])
    return key


def _index(number: SupportsIndex) -> int:
    # In a compiled function ``operator.index`` makes a constant, and every other int compiles anew.
    return number if isinstance(number, int) else operator.index(number)


def _check_advances(name: str, seed: Tensor, contiguous: bool) -> None:
    """Refuse a tensor that cannot be advanced after the call, when it would be too late."""
    if seed.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: a seed tensor is advanced and must not come from torch.inference_mode(), "
            "outside of which nothing can be written into it: pass a clone() of it"
        )
    if not contiguous and seed.stride(0) == 0:
        raise ValueError(
            f"{name}: a seed tensor is advanced and must have memory for both of its numbers, "
            "got an expanded tensor: pass a clone() of it"
        )


def later(seed: Seed | None, half_sweeps: int) -> Seed | None:
    """The seed from which draws go on after some half-sweeps.

    A tensor is returned as it is, since the call that drew has advanced it.
    """
    if isinstance(seed, tuple):
        return (seed[0], seed[1] + half_sweeps)
    if isinstance(seed, int):
        return (seed, half_sweeps)
    return seed


def advance(seed: Seed | None, half_sweeps: int) -> None:
    """Move the offset of a caller's seed tensor past the half-sweeps just drawn."""
    if type(seed) is Tensor and seed.is_cpu and not torch.compiler.is_compiling():
        seed.add_(_ONE_HALF_SWEEP, alpha=half_sweeps)  # a third of the cost of indexing
    elif isinstance(seed, Tensor):
        seed[1].add_(half_sweeps)
