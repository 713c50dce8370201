"""What stands beside a joint RBM in re-ranking: models of its size, and fitting to CIDEr.

All see the same two things, the features of an image and which words a caption has, and all form
``hidden units = image part + word part``. They differ in what they make of that:

==================== ===========================================================================
``JointRBM``         softplus sums: the pointwise mutual information of its free energies
``TwoTower``    the cosine of both parts (image-text contrastive learning, ITC)
``MatchMLP``    a layer of rectified units and one logit (image-text matching, ITM)
==================== ===========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from blip_integration.joint_rbm import PairModel, Vocabulary
from blip_integration.losses import contrastive_loss, itm_loss
from blip_integration.ranker_training import (
    CaptionBags,
    PairTraining,
    encode_lists,
    fit_contrastive,
    recall_of,
    train_ranker,
    training_batches,
    with_dropout,
)
from blip_integration.rerank import PairReranker


class TwoTower(PairModel):
    """Linear maps of image and words into one space, where their cosine is compared.

    The image-text contrastive model (ITC) of CLIP (Radford et al. 2021) and BLIP (Li et al. 2022)
    with a linear tower a side; the temperature is learned as exp(-log_scale) and starts at
    CLIP's 0.07.

    Attributes:
        c_image: Bias [H] of the image's tower.
        c_words: Bias [H] of the words' tower.
        log_scale: 0-dim.
    """

    def __init__(
        self,
        n_features: int,
        n_words: int,
        n_hidden: int,
        *,
        init_std: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(n_features, n_words, n_hidden, init_std=init_std, generator=generator)
        self.c_image = nn.Parameter(torch.zeros(n_hidden))
        self.c_words = nn.Parameter(torch.zeros(n_hidden))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_part(self, features: Tensor) -> Tensor:
        """Unit vectors [N, H]; as image features they serve a ``JointRBM``, too."""
        return normalize(self.standardize(features) @ self.W_image + self.c_image, dim=-1)

    def word_part(self, words: Tensor) -> Tensor:
        return normalize(words.to(self.W_words.dtype) @ self.W_words + self.c_words, dim=-1)

    def combine(self, image: Tensor, words: Tensor) -> Tensor:
        return self.log_scale.exp() * (image * words).sum(-1)

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Scores [N, M] of every image with every caption."""
        self._check(features, words)
        return self.log_scale.exp() * self.image_part(features) @ self.word_part(words).T


class MatchMLP(PairModel):
    """One layer of rectified units over image and words, and the log-odds that they match.

    The image-text matching model (ITM) of BLIP (Li et al. 2022) at the size of the others.

    Attributes:
        c: Bias [H] of the hidden units.
        w_match: Weights [H] of the logit.
        b_match: Its bias, 0-dim.
    """

    def __init__(
        self,
        n_features: int,
        n_words: int,
        n_hidden: int,
        *,
        init_std: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(n_features, n_words, n_hidden, init_std=init_std, generator=generator)
        self.c = nn.Parameter(torch.zeros(n_hidden))
        self.w_match = nn.Parameter(torch.randn(n_hidden, generator=generator) / n_hidden**0.5)
        self.b_match = nn.Parameter(torch.zeros(()))

    def image_part(self, features: Tensor) -> Tensor:
        return self.standardize(features) @ self.W_image

    def word_part(self, words: Tensor) -> Tensor:
        return words.to(self.W_words.dtype) @ self.W_words

    def combine(self, image: Tensor, words: Tensor) -> Tensor:
        return torch.relu(self.c + image + words) @ self.w_match + self.b_match


def fit_matching(
    model: PairModel,
    train: CaptionBags,
    held_out: CaptionBags,
    training: PairTraining | None = None,
) -> list[float]:
    """Train on match or no match, with hard negatives drawn by the model's own scores.

    BLIP's ITM loss (Li et al. 2022, section 3.2); see ``itm_loss``.

    Arguments and result are those of ``fit_contrastive``.
    """
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)

    def losses() -> Iterator[Tensor]:
        for features, words in training_batches(model, train, training, generator):
            if len(features) < 2:
                continue  # no negatives
            scores = model(features, words)
            yield itm_loss(_match_logits(scores), scores.detach(), generator=generator)

    return train_ranker(model, losses, lambda: recall_of(model, held_out).mean, training)


