"""The pseudo-likelihood against the table of all states."""

from __future__ import annotations

import math

import pytest
import torch
from support.enumeration import Exact, in_float32, small_bernoulli

from rbm_kernels import evaluation


def exact_pseudo_likelihood(model: Exact) -> torch.Tensor:
    """log p(v_i | v_-i) of every state from the table of p(v), [2**V, V]."""
    p = model.p_v()
    numbers = torch.arange(p.numel())
    columns = [(p / (p + p[numbers ^ (1 << i)])).log() for i in range(model.b.numel())]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_pseudo_likelihood(chunk):
    model = small_bernoulli(seed=2, spread=1.5)
    result = evaluation.pseudo_likelihood(model.v_states, *in_float32(model), chunk=chunk)
    expected = exact_pseudo_likelihood(model)
    torch.testing.assert_close(result.per_unit, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.total, expected.sum(1), rtol=0, atol=1e-5)


def test_pseudo_likelihood_of_random_units_is_unbiased():
    model = small_bernoulli(seed=2)
    v = model.v_states[37:38].repeat(20000, 1).bool()
    result = evaluation.pseudo_likelihood(
        v, *in_float32(model), units="random", generator=torch.Generator().manual_seed(0)
    )
    assert result.per_unit is None
    error = result.total.mean() - exact_pseudo_likelihood(model)[37].sum()
    assert error.abs() < 4 * result.total.std() / math.sqrt(20000)
    # Every value is one of V times the exact conditionals.
    gaps = (result.total[:, None] / 6 - exact_pseudo_likelihood(model)[37]).abs().min(1).values
    assert gaps.max() < 1e-12


def test_pseudo_likelihood_errors():
    W, b, c = in_float32(small_bernoulli())
    with pytest.raises(ValueError, match="v must hold only 0 and 1"):
        evaluation.pseudo_likelihood(torch.full((2, 6), 0.5), W, b, c)
    with pytest.raises(ValueError, match="units must be 'all' or 'random', got 'some'"):
        evaluation.pseudo_likelihood(torch.zeros(2, 6), W, b, c, units="some")
    with pytest.raises(ValueError, match=r"v must be \[B, V\] = \[B, 6\], got \[6\]"):
        evaluation.pseudo_likelihood(torch.zeros(6), W, b, c)
