"""What decides the results of each command: the fields here are the flags of the command line.

Nothing heavy is imported, so that ``--help`` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
