"""Training of the models in :mod:`.matching`: contrastively, by matching, by CD, and to CIDEr.

Some thousand images are soon learned by heart, so all of these keep the state of the epoch that did
best on held-out images, and stop when no better one comes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm import tqdm

from .losses import contrastive_loss, itm_loss
from .matching import JointRBM, PairModel, Vocabulary
from .multimodal import RetrievalRecall, retrieval_recall


@dataclass(frozen=True)
class PairTraining:
    """What decides the course of a training.

    Attributes:
        epochs: At most; every caption is seen once in each.
        batch: Pairs per update.
        learning_rate: Of Adam (Loshchilov and Hutter 2019).
        weight_decay: On weight matrices alone, never on biases; decoupled from the gradient.
        word_dropout: Share of a caption's words left out at random.
        feature_dropout: Share of an image's features set to their mean at random.
        patience: Stop after so many epochs without a better one.
        seed: Governs order, dropout, negatives and chains.
        progress: Show a progress bar.

    Raises:
        ValueError: A value out of range.
    """

    epochs: int = 30
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    word_dropout: float = 0.2
    feature_dropout: float = 0.2
    patience: int = 3
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 2), ("patience", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"PairTraining: {name} must be {least} or more, got {getattr(self, name)}"
                )
        for name in ("word_dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"PairTraining: {name} must lie in [0, 1), got {getattr(self, name)}"
                )
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                "PairTraining: learning_rate must be positive and weight_decay not negative, "
                f"got {self.learning_rate} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class CaptionBags:
    """Images with all of their captions as bags of words.

    Attributes:
        features: [N, D] float32.
        words: [M, T] bool, the captions of all images.
        owner: [M] int64, the number of the image that each caption belongs to.
    """

    features: Tensor
    words: Tensor
    owner: Tensor

    def __post_init__(self) -> None:
        if self.features.dim() != 2 or self.words.dim() != 2:
            raise ValueError(
                "CaptionBags: features must be [N, D] and words [M, T], "
                f"got {list(self.features.shape)} and {list(self.words.shape)}"
            )
        if self.owner.shape != self.words.shape[:1]:
            raise ValueError(
                f"CaptionBags: owner must be [M] = [{len(self.words)}], "
                f"got {list(self.owner.shape)}"
            )
        present = torch.bincount(self.owner, minlength=len(self.features))
        if len(present) != len(self.features) or bool((present == 0).any()):
            raise ValueError(
                f"CaptionBags: owner must name each of the {len(self.features)} images, "
                f"got {int((present > 0).sum())} different numbers"
            )

    @classmethod
    def encode(
        cls, features: Tensor, captions: Sequence[Sequence[str]], vocabulary: Vocabulary
    ) -> CaptionBags:
        """Features [N, D] with the captions of each of the N images."""
        if len(features) != len(captions):
            raise ValueError(
                f"CaptionBags: captions must be given for {len(features)} images, "
                f"got {len(captions)}"
            )
        owner = [image for image, own in enumerate(captions) for _ in own]
        words = vocabulary.encode([text for own in captions for text in own])
        return cls(features.float(), words, torch.tensor(owner, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.features)

    def part(self, images: Tensor) -> CaptionBags:
        """The images of those numbers, int64 [n], each once, with their captions."""
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[images] = torch.arange(len(images))
        owner = place[self.owner]
        kept = owner >= 0
        return CaptionBags(self.features[images], self.words[kept], owner[kept])

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[CaptionBags, CaptionBags]:
        """(Training, held-out) images by a seeded permutation, one or more on either side."""
        if not 0 < held_out < 1 or len(self) < 2:
            raise ValueError(
                "CaptionBags.split: held_out must lie in (0, 1) and there must be 2 images, "
                f"got {held_out} and {len(self)}"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = min(max(1, round(held_out * len(self))), len(self) - 1)
        return self.part(order[count:]), self.part(order[:count])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every caption once, with its image; no image twice in a batch.

        Two captions of one image in a batch would each be a negative for it, though both are true.

        Yields:
            (image numbers [B], caption numbers [B]), B at most ``size``.
        """
        count = len(self.owner)
        shuffled = torch.randperm(count, generator=generator)
        by_image = shuffled[torch.argsort(self.owner[shuffled], stable=True)]
        per_image = torch.bincount(self.owner, minlength=len(self))
        first = per_image.cumsum(0) - per_image
        turn = torch.arange(count) - first[self.owner[by_image]]
        for round_number in range(int(per_image.max())):
            captions = by_image[turn == round_number]
            captions = captions[torch.randperm(len(captions), generator=generator)]
            for chosen in captions.split(size):
                yield self.owner[chosen], chosen


@torch.no_grad()
def recall_of(model: PairModel, pairs: CaptionBags) -> RetrievalRecall:
    """Recall at 1, 5 and 10 of a model on images with their captions."""
    device = model.mean.device
    scores = model(pairs.features.to(device), pairs.words.to(device))
    return retrieval_recall(scores, pairs.owner.to(device))


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


def fit_contrastive(
    model: PairModel,
    train: CaptionBags,
    held_out: CaptionBags,
    training: PairTraining | None = None,
) -> list[float]:
    """Train on telling the true pairs of a batch from all others (InfoNCE, both ways).

    The logits are the scores as they are: the PMI of a :class:`~.matching.JointRBM` is the quantity
    that InfoNCE estimates (van den Oord et al., arXiv:1807.03748), and a two-tower model has its
    temperature within.

    Args:
        model: Changed in place; start with ``model.initialize_from_data``.
        train: Images with captions.
        held_out: Other images; their mean recall decides which epoch is kept.
        training: See :class:`PairTraining`.

    Returns:
        The mean recall on ``held_out`` before training and after each epoch.
    """
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)

    def losses() -> Iterator[Tensor]:
        for features, words in _batches(model, train, training, generator):
            yield contrastive_loss(model(features, words))

    return _fit(model, losses, lambda: recall_of(model, held_out).mean, training)


