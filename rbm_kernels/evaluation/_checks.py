"""Checks of the parameters that are evaluated: each error names what came and what was expected.

Unlike the operations, the estimates take parameters of different float dtypes, since they compute
in float64.
"""

from __future__ import annotations

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
    """A parameter of a layer must be [size]."""
    if x.shape != (size,):
        raise ValueError(f"{where}: {name} must be [{letter}] = [{size}], got {list(x.shape)}")


def rows(where: str, v: Tensor, W: Tensor, units: Units) -> None:
    """Visible states must be [B, V], of values that the units take."""
    _checks.states(where, "v", v, W.shape[0], "V", W)
    units.check(where, "v", v)
