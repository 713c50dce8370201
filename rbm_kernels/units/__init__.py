"""Kinds of visible units: one file each, in plain PyTorch, and nothing else decides by the kind."""

from __future__ import annotations

from torch import Tensor

from .base import Units
from .bernoulli import Bernoulli
from .gaussian import Gaussian
from .spin import Spin

KINDS: dict[str, type[Units]] = {units.kind: units for units in (Bernoulli, Gaussian, Spin)}


def visible_units(
    log_var: Tensor | None = None, visible: str | None = None, op: str = "visible_units"
) -> Units:
    """The units that an operation's arguments mean.

    Args:
        log_var: [V] log-variances, which Gaussian units alone have.
        visible: A key of ``KINDS``; None means Gaussian units where ``log_var`` is given and
            Bernoulli units otherwise.
        op: The operation, for error messages.

    Raises:
        ValueError: An unknown kind, or one to which ``log_var`` does not belong.
    """
    if visible is None:
        return Bernoulli() if log_var is None else Gaussian(log_var)
    if visible not in KINDS:
        raise ValueError(f"{op}: visible must be one of {tuple(KINDS)}, got {visible!r}")
    kind = KINDS[visible]
    given = {} if log_var is None else {"log_var": log_var}
    if tuple(given) != kind.parameter_names:
        raise ValueError(
            f"{op}: {kind.label} units have the parameters {list(kind.parameter_names)}, "
            f"got {list(given)}"
        )
    return kind(*given.values())


__all__ = ["KINDS", "Bernoulli", "Gaussian", "Spin", "Units", "visible_units"]
