"""Kinds of visible units: one file each, in plain PyTorch, and nothing else decides by the kind."""

from __future__ import annotations

from torch import Tensor

from .base import Units
from .bernoulli import Bernoulli
from .gaussian import Gaussian

KINDS: dict[str, type[Units]] = {units.kind: units for units in (Bernoulli, Gaussian)}


def visible_units(log_var: Tensor | None) -> Units:
    """The units that an operation's arguments mean: Gaussian exactly where ``log_var`` is given."""
    return Bernoulli() if log_var is None else Gaussian(log_var)


__all__ = ["KINDS", "Bernoulli", "Gaussian", "Units", "visible_units"]
