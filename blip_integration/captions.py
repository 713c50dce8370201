"""Captions as text: their normal form, and the candidates that a captioner proposes for images."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

# A word may hold hyphens ("t-shirt"); the possessive is a word of its own, as in the Penn
# Treebank's tokenization, so that "man" and "man's" share their first word.
WORD = r"'s(?!\w)|[^\W_]+(?:-[^\W_]+)*"


def normalize_caption(caption: str) -> str:
    """Lower-case words with single spaces between them: what tokenizer and metrics see.

    Punctuation goes, except hyphens inside a word; a possessive is split off. Applying it twice
    changes nothing.

    Example:
        >>> normalize_caption("A man's dog, in a T-shirt .")
        "a man 's dog in a t-shirt"
    """
    text = unicodedata.normalize("NFKC", caption).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join(re.findall(WORD, text.lower()))


@dataclass(frozen=True)
class Candidates:
    """The n best captions of N images.

    Attributes:
        ids: The name of each image.
        texts: N lists of n captions, the captioner's favorite first.
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
        """The captioner's favorite for each image."""
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
        """Read what ``save`` wrote."""
        content = json.loads(Path(path).read_text())
        scores = torch.tensor(content["scores"]).reshape(len(content["ids"]), -1)
        return cls(content["ids"], content["texts"], scores)


@torch.inference_mode()
def beam_candidates(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pixel_values: Any,
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
        model: The captioner.
        tokenizer: The captioner's tokenizer.
        pixel_values: What its vision model takes of N images: a tensor, or whatever has a length
            and gives tensors for slices of rows.
        ids: Names of the images; by default the ``ids`` of ``pixel_values``, or numbers.
        beams: The width of the search.
        n: The number of captions to keep, 1 to ``beams``.
        min_length: The fewest tokens of a caption, its start, prompt and end included.
        max_length: The most tokens of a caption, its start, prompt and end included.
        length_penalty: Scores are divided by the length to this power; without effect on one beam.
        prompt: Words that the captioner goes on from, such as BLIP's "a picture of"; they are not
            part of the captions.
        batch_size: The number of images at a time.
        progress: Whether to show a progress bar, where there is a terminal.
        **generate: Further keywords of ``generate``.

    Returns:
        The candidates.

    Raises:
        ValueError: n outside of 1..beams; a prompt that leaves no room for a caption.
    """
    if not 1 <= n <= beams:
        raise ValueError(f"beam_candidates: n must lie in 1..beams = 1..{beams}, got {n}")
    if ids is None:
        ids = getattr(pixel_values, "ids", [str(i) for i in range(len(pixel_values))])
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


def generated_candidates(
    output: Any, tokenizer: PreTrainedTokenizerBase, n_images: int
) -> Candidates:
    """What ``generate`` returned, as lists of candidates in its own order.

    Args:
        output: With ``sequences`` [N n, L] and, from a beam search, ``sequences_scores`` [N n].
            Without these (sampling) the mean log-probability of the drawn tokens is taken from
            ``scores``, the processed logits of each step.
        tokenizer: The captioner's tokenizer, which decodes the sequences.
        n_images: The number N of images.

    Returns:
        The candidates, with the images' numbers as their names.

    Raises:
        ValueError: No dictionary output with scores, or sequences that do not divide by N.
    """
    sequences = getattr(output, "sequences", None)
    steps = getattr(output, "scores", None)
    totals = getattr(output, "sequences_scores", None)
    if sequences is None or (totals is None and steps is None):
        raise ValueError(
            "generated_candidates: output must come from generate(..., "
            f"return_dict_in_generate=True, output_scores=True), got {type(output).__name__}"
        )
    if n_images < 1 or len(sequences) % n_images:
        raise ValueError(
            f"generated_candidates: {len(sequences)} sequences must be as many for each of "
            f"{n_images} images; is num_return_sequences what you think?"
        )
    if totals is None:
        assert steps is not None
        totals = _mean_log_probability(sequences, steps, tokenizer.pad_token_id)
    n = len(sequences) // n_images
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    lists = [texts[first : first + n] for first in range(0, len(texts), n)]
    scores = totals.view(n_images, n).float().cpu()
    return Candidates([str(i) for i in range(n_images)], lists, scores)


def _mean_log_probability(
    sequences: Tensor, steps: Sequence[Tensor], pad_token_id: int | None
) -> Tensor:
    """Mean over the drawn tokens of each sequence [R] of their log-probabilities."""
    drawn = sequences[:, -len(steps) :]  # [R, S]
    log_p = torch.stack([logits.float().log_softmax(-1) for logits in steps], 1)  # [R, S, V]
    of_drawn = log_p.gather(2, drawn[..., None])[..., 0]
    counted = torch.ones_like(drawn, dtype=torch.bool)
    if pad_token_id is not None:
        counted = drawn != pad_token_id
    return of_drawn.masked_fill(~counted, 0.0).sum(1) / counted.sum(1).clamp_min(1)
