"""What joint training minimises: the terms LM, ITC, ITM and CD of a batch of captioned images.

- LM: cross-entropy of the captions, in nats a token. It goes back through the gated residual's
  mean-field steps, so that it trains the gate and the RBM along with whatever of BLIP learns.
- ITC: image-text contrast (Radford et al. 2021, https://arxiv.org/abs/2103.00020) and ITM:
  image-text matching with hard negatives (Li et al. 2021, ALBEF, https://arxiv.org/abs/2107.07651),
  as in BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086).
- CD: contrastive divergence (Hinton 2002) of the RBM on the standardised features it stands behind,
  which keeps it a model of them. Its value is no measure of learning, so it is never validated.

:mod:`.joint` trains with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    BlipForConditionalGeneration,
    BlipTextConfig,
    PreTrainedTokenizerBase,
)

from .captions import normalize_caption
from .gated_residual import GatedResidual, RBMReconstructor
from .losses import contrastive_loss, itm_loss, lm_loss

TERMS = ("lm", "itc", "itm", "cd")

# BLIP's range of the temperature that is learnt.
_TEMPERATURES = (0.001, 0.5)


class CaptionPairs(Dataset):
    """Every caption together with its image: items (pixel values, caption, image number).

    Args:
        pixel_values: What ``pixel_values[i]`` is image i for, as the captioner's vision model takes
            it: a tensor [N, 3, S, S], cached features [N, 1 + L, D] or a
            :class:`.features.FeatureCache`, which is read from disk as it is needed.
        captions: One list of captions an image.

    Raises:
        ValueError: Numbers of images and of lists that differ, or no caption at all.

    Example:
        >>> pairs = CaptionPairs(torch.zeros(2, 5, 8), [["a dog", "a black dog"], ["a cat"]])
        >>> len(pairs), pairs[2][1:]
        (3, ('a cat', 1))
    """

    def __init__(self, pixel_values: Any, captions: Sequence[Sequence[str]]) -> None:
        if len(pixel_values) != len(captions):
            raise ValueError(
                f"CaptionPairs: captions must have a list for each of {len(pixel_values)} images, "
                f"got {len(captions)}"
            )
        self.pixel_values = pixel_values
        self.pairs = [(text, image) for image, texts in enumerate(captions) for text in texts]
        if not self.pairs:
            raise ValueError("CaptionPairs: captions must hold one caption or more, got none")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, str, int]:
        caption, image = self.pairs[index]
        return torch.as_tensor(self.pixel_values[image]), caption, image


def collate_captions(
    items: Sequence[tuple[Tensor, str, int]],
    tokenizer: PreTrainedTokenizerBase,
    config: BlipTextConfig,
    *,
    max_tokens: int = 32,
    prompt: str = "",
) -> dict[str, Tensor]:
    """Pairs to the tensors that a captioner learns from.

    Hugging Face's BLIP adds no first token and leaves neither pads nor prompts out of its loss.
    Sequences here are ``BOS prompt caption SEP``, the tokens with which ``generate`` starts and
    stops, and only the caption and SEP are labels.

    Args:
        items: (pixel values, caption, image number) each. Equal numbers mark captions of one
            image, which are no negatives of each other.
        tokenizer: The captioner's.
        config: The captioner's ``config.text_config``, whose BOS, SEP and pad are used.
        max_tokens: Longest sequence T; the rest of a caption is cut off.
        prompt: See :class:`JointSettings`.

    Returns:
        ``pixel_values`` [B, ...] float32, ``input_ids``, ``attention_mask`` and ``labels`` int64
        [B, T] with -100 where nothing is learnt, ``image_ids`` int64 [B].

    Raises:
        ValueError: A caption without a word, images of several shapes, or a prompt that leaves no
            room for a caption.
    """
    images, captions, numbers = zip(*items, strict=True)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"collate_captions: images must be of one shape, got {sorted(shapes)}")
    texts = [normalize_caption(caption) for caption in captions]
    if not all(texts):
        empty = texts.index("")
        raise ValueError(
            f"collate_captions: every caption must have a word, got {captions[empty]!r} for "
            f"image {numbers[empty]}"
        )
    start = [config.bos_token_id]
    if prompt:
        start += tokenizer(normalize_caption(prompt), add_special_tokens=False)["input_ids"]
    room = max_tokens - len(start) - 1
    if room < 1:
        raise ValueError(
            f"collate_captions: max_tokens must be {len(start) + 2} or more with the prompt "
            f"{prompt!r}, got {max_tokens}"
        )
    words = [ids[:room] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    length = len(start) + max(map(len, words)) + 1
    input_ids = torch.full((len(items), length), config.pad_token_id)
    labels = torch.full((len(items), length), -100)
    mask = torch.zeros(len(items), length, dtype=torch.int64)
    for row, caption_ids in enumerate(words):
        target = torch.tensor([*caption_ids, config.sep_token_id])
        end = len(start) + len(target)
        input_ids[row, :end] = torch.cat([torch.tensor(start), target])
        labels[row, len(start) : end] = target
        mask[row, :end] = 1
    return {
        "pixel_values": torch.stack(images).float(),
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "image_ids": torch.tensor(numbers),
    }


class JointHeads(nn.Module):
    """What ITC and ITM need beside a captioner, which has neither projections nor a text encoder.

    - ITC compares projections of the image's CLS token, behind the gated residual, and of the mean
      of the decoder's word embeddings.
    - ITM tells fitting from unfitting pairs by the decoder's last state at SEP, where it has read
      the whole caption and looked at the image.

    Args:
        image_width: Of the vision features, D.
        text_width: Of the decoder.
        projection: Width of the common space.
        temperature: Of the contrast to start from, learnt in the range 0.001 to 0.5 (BLIP's).
    """

    def __init__(
        self, image_width: int, text_width: int, projection: int = 256, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, projection)
        self.text = nn.Linear(text_width, projection)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.match = nn.Linear(text_width, 2)

    @classmethod
    def for_model(cls, model: BlipForConditionalGeneration, projection: int = 256) -> JointHeads:
        """New heads of the widths of a captioner."""
        config = model.config
        return cls(config.vision_config.hidden_size, config.text_config.hidden_size, projection)

    def project_image(self, features: Tensor) -> Tensor:
        """Vision features [B, 1 + L, D] to unit vectors [B, P]."""
        return functional.normalize(self.image(features[:, 0]).float(), dim=-1)

    def project_text(self, embeddings: Tensor, words: Tensor) -> Tensor:
        """Word embeddings [B, T, d], averaged where ``words`` [B, T], to unit vectors [B, P]."""
        share = words.to(embeddings.dtype)
        mean = (embeddings * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp_min(1)
        return functional.normalize(self.text(mean).float(), dim=-1)


def gated_residual(model: BlipForConditionalGeneration) -> GatedResidual | None:
    """The gated residual behind a captioner's vision model, None where there is none."""
    residual = getattr(model.vision_model, "rbm", None)
    return residual if isinstance(residual, GatedResidual) else None


def rbm_reconstructors(residual: GatedResidual | None) -> list[RBMReconstructor]:
    if residual is None:
        return []
    parts = (residual.reconstructor, residual.cls_reconstructor)
    return [part for part in parts if isinstance(part, RBMReconstructor)]


def _standardised(residual: GatedResidual, features: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each reconstructor with the tokens [B, M, D] it is given, standardised."""
    features = features.to(residual.mean.dtype)
    if residual.cls_token == "apart":
        assert residual.cls_reconstructor is not None
        (mean, patch_mean), (scale, patch_scale) = residual.mean, residual.scale
        return [
            (residual.reconstructor, (features[:, 1:] - patch_mean) / patch_scale),
            (residual.cls_reconstructor, (features[:, :1] - mean) / scale),
        ]
    tokens = features if residual.cls_token == "shared" else features[:, 1:]
    return [(residual.reconstructor, (tokens - residual.mean) / residual.scale)]


class JointObjective(nn.Module):
    """The terms of the joint loss of a batch, in one ``forward`` for DistributedDataParallel.

    Args:
        model: A captioner.
        heads: See :class:`JointHeads`.
        weights: Of the terms in the loss; those that it does not name are not computed. LM is
            always there.
        cd_sweeps: Gibbs sweeps k of CD-k.
        seed: Of CD's chains.

    Raises:
        TypeError: ``model`` is no ``BlipForConditionalGeneration``.
        ValueError: A weight for CD, but no RBM.
    """

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        heads: JointHeads,
        weights: Mapping[str, float],
        *,
        cd_sweeps: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, BlipForConditionalGeneration):
            raise TypeError(
                "JointObjective: model must be a BlipForConditionalGeneration, "
                f"got {type(model).__name__}"
            )
        self.model = model
        self.heads = heads
        self.weights = dict(weights)
        self.cd_sweeps = cd_sweeps
        self.seed = seed
        self.gated = gated_residual(model)
        if "cd" in weights and not rbm_reconstructors(self.gated):
            raise ValueError(
                "JointObjective: cd must be 0 for a model without an RBM (apply_rbm_to_blip puts "
                f"one in), got {weights['cd']}"
            )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        image_ids: Tensor,
        *,
        update: int = 0,
        first_image: int = 0,
        draw: int = 0,
    ) -> dict[str, Tensor]:
        """The terms that are on; in evaluation mode without CD and label smoothing.

        Args:
            pixel_values: See :func:`collate_captions` for these five.
            input_ids: [B, T].
            attention_mask: [B, T].
            labels: [B, T].
            image_ids: [B].
            update: Number of the update, which decides the draws of CD's chains.
            first_image: How many images of this update other batches hold: their chains are the
                first.
            draw: Seed of the hard negatives.

        Returns:
            0-dim terms "lm", "itc", "itm" and "cd": LM averaged over the labels, the others over
            the pairs.

        Raises:
            FloatingPointError: Vision features that are not finite.
        """
        features, before = self._encode(pixel_values)
        if not bool(torch.isfinite(features).all()):
            wrong = image_ids[~torch.isfinite(features).flatten(1).all(1)].tolist()
            raise FloatingPointError(
                "JointObjective: vision features must be finite, got NaN or infinity for the "
                f"images {wrong}"
            )

        def states(rows: Tensor | slice, texts: Tensor | slice) -> Tensor:
            return self.model.text_decoder.bert(
                input_ids[texts],
                attention_mask=attention_mask[texts],
                encoder_hidden_states=features[rows],
                is_decoder=True,
                use_cache=False,
            ).last_hidden_state  # [M, T, d]

        def match(rows: Tensor, texts: Tensor) -> Tensor:
            last = attention_mask[texts].sum(1) - 1  # where SEP is
            read = states(rows, texts)[torch.arange(len(texts), device=last.device), last]
            return self.heads.match(read)  # [M, 2]

        everything = slice(None)
        logits = self.model.text_decoder.cls(states(everything, everything))  # [B, T, V]
        smoothing = self.model.text_decoder.label_smoothing if self.training else 0.0
        terms = {"lm": lm_loss(logits, labels, label_smoothing=smoothing)}
        contrasted = "itc" in self.weights or "itm" in self.weights
        if contrasted and bool((image_ids != image_ids[0]).any()):
            scores = features.new_zeros(len(features), len(features))  # negatives drawn evenly
            if "itc" in self.weights:
                scores = self._similarities(features, input_ids, labels != -100)
                terms["itc"] = contrastive_loss(scores, groups=image_ids)
            if "itm" in self.weights:
                generator = torch.Generator().manual_seed(draw)
                terms["itm"] = itm_loss(match, scores, groups=image_ids, generator=generator)
        if "cd" in self.weights and self.training:
            terms["cd"] = self._contrastive_divergence(before, update, first_image)
        return terms

    def _similarities(self, features: Tensor, input_ids: Tensor, words: Tensor) -> Tensor:
        """ITC's cosines over their temperature, [B, B]: image i with text j."""
        with torch.no_grad():
            self.heads.log_temperature.clamp_(*map(math.log, _TEMPERATURES))
        image = self.heads.project_image(features)
        text = self.heads.project_text(self.model.get_input_embeddings()(input_ids), words)
        return image @ text.T / self.heads.log_temperature.exp()

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Vision features [B, L, D] as the decoder sees them, and before the gated residual."""
        before: list[Tensor] = []
        hooks = []
        if self.gated is not None:
            hooks.append(self.gated.register_forward_pre_hook(lambda _, x: before.append(x[0])))
        try:
            features = self.model.vision_model(pixel_values).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return features, before[0] if before else features

    def _contrastive_divergence(self, features: Tensor, update: int, first_image: int) -> Tensor:
        """CD-k of the RBMs on the standardised tokens they are given, averaged over the tokens."""
        assert self.gated is not None
        total = torch.zeros((), device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            for i, (part, tokens) in enumerate(_standardised(self.gated, features)):
                if isinstance(part, RBMReconstructor):
                    loss = part.rbm.cd_loss(
                        tokens.flatten(0, 1),
                        self.cd_sweeps,
                        seed=(seed_for(self.seed, "chains", i), 2 * self.cd_sweeps * update),
                        chain_offset=first_image * tokens.shape[1],
                    )
                    total = total + loss * (tokens.shape[1] / features.shape[1])
        return total


def seed_for(*purpose: int | str) -> int:
    """A seed of 63 bits for one purpose, such as ``(seed, "order", epoch)``."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
