"""Thresholds for tests of samples, and their stated rates of false alarms."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

# A correct sampler fails a test below this p-value once in a million fixed seeds.
P_VALUE = 1e-6


# The two-sided normal deviate of that p-value is 4.9; sums of products get a little more.
SIGMAS = 5.0


def assert_chi_square(counts: Tensor, p: Tensor, min_expected: float = 20.0) -> None:
    """Pearson's test of observed counts against probabilities, rare cells pooled."""
    counts, p = counts.double().flatten(), p.double().flatten()
    n = counts.sum()
    assert counts[p == 0].sum() == 0, "states of probability zero were drawn"
    rare = p * n < min_expected
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        p = torch.cat([p[~rare], p[rare].sum()[None]])
        if p[-1] * n < 1e-6:
            counts, p = counts[:-1], p[:-1]
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    p_value = stats.chi2.sf(statistic, counts.numel() - 1)
    assert p_value > P_VALUE, f"chi2 = {statistic:.1f} on {counts.numel() - 1} cells"


def assert_mean(samples: Tensor, mean: Tensor, sigmas: float = SIGMAS) -> None:
    """Column means of independent rows [N, ...] against exact means, by their own spread."""
    samples = samples.double()
    error = samples.std(0) / math.sqrt(samples.shape[0])
    z = (samples.mean(0) - mean).abs() / error.clamp_min(1e-12)
    assert z.max() < sigmas, f"off by {z.max():.1f} standard errors"
