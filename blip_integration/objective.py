"""The joint objective of a captioner and the RBM inside it: LM + a ITC + b ITM + c CD.

- LM is the cross-entropy of the captions in nats a token. Its gradient passes through the
  mean-field steps of the gated residual, so that it trains the gate and the RBM along with whatever
  of BLIP learns.
- ITC is image-text contrast (Radford et al. 2021, https://arxiv.org/abs/2103.00020) and ITM is
  image-text matching with hard negatives (Li et al. 2021, https://arxiv.org/abs/2107.07651), as in
  BLIP (Li et al. 2022, https://arxiv.org/abs/2201.12086).
- CD is contrastive divergence (Hinton 2002) of the RBM on the standardized features that it stands
  behind, which keeps it a model of them. Its value does not measure learning, so it is a term of
  training alone.

``trainer.py`` trains with it.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    BlipForConditionalGeneration,
    BlipPreTrainedModel,
    BlipTextConfig,
    PreTrainedTokenizerBase,
)

from .captions import normalize_caption
from .gated_residual import GatedResidual, RBMReconstructor
from .losses import contrastive_loss, itm_loss, lm_loss
from .modeling import rbm_of

# The range of BLIP's learned temperature.
_TEMPERATURES = (0.001, 0.5)


class CaptionPairs(Dataset):
    """Every caption together with its image, as items (pixel values, caption, image number).

    Args:
        pixel_values: Anything whose item i is image i as the captioner's vision model takes it:
            a tensor [N, 3, S, S], cached features [N, 1 + L, D], or an object that reads them from
            disk when they are needed.
        captions: A list of captions for each image.

    Raises:
        ValueError: The numbers of images and lists differ, or there is no caption at all.

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


