"""Frozen image features: an EfficientNet-Lite encoder, and a cache of features on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BlipProcessor, BlipVisionModel

from blip_integration.images import open_image, pixels_of

from .files import whole_folder
from .lite_blip import LiteVisionModel, lite_vision_model

_FORMAT = 1


class FeatureCache:
    """Features of images in a folder: ``features.npy`` [N, L, D] float16, read as it is needed.

    Args:
        folder: Written by ``extract``.

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


# Enough to settle some hundred directions: each image gives 49 to 81 feature vectors.
COMPONENT_IMAGES = 600


def view_loader(
    processor: BlipProcessor, view: int = 0
) -> Callable[[str | os.PathLike[str]], Tensor]:
    """A function from an image file to a captioner's ``pixel_values`` [3, S, S] of a view of it.

    Args:
        processor: The captioner's.
        view: 0 is the image as it is, 1 with left and right exchanged; 2, 3, ... are pieces of
            these two by turns, of three quarters to all of each side, which the file's name and
            the number of the view settle.
    """

    def load(path: str | os.PathLike[str]) -> Tensor:
        image = open_image(path)
        if view % 2:
            image = ImageOps.mirror(image)
        if view >= 2:
            image = _piece(image, random.Random(f"{Path(path).name} {view}"))
        return pixels_of(image, processor)

    return load


def _piece(image: Image.Image, draw: random.Random) -> Image.Image:
    """Three quarters to all of each side, somewhere in the image."""
    width, height = (max(1, round(side * draw.uniform(0.75, 1))) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def cached_vision_model(
    images: Sequence[Path],
    processor: BlipProcessor,
    folder: str | os.PathLike[str],
    *,
    variant: int = 2,
    width: int = 256,
    progress: bool = True,
) -> LiteVisionModel:
    """The ``lite_vision_model`` of some images, made once and kept in a folder.

    Args:
        images: Image files; the principal components are those of 600 of them, spread evenly.
        processor: From ``lite_processor``, of the same variant.
        folder: Made where it is missing. A model in it serves again where the images (names,
            sizes, times of change), the variant and the width are the same.
        variant: Which EfficientNet-Lite, 0, 1 or 2.
        width: How many components are kept.
        progress: Show a progress bar.
    """
    chosen = images[:: max(1, len(images) // COMPONENT_IMAGES)][:COMPONENT_IMAGES]
    saved = Path(folder) / f"vision-{digest(variant, width, _stamps(chosen))}"
    if saved.is_dir():
        return LiteVisionModel.from_pretrained(saved).eval()
    load = view_loader(processor)
    starts = tqdm(range(0, len(chosen), 20), desc="components", unit="batch", disable=not progress)
    batches = (torch.stack([load(path) for path in chosen[i : i + 20]]) for i in starts)
    model = lite_vision_model(batches, variant=variant, width=width)
    with whole_folder(saved) as unfinished:
        model.save_pretrained(unfinished)
    return model


def cached_features(
    vision_model: BlipVisionModel,
    images: Sequence[Path],
    processor: BlipProcessor,
    folder: str | os.PathLike[str],
    *,
    view: int = 0,
    progress: bool = True,
) -> FeatureCache:
    """The ``last_hidden_state`` [N, L, D] of images, computed once and kept in a folder.

    Args:
        vision_model: A captioner's; it computes where it is.
        images: Image files, one row each.
        processor: The captioner's.
        folder: See ``extract``; the cache in it serves again where the vision model
            and the images (names, sizes, times of change) are the same.
        view: Which view of the images, see ``view_loader``.
        progress: Show a progress bar.
    """
    return extract(
        lambda pixels: vision_model(pixels.to(vision_model.device)).last_hidden_state,
        view_loader(processor, view),
        [str(path) for path in images],
        folder,
        fingerprint=digest(fingerprint(vision_model), view, _stamps(images)),
        progress=progress,
    )


def _stamps(images: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What changes when an image file does."""
    stats = [path.stat() for path in images]
    return [
        (str(path), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(images, stats, strict=True)
    ]
