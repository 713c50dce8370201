"""Contrastive divergence: the gradient as a step, and the gradient behind a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbm_kernels import seeds
from rbm_kernels.arguments import Draw, Model
from rbm_kernels.ops import _checks, free_energy
from rbm_kernels.ops._dispatch import Underivable, define, needs_grad, opaque, run
from rbm_kernels.units import Units


class CDStep(NamedTuple):
    """What one step of contrastive divergence yields.

    Attributes:
        grad_W: [V, H] gradient of the mean negative log-likelihood (the direction to descend).
        grad_b: [V].
        grad_c: [H].
        grad_log_var: [V] for Gaussian visible units, None for Bernoulli ones.
        chains: [N, V] the advanced chains (without persistent chains, v_k [B, V]).
        free_energies: float32 [2], mean free energy in nats of the data and of the advanced chains.
    """

    grad_W: Tensor
    grad_b: Tensor
    grad_c: Tensor
    grad_log_var: Tensor | None
    chains: Tensor
    free_energies: Tensor

    @property
    def free_energy_data(self) -> Tensor:
        """Mean free energy of the data, 0-dim."""
        return self.free_energies[0]

    @property
    def free_energy_chain(self) -> Tensor:
        """Mean free energy of the advanced chains, 0-dim."""
        return self.free_energies[1]


def cd_step(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int = 1,
    *,
    chains: Tensor | None = None,
    log_var: Tensor | None = None,
    visible: str | None = None,
    out: tuple[Tensor, ...] | None = None,
    accumulate: bool = False,
    seed: seeds.Seed | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> CDStep:
    """Gradient of the mean negative log-likelihood by k-step contrastive divergence.

    grad_W = <v p(h|v)>_chain - <v p(h|v)>_data, each phase divided by its own count; the negative
    phase uses the sampled v_k and p(h|v_k) of that same v_k (Hinton 2002; with ``chains``,
    persistent CD, Tieleman 2008). The results have no derivatives: by ``torch.func`` and in forward
    mode, to ask for one raises RuntimeError.

    Args:
        v: [B, V] data, B at least 1, binary or real: a tensor, a NumPy array, a table or lists
            (see ``rbm_kernels.inputs``).
        W: [V, H] weights.
        b: [V] visible biases.
        c: [H] hidden biases.
        k: Gibbs sweeps, at least 1.
        chains: [N, V] persistent chains, N at least 1, not changed; None starts the chains from v.
        log_var: [V] log-variances; given exactly when the visible units are Gaussian.
        visible: The kind of visible units, by its name in docs/units.md; None means Gaussian units
            where ``log_var`` is given and Bernoulli units otherwise.
        out: Buffers (grad_W, grad_b, grad_c[, grad_log_var]) to write the gradients into.
        accumulate: Add to ``out`` instead of overwriting it.
        seed: int, (seed, offset), or int64[2] tensor whose offset is advanced by 2k.
        generator: Source of the seed where none is given.
        chain_offset: Global index of the first chain.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium".

    Returns:
        A ``CDStep``; gradients in W's dtype (or the buffers of ``out``), chains in the dtype of
        ``chains`` (float32 for integers other than uint8), or W's.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A wrong shape or device, k < 1, an empty batch, or values that are not finite or
            that the units do not take (docs/units.md). Nothing has been written then.
        RuntimeError: An explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> W, b, c = torch.zeros(3, 2), torch.full((3,), 50.0), torch.zeros(2)
        >>> step = cd_step(torch.zeros(4, 3), W, b, c, k=1, seed=0)
        >>> step.grad_b  # the model's units are on, the data's are off
        tensor([1., 1., 1.])
    """
    op = "cd_step"
    v, model, k, chains = _check(op, v, W, b, c, k, chains, log_var, visible)
    if out is not None:
        _check_out(op, out, W, model.units)
    elif accumulate:
        raise ValueError(f"{op}: accumulate=True needs out=, got None")
    draw = _checks.draw(op, W, 1.0, seed, generator, chain_offset, backend, precision)
    buffers, start = out, chains
    if (change := model.units.change) is not None:
        # Gradients must be changed back before they reach the caller's buffers.
        buffers, start = None, None if chains is None else change.states(chains)
        v, model = change.states(v), Model(*change.model(W, b, c), change.units)
    advanced, energies, *grads = run(
        _STEP, backend, v, model, k, start, draw, eager=(buffers, accumulate)
    )
    del grads[3 + len(model.units.parameter_names) :]
    if change is not None:
        grads = change.gradients(*grads)
        if out is None:
            grads = tuple(grad.to(W.dtype) for grad in grads)
        advanced = change.restored(advanced).to(W.dtype if chains is None else chains.dtype)
        energies = energies + change.free_energy(b)
    if out is not None and grads[0] is not out[0]:
        grads = _write(out, grads, accumulate)
    seeds.advance(seed, 2 * k)
    grad_W, grad_b, grad_c, grad_log_var = (*grads, None)[:4]
    return CDStep(grad_W, grad_b, grad_c, grad_log_var, advanced, energies)


def cd_loss(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int = 1,
    *,
    chains: Tensor | None = None,
    log_var: Tensor | None = None,
    visible: str | None = None,
    seed: seeds.Seed | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """mean F(v) - mean F(v_k), a scalar whose backward is the CD-k gradient.

    Its value is no measure of learning; its gradient with respect to W, b, c and log_var is what
    ``cd_step`` returns, so any torch optimizer, AMP and DDP work as with any other loss. A ``v``
    that requires grad, such as the output of an encoder, gets dF/dv / B, the gradient of the data's
    mean free energy: the states v_k are drawn and count as constants, also where they start from
    ``v``. Only first derivatives are defined: to differentiate one raises RuntimeError.

    Args:
        chains: [N, V] persistent chains, a tensor that is advanced in place (unlike ``cd_step``'s).

    The other arguments and errors are those of ``cd_step``.

    Returns:
        0-dim tensor, float32.
    """
    op = "cd_loss"
    v, model, k, start = _check(op, v, W, b, c, k, chains, log_var, visible)
    if chains is not None:
        _check_advances(op, chains, model.units)
    draw = _checks.draw(op, W, 1.0, seed, generator, chain_offset, backend, precision)
    if (change := model.units.change) is not None:
        start = None if start is None else change.states(start)
        v, model = change.states(v), Model(*change.model(W, b, c), change.units)
    loss: Tensor
    if needs_grad(v):
        loss, advanced = _LOSS.by_formula(backend, (v, model, k, start, draw))
    else:
        record = needs_grad(W, b, c, log_var)
        loss, advanced = run(_LOSS, backend, v, model, k, start, draw, record=record)
    if chains is not None:
        advanced = advanced.detach()
        chains.copy_(advanced if change is None else change.restored(advanced))
    seeds.advance(seed, 2 * k)
    return loss


def _check(
    op: str,
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int,
    chains: Tensor | None,
    log_var: Tensor | None,
    visible: str | None,
) -> tuple[Tensor, Model, int, Tensor | None]:
    v, model = _checks.model(op, v, W, b, c, log_var, visible)
    if v.shape[0] == 0:
        raise ValueError(f"{op}: v must have at least one row to average over, got {list(v.shape)}")
    if chains is not None:
        chains = _checks.states(op, "chains", chains, W.shape[0], "V", W)
        if not (model.units.fits_bytes or chains.is_floating_point()):
            raise TypeError(
                f"{op}: chains of {model.units.label} units must be floating point, "
                f"got {chains.dtype}"
            )
        if chains.shape[0] == 0:
            raise ValueError(
                f"{op}: chains must have at least one row to average over, got {list(chains.shape)}"
            )
        _checks.values(op, "chains", chains, model.units)
    return v, model, _checks.sweeps(op, k), chains


def _check_advances(op: str, chains: Tensor, units: Units) -> None:
    """Persistent chains must be able to hold the states that they are advanced to."""
    if not isinstance(chains, Tensor) or chains.layout is not torch.strided:
        got = f"layout {chains.layout}" if isinstance(chains, Tensor) else type(chains).__name__
        raise TypeError(
            f"{op}: chains are advanced in place and must be a dense tensor, got {got}: pass "
            "torch.as_tensor(chains), and the same tensor again"
        )
    if not (units.fits_bytes or chains.is_floating_point()):
        raise TypeError(
            f"{op}: chains of {units.label} units must be floating point, got {chains.dtype}"
        )
    if chains.requires_grad:
        raise ValueError(f"{op}: chains are advanced in place and must not require grad")
    _checks.written(op, "chains", chains)


@functools.cache
def _buffer_names(parameter_names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"out's grad_{name}" for name in ("W", "b", "c", *parameter_names))


def _check_out(op: str, out: tuple[Tensor, ...], W: Tensor, units: Units) -> None:
    """The buffers must be of the gradients' shapes, and writable."""
    names = _buffer_names(units.parameter_names)
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        got = len(out) if isinstance(out, (tuple, list)) else repr(out)
        wanted = ", ".join(name.removeprefix("out's ") for name in names)
        raise ValueError(f"{op}: out must be the buffers ({wanted}), got {got}")
    device = W.device
    n_visible, n_hidden = W.shape
    shapes = ((n_visible, n_hidden), (n_visible,), (n_hidden,), *((n_visible,),) * (len(names) - 3))
    for name, buffer, shape in zip(names, out, shapes, strict=True):
        if not isinstance(buffer, Tensor) or not buffer.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {buffer!r}")
        if buffer.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(buffer.shape)}")
        if buffer.device != device:
            raise ValueError(f"{op}: {name} must be on W's device {device}, got {buffer.device}")
        _checks.written(op, name, buffer)


