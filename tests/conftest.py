"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import backends

from rbm_kernels.ops import _dispatch


@pytest.fixture(autouse=True, scope="session")
def poisoned_outputs() -> Iterator[None]:
    """Fills new uninitialized tensors (torch.empty and its kin) with NaN.

    An element that a kernel forgot to write then shows in every comparison.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def backends_on_the_gpu() -> Iterator[None]:
    """Where there is a GPU, tests name its backends with CPU tensors (support/backends.py)."""
    with pytest.MonkeyPatch.context() as patch:
        if backends.ON_GPU:
            patch.setattr(_dispatch, "select", backends.on_the_gpu(_dispatch.select))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and lose much where the cores are shared.

    Tests that compare thread counts set their own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
