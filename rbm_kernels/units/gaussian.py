"""Real units with a normal distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rbm_kernels import arithmetic

from .base import Beta, Units, exp_neg, per_row, per_row_float32


class Gaussian(Units):
    """Units v with energy sum_i (v_i - b_i)^2 / (2 s_i^2); given x they are Normal(x, s^2 / beta).

    The hidden units see v / s^2 (Hinton, "A practical guide to training restricted Boltzmann
    machines", 2010, section 13.2, with the variance learned as its logarithm).

    Args:
        log_var: [V] log s^2.

    Example:
        >>> import torch
        >>> units = Gaussian(torch.zeros(2))
        >>> units.energy(torch.ones(1, 2), torch.zeros(2))  # (1 + 1) / 2
        tensor([1.])
    """

    __slots__ = ("log_var",)

    kind = "gaussian"
    label = "Gaussian"
    continuous = True
    parameter_names = ("log_var",)
    log_var: Tensor

    def __init__(self, log_var: Tensor) -> None:
        self.log_var = log_var

    def parameters(self) -> tuple[tuple[str, Tensor], ...]:
        return (("log_var", self.log_var),)

    def to(self, dtype: torch.dtype) -> Gaussian:
        return Gaussian(self.log_var.to(dtype))

    @classmethod
    def fit(cls, op: str, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Gaussian]:
        """Mean and log-variance; a unit of zero variance is given variance 1."""
        variance, mean = torch.var_mean(v.to(dtype), dim=0, correction=0)
        # Rounding can leave a constant unit a variance of the order of (eps * mean)^2.
        constant = variance <= (4 * torch.finfo(dtype).eps * mean).square()
        return mean, cls(torch.where(constant, 1.0, variance).log())

    def energy(self, v: Tensor, b: Tensor) -> Tensor:
        return ((v - b).square() * exp_neg(self.log_var)).sum(dim=1) / 2

    def given(self, v: Tensor, exp_neg: Callable[[Tensor], Tensor] = exp_neg) -> Tensor:
        return v * exp_neg(self.log_var)

    def log_partition(self, x: Tensor, b: Tensor) -> Tensor:
        # The integral of exp(-(v - b)^2 / 2s^2 + v a / s^2), with a = x - b.
        exponent = (x - b) * (x + b) * exp_neg(self.log_var)
        return 0.5 * (exponent + math.log(2 * math.pi) + self.log_var)

    def mean(self, x: Tensor, beta: Beta = 1.0) -> Tensor:
        return x

    def sample(self, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        deviation = torch.exp(0.5 * self.log_var) / per_row(beta) ** 0.5
        return torch.randn_like(mean).mul_(deviation).add_(mean)

    def between(
        self, other: Units, b: Tensor, other_b: Tensor, other_W: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Gaussian]:
        """Precisions mix linearly; completing the square gives the mean and the weights."""
        (_, other_log_var), *_ = other.parameters()
        mine, others = (1 - share) * exp_neg(self.log_var), share * exp_neg(other_log_var)
        part = others / (mine + others)
        return (
            part[:, None] * other_W,
            torch.lerp(b, other_b, part),
            Gaussian(-(mine + others).log()),
        )

    def draw(self, x: Tensor, words: Tensor, beta: Beta = 1.0) -> tuple[Tensor, Tensor]:
        noise = arithmetic.normal(words)[:, : x.shape[1]]
        root = arithmetic.sqrt(per_row_float32(beta, x))
        deviation = arithmetic.exp_neg(-0.5 * self.log_var.float()) / root
        return arithmetic.fma(deviation.expand_as(x), noise, x), x

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
        """A factor 1 / s^2 for W and b; the log-variance's gradient follows from them.

        It is (<(v - b)^2>_chains - <(v - b)^2>_data) / (2 s^2) - sum_j W_ij grad_W_ij.
        """
        precision = exp_neg(self.log_var.to(grad_W.dtype))
        center = b.to(grad_W.dtype)
        # Contiguous, since a sum's last bits follow the layout of what is summed.
        of_chains, of_data = (
            (states.to(grad_W.dtype).contiguous() - center).square_().mean(dim=0)
            for states in (chains, data)
        )
        grad_W = grad_W * precision[:, None]
        grad_log_var = (of_chains - of_data) * precision / 2
        of_weights = (W.to(grad_W.dtype).contiguous() * grad_W).sum(dim=1)
        grad_log_var = grad_log_var - of_weights
        return grad_W, grad_b * precision, grad_log_var

    def energy_backward(self, grad: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        precision, distance, column = exp_neg(self.log_var), v - b, grad[:, None]
        return (
            column * distance * precision,
            -(column * distance).sum(dim=0) * precision,
            -(column * distance.square() / 2).sum(dim=0) * precision,
        )

    def given_backward(self, grad: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        precision = exp_neg(self.log_var)
        return grad * precision, -(grad * (v * precision)).sum(dim=0)

    def mean_backward(self, grad: Tensor, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        return grad
