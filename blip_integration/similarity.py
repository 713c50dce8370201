"""Six measures of how alike two codes are: two of vectors, two of distributions, two of sets.

All take tensors [..., D] that broadcast against each other and return [...], one value for each
pair of rows; ``cosine(x[:, None], y)`` is the matrix of all pairs. A ValueError says what is wrong
with widths that differ, rows that are no distributions, or values that are no probabilities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """The cosine of vectors, in [-1, 1]; 0 where either is the zero vector.

    Example:
        >>> cosine(torch.tensor([3.0, 0.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
        tensor([1.0000, 0.7071, 0.0000])
    """
    _check_width("cosine", x, y)
    return F.cosine_similarity(x, y, dim=-1)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """``1 / (1 + |x - y|)`` of vectors, in (0, 1]; 1 where they are equal."""
    _check_width("euclidean", x, y)
    return 1 / (1 + torch.linalg.vector_norm(x - y, dim=-1))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of q from p in nats; infinite where q misses a part of p."""
    _check_distributions("kl", p, q)
    return _relative_entropy(p, q)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions in nats, symmetric and in [0, ln 2].

    It is the mean divergence of p and q from ``(p + q) / 2``; scipy's ``jensenshannon`` is its
    square root.
    """
    _check_distributions("jensen_shannon", p, q)
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def kl_bernoulli(p: Tensor, q: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of independent binary units in nats, summed over the units.

    p and q [..., H] are the probabilities of the units to be on, so this is the divergence between
    an RBM's p(h | v) and its p(h | v') in closed form.
    """
    _check_width("kl_bernoulli", p, q)
    for name, values in (("p", p), ("q", q)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"kl_bernoulli: {name} must lie in [0, 1], "
                f"got {values.min().item()} to {values.max().item()}"
            )
    return _relative_entropy(p, q) + _relative_entropy(1 - p, 1 - q)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """The common members of sets over all of them, in [0, 1]; 1 where both sets are empty.

    a and b [..., D] are booleans, or numbers of which those other than 0 are members.

    Example:
        >>> jaccard(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 1, 0]))
        tensor(0.3333)
    """
    _check_width("jaccard", a, b)
    both, either = ((a != 0) & (b != 0)).sum(-1), ((a != 0) | (b != 0)).sum(-1)
    return torch.where(either == 0, 1.0, both / either)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """The common members of sets over those of the smaller one, in [0, 1].

    It is 1 where both sets are empty, and 0 where one is. See ``jaccard`` for sets.
    """
    _check_width("overlap", a, b)
    members_a, members_b = (a != 0).sum(-1), (b != 0).sum(-1)
    smaller = torch.minimum(members_a, members_b)
    both = ((a != 0) & (b != 0)).sum(-1)
    return torch.where(smaller == 0, (members_a == members_b).float(), both / smaller)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    # xlogy is 0 where p is 0, whatever q; p log p - p log q would be inf - inf where both are tiny.
    return torch.special.xlogy(p, torch.where(p > 0, p / q, 1.0)).sum(-1)


def _check_width(name: str, x: Tensor, y: Tensor) -> None:
    if x.ndim == 0 or y.ndim == 0 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{name}: both arguments must be [..., D] with the same D, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )


def _check_distributions(function: str, p: Tensor, q: Tensor) -> None:
    _check_width(function, p, q)
    for name, values in (("p", p), ("q", q)):
        # Wide enough for the rounding of a softmax over a large vocabulary, in half precision too.
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        sums = values.double().sum(-1)
        if bool((values < 0).any()) or not bool(((sums - 1).abs() <= max(1e-4, 16 * eps)).all()):
            raise ValueError(
                f"{function}: {name} must be distributions, not negative and with sums of 1, got "
                f"values from {values.min().item()} and sums of {sums.min().item()} to "
                f"{sums.max().item()}"
            )
