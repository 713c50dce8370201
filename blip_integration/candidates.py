"""Captions that a captioner proposes for each image, best first, with its scores of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

from .features import FeatureCache


@dataclass(frozen=True)
class Candidates:
    """The n best captions of N images.

    Attributes:
        ids: What names each image.
        texts: N lists of n captions, the captioner's favourite first.
        scores: [N, n] float32, log-probabilities divided by the length to the length penalty.
    """

    ids: list[str]
    texts: list[list[str]]
    scores: Tensor

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts) or self.scores.shape[0] != len(self.ids):
            raise ValueError(
                "Candidates: ids, texts and scores must be of as many images, got "
                f"{len(self.ids)}, {len(self.texts)} and {list(self.scores.shape)}"
            )
        if any(len(each) != self.scores.shape[1] for each in self.texts):
            raise ValueError(
                f"Candidates: texts must have {self.scores.shape[1]} captions for each image, as "
                f"scores {list(self.scores.shape)} has"
            )

    @property
    def best(self) -> list[str]:
        """The captioner's favourite for each image."""
        return [each[0] for each in self.texts]

    def chosen(self, indices: Tensor) -> list[str]:
        """The candidates of those numbers, int64 [N]."""
        return [each[i] for each, i in zip(self.texts, indices.tolist(), strict=True)]

    def part(self, rows: Sequence[int]) -> Candidates:
        """Those of some images."""
        rows = list(rows)
        return Candidates(
            [self.ids[i] for i in rows], [self.texts[i] for i in rows], self.scores[rows]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file."""
        content = {"ids": self.ids, "texts": self.texts, "scores": self.scores.tolist()}
        Path(path).write_text(json.dumps(content))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Candidates:
        """Read what :meth:`save` wrote."""
        content = json.loads(Path(path).read_text())
        scores = torch.tensor(content["scores"]).reshape(len(content["ids"]), -1)
        return cls(content["ids"], content["texts"], scores)


@torch.inference_mode()
def beam_candidates(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pixel_values: FeatureCache | Tensor,
    ids: Sequence[str] | None = None,
    *,
    beams: int = 3,
    n: int = 1,
    min_length: int = 5,
    max_length: int = 20,
    length_penalty: float = 1.0,
    prompt: str = "",
    batch_size: int = 50,
    progress: bool = True,
    **generate: Any,
) -> Candidates:
    """The n best captions by beam search, with BLIP's own settings by default.

    Args:
        model: A captioner.
        tokenizer: Its tokenizer.
        pixel_values: What its vision model takes, N images, or a cache of what it gives.
        ids: Names of the images; the cache's own, or their numbers, by default.
        beams: Width of the search.
        n: Captions to keep, 1 to ``beams``.
        min_length: Tokens of a caption at least, the start, the prompt and the end counted.
        max_length: Tokens at most, counted likewise.
        length_penalty: Scores are divided by the length to this power; without effect on one beam.
        prompt: Words that the captioner goes on from, such as BLIP's "a picture of"; they are not
            part of the captions.
        batch_size: Images at a time.
        progress: Show a progress bar, where there is a terminal.
        **generate: Other keywords of ``generate``.

    Returns:
        The candidates.

    Raises:
        ValueError: n outside of 1..beams; a prompt that leaves no room for a caption.
    """
    if not 1 <= n <= beams:
        raise ValueError(f"beam_candidates: n must lie in 1..beams = 1..{beams}, got {n}")
    if ids is None:
        if isinstance(pixel_values, FeatureCache):
            ids = pixel_values.ids
        else:
            ids = [str(i) for i in range(len(pixel_values))]
    start = _start(model, tokenizer, prompt)
    if len(start) >= max_length:
        raise ValueError(
            f"beam_candidates: max_length must be above the {len(start)} tokens of the prompt "
            f"{prompt!r} and the start, got {max_length}"
        )
    if beams > 1:  # Greedy search has no use for it, and says so.
        generate["length_penalty"] = length_penalty
    texts: list[list[str]] = []
    scores: list[Tensor] = []
    model.eval()
    for first in tqdm(
        range(0, len(ids), batch_size),
        desc="captions",
        unit="batch",
        disable=None if progress else True,
    ):
        images = pixel_values[first : first + batch_size].to(model.device, model.dtype)
        # generate puts its own first token in place of the first and leaves out the last, the end.
        ids_in = torch.cat([start, start[-1:]]).repeat(len(images), 1).to(model.device)
        output = model.generate(
            images,
            input_ids=ids_in,
            attention_mask=torch.ones_like(ids_in),
            num_beams=beams,
            num_return_sequences=n,
            min_length=min_length,
            max_length=max_length,
            return_dict_in_generate=True,
            output_scores=True,
            **generate,
        )
        decoded = tokenizer.batch_decode(
            output.sequences[:, len(start) :], skip_special_tokens=True
        )
        count = len(images)
        texts += [decoded[i * n : (i + 1) * n] for i in range(count)]
        if beams > 1:
            scores.append(output.sequences_scores.view(count, n).float().cpu())
        else:
            scores.append(_greedy_scores(model, output).view(count, n).cpu())
    return Candidates(list(ids), texts, torch.cat(scores))


def _start(
    model: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> Tensor:
    """The tokens that captions start with, int64 [T]: the first and the prompt's."""
    words = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    return torch.tensor([model.config.text_config.bos_token_id, *words])


def _greedy_scores(model: BlipForConditionalGeneration, output: Any) -> Tensor:
    """Mean log-probability of the tokens drawn, as beam search scores its sequences."""
    steps = model.text_decoder.compute_transition_scores(
        output.sequences, output.scores, normalize_logits=True
    )
    drawn = output.sequences[:, -steps.shape[1] :] != model.config.text_config.pad_token_id
    return steps.masked_fill(~drawn, 0.0).sum(1) / drawn.sum(1)
