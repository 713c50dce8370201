"""How every operation reaches a backend: at once in plain eager, else by way of torch.library.

Under a function transform (``torch.func``) or a forward-mode derivative, what has derivatives is
computed in plain PyTorch instead, which has all of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from rbm_kernels.arguments import Draw, Layer, Model
from rbm_kernels.backends import select
from rbm_kernels.units import visible_units

_LIBRARY = torch.library.Library("rbm_kernels", "DEF")

# torch.library knows tensors and numbers alone: what the tuples of arguments.py become there. An
# inverse temperature is a number and a tensor, one of which counts.
_FIELDS = {
    "Model": "Tensor W, Tensor b, Tensor c, Tensor? log_var",
    "Layer": "Tensor W, Tensor bias, Tensor? given_log_var, Tensor? drawn_log_var",
    "Draw": "Tensor seed, SymInt chain_offset, float beta, Tensor? betas, int digits",
}


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, Model):
            yield from (*argument[:3], argument.units.log_var)
        elif isinstance(argument, Layer):
            yield from (*argument[:2], argument.given.log_var, argument.drawn.log_var)
        elif isinstance(argument, Draw):
            seed, chain_offset, beta, digits = argument
            both = (1.0, beta) if isinstance(beta, Tensor) else (beta, None)
            yield from (seed, chain_offset, *both, digits)
        else:
            yield argument


def _tuples(kinds: list[str], flat: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments of which ``flat`` was made."""
    values = iter(flat)
    for kind in kinds:
        first = next(values)
        if kind == "Model":
            yield Model(first, next(values), next(values), visible_units(next(values)))
        elif kind == "Layer":
            bias, given, drawn = next(values), next(values), next(values)
            yield Layer(first, bias, visible_units(given), visible_units(drawn))
        elif kind == "Draw":
            chain_offset, beta, betas = next(values), next(values), next(values)
            yield Draw(first, chain_offset, beta if betas is None else betas, next(values))
        else:
            yield first