def fit_matching(
    model: PairModel,
    train: CaptionBags,
    held_out: CaptionBags,
    training: PairTraining | None = None,
) -> list[float]:
    """Train on match or no match, with hard negatives drawn by the model's own scores.

    BLIP's ITM loss (Li et al. 2022, section 3.2); see :func:`.losses.itm_loss`.

    Arguments and result are those of :func:`fit_contrastive`.
    """
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)

    def losses() -> Iterator[Tensor]:
        for features, words in _batches(model, train, training, generator):
            if len(features) < 2:
                continue  # no negatives
            scores = model(features, words)
            yield itm_loss(_match_logits(scores), scores.detach(), generator=generator)

    return _fit(model, losses, lambda: recall_of(model, held_out).mean, training)


def fit_cd(
    model: JointRBM,
    train: CaptionBags,
    held_out: CaptionBags,
    training: PairTraining | None = None,
    *,
    k: int = 1,
    persistent: bool = False,
    learn_variance: bool = False,
) -> list[float]:
    """Train by contrastive divergence (Hinton 2002) or its persistent form (Tieleman 2008).

    Arguments and result are those of :func:`fit_contrastive`; dropout is not used, as it would
    change the distribution that the RBM learns.

    Args:
        k: Gibbs sweeps per update.
        persistent: Keep ``training.batch`` chains over the whole training.
        learn_variance: Also learn the variances of the image features.
    """
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)
    device = model.mean.device
    seed = torch.tensor([training.seed, 0], device=device)
    chains = None
    if persistent:
        start = torch.randint(len(train.owner), (training.batch,), generator=generator)
        chains = (train.features[train.owner[start]].to(device), train.words[start].to(device))

    def losses() -> Iterator[Tensor]:
        for images, captions in train.batches(training.batch, generator):
            features, words = train.features[images].to(device), train.words[captions].to(device)
            yield model.cd_loss(features, words, k, chains=chains, seed=seed)

    frozen = () if learn_variance else ("log_var",)
    return _fit(model, losses, lambda: recall_of(model, held_out).mean, training, frozen)


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


def encode_lists(texts: Sequence[Sequence[str]], vocabulary: Vocabulary) -> Tensor:
    """The words of N lists of n texts, bool [N, n, T].

    Raises:
        ValueError: The lists are not all of one length.
    """
    lengths = {len(each) for each in texts}
    if len(lengths) > 1:
        raise ValueError(
            f"texts must be lists of one length, got lengths from {min(lengths)} to {max(lengths)}"
        )
    flat = vocabulary.encode([text for each in texts for text in each])
    return flat.view(len(texts), max(lengths, default=0), len(vocabulary))


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
        training: See :class:`PairTraining`; dropout applies.
        loss: "listwise" or "pairwise", see :func:`listwise_loss` and :func:`pairwise_loss`.
        temperature: Of that loss.
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
        for rows in torch.randperm(len(train.features), generator=generator).split(training.batch):
            features, words = _dropped(
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

    return _fit(model, losses, held_out_score, training)


def _batches(
    model: PairModel, pairs: CaptionBags, training: PairTraining, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    device = model.mean.device
    for images, captions in pairs.batches(training.batch, generator):
        features, words = pairs.features[images].to(device), pairs.words[captions].to(device)
        yield _dropped(model, features, words, training, generator)


def _match_logits(scores: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits [M, 2] of the pairs (image, text), whose difference is their log-odds."""

    def match(images: Tensor, texts: Tensor) -> Tensor:
        log_odds = scores[images, texts]
        return torch.stack([torch.zeros_like(log_odds), log_odds], 1)

    return match


def _endless(
    model: PairModel, pairs: CaptionBags, training: PairTraining, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from _batches(model, pairs, training, generator)


def _dropped(
    model: PairModel,
    features: Tensor,
    words: Tensor,
    training: PairTraining,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Features and words with some left out; a feature that is left out is at its mean."""

    def kept(like: Tensor, share: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) >= share).to(like.device)

    if training.feature_dropout:
        # Larger in return, as in dropout: the hidden units' input keeps its expectation.
        centred = (features - model.mean) / (1 - training.feature_dropout)
        features = model.mean + centred * kept(features, training.feature_dropout)
    if training.word_dropout:
        words = words & kept(words, training.word_dropout)
    return features, words


def _fit(
    model: PairModel,
    losses: Callable[[], Iterator[Tensor]],
    score: Callable[[], float],
    training: PairTraining,
    frozen: Sequence[str] = (),
) -> list[float]:
    """Epochs of AdamW over `losses`, keeping the parameters of the one with the highest score."""
    trained = {name: p for name, p in model.named_parameters() if name not in frozen}
    optimizer = torch.optim.AdamW(_groups(trained, training), lr=training.learning_rate)
    history = [score()]
    best, best_epoch = copy.deepcopy(model.state_dict()), 0
    bar = tqdm(range(1, training.epochs + 1), desc="epochs", disable=not training.progress)
    for epoch in bar:
        for loss in losses():
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        history.append(score())
        bar.set_postfix(held_out=f"{history[-1]:.4f}")
        if history[-1] > history[best_epoch]:
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch
        elif epoch - best_epoch >= training.patience:
            break
    model.load_state_dict(best)
    return history


def _groups(parameters: dict[str, nn.Parameter], training: PairTraining) -> list[dict[str, object]]:
    weights = [p for name, p in parameters.items() if name.startswith("W_")]
    others = [p for name, p in parameters.items() if not name.startswith("W_")]
    return [
        {"params": weights, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
