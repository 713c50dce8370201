"""Argument checks shared by the operations: each error names what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATES = (*_FLOATS, torch.bool, torch.uint8)


def _tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def weight(op: str, W: Tensor) -> None:
    """W must be a floating-point matrix on a device that holds data."""
    if not isinstance(W, Tensor):
        _tensor(op, "W", W)
    if W.dim() != 2:
        raise ValueError(f"{op}: W must be [V, H], got {list(W.shape)}")
    if W.dtype not in _FLOATS:
        raise TypeError(f"{op}: W must be float32, float64, bfloat16 or float16, got {W.dtype}")
    if W.device.type == "meta":
        raise ValueError(f"{op}: W must hold data, got a tensor on device 'meta'")


def states(op: str, name: str, value: Tensor, units: int, layer: str, W: Tensor) -> None:
    """States of a layer: [B, units], bool, uint8 or floating point."""
    if not isinstance(value, Tensor):
        _tensor(op, name, value)
    if value.dim() != 2 or value.shape[1] != units:
        raise ValueError(
            f"{op}: {name} must be [B, {layer}] = [B, {units}], got {list(value.shape)}"
        )
    if value.dtype not in _STATES:
        raise TypeError(f"{op}: {name} must be bool, uint8 or floating point, got {value.dtype}")
    if value.device != W.device:
        raise ValueError(f"{op}: {name} must be on W's device {W.device}, got {value.device}")


def vector(op: str, name: str, value: Tensor, units: int, layer: str, W: Tensor) -> None:
    """A parameter of a layer: [units], W's dtype and device."""
    if not isinstance(value, Tensor):
        _tensor(op, name, value)
    if value.dim() != 1 or value.shape[0] != units:
        raise ValueError(f"{op}: {name} must be [{layer}] = [{units}], got {list(value.shape)}")
    if value.dtype != W.dtype:
        raise TypeError(f"{op}: {name} must have W's dtype {W.dtype}, got {value.dtype}")
    if value.device != W.device:
        raise ValueError(f"{op}: {name} must be on W's device {W.device}, got {value.device}")


def sweeps(op: str, k: int) -> None:
    """k must be a positive int."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")


def temperature(op: str, beta: float | Tensor, rows: int, W: Tensor) -> tuple[float, Tensor | None]:
    """beta as a (float, None) or a (1.0, float32 [B]) pair."""
    if isinstance(beta, Tensor):
        if beta.dim() == 0:
            return temperature(op, float(beta), rows, W)
        if beta.shape != (rows,):
            raise ValueError(
                f"{op}: beta must be a float or [B] = [{rows}], got {list(beta.shape)}"
            )
        if beta.device != W.device:
            raise ValueError(f"{op}: beta must be on W's device {W.device}, got {beta.device}")
        return 1.0, beta.float().contiguous()
    if not isinstance(beta, (int, float)):
        raise TypeError(f"{op}: beta must be a float or a tensor [B], got {type(beta).__name__}")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"{op}: beta must be finite and not negative, got {beta}")
    return float(beta), None


def state_dtype(op: str, out_dtype: torch.dtype | None, W: Tensor) -> torch.dtype:
    """dtype of returned states: W's unless asked for."""
    if out_dtype is None:
        return W.dtype
    if out_dtype not in _STATES:
        raise TypeError(f"{op}: out_dtype must be a float dtype, uint8 or bool, got {out_dtype}")
    return out_dtype
