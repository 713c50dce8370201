"""What people hand over as data: arrays, tables, lists and integers become tensors of states.

All functions that take data take the same kinds of it, because they ask here. Tensors of the dtypes
in ``STATES`` are used as they are, and cost a call nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES = (*FLOATS, torch.bool, torch.uint8)
_INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip

_TAKEN = "a tensor, a NumPy array, a table or lists of numbers"


def as_states(where: str, name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """States as a strided tensor of one of the dtypes ``STATES``.

    Args:
        where: The calling function, for error messages.
        name: The argument, for error messages.
        value: A tensor of bool, integers or floating-point numbers; a NumPy array, a pandas table
            or (nested) lists of them; or a sparse matrix, of torch or SciPy, whose entries that are
            not stored are 0. Integers other than uint8 become float32.
        device: Where to put what was no tensor; None leaves it on the CPU. A tensor stays where it
            is.

    Raises:
        TypeError: Anything else, such as text, objects, complex numbers, or a table or a masked
            array in which values are missing.
        ValueError: Lists whose rows differ in length.

    Example:
        >>> as_states("cd_step", "v", [[0, 1], [1, 1]])
        tensor([[0., 1.],
                [1., 1.]])
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, Tensor) for x in value):
        value = _stacked(where, name, value)
    if isinstance(value, Tensor):
        tensor = value
    else:
        tensor = _from_array(where, name, _as_array(where, name, value)).to(device)
    if tensor.is_nested:
        raise TypeError(f"{where}: {name} must have rows of one length, got a nested tensor")
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype in STATES:
        return tensor
    if tensor.dtype in _INTEGERS:
        return tensor.float()
    raise TypeError(
        f"{where}: {name} must hold bool, integers or floating-point numbers, got {tensor.dtype}"
    )


def as_rows(where: str, name: str, value: Any, n_units: int | None = None) -> Tensor:
    """Rows of data [N, V]: ``as_states`` of that shape.

    Args:
        where: The calling function, for error messages.
        name: The argument, for error messages.
        value: See ``as_states``.
        n_units: V where it is known.

    Raises:
        TypeError: See ``as_states``.
        ValueError: A wrong shape.
    """
    rows = as_states(where, name, value)
    if rows.dim() != 2 or n_units not in (None, rows.shape[1]):
        expected = "" if n_units is None else f" = [N, {n_units}]"
        raise ValueError(f"{where}: {name} must be [N, V]{expected}, got {list(rows.shape)}")
    return rows


def _stacked(where: str, name: str, rows: Any) -> Tensor:
    """Tensors of one shape as one tensor, which autograd follows."""
    if any(row.shape != rows[0].shape for row in rows):
        raise ValueError(
            f"{where}: {name} must have rows of one length, got {[list(row.shape) for row in rows]}"
        )
    return torch.stack(list(rows))


def _as_array(where: str, name: str, value: Any) -> Any:
    """A NumPy array of an array, a table, a sparse matrix, a number or nested lists."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{where}: {name} must have no missing values, got a masked array: fill them in"
        )
    if hasattr(value, "to_numpy"):  # a table or a column of pandas or of its kin
        return value.to_numpy()
    if hasattr(value, "toarray"):  # a sparse matrix of SciPy
        return value.toarray()
    if isinstance(value, (list, tuple)):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{where}: {name} must have rows of one length ({error})") from None
    if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__array__"):
        return np.asarray(value)
    raise TypeError(f"{where}: {name} must be {_TAKEN}, got {type(value).__name__}")


def _from_array(where: str, name: str, array: Any) -> Tensor:
    if array.dtype.kind == "O" and all(
        isinstance(x, (bool, int, float, np.number, np.bool_)) for x in array.flat
    ):
        array = array.astype(np.float64)  # such as a table with columns of bool and of integers
    if array.dtype.kind not in "buif":
        missing = "" if array.dtype.kind != "O" else " (text, objects or missing values)"
        raise TypeError(
            f"{where}: {name} must hold bool, integers or floating-point numbers, got the dtype "
            f"{array.dtype}{missing}: convert it by astype(float), and fill in what is missing"
        )
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # long doubles, which torch lacks
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch shares an array's memory if it is writable and goes forwards.
    shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy())
