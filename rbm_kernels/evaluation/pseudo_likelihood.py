"""The pseudo-likelihood, which needs no partition function."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_kernels.textbook import BERNOULLI, hidden_input

from . import _checks


class PseudoLikelihood(NamedTuple):
    """log p(v_i | all other visible units), in float64.

    Attributes:
        total: [B], the sum over the units; for ``units="random"`` its estimate, V times one unit's.
        per_unit: [B, V], or None for ``units="random"``.
    """

    total: Tensor
    per_unit: Tensor | None


@torch.no_grad()
def pseudo_likelihood(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    visible: str | None = None,
    units: str = "all",
    generator: torch.Generator | None = None,
    chunk: int = 2**22,
) -> PseudoLikelihood:
    """Log pseudo-likelihood of binary rows: each unit given all others (Besag 1975).

    It needs no log Z: log p(v_i | v_-i) = log sigmoid(F(v^i) - F(v)), with v^i the row whose
    unit i is flipped.

    Args:
        v: [B, V] of zeros and ones, any dtype, or of the two values of such units.
        W: [V, H].
        b: [V].
        c: [H].
        visible: The kind of visible units, as for the operations.
        units: ``"all"`` evaluates every unit exactly, in O(B V H). ``"random"`` evaluates one
            random unit of each row, whose value times V estimates the total without bias, in
            O(B (V + H)) after one product.
        generator: Chooses the units of ``"random"``.
        chunk: Elements of the working array.

    Returns:
        Totals and, for ``"all"``, every unit's value.

    Raises:
        ValueError: A wrong shape, unknown ``units``, or values other than the two that a unit
            takes.
    """
    W, b, c, kind = _checks.in_float64("pseudo_likelihood", W, b, c, None, visible)
    v = _checks.rows("pseudo_likelihood", "v", v, W, kind)
    if units not in ("all", "random"):
        raise ValueError(f"pseudo_likelihood: units must be 'all' or 'random', got {units!r}")
    if (binary := kind.change) is not None:
        v, (W, b, c) = binary.states(v), binary.model(W, b, c)
    v = v.double()
    if not ((v == 0) | (v == 1)).all():
        raise ValueError("pseudo_likelihood: v must hold only 0 and 1, got other values")
    x = hidden_input(v, W, c)  # [B, H]
    sign = 1 - 2 * v  # [B, V], the change of each unit when flipped
    batch, n_visible = v.shape
    if units == "random":
        unit = torch.randint(n_visible, (batch,), generator=generator).to(v.device)
        step = sign.gather(1, unit[:, None])  # [B, 1]
        hidden, flipped = (BERNOULLI.log_partition(y, c).sum(1) for y in (x, x + step * W[unit]))
        rise = flipped - hidden + step[:, 0] * b[unit]  # F(v) - F(v^i)
        return PseudoLikelihood(n_visible * F.logsigmoid(-rise), None)
    per_unit = torch.empty_like(v)
    # float32 for the O(B V H) part: a softplus there is good to 1e-7, and sums are in float64.
    x32, W32, sign32 = x.float(), W.float(), sign.float()
    base = F.softplus(x32)
    rows = max(1, chunk // max(1, W.shape[1]))
    for i in range(n_visible):
        for first in range(0, batch, rows):
            part = slice(first, first + rows)
            moved = x32[part] + sign32[part, i, None] * W32[i]
            change = (F.softplus(moved) - base[part]).sum(1, dtype=torch.float64)
            rise = change + sign[part, i] * b[i]
            per_unit[part, i] = F.logsigmoid(-rise)
    return PseudoLikelihood(per_unit.sum(1), per_unit)
