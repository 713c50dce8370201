"""What an operation hands on to a backend: a model, or one layer of it, and how it draws."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rbm_kernels.units import Units
from rbm_kernels.units.base import Beta

__all__ = ["Beta", "Draw", "Layer", "Model"]


class Model(NamedTuple):
    """The parameters of an RBM.

    Attributes:
        W: [V, H] weights.
        b: [V] visible biases.
        c: [H] hidden biases.
        units: The kind of visible units, with the parameters that only this kind has.
    """

    W: Tensor
    b: Tensor
    c: Tensor
    units: Units

    @property
    def kinds(self) -> tuple[type[Units], ...]:
        """The kinds of unit that a backend must know to run this model."""
        return (type(self.units),)


class Layer(NamedTuple):
    """One layer as the other sees it: what a half-sweep draws.

    Attributes:
        W: [K, N] weights from the K units of the given layer to the N units that are drawn.
        bias: [N] biases of the drawn units.
        given: The kind of the given units.
        drawn: The kind of the drawn units.
    """

    W: Tensor
    bias: Tensor
    given: Units
    drawn: Units

    @property
    def kinds(self) -> tuple[type[Units], ...]:
        """The kinds of unit that a backend must know to draw this layer."""
        return type(self.given), type(self.drawn)


class Draw(NamedTuple):
    """How the states of one call are drawn.

    Attributes:
        seed: int64 [2] on the model's device: the key of the generator and the half-sweep's offset.
        chain_offset: The global index of row 0, so that a batch cut in parts draws the same.
        beta: Inverse temperature, a float or a contiguous float32 [B].
        digits: Base-256 digits of the fixed-point weights, 2 or 3 (docs/arithmetic.md).
    """

    seed: Tensor
    chain_offset: int
    beta: Beta
    digits: int
