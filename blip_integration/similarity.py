"""Six measures of how alike two codes are: of vectors, of distributions, of sets.

All take tensors [..., D] that broadcast against each other and return [...]: one value for each
pair of rows. `cosine(x[:, None], y)` is the matrix of all pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """x . y / (|x| |y|), in [-1, 1]; 0 where either is the zero vector.

    Example:
        >>> cosine(torch.tensor([3.0, 0.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
        tensor([1.0000, 0.7071, 0.0000])
    """
    _check_width("cosine", x, y)
    return F.cosine_similarity(x, y, dim=-1)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """1 / (1 + |x - y|), in (0, 1]; 1 where they are equal."""
    _check_width("euclidean", x, y)
    return 1 / (1 + torch.linalg.vector_norm(x - y, dim=-1))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence sum_i p_i log(p_i / q_i) in nats; infinite where q misses p.

    Args:
        p: [..., D] distributions: no negative entry, and sums of 1.
        q: likewise.

    Raises:
        ValueError: widths that differ, or rows that are no distributions.
    """
    _check_width("kl", p, q)
    _check_distribution("kl", "p", p)
    _check_distribution("kl", "q", q)
    return _relative_entropy(p, q)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats: the mean divergence of p and q from (p + q) / 2.

    Symmetric, in [0, ln 2]. scipy's `jensenshannon` is its square root. Arguments and errors are
    those of ``kl``.
    """
    _check_width("jensen_shannon", p, q)
    _check_distribution("jensen_shannon", "p", p)
    _check_distribution("jensen_shannon", "q", q)
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def kl_bernoulli(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of independent binary units, in nats: a sum over the units.

    This is the divergence between an RBM's p(h | v) and p(h | v'), in closed form.

    Args:
        p: [..., H] probabilities of a unit to be on.
        q: likewise.

    Raises:
        ValueError: widths that differ, or values outside [0, 1].
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
    """|A and B| / |A or B|, in [0, 1]; 1 where both sets are empty.

    Args:
        a: [..., D] membership: booleans, or numbers of which those other than 0 are members.
        b: likewise.

    Example:
        >>> jaccard(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 1, 0]))
        tensor(0.3333)
    """
    _check_width("jaccard", a, b)
    both, either = _counts(a, b)
    return torch.where(either == 0, 1.0, both / either)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Overlap coefficient |A and B| / min(|A|, |B|), in [0, 1]; arguments as of ``jaccard``.

    1 where both sets are empty, 0 where one is.
    """
    _check_width("overlap", a, b)
    both, either = _counts(a, b)
    smaller = torch.minimum((a != 0).sum(-1), (b != 0).sum(-1))
    return torch.where(smaller == 0, (either == 0).float(), both / smaller)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    # xlogy is 0 where p is 0, whatever q; p log p - p log q would be inf - inf where both are tiny.
    ratio = torch.where(p > 0, p / q, 1.0)
    return torch.special.xlogy(p, ratio).sum(-1)


def _counts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return ((a != 0) & (b != 0)).sum(-1), ((a != 0) | (b != 0)).sum(-1)


def _check_width(name: str, x: Tensor, y: Tensor) -> None:
    if x.ndim == 0 or y.ndim == 0 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{name}: both arguments must be [..., D] with the same D, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )


def _check_distribution(function: str, name: str, values: Tensor) -> None:
    # Wide enough for the rounding of a softmax over a large vocabulary, in half precision too.
    eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    tolerance = max(1e-4, 16 * eps)
    sums = values.double().sum(-1)
    if bool((values < 0).any()) or not bool(((sums - 1).abs() <= tolerance).all()):
        raise ValueError(
            f"{function}: {name} must be distributions, not negative and with sums of 1, got "
            f"values from {values.min().item()} and sums of {sums.min().item()} to "
            f"{sums.max().item()}"
        )
