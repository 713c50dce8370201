"""Units that are -1 or 1, as in physics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_kernels import arithmetic

from .base import Beta, Change, per_row_float32, tempered
from .bernoulli import Bernoulli

# Above this, log(1 + exp(-x)) is 0 beside x to full float64 precision.
_SOFTPLUS_LINEAR = 40.0
# Bits of a weight in the sums of ``_sums``: 2^16 units then add up below 2^53.
_SUM_BITS = 36


class SpinChange(Change):
    """v = 2u - 1 with Bernoulli units u of W' = 2W, b' = 2b, c' = c - sum_i W_i.

    The energies differ by a constant, E(v, h) = E'(u, h) + sum_i b_i, so that both models draw
    the same states with the same probabilities.
    """

    units = Bernoulli()

    def weights(self, W: Tensor) -> Tensor:
        return 2 * W

    def visible_bias(self, b: Tensor) -> Tensor:
        return 2 * b

    def hidden_bias(self, c: Tensor, W: Tensor) -> Tensor:
        return (c.double() - _sums(W)).to(c.dtype)

    def free_energy(self, b: Tensor) -> Tensor:
        return b.sum(dtype=torch.float64)

    def states(self, v: Tensor) -> Tensor:
        v = v if v.is_floating_point() else v.float()
        return torch.where(v.abs() == 1, (v + 1) / 2, torch.nan)

    def restored(self, states: Tensor) -> Tensor:
        return 2 * states - 1

    def gradients(self, grad_W: Tensor, grad_b: Tensor, grad_c: Tensor) -> tuple[Tensor, ...]:
        return 2 * grad_W - grad_c, 2 * grad_b, grad_c


def _sums(W: Tensor) -> Tensor:
    """Sums of W over the visible units [H], float64, with the same bits on every device.

    The order in which a device adds shows in the last bits of a sum, so that each weight is first
    rounded to ``_SUM_BITS`` bits below the largest: such sums are exact. Weights in float64 are
    summed as they are.
    """
    total = W.sum(0, dtype=torch.float64)
    if W.dtype == torch.float64 or not W.numel():
        return total
    weights = W.detach()
    smallest, largest = torch.aminmax(weights)
    _, exponent = torch.frexp(torch.maximum(-smallest, largest))
    unit = torch.ldexp(weights.new_ones(()), (exponent - _SUM_BITS).clamp(min=-120))
    exact = (weights / unit).round_().sum(0, dtype=torch.float64) * unit
    return exact + (total - total.detach())  # a zero that has the sum's derivatives


class Spin(Bernoulli):
    """Units v in {-1, 1} with energy -b'v; given x they are 1 with probability sigmoid(2x).

    The energy and what the hidden units see are those of Bernoulli units; the mean is the
    magnetization tanh(x). Data must be -1 and 1 exactly.

    Example:
        >>> import torch
        >>> Spin().mean(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """

    __slots__ = ()

    kind = "spin"
    label = "spin"
    fits_bytes = False
    change = SpinChange()

    @classmethod
    def fit(cls, op: str, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Spin]:
        """Half the log-odds of 1, smoothed as for Bernoulli units."""
        cls().check(op, "v", v)
        b, _ = Bernoulli.fit(op, v > 0, dtype)
        return b / 2, cls()

    def check(self, op: str, name: str, states: Tensor) -> None:
        wrong = states[states.float().abs() != 1]
        if wrong.numel():
            value = wrong[0].item()
            raise ValueError(f"{op}: {name} of spin units must be -1 or 1, got {value}")

    def log_partition(self, x: Tensor, b: Tensor) -> Tensor:
        return F.softplus(2 * x, threshold=_SOFTPLUS_LINEAR) - x

    def mean(self, x: Tensor, beta: Beta = 1.0) -> Tensor:
        return torch.tanh(tempered(x, beta))

    def sample(self, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        return torch.rand_like(mean).lt_((mean + 1) / 2).mul_(2).sub_(1)

    def draw(self, x: Tensor, words: Tensor, beta: Beta = 1.0) -> tuple[Tensor, Tensor]:
        x = per_row_float32(beta, x) * (2 * x)
        on = arithmetic.bernoulli(x, words[:, : x.shape[1]])
        return 2 * on.float() - 1, 2 * arithmetic.sigmoid(x) - 1

    def mean_backward(self, grad: Tensor, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        return tempered(grad * (1 - mean.square()), beta)