def _write(
    out: tuple[Tensor, ...], grads: Sequence[Tensor], accumulate: bool
) -> tuple[Tensor, ...]:
    """Bring gradients into the caller's buffers, which take their place."""
    for buffer, grad in zip(out, grads, strict=True):
        if accumulate:
            buffer.add_(grad.to(buffer.dtype))
        else:
            buffer.copy_(grad)
    return tuple(out)


def _step(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    op: str,
    v: Tensor,
    model: Model,
    k: int,
    chains: Tensor | None,
    draw: Draw,
    out: tuple[Tensor, ...] | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, ...]:
    """The advanced chains, the mean free energies and the gradients, these in ``out`` if given."""
    W, b, c, units = model
    # The averages over both phases are the gradient, unless the units have parameters of their own.
    final = not units.parameter_names
    averages: tuple[Tensor, ...]
    if out is not None and final and all(map(_is_plain, out)):
        averages, direct = out, True
    else:
        averages, direct = (_like(W), _like(b), _like(c)), False
    advanced, energies = kernel(op, v, model, k, chains, draw, averages, accumulate and direct)
    grads = averages if final else _finished(averages, v, advanced, model)
    if out is not None:
        grads = averages if direct else _write(out, grads, accumulate)
    elif W.dtype is not torch.float32:
        grads = tuple(grad.to(W.dtype) for grad in grads)
    if advanced.dtype is not (dtype := W.dtype if chains is None else chains.dtype):
        advanced = advanced.to(dtype)
    return (advanced, energies, *grads)


