"""What decides the results of each command: the fields here are the flags of the command line.

Nothing heavy is imported, so that ``--help`` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StudySettings:
    """What decides the results of a comparison, beside the captioner and the images.

    Attributes:
        seeds: Number of seeds with which each strategy is trained or drawn.
        beams: Width of the beam search, and number of candidates for each image.
        length_penalty: Exponent of the beam search; below 1 it prefers short captions.
        loss_captions: Captions of each image whose loss chooses the strength of an adapter.
        rated_images: Training images whose candidates show a re-ranker what CIDEr likes.
        joint_epochs: Passes over one caption of each training image when a strategy learns through
            the decoder.
        hidden: Hidden units of the RBM between encoder and decoder, and of its controls.
        components: Principal components that stand in for that RBM.
        words: The most frequent words, which are all that a re-ranker knows of a caption.
        pair_hidden: Hidden units of each re-ranker.
        strengths: Shares of the reconstruction in the features, one of which is chosen.
        learned_parts: Parts of a share that was learned, one of which is chosen.

    Raises:
        ValueError: A number below 1, a strength outside 0 to 1, or a penalty that is not finite.
    """

    seeds: int = 3
    beams: int = 5
    length_penalty: float = 1.0
    loss_captions: int = 2
    rated_images: int = 2000
    joint_epochs: int = 2
    hidden: int = 512
    components: int = 128
    words: int = 1000
    pair_hidden: int = 256
    strengths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    learned_parts: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"StudySettings: {name} must be at least 1, got {value}")
            if isinstance(value, tuple) and not (value and all(0 <= x <= 1 for x in value)):
                raise ValueError(
                    f"StudySettings: {name} must be one or more of 0 to 1, got {value}"
                )
        if not math.isfinite(self.length_penalty):
            raise ValueError(
                f"StudySettings: length_penalty must be finite, got {self.length_penalty}"
            )


@dataclass(frozen=True)
class LiteSettings:
    """What the small captioner is made of.

    Attributes:
        variant: Number of the EfficientNet-Lite, whose weights stay frozen.
        width: Principal components of its features that are kept, and width of the decoder.
        layers: Layers of the decoder.
        heads: Attention heads of each layer.
        dropout: Dropout in the decoder, 0 to 1.
        min_count: Words that captions have less often become unknown.
        views: Views of each image: as it is, mirrored, and then pieces of these two.
    """

    variant: Literal[0, 1, 2] = 2
    width: int = 256
    layers: int = 3
    heads: int = 4
    dropout: float = 0.3
    min_count: int = 5
    views: int = 4


@dataclass(frozen=True)
class CaptionerSettings:
    """How the small captioner is trained.

    Attributes:
        epochs: Passes over all captions.
        batch_size: Captions per update.
        learning_rate: Rate of AdamW, after a linear warm-up and before a cosine to zero.
        warmup: Share of the updates in which the rate rises.
        weight_decay: Decay of matrices; biases and norms have none.
        token_dropout: Share of the image's tokens that an update leaves out, never the first.
        ema_decay: Decay of the exponential moving average of the weights, which is what is kept;
            less in the first updates, so that the initial weights are soon forgotten.
        seed: Seed of the initial weights, of the order of the captions and of dropout.
        bfloat16: Multiply in bfloat16 where that is safe.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    token_dropout: float = 0.5
    ema_decay: float = 0.999
    seed: int = 0
    bfloat16: bool = False


@dataclass(frozen=True)
class LSTMSettings:
    """How the LSTM with soft attention is trained.

    Attributes:
        epochs: Passes over the captions.
        batch_size: Captions per update.
        learning_rate: Rate of Adam in the first epochs.
        step_epochs: After every so many epochs the rate is multiplied by gamma (StepLR).
        gamma: What the rate is multiplied by.
        max_length: Longer captions are cut to so many tokens.
        seed: Seed of the order of the captions and of dropout.

    Raises:
        ValueError: A value out of range.
    """

    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    step_epochs: int = 5
    gamma: float = 0.5
    max_length: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "step_epochs": 1, "max_length": 3}
        for name, value in vars(self).items():
            if name in least and value < least[name]:
                raise ValueError(
                    f"LSTMSettings: {name} must be at least {least[name]}, got {value}"
                )
            if name in ("learning_rate", "gamma") and not 0 < value < math.inf:
                raise ValueError(f"LSTMSettings: {name} must be positive, got {value}")


@dataclass(frozen=True)
class DemoSettings:
    """How large the demonstration is.

    Attributes:
        scenes: Number of scenes that are drawn, at least 10.
        held_out: Share of them that the captioner is not trained on.
        pixels: Side of a picture; a multiple of 32, the encoder's stride.
        width: Principal components of the features, and width of the decoder.
        epochs: Passes of the captioner over its captions.
        hidden: Hidden units of either RBM.
        beams: Width of the beam search, and length of the lists that are re-ranked.
        shown: Scenes on a page.
        seed: Seed of everything.

    Raises:
        ValueError: Too few scenes.
    """

    scenes: int = 1500
    held_out: float = 0.2
    pixels: int = 128
    width: int = 128
    epochs: int = 15
    hidden: int = 256
    beams: int = 5
    shown: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenes < 10:
            raise ValueError(f"DemoSettings: scenes must be at least 10, got {self.scenes}")
