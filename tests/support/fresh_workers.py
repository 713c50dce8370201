"""A pytest plugin for GPUs: a test that leaves the device broken takes no other test with it.

After an illegal access every later call of its process fails. Under pytest-xdist such a worker ends
at once, and xdist starts another in its place: ``pytest -n 4 -p support.fresh_workers``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest


def broken() -> bool:
    """Whether the device has an error that stays."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator:
    """Ends the worker after a failure that broke the device, with the failure's words."""
    report = yield
    if report.failed and hasattr(item.config, "workerinput") and broken():
        # The report would be lost with the worker. xdist counts the test as failed.
        os.write(2, f"{item.nodeid} broke the device:\n{report.longreprtext}\n".encode())
        os._exit(1)
    return report
