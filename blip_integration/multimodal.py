"""A joint RBM as a multi-modal model: words from images, images from words, and what they share.

Srivastava and Salakhutdinov, "Multimodal learning with deep Boltzmann machines" (JMLR 15, 2014),
infer a modality that is missing by clamping the other one, and take the hidden units as features of
either or both; here with the one hidden layer of a :class:`~.matching.JointRBM`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import rbm_kernels as rk

from .fitting import Schedule, TokenStream, fit_rbm
from .matching import JointRBM
from .similarity import cosine, euclidean, jaccard, kl_bernoulli, overlap

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS = ("mean_field", "gibbs")


@torch.no_grad()
def infer_words(
    model: JointRBM,
    features: Tensor,
    *,
    method: str = "mean_field",
    sweeps: int = 50,
    burn_in: int = 10,
    seed: int = 0,
) -> Tensor:
    """The probability of each word given an image.

    Args:
        model: The joint RBM.
        features: [N, D], not standardised.
        method: "mean_field" iterates E[h] and E[t] to a fixed point; "gibbs" clamps the image,
            samples, and averages p(t | h) over the sweeps, which is slower and exact in the limit.
        sweeps: Iterations, or Gibbs sweeps averaged over.
        burn_in: Gibbs sweeps before those.
        seed: Of the Gibbs sampling.

    Returns:
        [N, T] in [0, 1].

    Raises:
        ValueError: A wrong shape, an unknown method, sweeps below 1 or burn_in below 0.
    """
    _check(method, sweeps, burn_in)
    image = model.image_part(features)
    if method == "mean_field":
        h = model.hidden(features)
        for _ in range(sweeps):
            t = torch.sigmoid(model.b_words + h @ model.W_words.T)
            h = torch.sigmoid(model.c + image + t @ model.W_words)
        return t
    z = model.standardise(features)
    draws = torch.tensor([seed, 0], device=z.device)
    t = z.new_zeros(len(z), model.n_words)
    total = torch.zeros_like(t)
    for sweep in range(burn_in + sweeps):
        h = model.sample_hidden(z, t, seed=draws)
        t, p = rk.sample_visible(h, model.W_words, model.b_words, return_probs=True, seed=draws)
        if sweep >= burn_in:
            total += p
    return total / sweeps


@torch.no_grad()
def infer_image(
    model: JointRBM,
    words: Tensor,
    *,
    method: str = "mean_field",
    sweeps: int = 50,
    burn_in: int = 10,
    seed: int = 0,
) -> Tensor:
    """The mean of the image features given a caption's words.

    Args:
        words: [N, T].

    The other arguments and errors are those of :func:`infer_words`.

    Returns:
        [N, D], in the units of the features that the model was trained on.
    """
    _check(method, sweeps, burn_in)
    if method == "mean_field":
        text, precision = model.word_part(words), torch.exp(-model.log_var)
        h = model.hidden(words=words)
        for _ in range(sweeps):
            z = model.b_image + h @ model.W_image.T
            h = torch.sigmoid(model.c + (z * precision) @ model.W_image + text)
        return z * model.scale + model.mean
    draws = torch.tensor([seed, 0], device=words.device)
    z = model.b_image.expand(len(words), -1)
    total = torch.zeros_like(z)
    for sweep in range(burn_in + sweeps):
        h = model.sample_hidden(z, words, seed=draws)
        z, mean = rk.sample_visible(
            h, model.W_image, model.b_image, log_var=model.log_var, return_probs=True, seed=draws
        )
        if sweep >= burn_in:
            total += mean
    return total / sweeps * model.scale + model.mean


class RBMFeatures:
    """The hidden units of an RBM as features of images, in scikit-learn's manner.

    For features of a caption, or of both, see :meth:`~.matching.JointRBM.hidden`.

    Args:
        n_hidden: H.
        sigma: Of the visible units; see :func:`.fitting.fit_rbm`.
        schedule: How long and how fast to fit.

    Attributes:
        rbm_: The Gaussian-Bernoulli RBM, once fitted.
        mean_: [D], subtracted from the features.
        scale_: [D], divided by.

    Example:
        >>> x = torch.randn(50, 6)
        >>> RBMFeatures(n_hidden=4, schedule=Schedule(epochs=1)).fit(x).transform(x).shape
        torch.Size([50, 4])
    """

    rbm_: rk.RBM
    mean_: Tensor
    scale_: Tensor

    def __init__(
        self,
        n_hidden: int = 256,
        *,
        sigma: float = 0.5,
        schedule: Schedule = Schedule(tokens_per_image=1),  # noqa: B008
    ) -> None:
        self.n_hidden = n_hidden
        self.sigma = sigma
        self.schedule = schedule

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the RBM to features [N, D] (tensor, array or memmap); ``y`` is not looked at."""
        stream = TokenStream(X, held_out=0.0, seed=self.schedule.seed)
        fitted = fit_rbm(stream, self.n_hidden, self.schedule, sigma=self.sigma)
        self.rbm_ = fitted.reconstructor.rbm
        self.mean_, self.scale_ = fitted.mean, fitted.scale
        return self

    @torch.no_grad()
    def transform(self, X: Any) -> Any:
        """p(h = 1 | x) [N, H] of features [N, D], a numpy array for a numpy array.

        Raises:
            AttributeError: Not fitted.
            ValueError: A wrong shape.
        """
        if not hasattr(self, "rbm_"):
            raise AttributeError("RBMFeatures: fit must be called before transform")
        given = X if isinstance(X, Tensor) else torch.from_numpy(np.asarray(X))
        if given.dim() != 2 or given.shape[1] != self.rbm_.n_visible:
            raise ValueError(
                f"RBMFeatures: X must be [N, D] = [N, {self.rbm_.n_visible}], "
                f"got {list(given.shape)}"
            )
        hidden = self.rbm_((given.float() - self.mean_) / self.scale_)
        return hidden if isinstance(X, Tensor) else hidden.numpy()

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """:meth:`fit`, then :meth:`transform` the same features."""
        return self.fit(X, y).transform(X)


