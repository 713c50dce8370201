"""Units that are 0 or 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_kernels import arithmetic

from .base import Beta, Units, exp_neg, per_row_float32, tempered

# Above this, softplus(x) is x to full float64 precision: exp(-40) is below half a last place.
_SOFTPLUS_LINEAR = 40.0
# How far outside [0, 1] rounding and finite differences may take a value; csrc/cpu/states.h has it.
_SLACK = 2.0**-9


class Bernoulli(Units):
    """Units v in {0, 1} with energy -b'v; given x they are on with probability sigmoid(x).

    The hidden units of every model are of this kind too. Data may also be probabilities in [0, 1].

    Example:
        >>> import torch
        >>> Bernoulli().log_partition(torch.zeros(1), torch.zeros(1)).exp()  # two states
        tensor([2.])
    """

    __slots__ = ()

    kind = "bernoulli"
    label = "Bernoulli"
    fits_bytes = True
    log_var = None

    @classmethod
    def fit(cls, op: str, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Bernoulli]:
        """Log-odds log((n1 + 1/2) / (n0 + 1/2)), finite for units that never change."""
        Bernoulli().check(op, "v", v)
        on = v.sum(0, dtype=dtype).clamp(0, v.shape[0])
        return torch.log((on + 0.5) / (v.shape[0] - on + 0.5)), cls()

    def check(self, op: str, name: str, states: Tensor) -> None:
        if states.dtype is torch.bool or not states.numel():
            return
        low, high = torch.aminmax(states.detach())
        if low < -_SLACK or high > 1 + _SLACK:
            raise ValueError(
                f"{op}: {name} must lie in [0, 1] for Bernoulli units, "
                f"got values from {low.item():g} to {high.item():g}"
            )

    def energy(self, v: Tensor, b: Tensor) -> Tensor:
        return -(v @ b)

    def given(self, v: Tensor, exp_neg: Callable[[Tensor], Tensor] = exp_neg) -> Tensor:
        return v

    def log_partition(self, x: Tensor, b: Tensor) -> Tensor:
        return F.softplus(x, threshold=_SOFTPLUS_LINEAR)

    def mean(self, x: Tensor, beta: Beta = 1.0) -> Tensor:
        return torch.sigmoid(tempered(x, beta))

    def sample(self, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        return torch.rand_like(mean).lt_(mean)

    def draw(self, x: Tensor, words: Tensor, beta: Beta = 1.0) -> tuple[Tensor, Tensor]:
        x = per_row_float32(beta, x) * x
        on = arithmetic.bernoulli(x, words[:, : x.shape[1]])
        return on.float(), arithmetic.sigmoid(x)

    def gradients(
        self,
        grad_W: Tensor,
        grad_b: Tensor,
        data: Tensor,
        chains: Tensor,
        W: Tensor,
        b: Tensor,
        exp_neg: Callable[[Tensor], Tensor] = exp_neg,
    ) -> tuple[Tensor, ...]:
        return grad_W, grad_b

    def energy_backward(self, grad: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        column = grad[:, None]
        return -column * b, -(column * v).sum(dim=0)

    def given_backward(self, grad: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (grad,)

    def mean_backward(self, grad: Tensor, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        return tempered(grad * mean * (1 - mean), beta)
