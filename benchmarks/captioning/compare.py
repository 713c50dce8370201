"""The comparison: every strategy and every control on the same captioner, features and images.

Intervals come from resampling images (``paired_bootstrap``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_integration.images import open_image

from .attention_maps import word_attention
from .metrics import cider_scores, evaluate, paired_bootstrap
from .report import CaptionedPicture, caption_page
from .strategies import GROUPS
from .study import TOP_1, Strategy, StrategyResult, Study, kept_results


@dataclass(frozen=True)
class Row:
    """A line of the table: the results of a strategy together.

    Attributes:
        strategy: The strategy.
        runs: Number of its results, one for each seed.
        metrics: Means over the results, as ``evaluate`` gives them, with ``loss``; METEOR is that
            of the first result.
        std: Standard deviation of CIDEr over the results (nan of one result).
        difference: Mean CIDEr (in points, 100 times CIDEr) over that of the reference strategy,
            with its 95% interval over images; None for the reference itself.
        settings: What the first result chose.
        parameters: Number of parameters that the strategy adds.
        seconds: Mean time that a result took.
    """

    strategy: Strategy
    runs: int
    metrics: dict[str, float]
    std: float
    difference: tuple[float, float, float] | None
    settings: dict[str, Any]
    parameters: int
    seconds: float


def row(
    study: Study, results: Sequence[StrategyResult], reference: Sequence[StrategyResult] | None
) -> Row:
    """Summarize the results of a strategy, beside those of a reference."""
    scored = [evaluate(result.captions, study.val_captions, meteor=False) for result in results]
    # METEOR starts a Java program; once for each strategy does.
    scored[0] = evaluate(results[0].captions, study.val_captions)
    metrics = {
        name: sum(s[name] for s in scored if name in s) / sum(name in s for s in scored)
        for name in scored[0]
    }
    losses = [result.loss for result in results if result.loss is not None]
    if losses:
        metrics["loss"] = sum(losses) / len(losses)
    ciders = torch.tensor([s["CIDEr"] for s in scored])
    return Row(
        strategy=results[0].strategy,
        runs=len(results),
        metrics=metrics,
        std=ciders.std().item() if len(results) > 1 else math.nan,
        difference=None if reference is None else _difference(study, results, reference),
        settings=results[0].settings,
        parameters=results[0].parameters,
        seconds=sum(result.seconds for result in results) / len(results),
    )


def per_image(study: Study, results: Sequence[StrategyResult]) -> Tensor:
    """CIDEr of each held-out image [N], the mean over the results."""
    scores = [cider_scores(result.captions, study.val_captions) for result in results]
    return torch.stack(scores).mean(0)


def _difference(
    study: Study, results: Sequence[StrategyResult], reference: Sequence[StrategyResult]
) -> tuple[float, float, float]:
    """CIDEr points over a reference: the mean and the ends of its 95% interval."""
    found = paired_bootstrap(per_image(study, results), per_image(study, reference))
    return 100 * found.mean, 100 * found.low, 100 * found.high


def compare(
    study: Study,
    groups: Sequence[str] = tuple(GROUPS),
    on_result: Callable[[StrategyResult], None] | None = None,
) -> dict[str, list[Row]]:
    """Run all strategies and summarize them.

    Args:
        study: What they share.
        groups: Which of ``GROUPS``; "rerank" is run in any case, as all others are set beside the
            captioner's own first choice.
        on_result: Called with each result.

    Returns:
        Rows by group, each group in the order of CIDEr.

    Raises:
        ValueError: An unknown group; a folder that has results of another study.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"compare: groups must be among {', '.join(GROUPS)}, got {unknown[0]!r}")
    study.claim_folder()
    table: dict[str, list[Row]] = {}
    reference: list[StrategyResult] = []
    for group, results_of in GROUPS.items():
        if group != "rerank" and group not in groups:
            continue
        by_strategy: dict[Strategy, list[StrategyResult]] = {}
        for result in results_of(study):
            by_strategy.setdefault(result.strategy, []).append(result)
            if on_result is not None:
                on_result(result)
        reference = reference or by_strategy[TOP_1]
        rows = [
            row(study, results, None if results is reference else reference)
            for results in by_strategy.values()
        ]
        table[group] = sorted(rows, key=lambda each: -each.metrics["CIDEr"])
    return table


