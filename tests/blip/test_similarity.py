"""The six similarities against scipy, and where they are defined by convention."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.spatial import distance
from scipy.special import rel_entr

from blip_integration import similarity

GENERATOR = np.random.default_rng(0)
VECTORS = GENERATOR.normal(size=(2, 20, 7))
DISTRIBUTIONS = GENERATOR.dirichlet(np.full(7, 0.5), size=(2, 20))
SETS = GENERATOR.random((2, 20, 7)) < 0.4

ORACLES = {
    "cosine": (VECTORS, lambda x, y: 1 - distance.cosine(x, y)),
    "euclidean": (VECTORS, lambda x, y: 1 / (1 + distance.euclidean(x, y))),
    "kl": (DISTRIBUTIONS, lambda p, q: rel_entr(p, q).sum()),
    "jensen_shannon": (DISTRIBUTIONS, lambda p, q: distance.jensenshannon(p, q) ** 2),
    "jaccard": (SETS, lambda a, b: 1 - distance.jaccard(a, b)),
    "overlap": (SETS, lambda a, b: (a & b).sum() / min(a.sum(), b.sum())),
}


@pytest.mark.parametrize("name", ORACLES)
def test_against_scipy(name):
    """Row by row, all pairs by broadcasting, and in any leading shape."""
    (x, y), oracle = ORACLES[name]
    if name == "overlap":
        assert x.any(-1).all() and y.any(-1).all()
    measure = getattr(similarity, name)
    first, second = torch.from_numpy(x), torch.from_numpy(y)
    rows = measure(first, second)
    assert rows.shape == (20,)
    np.testing.assert_allclose(rows, [oracle(a, b) for a, b in zip(x, y, strict=True)], rtol=1e-6)
    pairs = measure(first[:, None], second)
    expected = [[oracle(a, b) for b in y] for a in x]
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)
    assert torch.equal(measure(first.reshape(4, 5, 7), second.reshape(4, 5, 7)).flatten(), rows)


@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "kl_bernoulli"])
def test_divergences_vanish_between_equals(name):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        p = torch.softmax(3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)), 1)
        same = getattr(similarity, name)(p.to(dtype), p.to(dtype))
        assert same.dtype == dtype and same.abs().max() < 1e-6


def test_disjoint_distributions():
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert similarity.kl(p, q).tolist() == [math.inf, math.inf]
    assert similarity.kl(q, p).tolist() == [math.inf, pytest.approx(math.log(2))]
    assert similarity.jensen_shannon(p, q)[0] == pytest.approx(math.log(2))
    assert torch.equal(similarity.jensen_shannon(p, q), similarity.jensen_shannon(q, p))


def test_kl_bernoulli_is_that_of_all_states():
    p, q = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = torch.tensor(list(product([0.0, 1.0], repeat=4)), dtype=torch.float64)  # [16, 4]

    def joint(probabilities: torch.Tensor) -> torch.Tensor:  # [3, 16]
        on = probabilities[:, None]
        return torch.where(states == 1, on, 1 - on).prod(-1)

    expected = similarity.kl(joint(p), joint(q))
    torch.testing.assert_close(similarity.kl_bernoulli(p, q), expected)
    certain = torch.tensor([0.0, 1.0])
    assert similarity.kl_bernoulli(certain, certain) == 0.0
    assert similarity.kl_bernoulli(certain, 1 - certain) == math.inf


def test_zero_vectors():
    zero, one = torch.zeros(3), torch.ones(3)
    assert similarity.cosine(zero, one) == similarity.cosine(zero, zero) == 0.0
    assert similarity.euclidean(zero, zero) == 1.0


def test_empty_sets():
    none, some = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1])
    assert similarity.jaccard(none, none) == similarity.overlap(none, none) == 1.0
    assert similarity.jaccard(none, some) == similarity.overlap(none, some) == 0.0
    assert similarity.overlap(torch.tensor([0, 1, 0]), some) == 1.0


def test_membership_of_any_type():
    a, b = torch.from_numpy(SETS[0]), torch.from_numpy(SETS[1])
    for measure in (similarity.jaccard, similarity.overlap):
        for dtype in (torch.uint8, torch.int64, torch.float32):
            torch.testing.assert_close(measure(a.to(dtype), b.to(dtype)), measure(a, b))


@pytest.mark.parametrize("name", [*ORACLES, "kl_bernoulli"])
def test_widths_must_agree(name):
    with pytest.raises(ValueError, match=rf"{name}: .* same D, got \[2, 3\] and \[2, 1\]"):
        getattr(similarity, name)(torch.ones(2, 3), torch.ones(2, 1))


@pytest.mark.parametrize(
    "bad", [[0.5, 0.6], [1.5, -0.5], [math.nan, 1.0], [0.0, 0.0], [math.inf, 0.0]]
)
def test_distributions_are_checked(bad):
    good = torch.tensor([0.5, 0.5])
    for measure in (similarity.kl, similarity.jensen_shannon):
        name = measure.__name__
        with pytest.raises(ValueError, match=f"{name}: p must be distributions"):
            measure(torch.tensor([bad, [0.5, 0.5]]), good)
        with pytest.raises(ValueError, match=f"{name}: q must be distributions"):
            measure(good, torch.tensor(bad))


def test_probabilities_are_checked():
    good = torch.tensor([0.5, 0.5])
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"kl_bernoulli: q must lie in \[0, 1\]"):
            similarity.kl_bernoulli(good, torch.tensor([0.5, bad]))
