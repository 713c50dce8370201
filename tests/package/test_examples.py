"""The examples that users read run as written: every docstring's, and every block of a page."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import blip_integration
import rbm_kernels

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def modules_with_examples() -> list[str]:
    """The names of the installed modules whose docstrings hold an example."""
    found = []
    for package in (rbm_kernels, blip_integration):
        folder = Path(package.__file__ or "").parent
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(folder.parent).with_suffix("").parts
                found.append(".".join(part for part in parts if part != "__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_block_on_units(capsys: pytest.CaptureFixture[str]) -> None:
    page = README.parent / "docs" / "units.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(block, str(page), "exec"), {})
    assert capsys.readouterr().out == "tensor([[ 1., -1.,  1., -1.]])\n"


def test_the_first_block_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], str(README), "exec"), {})
    assert capsys.readouterr().out.startswith("tensor(")


def test_the_captions_block_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny captioner under the name of the real one."""
    pytest.importorskip("transformers")
    from support import blip

    blip.readme_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    [block] = [block for block in BLOCKS if "blip_integration" in block]
    exec(compile(block, str(README), "exec"), {})
    assert (tmp_path / "rbm.safetensors").is_file()
    assert capsys.readouterr().out.strip()
