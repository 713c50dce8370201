"""Argument checks shared by the operations: each error names what came and what was expected.

The checks hand back what they looked at in the form in which backends take it.
"""

from __future__ import annotations

import math
import operator
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rbm_kernels import seeds
from rbm_kernels.arguments import Beta, Draw, Model
from rbm_kernels.arithmetic import digits_of
from rbm_kernels.backends import require
from rbm_kernels.inputs import FLOATS, STATES, as_states
from rbm_kernels.ops._dispatch import _plain_eager
from rbm_kernels.units import Units, visible_units
from rbm_kernels.units.base import readable

# Whether to look at the values of states before every call, on every device and for every backend.
LOOK = os.environ.get("RBM_KERNELS_CHECK_VALUES") == "1"


def _not_a_tensor(op: str, name: str, value: object) -> TypeError:
    return TypeError(
        f"{op}: {name} must be a tensor, got {type(value).__name__}: parameters are not converted, "
        f"use torch.as_tensor"
    )


def weight(op: str, W: Tensor) -> None:
    """W must be a floating-point matrix on a device that holds data."""
    if not isinstance(W, Tensor):
        raise _not_a_tensor(op, "W", W)
    if W.dim() != 2:
        raise ValueError(f"{op}: W must be [V, H], got {list(W.shape)}")
    if W.dtype not in FLOATS:
        raise TypeError(f"{op}: W must be float32, float64, bfloat16 or float16, got {W.dtype}")
    if W.is_meta:
        raise ValueError(f"{op}: W must hold data, got a tensor on device 'meta'")


def transposed(op: str, W: Tensor, visible: Tensor, hidden: Tensor) -> None:
    """Blame W rather than the other arguments where its two sizes both disagree with theirs.

    Called when another check has failed already. A transposed W makes the first argument that is
    compared with it look wrong, although the mistake is W.

    Args:
        visible: Any tensor whose last dimension is V.
        hidden: Any tensor whose last dimension is H.
    """
    if not (isinstance(visible, Tensor) and isinstance(hidden, Tensor)):
        return
    expected = [*visible.shape[-1:], *hidden.shape[-1:]]
    if len(expected) == 2 and expected[0] != W.shape[0] and expected[1] != W.shape[1]:
        raise ValueError(f"{op}: W must be [V, H] = {expected}, got {list(W.shape)}")


def model(
    op: str,
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    log_var: Tensor | None,
    visible: str | None,
) -> tuple[Tensor, Model]:
    """Visible states and the parameters of a whole RBM."""
    weight(op, W)
    n_visible, n_hidden = W.shape
    units = visible_units(log_var, visible, op)
    try:
        v = states(op, "v", v, n_visible, "V", W)
        dtype, device = W.dtype, W.device
        vector(op, "b", b, n_visible, "V", dtype, device)
        vector(op, "c", c, n_hidden, "H", dtype, device)
        unit_parameters(op, units, n_visible, dtype, device)
    except ValueError:
        transposed(op, W, b, c)
        raise
    values(op, "v", v, units)
    return v, Model(W, b, c, units)


def unit_parameters(
    op: str, units: Units, n_units: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The parameters that a kind of visible unit has beside W, b and c: [V] each."""
    for name, parameter in units.parameters():
        vector(op, name, parameter, n_units, "V", dtype, device)


def states(op: str, name: str, value: Any, units: int, layer: str, W: Tensor) -> Tensor:
    """States of a layer: [B, units], of a kind that ``inputs.as_states`` takes."""
    if (
        not isinstance(value, Tensor)
        or value.dtype not in STATES
        or value.layout is not torch.strided
    ):
        value = as_states(op, name, value, W.device)
    if value.dim() != 2 or value.shape[1] != units:
        raise ValueError(
            f"{op}: {name} must be [B, {layer}] = [B, {units}], got {list(value.shape)}"
        )
    if value.device != W.device:
        raise ValueError(f"{op}: {name} must be on W's device {W.device}, got {value.device}")
    return value


def values(op: str, name: str, states: Tensor, units: Units) -> None:
    """Values that the units do not take, as far as nobody else looks for them.

    On the CPU the kernels do, which read the states anyway, unless the units become others first.
    On a GPU reading them would wait for it, so that only ``RBM_KERNELS_CHECK_VALUES`` asks for it.
    """
    if not LOOK:
        if units.change is None or not readable(states):
            return
    elif not _plain_eager():
        return
    elif states.is_floating_point() and not bool(torch.isfinite(states).all()):
        raise ValueError(f"{op}: {name} must be finite, got values that are NaN or infinite")
    units.check(op, name, states)


def vector(
    op: str,
    name: str,
    value: Tensor,
    units: int,
    layer: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """A parameter of a layer: [units], of W's dtype and on its device."""
    if not isinstance(value, Tensor):
        raise _not_a_tensor(op, name, value)
    if value.shape != (units,):
        raise ValueError(f"{op}: {name} must be [{layer}] = [{units}], got {list(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must have W's dtype {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on W's device {device}, got {value.device}")


def written(op: str, name: str, value: Tensor) -> None:
    """What a call writes in place must be writable, which torch would find out too late."""
    if torch.compiler.is_compiling():
        return
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: {name} must not come from torch.inference_mode(), outside of which nothing can "
            f"be written into it: pass a clone() of it"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} must not require grad, since it is written in place: detach() it"
        )
    if not value.is_contiguous() and any(
        size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)
    ):
        raise ValueError(
            f"{op}: {name} must have memory for each element, got an expanded tensor of strides "
            f"{list(value.stride())}: pass a clone() of it"
        )


