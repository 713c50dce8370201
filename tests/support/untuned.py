"""A pytest plugin: Triton's kernels run with their first tile size, and none is timed.

Every new size would be timed with two or three of them, most of what such tests take on a GPU.
``pytest -p support.untuned``
"""

from __future__ import annotations

from rbm_kernels.backends.triton import tuning


def pytest_configure() -> None:
    tuning._time = lambda run, config: 0.0
