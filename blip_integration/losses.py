"""BLIP's three training losses: image-text contrast, image-text matching and language modeling.

They are those of Li, Li, Xiong and Hoi, "BLIP" (2022, https://arxiv.org/abs/2201.12086, section
3.2), there called ITC, ITM and LM. Every loss is a scalar tensor, computed in float32 or wider
whatever the dtype of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# BLIP's own code adds this to the probabilities of negatives, so that something can be drawn where
# the softmax has underflowed.
_LEAST_PROBABILITY = 1e-4


def itc_loss(
    image: Tensor,
    text: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    one_way: bool = False,
    groups: Tensor | None = None,
) -> Tensor:
    """Contrast every image with every text of a batch by their cosines (InfoNCE).

    From images to texts the loss is the mean over i of
    ``-log softmax_j(cos(image_i, text_j) / temperature)`` at j = i. By default it is averaged with
    the same loss from texts to images, as in Radford et al., "CLIP" (2021,
    https://arxiv.org/abs/2103.00020).

    Args:
        image: Features [N, D] of any length; they are normalized here.
        text: Features [N, D], of which row i belongs to row i of ``image``.
        temperature: A positive number, or a tensor [], which may be learned.
        one_way: Whether only the loss from images to texts is wanted.
        groups: Integers [N]. Pairs of one group, such as the captions of one image, are positives
            of each other with equal shares of the target. By default every pair is a group.

    Returns:
        The mean over the batch.

    Raises:
        ValueError: The shapes differ, or the temperature is a number that is not positive.

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
    """Contrast images with texts as ``itc_loss`` does, by any scores, such as an energy model's.

    Args:
        scores: The score [N, N] of image i with text j, of which the higher is the better.
        one_way: Whether only the loss from images (rows) to texts is wanted.
        groups: Integers [N], as in ``itc_loss``.

    Returns:
        The mean over the batch.

    Raises:
        ValueError: The scores are not square, or ``groups`` does not fit them.
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
    """Draw a wrong text for each image and a wrong image for each text, similar ones likelier.

    The probabilities are the softmax of the scores over the other groups, as in Li et al., "ALBEF"
    (2021, https://arxiv.org/abs/2107.07651, section 3.2).

    Args:
        scores: The score [N, N] of image i with text j, divided by the temperature already.
        groups: Integers [N], as in ``itc_loss``; no pair is drawn within a group.
        generator: Where the random numbers come from; the draws happen on its device. By default
            it is PyTorch's own.

    Returns:
        The texts for the images and the images for the texts, as indices [N] each.

    Raises:
        ValueError: There are no negatives, because all pairs are of one group or there is only one.
            Also as in ``contrastive_loss``.
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
        weights = (logits.softmax(1) + _LEAST_PROBABILITY).masked_fill(own, 0.0)
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
    """Tell the true pairs of a batch from wrong ones, of which there are two hard ones for each.

    Args:
        match: A function from indices of images [M] and of texts [M] in the batch to the logits
            [M, 2] of these pairs, of which column 1 stands for "they match". It is called once,
            with M = 3 N.
        scores: The scores [N, N] by which the negatives are drawn; see ``hard_negatives``.
        groups: Integers [N], as in ``itc_loss``.
        generator: As in ``hard_negatives``.

    Returns:
        The mean cross-entropy over the 3 N pairs, which is ln 2 where ``match`` knows nothing.

    Raises:
        ValueError: ``match`` returns another shape. Also as in ``hard_negatives``.
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
    """Predict each next token from those before it, by cross-entropy in nats.

    Position t of the logits predicts label t + 1, as in the decoders of transformers.

    Args:
        logits: Unnormalized log-probabilities [B, T, V].
        labels: Tokens [B, T] of the same texts with their starts. Those that are -100 are left out.
        pad: A token that is left out too, which transformers does not do by itself.
        label_smoothing: The share in [0, 1) of the target that is spread evenly over all tokens.
            BLIP was trained with 0.1.
        reduction: "token" for the mean over the predicted tokens, or "sequence" for the mean over
            the batch of the sums over a text.

    Returns:
        The reduced loss, which is 0 where there is no token to predict.

    Raises:
        ValueError: The shapes do not fit, or the reduction is unknown.
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
    """Whether text j belongs to the group of image i, as a boolean [N, N]."""
    if groups is None:
        return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    groups = groups.to(scores.device)
    return groups[:, None] == groups[None, :]
