"""What every kind of visible unit must be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Beta = float | Tensor


def exp_neg(x: Tensor) -> Tensor:
    """``exp(-x)`` by PyTorch, differentiable; ``arithmetic.exp_neg`` is that of the kernels."""
    return torch.exp(-x)


def readable(tensor: Tensor) -> bool:
    """Whether a check may look at the values of a tensor.

    On a GPU that would wait for it, a compiler, a tracer or a function transform has no values, and
    of a tensor in forward mode they are not all.
    """
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


def per_row(beta: Beta) -> Beta:
    """An inverse temperature that broadcasts over [B, V]: a float, or [B] as a column [B, 1]."""
    return beta[:, None] if isinstance(beta, Tensor) else beta


def per_row_float32(beta: Beta, like: Tensor) -> Tensor:
    """The same as a float32 tensor, which the arithmetic contract needs."""
    if isinstance(beta, Tensor):
        return beta.to(like.device, torch.float32)[:, None]
    return torch.full((), beta, dtype=torch.float32, device=like.device)


def tempered(x: Tensor, beta: Beta) -> Tensor:
    """beta x of rows x [B, V], without a pass over x at the usual temperature 1."""
    return x if isinstance(beta, float) and beta == 1.0 else per_row(beta) * x


def _wide(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Half precision in float32, which holds it exactly: changed parameters are rounded once."""
    return tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in parameters)


