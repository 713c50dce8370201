"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rbm_kernels.files import write_atomically


def test_a_failed_save_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda name: Path(name).write_text("earlier"))

    def fail(name: str) -> None:
        Path(name).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["file"]
