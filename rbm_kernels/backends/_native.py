"""What the two backends of ``csrc/`` share: tensors become addresses, and results are allocated.

Their kernels know nothing of torch. An array crosses to them as a tuple that names its memory, and
so do a model, a layer and a draw, which refer to arrays; ``csrc/*/module.cpp`` makes structs of
them. The tensors behind the addresses must live until the call returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rbm_kernels.arguments import Beta, Draw, Layer, Model

_FLOAT32 = torch.float32

# Address, element, rows, columns, the strides of both, and whether all values are known to be 0 or
# 1. Plain tuples, since a named one takes a quarter of a microsecond longer to make.
Array: TypeAlias = tuple[int, int, int, int, int, int, bool]
_NO_ARRAY: Array = (0, 0, 0, 0, 0, 0, False)


def _vector(x: Tensor) -> Tensor:
    return x if x.dtype is _FLOAT32 and x.is_contiguous() else x.float().contiguous()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _vector(x)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _empty(rows: int, units: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Like torch.empty((rows, units)), in two thirds of the time.
    return torch.empty_strided((rows, units), (units, 1), dtype=dtype, device=device)


def _like(states: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(states, dtype=dtype, memory_format=torch.contiguous_format)


def _draw(draw: Draw) -> tuple[int, int, float, int, int]:
    seed, chain_offset, beta, digits = draw
    if isinstance(beta, Tensor):
        return seed.data_ptr(), chain_offset, 1.0, beta.data_ptr(), digits
    return seed.data_ptr(), chain_offset, beta, 0, digits


class Kernels(ABC):
    """The operations of one extension module; see ``reference.py`` for what each computes.

    Args:
        module: The extension module, or None where it could not be imported; nothing may be called
            then.
        states: The numbers by which the kernels know the dtypes of states. Tensors of other dtypes
            become float32 first.
        weights: The same of weights.
    """

    def __init__(
        self,
        module: ModuleType | None,
        states: dict[torch.dtype, int],
        weights: dict[torch.dtype, int],
    ) -> None:
        self.module: Any = module
        self.states, self.weights = states, weights

    @abstractmethod
    def context(self, device: torch.device) -> Any:
        """Where a call runs, in the form in which the module takes it."""

    @abstractmethod
    def check(self, op: str, name: str, states: Tensor, W: Tensor) -> None:
        """Refuse states [B, K] and weights [K, N] that are too large for the kernels."""

    @abstractmethod
    def fail(self, op: str, status: int, **states: Tensor | None) -> None:
        """Raise what a status other than 0 means; ``states`` are what the call was given."""

    def _states(self, x: Tensor) -> tuple[Tensor, Array]:
        """States [B, units] with the units side by side, and their description."""
        element = self.states.get(x.dtype)
        if element is None:
            x, element = x.float(), self.states[_FLOAT32]
        row, col = x.stride()
        rows, units = x.shape
        if col != 1 and units != 1:
            x, row = x.contiguous(), units
        return x, (x.data_ptr(), element, rows, units, row, 1, x.dtype is torch.bool)

    def _weights(self, W: Tensor) -> tuple[Tensor, Array]:
        """W [K, N] with one of its dimensions side by side, and its description."""
        element = self.weights.get(W.dtype)
        if element is None:
            W, element = W.float(), self.weights[_FLOAT32]
        row, col = W.stride()
        rows, cols = W.shape
        # Of a single row or column torch may report any stride.
        if cols == 1:
            col = 1
        elif rows == 1:
            row = 1
        if row != 1 and col != 1:
            W, row, col = W.contiguous(), cols, 1
        return W, (W.data_ptr(), element, rows, cols, row, col, False)

    def _model(self, model: Model) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors to keep, and W, b, c and the variances as the module takes them."""
        W, weights = self._weights(model.W)
        b, c, log_var = _vector(model.b), _vector(model.c), _optional(model.units.log_var)
        return (W, b, c, log_var), (weights, b.data_ptr(), c.data_ptr(), _address(log_var))

    def _result(self, dtype: torch.dtype, exact: bool) -> torch.dtype:
        """The dtype in which kernels write states that are asked for in ``dtype``."""
        return dtype if not exact and dtype in self.states else _FLOAT32

    def sample_layer(
        self,
        op: str,
        given: Tensor,
        layer: Layer,
        draw: Draw,
        return_means: bool,
        out_dtype: torch.dtype,
        *more: int,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``reference.sample_layer``; ``more`` are results that only one module has."""
        self.check(op, "v" if op == "sample_hidden" else "h", given, layer.W)
        device = given.device
        given, states = self._states(given)
        W, weights = self._weights(layer.W)
        bias = _vector(layer.bias)
        given_log_var = _optional(layer.given.log_var)
        drawn_log_var = _optional(layer.drawn.log_var)
        dtype = self._result(out_dtype, layer.drawn.continuous)
        rows, units = given.shape[0], W.shape[1]
        drawn = _empty(rows, units, dtype, device)
        means = _empty(rows, units, _FLOAT32, device) if return_means else None
        status = self.module.sample(
            states,
            (weights, bias.data_ptr(), _address(given_log_var), _address(drawn_log_var)),
            _draw(draw),
            drawn.data_ptr(),
            self.states[dtype],
            _address(means),
            *more,
            self.context(device),
        )
        if status:
            self.fail(op, status, v=given)
        return drawn, means

    def gibbs_sample(
        self,
        op: str,
        v: Tensor,
        model: Model,
        k: int,
        draw: Draw,
        mask: Tensor | None,
        values: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See ``reference.gibbs_sample``."""
        self.check(op, "v", v, model.W)
        device = v.device
        v, states = self._states(v)
        _kept, parameters = self._model(model)
        mask_stride, held = 0, _NO_ARRAY
        if mask is not None:
            mask = mask.contiguous()
            mask_stride = 0 if mask.dim() == 1 else mask.stride(0)
            if values is not None:
                values, held = self._states(values.expand(v.shape))
        # Among clamped units real values may stand, which bytes would not hold.
        dtype = self._result(out_dtype, model.units.continuous or mask is not None)
        drawn = _like(v, dtype)
        status = self.module.gibbs_sample(
            states,
            parameters,
            k,
            _draw(draw),
            _address(mask),
            mask_stride,
            held,
            drawn.data_ptr(),
            self.states[dtype],
            self.context(device),
        )
        if status:
            self.fail(op, status, v=v, values=values)
        return drawn

    def free_energies(self, op: str, v: Tensor, model: Model, beta: Beta, digits: int) -> Tensor:
        """See ``reference.free_energies``."""
        self.check(op, "v", v, model.W)
        device = v.device
        v, states = self._states(v)
        _kept, parameters = self._model(model)
        energies = torch.empty_strided((states[2],), (1,), dtype=_FLOAT32, device=device)
        betas = beta if isinstance(beta, Tensor) else None
        value = 1.0 if isinstance(beta, Tensor) else beta
        status = self.module.free_energy(
            states,
            parameters,
            (0, 0, value, _address(betas), digits),
            energies.data_ptr(),
            self.context(device),
        )
        if status:
            self.fail(op, status, v=v)
        return energies

    def cd_step(
        self,
        op: str,
        v: Tensor,
        model: Model,
        k: int,
        chains: Tensor | None,
        draw: Draw,
        averages: tuple[Tensor, Tensor, Tensor],
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        """See ``reference.cd_step``."""
        self.check(op, "v", v, model.W)
        device, state_dtype, start = v.device, model.W.dtype, _NO_ARRAY
        v, states = self._states(v)
        if chains is not None:
            self.check(op, "chains", chains, model.W)
            state_dtype = chains.dtype
            chains, start = self._states(chains)
        _kept, parameters = self._model(model)
        dtype = self._result(state_dtype, model.units.continuous)
        advanced = _like(v if chains is None else chains, dtype)
        energies = torch.empty_strided((2,), (1,), dtype=_FLOAT32, device=device)
        grad_W, grad_b, grad_c = averages
        status = self.module.cd_step(
            states,
            parameters,
            k,
            start,
            _draw(draw),
            grad_W.data_ptr(),
            grad_W.stride(0),
            grad_b.data_ptr(),
            grad_c.data_ptr(),
            accumulate,
            advanced.data_ptr(),
            self.states[dtype],
            energies.data_ptr(),
            self.context(device),
        )
        if status:
            self.fail(op, status, v=v, chains=chains)
        return advanced, energies