@dataclass(frozen=True)
class Operation:
    """An operation of ``torch.ops.rbm_kernels``, made by ``define``.

    Attributes:
        name: The name of the public function.
        kinds: The types of the body's arguments, in words.
        n_results: How many results torch.library has. An empty tensor stands there for None, and
            for a result that is missing at the end.
        kernel: The name of the function that runs it in every backend that can.
        body: What calls that function, ``body(function, name, *arguments, *eager)``. The first
            argument is states [B, K], the second a model or a layer. Only calls in plain eager have
            further arguments.
        save: ``save(arguments, results)``, the tensors and numbers that the gradient needs.
        backward: ``backward(saved, *grads)``, gradients of the fields of the first two arguments.
            The other arguments have none.
        differentiable: Which of several results has a gradient.
        returned: How many of several results a caller gets; the others are for ``save`` alone.
        formula: ``formula(constants, *arguments)``, the results in plain PyTorch wherever they have
            derivatives; ``constants()`` are the registered operation's, which have none. None for
            an operation without derivatives.
    """

    name: str
    kinds: list[str]
    n_results: int
    kernel: str
    body: Callable[..., Any]
    save: Callable[..., tuple[Any, ...]] | None
    backward: Callable[..., tuple[Any, ...]] | None
    differentiable: int
    returned: int | None
    formula: Callable[..., Any] | None

    def registered(self, backend: str | None, flat: Iterable[Any]) -> Any:
        """The results by way of torch.library."""
        return getattr(torch.ops.rbm_kernels, self.name)(*flat, backend)

    def by_formula(self, backend: str | None, arguments: tuple[Any, ...]) -> Any:
        """The results with all their derivatives, wherever they have any."""

        def constants() -> Any:
            flat = (x.detach() if isinstance(x, Tensor) else x for x in _flat(arguments))
            return self.registered(backend, flat)

        return constants() if self.formula is None else self.formula(constants, *arguments)

    def looped(self, info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        """What ``torch.vmap`` makes of the kernels: one call for each element of the batch.

        Every element may have a model and a seed of its own, for which kernels have no room.
        """
        pairs = list(zip(flat, in_dims, strict=True))
        results = []
        for i in range(info.batch_size):
            *element, backend = (x if dim is None else x.select(dim, i) for x, dim in pairs)
            results.append(self.registered(backend, element))
        if self.n_results == 1:
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * self.n_results

    def autograd(self, keyset: Any, *flat: Any) -> Any:
        """The operation as torch.library differentiates it: once, in reverse mode.

        ``torch.library.register_autograd`` would drop the tangents of forward mode in silence.
        """
        tensors = [x for x in flat if isinstance(x, Tensor)]
        record = needs_grad(*tensors)
        if (record and peek_interpreter_stack() is not None) or any(map(_has_tangent, tensors)):
            raise RuntimeError(
                f"torch.ops.rbm_kernels.{self.name} has no derivatives by torch.func and in "
                f"forward mode; rbm_kernels.{self.name} has them"
            )
        if record:
            return _Registered.apply(self, keyset, *flat)
        return self.below_autograd(keyset, flat)

    def below_autograd(self, keyset: Any, flat: tuple[Any, ...]) -> Any:
        operator = getattr(torch.ops.rbm_kernels, self.name).default
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *flat)

    def from_flat(self, *flat: Any) -> Any:
        """The operation over torch.library's arguments, the last of which names the backend."""
        return self.tensors(_call(self, flat[-1], tuple(_tuples(self.kinds, flat))), flat[0])

    def tensors(self, results: Any, like: Tensor) -> Any:
        """The results of the body as torch.library returns them."""
        if isinstance(results, Tensor):
            return results
        missing = (None,) * (self.n_results - len(results))
        return tuple(like.new_empty(0) if x is None else x for x in (*results, *missing))

    def remember(self, ctx: Any, arguments: tuple[Any, ...], results: Any, returned: Any) -> None:
        """Keep what the gradient needs, and say which results have none."""
        assert self.save is not None
        ctx.set_materialize_grads(False)
        if not isinstance(returned, Tensor):
            constant = [x for i, x in enumerate(returned) if i != self.differentiable]
            ctx.mark_non_differentiable(*constant)
        saved = self.save(arguments, results)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in saved))
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in saved]

    def backward_flat(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the ``ctx.n_inputs`` inputs of the forward pass."""
        assert self.backward is not None
        grad = grads[self.differentiable if len(grads) > 1 else 0]
        if grad is None:
            return (None,) * ctx.n_inputs
        pairs = zip(ctx.saved_tensors, ctx.numbers, strict=True)
        result = self.backward([number if x is None else x for x, number in pairs], grad)
        return (*result, *(None,) * (ctx.n_inputs - len(result)))


def define(
    name: str,
    arguments: str,
    results: str,
    kernel: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., tuple[Any, ...]] | None = None,
    backward: Callable[..., tuple[Any, ...]] | None = None,
    differentiable: int = 0,
    returned: int | None = None,
    formula: Callable[..., Any] | None = None,
) -> Operation:
    """Register ``rbm_kernels::name``: its schema, kernels and, if given, its autograd.

    ``Library.define`` and ``impl`` cost about 4 microseconds a call; ``custom_op`` 15 to 30.

    Args:
        arguments: Those of the schema, where "Model model", "Layer layer" and "Draw draw" stand
            for their fields.
        results: Those of the schema.
        fake: ``fake(*arguments)``, empty tensors with the results' shapes and dtypes.

    The other arguments are described at ``Operation``.
    """
    declared = [argument.split() for argument in arguments.split(", ")]
    kinds = [kind for kind, _ in declared]
    fields = [_FIELDS.get(kind, f"{kind} {label}") for kind, label in declared]
    operation = Operation(
        name, kinds, results.count("Tensor"), kernel, body, save, backward, differentiable,
        returned, formula,
    )  # fmt: skip
    _LIBRARY.define(
        f"{name}({', '.join(fields)}, str? backend) -> {results}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.impl(name, operation.from_flat, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"rbm_kernels::{name}", lambda *flat: fake(*_tuples(kinds, flat)), lib=_LIBRARY
    )
    torch.library.register_vmap(f"rbm_kernels::{name}", operation.looped, lib=_LIBRARY)
    if backward is not None:
        _LIBRARY.impl(name, operation.autograd, "Autograd", with_keyset=True)
    return operation


def run(
    operation: Operation,
    backend: str | None,
    *arguments: Any,
    record: bool = False,
    eager: tuple[Any, ...] = (),
) -> Any:
    """Run an operation on a backend.

    Args:
        operation: What to run.
        backend: Its name; None lets ``RBM_KERNELS_BACKEND`` or the tensors decide.
        arguments: Those of the operation's body.
        record: Whether autograd must record the call; see ``needs_grad``.
        eager: Further arguments of the body, which torch.library has no room for: where a compiler
            or tracer looks on they are dropped, and the caller does what they ask for.

    Returns:
        The results of the body. By way of torch.library an empty tensor stands for None.
    """
    if _plain_eager():
        if record:
            inputs = _flat(arguments[:2])
            return _Recorded.apply(operation, backend, arguments, *inputs)
        results = _call(operation, backend, arguments, eager)
    elif _transforming():
        results = operation.by_formula(backend, arguments)
    else:
        results = operation.registered(backend, _flat(arguments))
    return results if operation.returned is None else results[: operation.returned]


def _call(
    operation: Operation, backend: str | None, arguments: Any, eager: tuple[Any, ...] = ()
) -> Any:
    states, model = arguments[:2]
    W = model.W
    rows, (given, drawn) = states.shape[0], W.shape
    module = select(
        operation.name,
        backend,
        W.device,
        W.dtype,
        given if given > drawn else drawn,
        model.kinds,
        operation.kernel,
        not (rows and given and drawn),
    )
    function = getattr(module, operation.kernel)
    return operation.body(function, operation.name, *arguments, *eager)


class _Recorded(torch.autograd.Function):
    """A registered operation's autograd without the dispatcher, for plain eager calls.

    Its differentiable inputs, the fields of the first two arguments, are given beside the arguments
    because autograd looks into no tuple.
    """

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, backend: str | None, arguments: Any, *inputs: Tensor | None
    ) -> Any:
        results = _call(operation, backend, arguments)
        returned = results if operation.returned is None else results[: operation.returned]
        ctx.operation, ctx.n_inputs = operation, len(inputs)
        operation.remember(ctx, arguments, results, returned)
        return returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, *ctx.operation.backward_flat(ctx, *grads))


_OPAQUE: list[type[torch.autograd.Function]] = []


def opaque(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Mark a function that a compiler puts into its graph as it is, without a look inside.

    ``torch.compiler.allow_in_graph`` would import the compiler, and with it triton, whenever this
    package is imported. So the compiler is told when it first traces a transform.
    """
    _OPAQUE.append(function)
    return function


@functools.cache
def _tell_compiler() -> None:
    for function in _OPAQUE:
        torch.compiler.allow_in_graph(function)


class _Registered(torch.autograd.Function):
    """A registered operation's autograd with the dispatcher."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, keyset: Any, *flat: Any) -> Any:
        results = operation.below_autograd(keyset, flat)
        ctx.operation, ctx.n_inputs = operation, len(flat)
        operation.remember(ctx, tuple(_tuples(operation.kinds, flat)), results, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.operation.backward_flat(ctx, *grads))


@opaque
class Underivable(torch.autograd.Function):
    """A tensor that depends on others, by derivatives that are not to be had.

    ``Underivable.apply(message, x, *others)`` is x; to differentiate it raises RuntimeError with
    the message, where a constant would have derivatives of zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, x: Tensor, *others: Tensor | None) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(ctx.message)


def _plain_eager() -> bool:
    """No compiler, tracer, tensor mode or transform looks on: a backend may be called directly."""
    return not (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _is_tracing()
    )


def _transforming() -> bool:
    """Whether a function transform or a forward-mode derivative looks on.

    A compiler enters the transforms that it meets, and guards those in which a function is called.
    It calls this function while it traces, and takes the answer for a constant.
    """
    looked_on = peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    if looked_on and "torch._dynamo" in sys.modules:
        _tell_compiler()
    return looked_on


# All that torch.compiler.assume_constant_result does, which would import the compiler.
_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
