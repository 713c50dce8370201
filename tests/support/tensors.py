"""Small tensors to test with, and their comparison bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor


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
