"""The examples that users read run as written: the README's and the docstrings'."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    exec(compile(found.group(1), str(README), "exec"), {})
    assert capsys.readouterr().out.startswith("tensor(")


@pytest.mark.parametrize(
    "module",
    [
        "ops.sample",
        "ops.gibbs",
        "ops.free_energy",
        "ops.cd",
        "rbm",
        "textbook",
        "units.bernoulli",
        "units.gaussian",
    ],
)
def test_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"rbm_kernels.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
