"""Checks of the parameters that are evaluated: each error names what came and what was expected.

Unlike the operations, the estimates take parameters of different float dtypes, since they compute
in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rbm_kernels.ops import _checks
from rbm_kernels.units import Units, visible_units


def parameters(
    where: str, W: Tensor, b: Tensor, c: Tensor, log_var: Tensor | None, visible: str | None
) -> Units:
    """Refuse parameters of a wrong shape or with values that are not finite.

    Returns:
        The visible units.
    """
    _checks.weight(where, W)
    vector(where, "b", b, "V", W.shape[0])
    vector(where, "c", c, "H", W.shape[1])
    units = visible_units(log_var, visible, where)
    for name, value in units.parameters():
        vector(where, name, value, "V", W.shape[0])
    for name, value in (("W", W), ("b", b), ("c", c), *units.parameters()):
        if not torch.isfinite(value).all():
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinite values")
    return units


def in_float64(
    where: str,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None = None,
    visible: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Units]:
    """Checked parameters (W, b, c, visible units) in float64."""
    units = parameters(where, W, b, c, log_var, visible)
    return W.double(), b.double(), c.double(), units.to(torch.float64)


def vector(where: str, name: str, x: Tensor, letter: str, size: int) -> None:
    """A parameter of a layer must be a tensor [size] of a float dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: {name} must be a tensor of a float dtype, got {got}")
    if x.shape != (size,):
        raise ValueError(f"{where}: {name} must be [{letter}] = [{size}], got {list(x.shape)}")


def rows(where: str, name: str, v: Any, W: Tensor, units: Units) -> Tensor:
    """Visible states must be [B, V], finite, of values that the units take."""
    v = _checks.states(where, name, v, W.shape[0], "V", W)
    values(where, name, v, units)
    return v


def values(where: str, name: str, v: Tensor, units: Units) -> None:
    """Visible states must be finite, and of values that the units take."""
    if not torch.isfinite(v).all():
        raise ValueError(f"{where}: {name} must be finite, got NaN or infinite values")
    units.check(where, name, v)
