"""Contrastive divergence: the gradient as a step, and the gradient behind a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbm_kernels import seeds
from rbm_kernels.arithmetic import limbs_of
from rbm_kernels.backends import select
from rbm_kernels.ops import _checks, _library


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
    phase uses the sampled v_k and p(h|v_k) of that same v_k (Hinton 2002; with `chains`,
    persistent CD, Tieleman 2008).

    Args:
        v: [B, V] data, B at least 1: bool, uint8 or floating point, binary or real.
        W: [V, H] weights.
        b: [V] visible biases.
        c: [H] hidden biases.
        k: Gibbs sweeps, at least 1.
        chains: [N, V] persistent chains, N at least 1, not changed; None starts the chains from v.
        log_var: [V] log-variances; given exactly when the visible units are Gaussian.
        out: buffers (grad_W, grad_b, grad_c[, grad_log_var]) to write the gradients into.
        accumulate: add to `out` instead of overwriting it.
        seed: int, (seed, offset), or int64[2] tensor whose offset is advanced by 2k.
        generator: source of the seed where none is given.
        chain_offset: global index of the first chain.
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".
        precision: "highest", "high" or "medium".

    Returns:
        A :class:`CDStep`; gradients in W's dtype (or the buffers of `out`), chains in the dtype of
        `chains`, or W's.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape or device, k < 1, an empty batch, or values that are not finite.
            Nothing has been written then.
        RuntimeError: an explicitly named backend cannot run.

    Example:
        >>> import torch
        >>> W, b, c = torch.zeros(3, 2), torch.full((3,), 50.0), torch.zeros(2)
        >>> step = cd_step(torch.zeros(4, 3), W, b, c, k=1, seed=0)
        >>> step.grad_b  # the model's units are on, the data's are off
        tensor([1., 1., 1.])
    """
    op = "cd_step"
    _check(op, v, W, b, c, k, chains, log_var, chain_offset)
    if out is not None:
        _check_out(op, out, W, log_var)
    elif accumulate:
        raise ValueError(f"{op}: accumulate=True needs out=, got None")
    key = seeds.resolve(op, seed, generator, W.device)
    if _library.plain_eager():
        result = select(op, backend, W.device, W.dtype, max(W.shape)).cd_step(
            v, W, b, c, k, chains, log_var, out, accumulate, key, chain_offset,
            limbs_of(op, precision),
        )  # fmt: skip
    else:
        *grads, advanced, energies = torch.ops.rbm_kernels.cd_step(
            v, W, b, c, k, chains, log_var, key, chain_offset, backend, precision
        )
        if out is not None:
            for buffer, grad in zip(out, grads, strict=False):
                buffer.add_(grad) if accumulate else buffer.copy_(grad)
            grads[: len(out)] = out
        result = (*grads[:3], None if log_var is None else grads[3], advanced, energies)
    seeds.advance(seed, 2 * k)
    return CDStep(*result)


