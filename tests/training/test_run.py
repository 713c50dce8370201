"""A run's start and its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.runs import SMALL

from rbm_kernels import training
from rbm_kernels.training import Settings


def test_weight_decay_leaves_biases_alone(digits):
    """With no learning but decay, W shrinks and the biases' group has none."""
    run = training.start(digits[0], replace(SMALL, weight_decay=0.5))
    groups = run.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [p is q for p, q in zip(groups[1]["params"], (run.model.b, run.model.c), strict=True)]
    assert groups[0]["params"][0] is run.model.W


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_hidden", 0, "n_hidden must be at least 1, got 0"),
        ("k", 0, "k must be at least 1, got 0"),
        ("n_chains", 0, "n_chains must be at least 1, got 0"),
        ("negative_phase", "rbm", "negative_phase must be 'pcd' or 'cd', got 'rbm'"),
        ("learning_rate", float("nan"), "learning_rate must be positive, got nan"),
        ("minutes", 0.0, "minutes must be positive, got 0.0"),
        ("momentum", 1.0, r"momentum must lie in \[0, 1\), got 1.0"),
        ("weight_decay", -1.0, "weight_decay must be at least 0, got -1.0"),
        ("optimizer", "lbfgs", "optimizer must be 'sgd' or 'adam', got 'lbfgs'"),
    ],
)
def test_bad_settings(name, value, message):
    with pytest.raises(ValueError, match="train: " + message):
        Settings(**{name: value})


def test_data_without_rows():
    with pytest.raises(ValueError, match=r"data must be \[N, V\] with N, V >= 1, got \[0, 3\]"):
        training.start(torch.zeros(0, 3), SMALL)
