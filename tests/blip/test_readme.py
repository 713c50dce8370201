"""The README's examples run as written, one after another, on a tiny captioner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from support import blip

README = Path(__file__).parents[2] / "blip_integration" / "README.md"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blip.readme_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "rbm.safetensors").is_file()
    assert (tmp_path / "captioner" / "model.safetensors").is_file()
