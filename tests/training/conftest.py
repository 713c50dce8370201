"""What the tests of training share."""

from __future__ import annotations

import pytest
import torch

from rbm_kernels import data


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out rows of scikit-learn's digits, uint8 [N, 64]."""
    train, held_out = data.split(data.load("digits"), 0.1)
    return train.values, held_out.values
