"""Exact log Z against the enumeration of both layers."""

from __future__ import annotations

import math

import pytest
import torch
from support.enumeration import in_float32, small_bernoulli, small_gaussian

from rbm_kernels import evaluation


@pytest.mark.parametrize(("n_visible", "n_hidden"), [(6, 5), (5, 6), (1, 7), (9, 1), (8, 8)])
@pytest.mark.parametrize("chunk", [1, 64, 2**16])
@pytest.mark.parametrize("spread", [0.5, 2.0, 200.0])
def test_log_partition_exact(n_visible, n_hidden, chunk, spread):
    model = small_bernoulli(n_visible, n_hidden, seed=n_visible, spread=spread)
    log_z = evaluation.log_partition_exact(*in_float32(model), chunk=chunk)
    assert log_z.dtype == torch.float64 and log_z.dim() == 0
    torch.testing.assert_close(log_z, model.log_z(), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_log_partition_exact_gaussian(chunk):
    model = small_gaussian(7, 5)
    log_z = evaluation.log_partition_exact(
        *in_float32(model), model.log_var.float().double(), chunk=chunk
    )
    expected = type(model)(model.W, model.b, model.c, model.log_var.float().double()).log_z()
    torch.testing.assert_close(log_z, expected, rtol=0, atol=1e-11)


def test_log_partition_exact_of_large_weights_is_finite():
    W = torch.full((3, 4), 1e4)
    log_z = evaluation.log_partition_exact(W, torch.full((3,), -1e4), torch.zeros(4))
    assert log_z.item() == pytest.approx(3 * 4 * 1e4 - 3e4, rel=1e-12)


def test_more_states_than_one_pass():
    """18 units in steps of 2 states, against independent units whose log Z is known."""
    c = torch.linspace(-1, 1, 18, dtype=torch.float64)
    log_z = evaluation.log_partition_exact(torch.zeros(40, 18), torch.zeros(40), c, chunk=40 * 8)
    expected = 40 * math.log(2) + torch.nn.functional.softplus(c).sum()
    torch.testing.assert_close(log_z, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": torch.zeros(30, 28)}, "smaller layer .* at most max_units = 25 units, got 28"),
        ({"W": torch.zeros(5)}, r"W must be \[V, H\], got \[5\]"),
        ({"b": torch.zeros(3)}, r"b must be \[V\] = \[30\], got \[3\]"),
        ({"c": torch.full((4,), math.nan)}, "c must be finite"),
        ({"log_var": torch.zeros(4)}, r"log_var must be \[V\] = \[30\], got \[4\]"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_log_partition_exact_errors(changes, message):
    W = changes.pop("W", torch.zeros(30, 4))
    arguments = {"b": torch.zeros(30), "c": torch.zeros(W.shape[-1]), **changes}
    with pytest.raises(ValueError, match="log_partition_exact: .*" + message):
        evaluation.log_partition_exact(W, **arguments)
