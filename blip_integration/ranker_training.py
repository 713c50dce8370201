"""Training of a joint RBM on images with captions, contrastively or by contrastive divergence.

Some thousand images are soon learned by heart, so all of these keep the state of the epoch that did
best on held-out images, and stop when no better one comes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rbm_kernels.training import optimize

from .joint_rbm import JointRBM, PairModel, Vocabulary
from .losses import contrastive_loss


@dataclass(frozen=True)
class PairTraining:
    """How to train a model of images with captions.

    Attributes:
        epochs: The most epochs; every caption is seen once in each.
        batch_size: The pairs of an update.
        learning_rate: The learning rate of AdamW (Loshchilov and Hutter 2019).
        weight_decay: The decay of weight matrices, never of biases; decoupled from the gradient.
        word_dropout: The share of a caption's words that is left out at random.
        feature_dropout: The share of an image's features that is set to their mean at random.
        patience: The number of epochs without a better one after which to stop.
        seed: The seed of order, dropout, negatives and chains.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A value out of range.
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    word_dropout: float = 0.2
    feature_dropout: float = 0.2
    patience: int = 3
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("patience", 1)):
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


def fit_contrastive(
    model: PairModel,
    train: CaptionBags,
    held_out: CaptionBags,
    training: PairTraining | None = None,
) -> list[float]:
    """Train on telling the true pairs of a batch from all others (InfoNCE, both ways).

    The logits are the scores as they are: the PMI of a ``JointRBM`` is the quantity
    that InfoNCE estimates (van den Oord et al., arXiv:1807.03748), and a two-tower model has its
    temperature within.

    Args:
        model: The model, changed in place; start with ``model.initialize_from_data``.
        train: The images with captions to train on.
        held_out: Other images; their mean recall decides which epoch is kept.
        training: How to train; None takes the defaults.

    Returns:
        The mean recall on ``held_out`` before training and after each epoch.
    """
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)

    def losses() -> Iterator[Tensor]:
        for features, words in training_batches(model, train, training, generator):
            yield contrastive_loss(model(features, words))

    return train_ranker(model, losses, lambda: recall_of(model, held_out).mean, training)


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

    Arguments and result are those of ``fit_contrastive``; dropout is not used, as it would
    change the distribution that the RBM learns.

    Args:
        k: The Gibbs sweeps of an update.
        persistent: Whether ``training.batch_size`` chains go on over the whole training.
        learn_variance: Whether the variances of the image features are learned, too.
    """
    training = training or PairTraining()
    generator = torch.Generator().manual_seed(training.seed)
    device = model.mean.device
    seed = torch.tensor([training.seed, 0], device=device)
    chains = None
    if persistent:
        start = torch.randint(len(train.owner), (training.batch_size,), generator=generator)
        chains = (train.features[train.owner[start]].to(device), train.words[start].to(device))

    def losses() -> Iterator[Tensor]:
        for images, captions in train.batches(training.batch_size, generator):
            features, words = train.features[images].to(device), train.words[captions].to(device)
            yield model.cd_loss(features, words, k, chains=chains, seed=seed)

    frozen = () if learn_variance else ("log_var",)
    return train_ranker(model, losses, lambda: recall_of(model, held_out).mean, training, frozen)


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


def training_batches(
    model: PairModel, pairs: CaptionBags, training: PairTraining, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    device = model.mean.device
    for images, captions in pairs.batches(training.batch_size, generator):
        features, words = pairs.features[images].to(device), pairs.words[captions].to(device)
        yield with_dropout(model, features, words, training, generator)


def with_dropout(
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
        centered = (features - model.mean) / (1 - training.feature_dropout)
        features = model.mean + centered * kept(features, training.feature_dropout)
    if training.word_dropout:
        words = words & kept(words, training.word_dropout)
    return features, words


def train_ranker(
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

    def gradients(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def after_epoch(epoch: int) -> None:
        nonlocal best, best_epoch
        history.append(score())
        bar.update()
        bar.set_postfix(held_out=f"{history[-1]:.4f}")
        if history[-1] > history[best_epoch]:
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch

    with tqdm(total=training.epochs, desc="epochs", disable=not training.progress) as bar:
        optimize(
            optimizer,
            lambda epoch: losses(),
            gradients,
            lambda update: training.learning_rate,
            epochs=range(1, training.epochs + 1),
            stop=lambda: len(history) - 1 - best_epoch >= training.patience,
            after_epoch=after_epoch,
        )
    model.load_state_dict(best)
    return history


def _groups(parameters: dict[str, nn.Parameter], training: PairTraining) -> list[dict[str, object]]:
    weights = [p for name, p in parameters.items() if name.startswith("W_")]
    others = [p for name, p in parameters.items() if not name.startswith("W_")]
    return [
        {"params": weights, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class RetrievalRecall:
    """How often the right partner is among the first k, for each k.

    Attributes:
        image_to_text: For each k, the share of images with one of their captions among the first k.
        text_to_image: For each k, the share of captions with their image among the first k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean over all k and both directions."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)


def retrieval_recall(
    scores: Tensor, owner: Tensor, at: Sequence[int] = (1, 5, 10)
) -> RetrievalRecall:
    """Recall at k of retrieval both ways (Hodosh et al., JAIR 47, 2013).

    Equal scores count against the model, so that a constant one finds nothing.

    Args:
        scores: [N, M] of N images with M captions, the higher the better.
        owner: [M], the number of the image that each caption belongs to; every image has one.
        at: The values of k.

    Returns:
        The recalls.

    Raises:
        ValueError: A wrong shape, or an image without a caption.

    Example:
        >>> recall = retrieval_recall(torch.eye(3), torch.arange(3), at=(1,))
        >>> recall.image_to_text, recall.text_to_image
        ({1: 1.0}, {1: 1.0})
    """
    n_images, n_captions = scores.shape
    if owner.shape != (n_captions,):
        raise ValueError(
            f"retrieval_recall: owner must be [M] = [{n_captions}], got {list(owner.shape)}"
        )
    if not torch.equal(owner.unique().cpu(), torch.arange(n_images)):
        raise ValueError(
            f"retrieval_recall: owner must name each of the {n_images} images, "
            f"got {owner.unique().numel()} different numbers"
        )
    own = owner == torch.arange(n_images, device=owner.device)[:, None]  # [N, M]
    best_own = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    image_ranks = ((scores >= best_own) & ~own).sum(1)  # captions of others that come before
    truth = scores[owner, torch.arange(n_captions, device=owner.device)]
    text_ranks = (scores >= truth).sum(0) - 1

    def recalls(ranks: Tensor) -> dict[int, float]:
        return {k: (ranks < k).double().mean().item() for k in at}

    return RetrievalRecall(recalls(image_ranks), recalls(text_ranks))