def _match_logits(scores: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits [M, 2] of the pairs (image, text), whose difference is their log-odds."""

    def match(images: Tensor, texts: Tensor) -> Tensor:
        log_odds = scores[images, texts]
        return torch.stack([torch.zeros_like(log_odds), log_odds], 1)

    return match


def listwise_loss(scores: Tensor, quality: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy from softmax(quality / temperature) to softmax(scores), list by list.

    ListNet's top-one probability (Cao et al., ICML 2007).

    Args:
        scores: [N, n].
        quality: [N, n], such as CIDEr of each candidate.
        temperature: Differences of quality well below it count as none.

    Returns:
        0-dim, in nats.
    """
    target = (quality / temperature).softmax(1)
    return -(target * log_softmax(scores, 1)).sum(1).mean()


def pairwise_loss(scores: Tensor, quality: Tensor, temperature: float = 0.1) -> Tensor:
    """Hinge over all pairs of a list: the better one ahead by the difference over the temperature.

    Energy-based re-ranking (Bhattacharyya et al., ACL 2021, section 3) asks for a margin that
    grows with the difference in the task's measure, of pairs drawn at random; all pairs of a short
    list are cheaper than drawing. The energy is the negative score.

    Args:
        scores: [N, n].
        quality: [N, n].
        temperature: A margin of 1 stands for this difference in quality.

    Returns:
        0-dim, the mean over pairs of different quality (0 where there are none).
    """
    margin = (quality[:, :, None] - quality[:, None, :]) / temperature
    better = margin > 0
    gap = scores[:, :, None] - scores[:, None, :]
    loss = (margin - gap).clamp_min(0)[better].sum()
    return loss / better.sum().clamp_min(1)


RANKING_LOSSES = {"listwise": listwise_loss, "pairwise": pairwise_loss}


@dataclass(frozen=True)
class RatedCandidates:
    """Candidate captions of images with what a measure says of them.

    Attributes:
        features: [N, D] float32.
        words: [N, n, T] bool.
        quality: [N, n], the higher the better, such as each candidate's CIDEr.
    """

    features: Tensor
    words: Tensor
    quality: Tensor

    def __post_init__(self) -> None:
        if self.words.dim() != 3 or self.words.shape[:2] != self.quality.shape:
            raise ValueError(
                "RatedCandidates: words must be [N, n, T] and quality [N, n], "
                f"got {list(self.words.shape)} and {list(self.quality.shape)}"
            )
        if len(self.features) != len(self.words):
            raise ValueError(
                f"RatedCandidates: features must be of {len(self.words)} images, "
                f"got {len(self.features)}"
            )

    @classmethod
    def encode(
        cls,
        features: Tensor,
        texts: Sequence[Sequence[str]],
        quality: Tensor,
        vocabulary: Vocabulary,
    ) -> RatedCandidates:
        """Features [N, D] with N lists of n candidates and their quality [N, n]."""
        return cls(features.float(), encode_lists(texts, vocabulary), quality.float())


def fit_to_quality(
    model: PairModel,
    train: RatedCandidates,
    held_out: RatedCandidates,
    training: PairTraining | None = None,
    *,
    loss: str = "listwise",
    temperature: float = 0.1,
    pairs: CaptionBags | None = None,
) -> list[float]:
    """Energy-based re-ranking: fit the scores to a measure of the candidates, such as CIDEr.

    Candidates of the training images look better to a captioner than those of new images will,
    since it was trained on them; the scores learn nothing of its own scores for that reason.

    Args:
        model: Changed in place; best trained contrastively before.
        train: Candidates of training images.
        held_out: Candidates of other images; their loss decides which epoch is kept.
        training: How to train, see ``PairTraining``; its dropout applies.
        loss: "listwise" or "pairwise", see ``listwise_loss`` and ``pairwise_loss``.
        temperature: The temperature of that loss.
        pairs: Images with captions on which the contrastive loss of an equal number of pairs is
            added, lest the model forget what it knows of words that candidates rarely have.

    Returns:
        Minus the loss on ``held_out``, before training and after each epoch.

    Raises:
        ValueError: An unknown loss, or a temperature that is not positive.
    """
    if loss not in RANKING_LOSSES:
        raise ValueError(f"fit_to_quality: loss must be one of {[*RANKING_LOSSES]}, got {loss!r}")
    if temperature <= 0:
        raise ValueError(f"fit_to_quality: temperature must be positive, got {temperature}")
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)
    device = model.mean.device
    ranking = RANKING_LOSSES[loss]

    def losses() -> Iterator[Tensor]:
        anchors = _endless(model, pairs, training, generator) if pairs is not None else None
        for rows in torch.randperm(len(train.features), generator=generator).split(
            training.batch_size
        ):
            features, words = with_dropout(
                model, train.features[rows].to(device), train.words[rows].to(device), training,
                generator,
            )  # fmt: skip
            scores = model.candidate_scores(features, words)
            value = ranking(scores, train.quality[rows].to(device), temperature)
            if anchors is not None:
                value = value + contrastive_loss(model(*next(anchors)))
            yield value

    @torch.no_grad()
    def held_out_score() -> float:
        scores = model.candidate_scores(held_out.features.to(device), held_out.words.to(device))
        return -ranking(scores, held_out.quality.to(device), temperature).item()

    return train_ranker(model, losses, held_out_score, training)


def _endless(
    model: PairModel, pairs: CaptionBags, training: PairTraining, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from training_batches(model, pairs, training, generator)


class ITCReranker(PairReranker):
    """Re-ranking by the cosine of a ``TwoTower``, times its learned scale."""

    model_class = TwoTower
    objectives: ClassVar = {"contrastive": fit_contrastive, "matching": fit_matching}


class ITMReranker(PairReranker):
    """Re-ranking by the log-odds of a match of a ``MatchMLP``."""

    model_class = MatchMLP
    objectives: ClassVar = {"matching": fit_matching, "contrastive": fit_contrastive}
