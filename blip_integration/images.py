"""Images from files, as a captioner's vision model takes them, and what it says of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, turned upright by its EXIF orientation.

    Transparent parts become white; of an animation the first frame is taken.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, no image, damaged, of 32 bits a channel, or has more pixels
            than ``PIL.Image.MAX_IMAGE_PIXELS`` (raise that limit for files that you trust).
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"open_image: path must be an image file, got {file}")
    if file.stat().st_size == 0:
        raise ValueError(f"open_image: {file} is empty (0 bytes), expected an image")
    try:
        with Image.open(file) as image:
            width, height = image.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"open_image: {file} is too large ({error}), expected at most "
            f"{Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"open_image: {file} is in no image format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow's decoders raise any of these on damaged data.
        raise ValueError(f"open_image: {file} is damaged ({error})") from error
    if upright.mode.startswith("I;16"):
        # Pillow's own conversion would clip 16 bits to 8, not scale them.
        return upright.point(lambda level: level / 256).convert("L").convert("RGB")
    if upright.mode in ("I", "F"):
        raise ValueError(
            f"open_image: {file} has 32 bits a pixel (mode {upright.mode}), expected 8 or 16 bits "
            f"a channel"
        )
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")


def pixels_of(image: Image.Image, processor: BlipProcessor) -> Tensor:
    """A captioner's ``pixel_values`` [3, S, S] of an image, by its own processor."""
    pixels: Tensor = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    return pixels


class ImageFiles:
    """Image files as a captioner's ``pixel_values``, which are read as they are needed.

    Args:
        processor: The captioner's processor.
        paths: The N files, in any format that Pillow reads.

    Attributes:
        ids: The names of the files.
    """

    def __init__(self, processor: BlipProcessor, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.processor = processor
        self.ids = [os.fspath(path) for path in paths]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Tensor:
        """The pixel values [3, S, S] of one file, or [n, 3, S, S] of a slice of them.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be read; see ``open_image``.
        """
        if isinstance(rows, slice):
            return torch.stack([self[row] for row in range(*rows.indices(len(self)))])
        return pixels_of(open_image(self.ids[rows]), self.processor)


@torch.inference_mode()
def image_states(
    model: BlipForConditionalGeneration,
    pixel_values: Any,
    file: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """The last states of a captioner's vision model, which is what an RBM is fitted to.

    Args:
        model: The captioner, on whatever device.
        pixel_values: N images: a tensor [N, 3, S, S], or ``ImageFiles``.
        file: Where to keep the states, which then take no memory; None keeps them in memory.
        batch_size: The number of images at a time.
        progress: Whether to show a progress bar.

    Returns:
        [N, L, D], float16.

    Raises:
        ValueError: There are no images, or one cannot be read.
    """
    n = len(pixel_values)
    if n < 1:
        raise ValueError("image_states: pixel_values must hold one image or more, got none")
    states = torch.empty(0)
    for first in tqdm(range(0, n, batch_size), "features", unit="batch", disable=not progress):
        pixels = pixel_values[first : first + batch_size].to(model.device, model.dtype)
        batch = model.vision_model(pixels).last_hidden_state
        if first == 0:
            shape = (n, *batch.shape[1:])
            if file is None:
                states = torch.empty(shape, dtype=torch.float16)
            else:
                name, size = os.fspath(file), math.prod(shape)
                states = torch.from_file(name, True, size, dtype=torch.float16).view(shape)
        states[first : first + len(batch)] = batch.to("cpu", torch.float16)
    return states
