"""BLIP's three training losses: contrast (ITC), matching (ITM) and language modelling (LM).

Li, Li, Xiong and Hoi 2022, BLIP, https://arxiv.org/abs/2201.12086, section 3.2. All are computed
in float32 or wider, whatever the inputs' type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to the probabilities that negatives are drawn with, as in BLIP's own code: where the
# softmax has underflowed there is still something to draw.
_FLOOR = 1e-4


def itc_loss(
    image: Tensor,
    text: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    one_way: bool = False,
    groups: Tensor | None = None,
) -> Tensor:
    """Image-text contrastive loss on cosine similarities (InfoNCE).

    -1/N sum_i log softmax_j(cos(image_i, text_j) / temperature)[i], averaged with the same of texts
    to images (Radford et al. 2021, CLIP).

    Args:
        image: [N, D], any lengths: they are normalized here.
        text: [N, D], row i belongs to row i of `image`.
        temperature: positive; a tensor may be learned.
        one_way: only from images to texts.
        groups: [N] integers; pairs of the same group (captions of one image) are positives of each
            other, with equal shares of the target.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive (checked if a number).

    Example:
        >>> same = torch.eye(4)
        >>> bool(itc_loss(same, same, 0.01) < 1e-6), round(itc_loss(same, same, 1e6).item(), 3)
        (True, 1.386)
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"itc_loss: image and text must both be [N, D], "
            f"got {list(image.shape)} and {list(text.shape)}"
        )
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"itc_loss: temperature must be positive, got {temperature}")
    image, text = F.normalize(_wide(image), dim=-1), F.normalize(_wide(text), dim=-1)
    return contrastive_loss(image @ text.T / temperature, one_way=one_way, groups=groups)


def contrastive_loss(
    scores: Tensor, *, one_way: bool = False, groups: Tensor | None = None
) -> Tensor:
    """The contrastive loss of any scores, such as an energy model's; see ``itc_loss``.

    Args:
        scores: [N, N], image i with text j; higher is better.
        one_way: only from images (rows) to texts.
        groups: [N]; see ``itc_loss``.

    Returns:
        A scalar.
    """
    _check_square("contrastive_loss", scores, groups)
    scores = _wide(scores)
    positive = _same_group(scores, groups).to(scores.dtype)
    target = positive / positive.sum(1, keepdim=True)  # [N, N], symmetric
    to_text = -(target * scores.log_softmax(1)).sum(1).mean()
    if one_way:
        return to_text
    to_image = -(target * scores.log_softmax(0)).sum(0).mean()
    return (to_text + to_image) / 2


def hard_negatives(
    scores: Tensor, *, groups: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a wrong text for each image and a wrong image for each text, likelier if similar.

    The probabilities are the softmax of the scores over the other groups (BLIP; Li et al. 2021,
    ALBEF, https://arxiv.org/abs/2107.07651, section 3.2).

    Args:
        scores: [N, N], image i with text j, already divided by the temperature; N at least 2.
        groups: [N]; none of an image's own captions is drawn. See ``itc_loss``.
        generator: of any device; draws happen on it. None takes PyTorch's own.

    Returns:
        (texts for the images, images for the texts): [N] indices each.

    Raises:
        ValueError: no negatives: one pair only, or all of one group.
    """
    _check_square("hard_negatives", scores, groups)
    own = _same_group(scores, groups)
    if bool(own.all(1).any()):
        raise ValueError(
            f"hard_negatives: scores must have pairs of different groups, got {len(scores)} "
            f"pair(s) of one group"
        )
    scores = _wide(scores.detach())
    device = scores.device if generator is None else generator.device

    def draw(logits: Tensor) -> Tensor:
        weights = (logits.softmax(1) + _FLOOR).masked_fill(own, 0.0)
        drawn = torch.multinomial(weights.to(device), 1, generator=generator)
        return drawn.squeeze(1).to(scores.device)

    return draw(scores), draw(scores.T)


def itm_loss(
    match: Callable[[Tensor, Tensor], Tensor],
    scores: Tensor,
    *,
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Image-text matching loss: true pairs against hard negatives, two of these for each.

    Args:
        match: takes image indices [M] and text indices [M] into the batch and returns the logits
            [M, 2] of these pairs, column 1 for "they match". It is called once, with M = 3 N.
        scores: [N, N], the similarities that negatives are drawn by; see ``hard_negatives``.
        groups: [N]; see ``itc_loss``.
        generator: see ``hard_negatives``.

    Returns:
        The mean cross-entropy over the 3 N pairs, a scalar; the chance level is ln 2.

    Raises:
        ValueError: no negatives, or logits of another shape.
    """
    wrong_texts, wrong_images = hard_negatives(scores, groups=groups, generator=generator)
    index = torch.arange(len(scores), device=scores.device)
    logits = match(
        torch.cat([index, index, wrong_images]), torch.cat([index, wrong_texts, index])
    )  # [3 N, 2]
    if logits.shape != (3 * len(index), 2):
        raise ValueError(
            f"itm_loss: match must return [3 N, 2] = [{3 * len(index)}, 2], "
            f"got {list(logits.shape)}"
        )
    labels = (torch.arange(len(logits), device=logits.device) < len(index)).long()
    return F.cross_entropy(_wide(logits), labels)


def lm_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    pad: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "token",
) -> Tensor:
    """Cross-entropy of each next token given those before it.

    The position t of the logits predicts the label t + 1, as in transformers' decoders.

    Args:
        logits: [B, T, V].
        labels: [B, T] tokens of the same text, its start included; -100 is left out.
        pad: a token whose positions are left out too. transformers does not do it by itself.
        label_smoothing: in [0, 1); BLIP was trained with 0.1.
        reduction: "token" for the mean over predicted tokens, "sequence" for the sum over a
            sequence, averaged over the batch.

    Returns:
        A scalar; 0 where there is no token to predict.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"lm_loss: logits must be [B, T, V] and labels [B, T], "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    if reduction not in ("token", "sequence"):
        raise ValueError(f"lm_loss: reduction must be 'token' or 'sequence', got {reduction!r}")
    targets = labels[:, 1:]
    if pad is not None:
        targets = targets.masked_fill(targets == pad, -100)
    total = F.cross_entropy(
        _wide(logits[:, :-1]).flatten(0, 1),
        targets.flatten(),
        ignore_index=-100,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if reduction == "sequence":
        return total / len(labels)
    return total / (targets != -100).sum().clamp(min=1)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_square(name: str, scores: Tensor, groups: Tensor | None) -> None:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"{name}: scores must be [N, N], got {list(scores.shape)}")
    if groups is not None and groups.shape != scores.shape[:1]:
        raise ValueError(f"{name}: groups must be [N] = [{len(scores)}], got {list(groups.shape)}")


def _same_group(scores: Tensor, groups: Tensor | None) -> Tensor:
    """[N, N]; True where text j belongs to image i."""
    if groups is None:
        return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    groups = groups.to(scores.device)
    return groups[:, None] == groups[None, :]
