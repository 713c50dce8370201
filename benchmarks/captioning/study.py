"""What all strategies of the comparison share: images, features, halves, and what is kept.

What is chosen by looking at captions (a strength, the weight of a re-ranker) is chosen on one half
of the held-out images and used on the other, both ways round, so that every figure is of images
that chose nothing.

Each result of a strategy is kept in a file, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blip_integration.captions import Candidates, beam_candidates
from blip_integration.rerank import choose_weight, combined_scores

from .features import FeatureCache, digest, fingerprint
from .metrics import candidate_ciders
from .settings import StudySettings
from .train_lite import caption_losses

# What release 0.1 called two of the groups; results that it kept are read under these names.
_OLD_GROUPS = {"adapter": "adjust", "finetune": "train"}


@dataclass(frozen=True)
class Strategy:
    """One way to come by captions.

    Attributes:
        group: "rerank", "adapter" or "finetune"; None for choices among the captioner's own
            candidates that no model makes.
        name: Its name within the group, such as "RBM" or "ITC".
    """

    group: str | None
    name: str

    @property
    def title(self) -> str:
        """Group and name, as people read them."""
        return self.name if self.group is None else f"{self.group}: {self.name}"


TOP_1 = Strategy(None, "top-1")
ORACLE = Strategy(None, "oracle")
RANDOM_CHOICE = Strategy(None, "random choice")


@dataclass
class Study:
    """What all strategies share.

    Attributes:
        model: The captioner.
        tokenizer: Its tokenizer.
        train: Features of the training images.
        train_captions: What people wrote of each.
        val: Features of the held-out images.
        val_captions: What people wrote of each.
        folder: The folder where results are kept.
        settings: Sizes, grids and numbers of runs.
    """

    model: BlipForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    train: FeatureCache
    train_captions: list[list[str]]
    val: FeatureCache
    val_captions: list[list[str]]
    folder: Path
    settings: StudySettings = field(default_factory=StudySettings)

    def halves(self) -> tuple[Tensor, Tensor]:
        """The rows of the held-out images' two halves: every other image."""
        rows = torch.arange(len(self.val))
        return rows[::2], rows[1::2]

    def decoding(self) -> dict[str, Any]:
        """Keywords of ``beam_candidates``."""
        return {"beams": self.settings.beams, "length_penalty": self.settings.length_penalty}

    def claim_folder(self) -> None:
        """Note in the folder everything that its results depend on.

        The number of seeds is left out: more of them go on where fewer stopped.

        Raises:
            ValueError: The folder has results of another study.
        """
        # Folders of release 0.1 leave some settings out, which were constants of these values.
        defaults = _noted(StudySettings())
        own = {
            "model": fingerprint(self.model),
            "train": digest(self.train.ids, self.train_captions),
            "val": digest(self.val.ids, self.val_captions),
            **_noted(self.settings),
        }
        path = self.folder / "study.json"
        kept = {**defaults, **json.loads(path.read_text())} if path.is_file() else own
        for name, value in own.items():
            if kept.get(name) != value:
                raise ValueError(
                    f"Study: folder must be new, or of a study with the same {name}: "
                    f"{self.folder} has results with {kept.get(name)!r}, got {value!r}"
                )
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(own, indent=1) + "\n")


def _noted(settings: StudySettings) -> dict[str, Any]:
    """The settings as JSON reads them back, but for the number of seeds."""
    noted: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    del noted["seeds"]
    return noted


@dataclass
class StrategyResult:
    """What one strategy gave with one seed.

    Attributes:
        strategy: The strategy.
        seed: The seed with which it was trained or drawn.
        captions: One caption for each held-out image.
        loss: Mean negative log-likelihood of the true captions, in nats a token; None where the
            strategy leaves it as it is.
        settings: What was chosen, for each half of the images.
        parameters: Number of parameters that the strategy adds to the captioner.
        scores: [N][n], a re-ranker's scores of the captioner's candidates.
        seconds: How long it took.
    """

    strategy: Strategy
    seed: int
    captions: list[str]
    loss: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    scores: list[list[float]] | None = None
    seconds: float = 0.0


def cached_result(
    study: Study, strategy: Strategy, seed: int, make: Callable[[], StrategyResult]
) -> StrategyResult:
    """The result kept in the study's folder, made where there is none."""
    for kept in kept_results(study, strategy, seed):
        return kept
    started = time.monotonic()
    result = make()
    result.seconds = time.monotonic() - started
    path = study.folder / "runs" / f"{_file_stem(strategy.title)}.{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result)))
    return result


