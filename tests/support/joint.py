"""A tiny captioner with an RBM and drawn images, for the tests of joint training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

import rbm_kernels as rk
from blip_integration.gated_residual import GatedResidual, RBMReconstructor
from blip_integration.modeling import apply_rbm_to_blip

from .blip import COLORS, SIDE, WIDTH, tiny_blip

GROUNDS = {"white": 1.0, "grey": 0.5}
KINDS = [(color, ground) for color in COLORS for ground in GROUNDS]


def drawn(n: int, seed: int = 0) -> tuple[Tensor, list[list[str]]]:
    """Images [n, 3, S, S] with a colored half, and two captions of different lengths for each."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    captions = []
    for i in range(n):
        color, ground = KINDS[i % len(KINDS)]
        images[i, :, :, : SIDE // 2] += GROUNDS[ground]
        images[i, COLORS.index(color), :, SIDE // 2 :] += 1.0
        captions.append([f"{color} on {ground}", f"a {color} circle on {ground}"])
    return images, captions


def tiny_captioner(dropout: float = 0.0) -> tuple[Any, PreTrainedTokenizerBase]:
    """Stock BLIP and its tokenizer."""
    model, processor = tiny_blip(initializer_range=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model, processor.tokenizer


def tiny_rbm(seed: int = 0) -> rk.RBM:
    rbm = rk.RBM(WIDTH, 8, "gaussian")
    with torch.no_grad():
        rbm.W.copy_(0.3 * torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(seed)))
    return rbm


def features_of(model: BlipForConditionalGeneration, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.vision_model(images).last_hidden_state


def captioner_with_rbm(
    model: BlipForConditionalGeneration, images: Tensor, strength: float = 0.3, **options: Any
) -> BlipForConditionalGeneration:
    """The model with an RBM on features that are standardized by those of some images."""
    features = features_of(model, images)
    statistics = features.mean((0, 1)), features.std((0, 1))
    of_cls = None
    if options.get("cls_token") == "apart":
        parts = features[:, :1], features[:, 1:]
        statistics = (
            torch.stack([part.mean((0, 1)) for part in parts]),
            torch.stack([part.std((0, 1)) for part in parts]),
        )
        of_cls = RBMReconstructor(tiny_rbm(seed=1))
    reconstructor = RBMReconstructor(tiny_rbm(), options.pop("mode", "mean_field"))
    fitted = GatedResidual(reconstructor, *statistics, cls_reconstructor=of_cls, **options)
    return apply_rbm_to_blip(model, fitted, strength=strength)


def captioner(
    strength: float = 0.3, dropout: float = 0.0, **options: Any
) -> tuple[BlipForConditionalGeneration, PreTrainedTokenizerBase]:
    """A captioner with an RBM, and its tokenizer."""
    model, tokenizer = tiny_captioner(dropout)
    return captioner_with_rbm(model, drawn(12)[0], strength, **options), tokenizer