def integer(op: str, name: str, value: Any) -> int:
    """An int, or what counts as one, such as an integer of NumPy."""
    if type(value) is int:
        return value
    try:
        if not isinstance(value, (bool, np.bool_)):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")


def sweeps(op: str, k: Any) -> int:
    """k must be a positive int."""
    k = integer(op, "k", k)
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")
    return k


def draw(
    op: str,
    W: Tensor,
    beta: Beta,
    seed: seeds.Seed | None,
    generator: torch.Generator | None,
    chain_offset: int,
    backend: str | None,
    precision: str | None,
) -> Draw:
    """How the states of a call are drawn; ``beta`` has passed ``temperature``.

    This check comes last of all: without a seed it advances the generator, which nothing gives
    back. What depends on values, and whether the backend takes W's device, is found out later.
    """
    chain_offset = integer(op, "chain_offset", chain_offset)
    if not 0 <= chain_offset < 2**32:
        raise ValueError(f"{op}: chain_offset must be in [0, 2^32), got {chain_offset}")
    digits = digits_of(op, precision)
    if seed is None and backend is not None:
        require(op, backend)
    return Draw(seeds.resolve(op, seed, generator, W.device), chain_offset, beta, digits)


def temperature(op: str, beta: Beta, rows: int, W: Tensor, drawn: Units | None = None) -> Beta:
    """Beta as a float or a contiguous float32 [B]; to draw continuous units it must be positive."""
    if type(beta) is float and beta == 1.0:  # the usual temperature, which costs a call no check
        return beta
    positive = drawn is not None and drawn.continuous
    if isinstance(beta, Tensor):
        if beta.dim() == 0 and beta.device == W.device and not readable(beta):
            return beta.float().expand(rows).contiguous()
        if beta.dim() == 0:
            return temperature(op, float(beta.detach()), rows, W, drawn)
        if beta.shape != (rows,):
            raise ValueError(
                f"{op}: beta must be a float or [B] = [{rows}], got {list(beta.shape)}"
            )
        if beta.device != W.device:
            raise ValueError(f"{op}: beta must be on W's device {W.device}, got {beta.device}")
        if readable(beta):  # elsewhere the values are the caller's promise
            wrong = ~(torch.isfinite(beta) & (beta > 0 if positive else beta >= 0))
            if bool(wrong.any()):
                worst = beta[wrong][0].item()
                raise ValueError(f"{op}: beta must be finite and {_sign(drawn)}, got {worst}")
        return beta.float().contiguous()
    if not isinstance(beta, (int, float)):
        return temperature(op, as_states(op, "beta", beta, W.device), rows, W, drawn)
    if not (0 < beta < math.inf if positive else 0 <= beta < math.inf):
        raise ValueError(f"{op}: beta must be finite and {_sign(drawn)}, got {beta}")
    if torch.compiler.is_compiling():
        # A number would be a constant of the graph, which every other number compiles anew.
        return W.new_ones(rows, dtype=torch.float32) * beta
    return float(beta)


def _sign(drawn: Units | None) -> str:
    if drawn is None or not drawn.continuous:
        return "not negative"
    return f"positive for {drawn.label} units"


def state_dtype(op: str, out_dtype: torch.dtype | None, W: Tensor, units: Units) -> torch.dtype:
    """dtype of returned states: W's unless asked for; bytes cannot hold all kinds of state."""
    if out_dtype is None:
        return W.dtype
    if out_dtype not in STATES:
        raise TypeError(f"{op}: out_dtype must be a float dtype, uint8 or bool, got {out_dtype}")
    if not (units.fits_bytes or out_dtype.is_floating_point):
        raise TypeError(
            f"{op}: out_dtype of {units.label} units must be a float dtype, got {out_dtype}"
        )
    return out_dtype