@dataclass
class CaptionCollator:
    """Pairs to the tensors that a captioner learns from.

    Hugging Face's BLIP adds no first token, and learns pads and prompts unless its labels say
    otherwise. Sequences here are ``BOS prompt caption SEP``, with the tokens that ``generate``
    starts and stops with, and only the caption and SEP are labels.

    Args:
        tokenizer: The captioner's tokenizer.
        config: The captioner's ``config.text_config``, which names BOS, SEP and the pad.
        max_length: The most tokens of a sequence; the rest of a caption is cut off.
        prompt: Words that every caption starts with and that are not learned, such as "a picture
            of" for Salesforce's BLIP.
    """

    tokenizer: PreTrainedTokenizerBase
    config: BlipTextConfig
    max_length: int = 32
    prompt: str = ""

    def __call__(self, items: Sequence[tuple[Tensor, str, int]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            items: Pixel values, caption and image number of each pair. Equal numbers mark captions
                of one image, which are no negatives of each other.

        Returns:
            ``pixel_values`` float32 [B, ...]; ``input_ids``, ``attention_mask`` and ``labels``
            int64 [B, T], labels being -100 where nothing is learned; ``image_ids`` int64 [B].

        Raises:
            ValueError: A caption has no word, the images have several shapes, or the prompt leaves
                no room for a caption.
        """
        images, captions, numbers = zip(*items, strict=True)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ValueError(f"CaptionCollator: images must be of one shape, got {sorted(shapes)}")
        texts = [normalize_caption(caption) for caption in captions]
        if not all(texts):
            empty = texts.index("")
            raise ValueError(
                f"CaptionCollator: every caption must have a word, got {captions[empty]!r} for "
                f"image {numbers[empty]}"
            )
        start = [self.config.bos_token_id, *self._ids([normalize_caption(self.prompt)])[0]]
        room = self.max_length - len(start) - 1
        if room < 1:
            raise ValueError(
                f"CaptionCollator: max_length must be {len(start) + 2} or more with the prompt "
                f"{self.prompt!r}, got {self.max_length}"
            )
        targets = [[*ids[:room], self.config.sep_token_id] for ids in self._ids(texts)]
        shape = (len(items), len(start) + max(map(len, targets)))
        input_ids = torch.full(shape, self.config.pad_token_id)
        labels = torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, target in enumerate(targets):
            end = len(start) + len(target)
            input_ids[row, :end] = torch.tensor([*start, *target])
            labels[row, len(start) : end] = torch.tensor(target)
            mask[row, :end] = 1
        return {
            "pixel_values": torch.stack(images).float(),
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "image_ids": torch.tensor(numbers),
        }

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found


class JointHeads(nn.Module):
    """What ITC and ITM need beside a captioner, which has neither projections nor a text encoder.

    - ITC compares projections of the image's CLS token, behind the gated residual, and of the mean
      of the decoder's word embeddings.
    - ITM tells fitting from unfitting pairs by the decoder's last state at SEP, where it has read
      the whole caption and looked at the image.

    Args:
        image_width: The width D of the vision features.
        text_width: The width d of the decoder.
        projection_dim: The width P of the space in which images and texts are compared.
        temperature: The temperature of the contrast to start from. It is learned in BLIP's range,
            from 0.001 to 0.5.
    """

    def __init__(
        self,
        image_width: int,
        text_width: int,
        projection_dim: int = 256,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, projection_dim)
        self.text = nn.Linear(text_width, projection_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.match = nn.Linear(text_width, 2)

    @classmethod
    def for_model(
        cls, model: BlipForConditionalGeneration, projection_dim: int = 256
    ) -> JointHeads:
        """New heads of the widths of a captioner."""
        config = model.config
        return cls(config.vision_config.hidden_size, config.text_config.hidden_size, projection_dim)

    def similarities(self, features: Tensor, embeddings: Tensor, words: Tensor) -> Tensor:
        """The cosine of every image with every text, over the temperature.

        Args:
            features: Vision features [B, 1 + L, D].
            embeddings: Word embeddings [B, T, d].
            words: Which embeddings count, as a boolean [B, T].

        Returns:
            The score [B, B] of image i with text j, in float32.
        """
        with torch.no_grad():
            self.log_temperature.clamp_(*map(math.log, _TEMPERATURES))
        share = words.to(embeddings.dtype)
        mean = (embeddings * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp_min(1)
        image = functional.normalize(self.image(features[:, 0]).float(), dim=-1)  # [B, P]
        text = functional.normalize(self.text(mean).float(), dim=-1)  # [B, P]
        return image @ text.T / self.log_temperature.exp()


class JointObjective(BlipPreTrainedModel):
    """The terms of the joint loss of a batch, as the module that is trained.

    It computes with the captioner's own modules and keeps their names, so that its checkpoints are
    checkpoints of the captioner, with the heads' tensors beside the captioner's own.

    Args:
        captioner: A BLIP captioner.
        heads: The heads of ITC and ITM.
        weights: The weight of each term in the loss. Terms that it does not name are not computed;
            "lm" always is.
        k: The Gibbs sweeps of CD-k.
        seed: The seed of CD's chains.

    Raises:
        TypeError: ``captioner`` is no ``BlipForConditionalGeneration``.
        ValueError: CD has a weight, but the captioner has no RBM.
    """

    # The trainer then counts the labels of an update, see RBMBlipTrainer.compute_loss.
    accepts_loss_kwargs = True

    def __init__(
        self,
        captioner: BlipForConditionalGeneration,
        heads: JointHeads,
        weights: Mapping[str, float],
        *,
        k: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(captioner, BlipForConditionalGeneration):
            raise TypeError(
                "JointObjective: captioner must be a BlipForConditionalGeneration, "
                f"got {type(captioner).__name__}"
            )
        super().__init__(copy.copy(captioner.config))
        for name, part in captioner.named_children():
            self.add_module(name, part)
        self.heads = heads
        self.weights = dict(weights)
        self.k = k
        self.seed = seed
        self._still: list[nn.Module] = []
        # In a tuple, because its parts are submodules already.
        self._captioner = (captioner,)
        if "cd" in weights and not self._reconstructors():
            raise ValueError(
                "JointObjective: cd must be 0 for a model without an RBM (apply_rbm_to_blip puts "
                f"one in), got {weights['cd']}"
            )

    @property
    def captioner(self) -> BlipForConditionalGeneration:
        return self._captioner[0]

    @property
    def residual(self) -> GatedResidual | None:
        return rbm_of(self)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        image_ids: Tensor,
        *,
        update: int = 0,
        first_pair: int = 0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms that have a weight; in evaluation without CD and label smoothing.

        Args:
            pixel_values: As ``CaptionCollator`` makes it, like the next four.
            input_ids: Tokens [B, T].
            attention_mask: 1 where there is a token [B, T].
            labels: The tokens to be learned [B, T], and -100 elsewhere.
            image_ids: The numbers of the images [B].
            update: The number of the update, which decides the draws of CD's chains.
            first_pair: How many pairs of the same update stand before this batch: the first chains
                are theirs.
            generator: Where the draws of hard negatives come from; by default PyTorch's own.

        Returns:
            The terms "lm", "itc", "itm" and "cd" as scalars: LM averaged over the labels, the
            others over the pairs. ITC and ITM are missing if all pairs are of one image.

        Raises:
            FloatingPointError: Vision features are not finite.
        """
        features, before = self._encode(pixel_values)  # [B, 1 + L, D]
        if not bool(torch.isfinite(features).all()):
            wrong = image_ids[~torch.isfinite(features).flatten(1).all(1)].tolist()
            raise FloatingPointError(
                "JointObjective: vision features must be finite, got NaN or infinity for the "
                f"images {wrong}"
            )

        def states(images: Tensor, texts: Tensor) -> Tensor:
            return self.text_decoder.bert(
                input_ids[texts],
                attention_mask=attention_mask[texts],
                encoder_hidden_states=features[images],
                is_decoder=True,
                use_cache=False,
            ).last_hidden_state  # [M, T, d]

        def match(images: Tensor, texts: Tensor) -> Tensor:
            last = attention_mask[texts].sum(1) - 1  # where SEP is
            read = states(images, texts)[torch.arange(len(texts), device=last.device), last]
            return self.heads.match(read)  # [M, 2]

        pairs = torch.arange(len(labels), device=labels.device)
        logits = self.text_decoder.cls(states(pairs, pairs))  # [B, T, V]
        smoothing = self.text_decoder.label_smoothing if self.training else 0.0
        terms = {"lm": lm_loss(logits, labels, label_smoothing=smoothing)}
        contrasted = "itc" in self.weights or "itm" in self.weights
        if contrasted and bool((image_ids != image_ids[0]).any()):
            scores = features.new_zeros(len(features), len(features))  # negatives drawn evenly
            if "itc" in self.weights:
                embeddings = self.captioner.get_input_embeddings()(input_ids)
                scores = self.heads.similarities(features, embeddings, labels != -100)
                terms["itc"] = contrastive_loss(scores, groups=image_ids)
            if "itm" in self.weights:
                terms["itm"] = itm_loss(match, scores, groups=image_ids, generator=generator)
        if "cd" in self.weights and self.training:
            terms["cd"] = self._contrastive_divergence(before, update, first_pair)
        return terms

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Vision features [B, 1 + L, D] behind the gated residual and before it."""
        before: list[Tensor] = []
        residual = self.residual
        if residual is None:
            features = self.vision_model(pixel_values).last_hidden_state
            return features, features
        hook = residual.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        try:
            features = self.vision_model(pixel_values).last_hidden_state
        finally:
            hook.remove()
        return features, before[0]

    def _contrastive_divergence(self, features: Tensor, update: int, first_pair: int) -> Tensor:
        """CD-k of the RBMs on the standardized tokens they are given, averaged over the tokens."""
        total = features.new_zeros((), dtype=torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            for i, (part, tokens) in enumerate(self._standardized(features)):
                if isinstance(part, RBMReconstructor):
                    loss = part.rbm.cd_loss(
                        tokens.flatten(0, 1).detach(),  # only the RBM learns from it
                        self.k,
                        seed=(self.seed + i, 2 * self.k * update),
                        chain_offset=first_pair * tokens.shape[1],
                    )
                    total = total + loss * (tokens.shape[1] / features.shape[1])
        return total

    def _standardized(self, features: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Each reconstructor with the tokens [B, M, D] that it is given."""
        residual = self.residual
        assert residual is not None
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

    def _reconstructors(self) -> list[RBMReconstructor]:
        residual = self.residual
        if residual is None:
            return []
        parts = (residual.reconstructor, residual.cls_reconstructor)
        return [part for part in parts if isinstance(part, RBMReconstructor)]

    def train(self, mode: bool = True) -> JointObjective:
        """Set the mode, except that what ``learning`` freezes as a whole stays without dropout."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    @contextmanager
    def learning(self, freeze: str) -> Iterator[None]:
        """Freeze what does not learn; in the end all flags and modes are as they were.

        Args:
            freeze: What of BLIP stays as it is: "all", "vision" or "none".
        """
        flags = {parameter: parameter.requires_grad for parameter in self.parameters()}
        modes = {module: module.training for module in self.modules()}
        residual = self.residual
        spared = set() if residual is None else set(residual.parameters())
        frozen: list[nn.Module] = []
        if freeze == "all":
            frozen += [self.vision_model, self.text_decoder]
        elif freeze == "vision":
            frozen += [self.vision_model]
        if "itm" not in self.weights:
            frozen += [self.heads.match]
        if "itc" not in self.weights:
            frozen += [self.heads.image, self.heads.text]
        try:
            if "itc" not in self.weights:
                self.heads.log_temperature.requires_grad_(False)
            for module in frozen:
                for parameter in set(module.parameters()) - spared:
                    parameter.requires_grad_(False)
            # Looked for once, because the trainer sets the mode before every batch.
            self._still = list(_frozen_parts(self))
            yield
        finally:
            self._still = []
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode

    def learned(self) -> dict[str, Tensor]:
        """The live tensors that training changes: buffers, and parameters that are not frozen."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {n: t.detach() for n, t in {**parameters, **dict(self.named_buffers())}.items()}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Save the captioner, with the heads' tensors beside its own."""
        tensors = self.state_dict() if state_dict is None else state_dict
        self.captioner.save_pretrained(save_directory, state_dict=tensors, **options)


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module of which no parameter learns."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
    else:
        for part in module.children():
            yield from _frozen_parts(part)