def cd_loss(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    k: int = 1,
    *,
    chains: Tensor | None = None,
    log_var: Tensor | None = None,
    seed: seeds.Seed | None = None,
    generator: torch.Generator | None = None,
    chain_offset: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """mean F(v) - mean F(v_k), a scalar whose backward is the CD-k gradient.

    Its value is no measure of learning; its gradient with respect to W, b, c and log_var is what
    :func:`cd_step` returns, so any torch optimizer, AMP and DDP work as with any other loss. No
    gradient flows into `v`.

    Args:
        chains: [N, V] persistent chains, advanced in place (unlike :func:`cd_step`'s).

    The other arguments and errors are those of :func:`cd_step`.

    Returns:
        0-dim tensor, float32.
    """
    op = "cd_loss"
    _check(op, v, W, b, c, k, chains, log_var, chain_offset)
    if chains is not None and chains.requires_grad:
        raise ValueError(f"{op}: chains are advanced in place and must not require grad")
    key = seeds.resolve(op, seed, generator, W.device)
    arguments = (v, W, b, c, k, chains, log_var, key, chain_offset, backend, precision)
    if _library.plain_eager():
        loss, advanced = _Loss.apply(*arguments)
    else:
        loss, *_, advanced = torch.ops.rbm_kernels.cd_loss(*arguments)
    if chains is not None:
        chains.copy_(advanced.detach())
    seeds.advance(seed, 2 * k)
    result: Tensor = loss
    return result


def _check(
    op: str, v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int, chains: Tensor | None,
    log_var: Tensor | None, chain_offset: int,
) -> None:  # fmt: skip
    _checks.model(op, v, W, b, c, log_var)
    if v.shape[0] == 0:
        raise ValueError(f"{op}: v must have at least one row to average over, got {list(v.shape)}")
    if chains is not None:
        _checks.states(op, "chains", chains, W.shape[0], "V", W)
        if log_var is not None and not chains.is_floating_point():
            raise TypeError(
                f"{op}: chains of Gaussian units must be floating point, got {chains.dtype}"
            )
        if chains.shape[0] == 0:
            raise ValueError(
                f"{op}: chains must have at least one row to average over, got {list(chains.shape)}"
            )
    _checks.sweeps(op, k)
    _checks.chain(op, chain_offset)


def _check_out(op: str, out: tuple[Tensor, ...], W: Tensor, log_var: Tensor | None) -> None:
    n_visible, n_hidden = W.shape
    names = ("grad_W", "grad_b", "grad_c", "grad_log_var")[: 3 if log_var is None else 4]
    shapes = ((n_visible, n_hidden), (n_visible,), (n_hidden,), (n_visible,))
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        got = len(out) if isinstance(out, (tuple, list)) else repr(out)
        raise ValueError(f"{op}: out must be the buffers ({', '.join(names)}), got {got}")
    for name, buffer, shape in zip(names, out, shapes, strict=False):
        if not isinstance(buffer, Tensor) or not buffer.dtype.is_floating_point:
            raise TypeError(f"{op}: out's {name} must be a floating-point tensor, got {buffer!r}")
        if buffer.shape != shape:
            raise ValueError(f"{op}: out's {name} must be {list(shape)}, got {list(buffer.shape)}")
        if buffer.device != W.device:
            raise ValueError(
                f"{op}: out's {name} must be on W's device {W.device}, got {buffer.device}"
            )


def _step(*arguments: Any) -> tuple[Tensor, ...]:
    return _gradients("cd_step", *arguments)


def _gradients(
    op: str, v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int, chains: Tensor | None,
    log_var: Tensor | None, seed: Tensor, chain_offset: int, backend: str | None,
    precision: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    *grads, advanced, energies = select(op, backend, W.device, W.dtype, max(W.shape)).cd_step(
        v, W, b, c, k, chains, log_var, None, False, seed, chain_offset, limbs_of(op, precision), op
    )
    if grads[3] is None:
        grads[3] = W.new_empty(0)
    return (*grads, advanced, energies)


def _step_fake(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int, chains: Tensor | None,
    log_var: Tensor | None, seed: Tensor, chain_offset: int, backend: str | None,
    precision: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        W.new_empty(W.shape),
        W.new_empty(b.shape),
        W.new_empty(c.shape),
        W.new_empty(0 if log_var is None else b.shape[0]),
        W.new_empty(v.shape) if chains is None else chains.new_empty(chains.shape),
        W.new_empty(2, dtype=torch.float32),
    )


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    *grads, advanced, energies = _gradients("cd_loss", *arguments)
    return (energies[0] - energies[1], *grads, advanced)


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *grads, advanced, energies = _step_fake(*arguments)
    return (energies[0].clone(), *grads, advanced)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:5])
    ctx.gaussian = inputs[6] is not None


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    grads = [g * grad.to(g.dtype) for g in ctx.saved_tensors]
    return (None, *grads[:3], None, None, grads[3] if ctx.gaussian else None, *(None,) * 4)


class _Loss(torch.autograd.Function):
    """The registered operator's autograd without the dispatcher, for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        outputs = _loss(*arguments)
        _save(ctx, arguments, outputs)
        ctx.mark_non_differentiable(outputs[5])
        return outputs[0], outputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _backward(ctx, grad)


_ARGUMENTS = (
    "(Tensor v, Tensor W, Tensor b, Tensor c, int k, Tensor? chains, Tensor? log_var, Tensor seed, "
    "int chain_offset, str? backend, str? precision) -> "
)
_library.register(
    "cd_step",
    _ARGUMENTS + "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _step,
    _step_fake,
)
_library.register(
    "cd_loss",
    _ARGUMENTS + "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
    _save,
    _backward,
)