def kept_results(study: Study, strategy: Strategy, seed: int | None = None) -> list[StrategyResult]:
    """The results of a strategy that the study's folder has, of one seed or of all."""
    titles = [strategy.title]
    if strategy.group in _OLD_GROUPS:
        titles.append(f"{_OLD_GROUPS[strategy.group]}: {strategy.name}")
    results = []
    for title in titles:
        pattern = f"{_file_stem(title)}.{'*' if seed is None else seed}.json"
        for path in sorted((study.folder / "runs").glob(pattern)):
            content = json.loads(path.read_text())
            content.pop("name", None)  # Release 0.1 noted the title here.
            results.append(StrategyResult(**{**content, "strategy": strategy}))
    return results


def _file_stem(title: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in title)


class CachedVision(nn.Module):
    """Stands in for a vision model: features [B, L, D] pass through an adapter or as they are."""

    def __init__(self, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        states = pixel_values if self.adapter is None else self.adapter(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


@contextmanager
def decoding(
    model: BlipForConditionalGeneration, adapter: nn.Module | None = None
) -> Iterator[Any]:
    """The captioner with cached features in place of images, for as long as the block runs."""
    vision = model.vision_model
    model.vision_model = CachedVision(adapter).to(model.device).eval()
    try:
        yield model
    finally:
        model.vision_model = vision


def image_losses(study: Study, adapter: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Sums of nats and tokens [N] of the held-out images' true captions."""
    captions = [texts[: study.settings.loss_captions] for texts in study.val_captions]
    with decoding(study.model, adapter) as model:
        return caption_losses(model, study.tokenizer, study.val, captions)


def mean_loss(losses: tuple[Tensor, Tensor], rows: Tensor | None = None) -> float:
    """Nats a token over some images."""
    nats, tokens = losses if rows is None else (losses[0][rows], losses[1][rows])
    return (nats.sum() / tokens.sum()).item()


def n_best(study: Study, features: FeatureCache | Tensor, name: str) -> Candidates:
    """The captioner's own n-best lists, kept in the study's folder."""
    beams = study.settings.beams
    path = study.folder / f"{name}-beam{beams}.json"
    if not path.is_file():
        with decoding(study.model) as model:
            lists = beam_candidates(model, study.tokenizer, features, n=beams, **study.decoding())
        path.parent.mkdir(parents=True, exist_ok=True)
        lists.save(path)
    return Candidates.load(path)


def captions_of(study: Study, adapter: nn.Module | None, rows: Tensor) -> list[str]:
    """Captions of some held-out images by the captioner behind an adapter."""
    with decoding(study.model, adapter) as model:
        return beam_candidates(
            model, study.tokenizer, study.val[rows], progress=False, **study.decoding()
        ).best


def adapted(
    study: Study,
    strategy: Strategy,
    seed: int,
    adapter_at: Callable[[float], nn.Module],
    parameters: int,
    strengths: Sequence[float],
) -> StrategyResult:
    """Captions through an adapter whose strength each half of the images chose for the other.

    Args:
        study: What all strategies share.
        strategy: The strategy.
        seed: The seed with which the adapter was fitted.
        adapter_at: The module [B, L, D] -> [B, L, D] at a strength.
        parameters: Number of its parameters.
        strengths: What to choose from, by the loss of the true captions.
    """
    losses = {strength: image_losses(study, adapter_at(strength)) for strength in strengths}
    halves = study.halves()
    captions = [""] * len(study.val)
    chosen = []
    nats = tokens = 0.0
    for own, other in (halves, halves[::-1]):
        strength = min(strengths, key=lambda s: mean_loss(losses[s], other))
        chosen.append(strength)
        nats += losses[strength][0][own].sum().item()
        tokens += losses[strength][1][own].sum().item()
        texts = captions_of(study, adapter_at(strength), own)
        for row, text in zip(own.tolist(), texts, strict=True):
            captions[row] = text
    by_strength = {str(strength): mean_loss(loss) for strength, loss in losses.items()}
    settings = {"strengths": chosen, "loss_by_strength": by_strength}
    return StrategyResult(strategy, seed, captions, nats / tokens, settings, parameters)


def reranked(
    study: Study, strategy: Strategy, seed: int, lists: Candidates, extra: Tensor, parameters: int
) -> StrategyResult:
    """The captions chosen from n-best lists, each half with the weight that the other chose.

    Args:
        study: What all strategies share.
        strategy: The strategy.
        seed: The seed with which the re-ranker was trained.
        lists: The candidates for the held-out images.
        extra: [N, n], the re-ranker's scores of them.
        parameters: Number of its parameters.
    """
    quality = candidate_ciders(lists.texts, study.val_captions)
    halves = study.halves()
    chosen = torch.zeros(len(study.val), dtype=torch.int64)
    weights = []
    for own, other in (halves, halves[::-1]):
        weight = choose_weight(lists.scores[other], extra[other], quality[other])
        weights.append(weight)
        chosen[own] = combined_scores(lists.scores[own], extra[own], weight).argmax(1)
    return StrategyResult(
        strategy,
        seed,
        lists.chosen(chosen),
        settings={"weights": weights},
        parameters=parameters,
        scores=extra.tolist(),
    )
