"""What stands between files and models: cached features, folders of captioners, files of RBMs."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    BlipVisionModel,
)

from rbm_kernels import RBM

from .adjust import with_rbm
from .captioner import LiteBlipForConditionalGeneration, LiteVisionModel, lite_vision_model
from .data import open_image
from .features import FeatureCache, digest, extract, fingerprint
from .fitting import Fitted

# Enough to settle some hundred directions: each image gives 49 to 81 feature vectors.
COMPONENT_IMAGES = 600


def image_loader(
    processor: BlipProcessor, view: int = 0
) -> Callable[[str | os.PathLike[str]], Tensor]:
    """A function from an image file to a captioner's ``pixel_values`` [3, S, S] of it.

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
        return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

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
    """The :func:`.captioner.lite_vision_model` of some images, made once and kept in a folder.

    Args:
        images: Image files; the principal components are those of 600 of them, spread evenly.
        processor: From :func:`.captioner.lite_processor`, of the same variant.
        folder: Made where it is missing. A model in it serves again where the images (names,
            sizes, times of change), the variant and the width are the same.
        variant: Of the EfficientNet-Lite, 0, 1 or 2.
        width: How many components are kept.
        progress: Show a progress bar.
    """
    chosen = images[:: max(1, len(images) // COMPONENT_IMAGES)][:COMPONENT_IMAGES]
    saved = Path(folder) / f"vision-{digest(variant, width, _stamps(chosen))}"
    if saved.is_dir():
        return LiteVisionModel.from_pretrained(saved).eval()
    load = image_loader(processor)
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
        folder: See :func:`.features.extract`; the cache in it serves again where the vision model
            and the images (names, sizes, times of change) are the same.
        view: Of the images, see :func:`image_loader`.
        progress: Show a progress bar.
    """
    return extract(
        lambda pixels: vision_model(pixels.to(vision_model.device)).last_hidden_state,
        image_loader(processor, view),
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


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when all went well, and goes if not.

    Raises:
        FileExistsError: ``target`` exists and is no empty folder.
    """
    final = Path(target)
    require_new_folder(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp makes it the owner's alone.
        yield unfinished
        # On POSIX an empty folder of that name gives way.
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def require_new_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds something.

    Raises:
        FileExistsError: It exists and is no empty folder.
    """
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"the folder to write must be new or empty, got {folder}")


def save_captioner(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    folder: str | os.PathLike[str],
) -> None:
    """Write a model and its processor into one new folder, as Hugging Face's Auto classes read it.

    Raises:
        FileExistsError: The folder exists and is not empty.
    """
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)


def load_captioner(
    name: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """A captioner and its processor: one of this package or any BLIP captioner.

    Args:
        name: A folder, or a name on a model hub ("Salesforce/blip-image-captioning-base").
        device: Where the model goes.

    Raises:
        FileNotFoundError: A folder without a model.
        ValueError: A model that is no BLIP captioner.
        OSError: Neither a folder nor a name that the hub answers to.
    """
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"load_captioner: name must be a folder with config.json or a hub's name, got {name}"
        )
    with_rbm(LiteBlipForConditionalGeneration)  # Makes that class known to the Auto classes.
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"load_captioner: name must be a folder or a hub's name, got {name}: {error}"
        ) from error
    if not isinstance(config, BlipConfig):
        raise ValueError(
            f"load_captioner: {name} must hold a BLIP model, got one of type {config.model_type!r}"
        )
    model, loading = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"load_captioner: {name} must hold all weights of a BLIP captioner, got none for "
            f"{sorted(loading['missing_keys'])[0]} and {len(loading['missing_keys']) - 1} more"
        )
    return model.to(device).eval(), AutoProcessor.from_pretrained(name)


def save_fitted_rbm(fitted: Fitted, path: str | os.PathLike[str]) -> None:
    """Write an RBM of :func:`.fitting.fit_rbm` as :meth:`rbm_kernels.RBM.save` does.

    The mean and scale that standardise the features go into the file's header.
    """
    statistics = {"mean": fitted.mean, "scale": fitted.scale}
    metadata = {name: json.dumps(values.tolist()) for name, values in statistics.items()}
    fitted.reconstructor.rbm.save(path, metadata=metadata)


def load_fitted_rbm(path: str | os.PathLike[str]) -> tuple[RBM, Tensor, Tensor]:
    """An RBM with the mean [D] and scale [D] of its features.

    Args:
        path: Written by :func:`save_fitted_rbm`, or by :meth:`rbm_kernels.RBM.save`: then the RBM
            is of features as they are, of mean 0 and scale 1.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No file of an RBM.
    """
    rbm = RBM.load(path)
    with safe_open(os.fspath(path), framework="pt") as file:
        header = file.metadata()
    if "mean" not in header:
        return rbm, torch.zeros(rbm.n_visible), torch.ones(rbm.n_visible)
    mean, scale = (torch.tensor(json.loads(header[name])) for name in ("mean", "scale"))
    return rbm, mean, scale
