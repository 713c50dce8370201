"""The study is no part of the installed package: its tests find it in the repository."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed rbm_kernels wins over the source folder beside the study.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture
def untrained_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite with random weights: no package of weights is needed."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from benchmarks.captioning import lite_blip

    real = lite_blip.LiteEncoder

    def encoder(variant: int, pretrained: bool = True) -> lite_blip.LiteEncoder:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return real(variant, pretrained=False)

    monkeypatch.setattr(lite_blip, "LiteEncoder", encoder)