def _is_plain(buffer: Tensor) -> bool:
    """Whether a backend can write into a buffer: float32, the values of a row side by side."""
    return buffer.dtype is torch.float32 and (buffer.is_contiguous() or buffer.stride(-1) == 1)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.no_grad()
def _finished(
    averages: Sequence[Tensor], v: Tensor, advanced: Tensor, model: Model
) -> tuple[Tensor, ...]:
    """The gradients of all parameters, in which the units' own have their part."""
    grad_W, grad_b, grad_c = averages
    W, b, _, units = model
    grad_W, grad_b, *of_units = units.gradients(grad_W, grad_b, v, advanced, W, b, exp_neg=_exp_neg)
    return grad_W, grad_b, grad_c, *of_units


def _exp_neg(x: Tensor) -> Tensor:
    """exp(-x) rounded once, as reproducible as ``arithmetic.exp_neg`` and a tenth of its work."""
    return torch.exp(-x.double().clamp(-87.0, 87.0)).to(x.dtype)


def _step_fake(
    v: Tensor, model: Model, k: int, chains: Tensor | None, draw: Draw
) -> tuple[Tensor, ...]:
    W = model.W
    parameters = [parameter for _, parameter in model.units.parameters()] or [W.new_empty(0)]
    return (
        W.new_empty(v.shape) if chains is None else chains.new_empty(chains.shape),
        W.new_empty(2, dtype=torch.float32),
        *(W.new_empty(x.shape) for x in (*model[:3], *parameters)),
    )


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    advanced, energies, *grads = _step(*arguments)
    return (energies[0] - energies[1], advanced, *grads)


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    advanced, energies, *grads = _step_fake(*arguments)
    return (energies[0].clone(), advanced, *grads)


