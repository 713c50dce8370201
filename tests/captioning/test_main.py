"""``python -m benchmarks.captioning`` from the repository's root, and the study's own examples."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "captioning"


def test_the_package_is_taken_from_where_it_is_installed(tmp_path: Path) -> None:
    """The sources in the current folder lack compiled modules, so they must not come first."""
    for name, content in (
        ("rbm_kernels", ""),
        ("blip_integration", "import rbm_kernels\nraise SystemExit(rbm_kernels.__file__)\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.captioning", "demo", "--scenes", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == str(tmp_path / "rbm_kernels" / "__init__.py")


def modules_with_examples() -> list[str]:
    """The names of the study's modules whose docstrings hold an example."""
    paths = (path for path in sorted(STUDY.rglob("*.py")) if ">>> " in path.read_text())
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