def difference(study: Study, strategy: Strategy, other: Strategy) -> tuple[float, float, float]:
    """CIDEr points of one strategy over another, from the results that are kept.

    Args:
        study: A study that has been compared.
        strategy: One strategy.
        other: The other one.

    Returns:
        The mean difference and the ends of its 95% interval over images.

    Raises:
        ValueError: A strategy without results.
    """
    return _difference(study, _kept(study, strategy), _kept(study, other))


def _kept(study: Study, strategy: Strategy) -> list[StrategyResult]:
    results = kept_results(study, strategy)
    if not results:
        raise ValueError(
            f"compare: {study.folder} must have results of the strategy, got none of "
            f"{strategy.title!r}"
        )
    return results


def markdown(table: dict[str, list[Row]]) -> str:
    """The table as people read it: CIDEr, BLEU, METEOR and ROUGE-L times 100."""
    lines = [
        "| strategy | runs | CIDEr | against top-1 (95%) | BLEU-1 | BLEU-4 | METEOR | ROUGE-L "
        "| distinct-1, -2 | length | loss | parameters |",
        "| --- " + "| ---: " * 11 + "|",
    ]
    for rows in table.values():
        for each in rows:
            m = each.metrics
            std = "" if math.isnan(each.std) else f" ± {100 * each.std:.1f}"
            gain = ""
            if each.difference is not None:
                mean, low, high = each.difference
                gain = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
            cells = [
                each.strategy.title,
                str(each.runs),
                f"{100 * m['CIDEr']:.1f}{std}",
                gain,
                *(
                    f"{100 * m[name]:.1f}" if name in m else ""
                    for name in ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-L")
                ),
                f"{m['distinct-1']:.3f}, {m['distinct-2']:.3f}",
                f"{m['length']:.1f}",
                f"{m['loss']:.3f}" if "loss" in m else "",
                f"{each.parameters:,}" if each.parameters else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def changes_page(study: Study, strategy: Strategy, images: Sequence[Path], count: int = 12) -> str:
    """An HTML page of the captions that a strategy made better and worse, the most first.

    Args:
        study: A study that has been compared.
        strategy: Its first result is shown beside the captioner's own captions, and with what each
            word looked at where the strategy re-ranks, so that the features are as they were.
        images: Files of the held-out images.
        count: How many of each kind are shown.
    """
    own, first = _kept(study, strategy)[0], _kept(study, TOP_1)[0]
    before, after = (cider_scores(result.captions, study.val_captions) for result in (first, own))
    order = (after - before).argsort(descending=True).tolist()
    changed = [i for i in order if own.captions[i] != first.captions[i]]
    shown = changed if len(changed) <= 2 * count else changed[:count] + changed[-count:]

    def attention(image: int, caption: str) -> Tensor | None:
        if strategy.group != "rerank" or not caption.split():
            return None
        return word_attention(study.model, study.tokenizer, study.val[[image]][0], caption)

    pictures = [
        CaptionedPicture(
            images[i].name,
            open_image(images[i]),
            first.captions[i],
            own.captions[i],
            references=study.val_captions[i],
            attention=attention(i, own.captions[i]),
            scores={"CIDEr": (100 * before[i].item(), 100 * after[i].item())},
        )
        for i in shown
    ]
    scored = [evaluate(r.captions, study.val_captions, meteor=False) for r in (first, own)]
    metrics = {name: (value, scored[1][name]) for name, value in scored[0].items()}
    note = (
        f"{len(changed)} of {len(images)} captions changed; the {len(shown)} shown are those that "
        "gained most and those that lost most."
    )
    return caption_page(
        pictures, title=strategy.title, note=note, labels=("top-1", "chosen"), metrics=metrics
    )