def _save(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, ...]:
    model: Model = arguments[1]
    # The parameters are not needed, but a derivative of the gradients must find the way to them.
    parameters = (*model[:3], model.units.log_var)
    return (*results[2 : 5 + len(model.units.parameter_names)], parameters)


def _backward(saved: list[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, parameters = saved
    grads = [gradient * grad.to(gradient.dtype) for gradient in gradients]
    if torch.is_grad_enabled():  # by create_graph=True
        grads = [Underivable.apply(_NO_SECOND, gradient, *parameters) for gradient in grads]
    return (None, *grads)


def _step_formula(
    constants: Callable[[], tuple[Tensor, ...]], v: Tensor, model: Model, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = (v, *model[:3], model.units.log_var)
    return tuple(
        Underivable.apply("cd_step: its results have no derivatives", result, *inputs)
        for result in constants()
    )


def _loss_formula(
    constants: Callable[[], tuple[Tensor, ...]], v: Tensor, model: Model, *rest: Any
) -> tuple[Tensor, Tensor]:
    loss, advanced, grad_W, grad_b, grad_c, grad_log_var = constants()
    inputs = (v, *model[:3], model.units.log_var)
    of_data = [None if x is None else x.detach() for x in inputs]
    share = loss.new_full((v.shape[0],), 1 / v.shape[0])
    grad_v, *_ = free_energy.backward([*of_data, 1.0, None], share)
    grads = (grad_v, grad_W, grad_b, grad_c, None if inputs[4] is None else grad_log_var)
    loss = _FirstOrder.apply(loss, *inputs, *grads)  # type: ignore[no-untyped-call]
    return loss, advanced


@opaque
class _FirstOrder(torch.autograd.Function):
    """The loss as a function of five inputs, whose gradients follow them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, *inputs_and_grads: Tensor | None) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, grads = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        results = (
            None if x is None else Underivable.apply(_NO_SECOND, x * grad.to(x.dtype), *inputs)
            for x in grads
        )
        return (None, *results, *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, loss: Tensor | None, *tangents: Tensor | None) -> Tensor:
        inputs, grads = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        parts = [
            (grad * tangent).sum(dtype=torch.float32)
            for grad, tangent in zip(grads, tangents[:5], strict=True)
            if grad is not None and tangent is not None
        ]
        return Underivable.apply(_NO_SECOND, torch.stack(parts).sum(), *inputs)


_ARGUMENTS = "Tensor v, Model model, SymInt k, Tensor? chains, Draw draw"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_NO_SECOND = "cd_loss: only its first derivatives are defined, and one of them was differentiated"
_STEP = define("cd_step", _ARGUMENTS, _RESULTS, "cd_step", _step, _step_fake, formula=_step_formula)
_LOSS = define(
    "cd_loss", _ARGUMENTS, _RESULTS, "cd_step", _loss, _loss_fake, _save, _backward, returned=2,
    formula=_loss_formula,
)  # fmt: skip