class Change(ABC):
    """An exact change of parameters onto units that the kernels know.

    Units that have one need no kernel: an operation changes what it is given, runs, and changes
    its results back. Everything is plain, differentiable PyTorch.

    Attributes:
        units: The units that the kernels see.
    """

    units: ClassVar[Units]

    def model(self, W: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W, b and c as the kernels see them."""
        W, b, c = _wide(W, b, c)
        return self.weights(W), self.visible_bias(b), self.hidden_bias(c, W)

    def hidden_layer(self, W: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """W and c as the kernels see them."""
        W, c = _wide(W, c)
        return self.weights(W), self.hidden_bias(c, W)

    def visible_layer(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """W and b as the kernels see them."""
        W, b = _wide(W, b)
        return self.weights(W), self.visible_bias(b)

    @abstractmethod
    def weights(self, W: Tensor) -> Tensor:
        """The weights [V, H] that the kernels see, float32 or wider as W."""

    @abstractmethod
    def visible_bias(self, b: Tensor) -> Tensor:
        """The visible bias [V] that the kernels see."""

    @abstractmethod
    def hidden_bias(self, c: Tensor, W: Tensor) -> Tensor:
        """The hidden bias [H] that the kernels see."""

    @abstractmethod
    def free_energy(self, b: Tensor) -> Tensor:
        """What F(v) has more than the free energy that the kernels see, 0-dim, at beta = 1."""

    @abstractmethod
    def states(self, v: Tensor) -> Tensor:
        """The states [B, V] that the kernels see; NaN, which they refuse, for impossible ones."""

    @abstractmethod
    def restored(self, states: Tensor) -> Tensor:
        """The states, or their means, that those of the kernels stand for."""

    @abstractmethod
    def gradients(self, grad_W: Tensor, grad_b: Tensor, grad_c: Tensor) -> tuple[Tensor, ...]:
        """The gradients of W, b and c, given those that the kernels see."""


class Units(ABC):
    """A layer of visible units: what depends on their kind, and nothing else.

    Given the hidden units, the visible units are independent, and everything follows from the
    energy ``E(v, h) = energy(v, b) - given(v)'W h - c'h``. The bias b stays outside, because every
    kind has one; the parameters that only one kind has, such as a log-variance, are the object's
    own. An object is made for every call of an operation, so it must cost next to nothing.

    Symbols: v [B, V] states, b [V] visible bias, W [V, H] weights, h [B, H] hidden states, and
    x = b + W h [B, V], what a unit receives. ``beta`` is an inverse temperature, a float or [B].

    The methods compute in plain PyTorch and are differentiable, except where they say that they
    follow the arithmetic contract (docs/arithmetic.md): there they yield the kernels' bits.

    Attributes:
        kind: The name by which a model file and ``RBM(visible=...)`` know these units.
        label: The name in error messages.
        continuous: Whether states are real numbers; an inverse temperature must then be positive.
        fits_bytes: Whether bool and uint8 can hold the states; otherwise only a float dtype can.
        change: How the operations make of these units others that the kernels know, or None where
            the kernels know these.
        parameter_names: The names of the parameters that this kind has beside W, b and c.
        log_var: [V] log-variances for kernels that draw from a normal distribution, else None.
    """

    __slots__ = ()

    kind: ClassVar[str]
    label: ClassVar[str]
    continuous: ClassVar[bool] = False
    fits_bytes: ClassVar[bool] = False
    change: ClassVar[Change | None] = None
    parameter_names: ClassVar[tuple[str, ...]] = ()
    log_var: Tensor | None

    def parameters(self) -> tuple[tuple[str, Tensor], ...]:
        """Pairs of name and tensor [V], in the order of ``parameter_names``."""
        return ()

    def to(self, dtype: torch.dtype) -> Units:
        """These units with their parameters in another dtype."""
        return self

    @classmethod
    @abstractmethod
    def fit(cls, op: str, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Units]:
        """The bias and the units of independent units fitted to data.

        Args:
            op: The calling function, for error messages.
            v: [N, V] finite data, N of 1 or more, of any dtype.
            dtype: The float dtype to compute in, float32 or wider.

        Returns:
            (b, units) whose distribution with W = 0 is the data's.

        Raises:
            ValueError: Values that such units do not take.
        """

    def check(self, op: str, name: str, states: Tensor) -> None:
        """Refuse states that such units do not take; NaN is left to others.

        This reads the values, and so waits for a GPU that is to compute them.

        Raises:
            ValueError: Naming the operation, the argument and the values.
        """
        return

    @abstractmethod
    def energy(self, v: Tensor, b: Tensor) -> Tensor:
        """The part of the energy that the visible units have by themselves, [B]."""

    @abstractmethod
    def given(self, v: Tensor, exp_neg: Callable[[Tensor], Tensor] = exp_neg) -> Tensor:
        """What the hidden units see of v, [B, V]: they receive ``c + given(v) W``.

        Args:
            v: [B, V] states, floating point.
            exp_neg: ``exp(-x)``; pass ``arithmetic.exp_neg`` for the contract's bits.
        """

    @abstractmethod
    def log_partition(self, x: Tensor, b: Tensor) -> Tensor:
        """The log of the sum, or integral, over one unit's states, [B, V].

        Its terms are exp(-energy(v, b) + given(v)'(x - b)): the sum over the V units is the log
        of the sum over all v of exp(-E(v, h) - c'h), with x = b + W h.
        """

    @abstractmethod
    def mean(self, x: Tensor, beta: Beta = 1.0) -> Tensor:
        """E[v | h], [B, V], from x = b + W h."""

    @abstractmethod
    def sample(self, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        """States of these means [B, V], drawn by PyTorch's own generator."""

    def between(
        self, other: Units, b: Tensor, other_b: Tensor, other_W: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Units]:
        """A point of the geometric path from independent units to an RBM of the same kind.

        Its energy is (1 - share) that of these units with bias b and without weights, plus share
        times that of the other model. This is the form of kinds whose energy is linear in b.

        Args:
            other: The RBM's units, of this kind.
            b: [V], the bias of the independent units.
            other_b: [V], the RBM's bias.
            other_W: [V, H], the RBM's weights.
            share: From 0 to 1.

        Returns:
            The weights, the bias and the units of the RBM at this point.
        """
        return share * other_W, torch.lerp(b, other_b, share), self

    @abstractmethod
    def draw(self, x: Tensor, words: Tensor, beta: Beta = 1.0) -> tuple[Tensor, Tensor]:
        """States drawn from given random words under the arithmetic contract.

        Args:
            x: [B, V] float32.
            words: [B, N] from ``arithmetic.random_words``, N even and at least V.
            beta: Inverse temperature, a float or [B].

        Returns:
            The states and their means, both [B, V] float32.
        """

    @abstractmethod
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
        """From differences of averages to the gradient of the mean negative log-likelihood.

        Args:
            grad_W: [V, H] <v p(h|v)> of the chains less that of the data.
            grad_b: [V] <v> of the chains less that of the data.
            data: [B, V] states.
            chains: [N, V] states.
            W: [V, H].
            b: [V].
            exp_neg: ``exp(-x)``; pass ``arithmetic.exp_neg`` for the contract's bits.

        Returns:
            The gradients of W, of b, and of each of ``parameters()``.
        """

    @abstractmethod
    def energy_backward(self, grad: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``energy`` for v, b and each of ``parameters()``, given its own [B]."""

    @abstractmethod
    def given_backward(self, grad: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``given`` for v and each of ``parameters()``, given its own [B, V]."""

    @abstractmethod
    def mean_backward(self, grad: Tensor, mean: Tensor, beta: Beta = 1.0) -> Tensor:
        """The gradient of ``mean`` for x, given its own and its result, both [B, V]."""
