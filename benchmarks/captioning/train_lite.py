"""Training of the small captioner's decoder on cached features, and the loss of captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import (
    BlipForConditionalGeneration,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from .features import FeatureCache
from .lite_blip import LiteBlipForConditionalGeneration
from .settings import CaptionerSettings


def caption_labels(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], max_length: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels of captions, each int64 [N, T].

    BLIP's ``forward`` neither adds the first token nor leaves pads out of the loss: both are done
    here, pads being -100 in the labels.
    """
    encoded = tokenizer(
        list(captions),
        padding=True,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    return ids, mask, ids.masked_fill(mask == 0, -100)


def train_captioner(
    model: LiteBlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Sequence[FeatureCache],
    captions: Sequence[Sequence[str]],
    settings: CaptionerSettings,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> LiteBlipForConditionalGeneration:
    """Train the decoder on cached features; the vision model is frozen.

    Args:
        model: From ``lite_blip``; changed in place.
        tokenizer: Its tokenizer.
        features: Caches of the same images in the same order, e.g. as they are and mirrored; each
            update is shown one of them at random.
        captions: What people wrote of each image.
        settings: How to train.
        on_epoch: Called with the epoch (from 1) and its mean training loss, in nats a token.
        progress: Show a progress bar.

    Returns:
        The model, in evaluation mode, with the averaged weights.

    Raises:
        ValueError: Numbers of images and of lists of captions that differ.
    """
    for cache in features:
        if len(cache) != len(captions):
            raise ValueError(
                f"train_captioner: captions must have a list for each of {len(cache)} images, "
                f"got {len(captions)}"
            )
    image_of = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
    ids, mask, labels = caption_labels(tokenizer, [text for texts in captions for text in texts])
    lengths = mask.sum(1)
    decoder = model.text_decoder
    average = AveragedModel(decoder, avg_fn=_moving_average(settings.ema_decay))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decoder.parameters() if p.dim() > 1]},
        {"params": [p for p in decoder.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    updates = settings.epochs * -(-len(ids) // settings.batch_size)
    warmup = round(settings.warmup * updates)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, updates)
    generator = torch.Generator().manual_seed(settings.seed)
    device = model.device
    model.train()
    with torch.random.fork_rng(), tqdm(total=updates, disable=not progress) as bar:
        torch.manual_seed(settings.seed)
        for epoch in range(settings.epochs):
            total = 0.0
            batches = _batches_of_equal_length(lengths, settings.batch_size, generator)
            for rows in batches:
                longest = int(lengths[rows].max())
                version = int(torch.randint(len(features), (), generator=generator))
                images = features[version][image_of[rows]]
                images = _without_tokens(images, settings.token_dropout, generator)
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                    loss = decoder(
                        input_ids=ids[rows, :longest].to(device),
                        attention_mask=mask[rows, :longest].to(device),
                        encoder_hidden_states=images.to(device),
                        labels=labels[rows, :longest].to(device),
                        reduction="mean",
                    ).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                average.update_parameters(decoder)
                total += loss.item()
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
            if on_epoch is not None:
                on_epoch(epoch + 1, total / len(batches))
    decoder.load_state_dict(average.module.state_dict())
    return model.eval()


def _batches_of_equal_length(
    lengths: Tensor, size: int, generator: torch.Generator
) -> list[Tensor]:
    """All rows in random batches of captions about as long, which halves the padding's cost."""
    batches = []
    # Sorted within sixteen batches of rows, so that a batch differs from one epoch to the next.
    for rows in torch.randperm(len(lengths), generator=generator).split(16 * size):
        batches += rows[lengths[rows].argsort(stable=True)].split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def _without_tokens(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """[B, L, D] with a random share of the tokens left out, the first one kept."""
    others = images.shape[1] - 1
    kept = torch.randperm(others, generator=generator)[: others - int(share * others)] + 1
    return torch.cat([images[:, :1], images[:, kept]], 1)


def _moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def step(average: Tensor, current: Tensor, n: Tensor | int) -> Tensor:
        return average.lerp(current, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return step


@torch.inference_mode()
def caption_losses(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pixel_values: FeatureCache | Tensor,
    captions: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of captions given their images, without label smoothing.

    Args:
        model: A captioner.
        tokenizer: Its tokenizer.
        pixel_values: What the vision model takes, or the cached features it passes on; N images.
        captions: N lists of captions.
        batch_size: Images at a time.

    Returns:
        For each image, float64 [N]: the sum over its captions' tokens, in nats, and how many
        tokens these are. Sums of the first over sums of the second are a mean loss a token.
    """
    smoothing, model.text_decoder.label_smoothing = model.text_decoder.label_smoothing, 0.0
    losses, tokens = [], []
    try:
        for first in range(0, len(captions), batch_size):
            texts = captions[first : first + batch_size]
            images = pixel_values[first : first + batch_size].to(model.device, model.dtype)
            states = model.vision_model(images).last_hidden_state
            counts = torch.tensor([len(each) for each in texts])
            image_of = torch.arange(len(texts)).repeat_interleave(counts)
            ids, mask, labels = caption_labels(tokenizer, [text for each in texts for text in each])
            of_caption = model.text_decoder(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                encoder_hidden_states=states[image_of.to(model.device)],
                labels=labels.to(model.device),
                reduction="none",
            ).loss
            zeros = torch.zeros(len(texts), dtype=torch.float64)
            losses.append(zeros.index_add(0, image_of, of_caption.double().cpu()))
            # The first token is given, not predicted.
            tokens.append(zeros.index_add(0, image_of, (mask.sum(1) - 1).double()))
    finally:
        model.text_decoder.label_smoothing = smoothing
    return torch.cat(losses), torch.cat(tokens)