@torch.no_grad()
def hidden_similarities(model: JointRBM, features: Tensor, words: Tensor) -> dict[str, Tensor]:
    """How alike the hidden units of an image and of a caption are, each given alone.

    p(h | v) and p(h | t) are products over the hidden units, so their Kullback-Leibler divergence
    is the sum of the units'. The Jensen-Shannon divergence of products has no closed form; given is
    the mean of the units' divergences, which lies in [0, ln 2].

    Args:
        model: The joint RBM.
        features: [N, D], not standardised.
        words: [N, T] of a caption for each image.

    Returns:
        Each [N]: "kl" (image from caption, in nats), "jensen_shannon"; "cosine" and "euclidean"
        (1 / (1 + distance)) of the probabilities; "jaccard" and "overlap" of the sets of units that
        are likelier on than off.

    Raises:
        ValueError: A wrong shape, or different N.
    """
    if len(features) != len(words):
        raise ValueError(
            "hidden_similarities: features and words must have as many rows, "
            f"got {len(features)} and {len(words)}"
        )
    p, q = model.hidden(features), model.hidden(words=words)
    middle = (p + q) / 2
    on = p > 0.5, q > 0.5
    return {
        "kl": kl_bernoulli(p, q),
        "jensen_shannon": (kl_bernoulli(p, middle) + kl_bernoulli(q, middle)) / 2 / p.shape[1],
        "cosine": cosine(p, q),
        "euclidean": euclidean(p, q),
        "jaccard": jaccard(*on),
        "overlap": overlap(*on),
    }


def _check(method: str, sweeps: int, burn_in: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if sweeps < 1 or burn_in < 0:
        raise ValueError(
            f"sweeps must be 1 or more and burn_in 0 or more, got {sweeps} and {burn_in}"
        )


@dataclass(frozen=True)
class RetrievalRecall:
    """How often the right partner is among the first k, for each k.

    Attributes:
        image_to_text: k to the share of images with one of their captions among the first k.
        text_to_image: k to the share of captions with their image among the first k.
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
