"""What each folder of csrc may include: imports only go down, and Python stays at the border."""

from __future__ import annotations

import re

import pytest
from support.native import CSRC

SHARED = {"include/rbm"}
TYPES = SHARED | {"cuda/types.h"}
ARCH = TYPES | {"cuda/arch"}
OPERANDS = ARCH | {"cuda/operands"}
TILED = OPERANDS | {"cuda/tiled"}
RESIDENT = TILED | {"cuda/resident"}
OPS = RESIDENT | {"cuda/ops"}
# A folder, or a file beside folders, and what its files may include: itself and what is below.
MAY_INCLUDE = {
    "include/rbm": SHARED,
    "binding.h": {"binding.h"},
    "cpu": SHARED | {"cpu", "binding.h"},
    "emulator": {"emulator"},
    "cuda/types.h": TYPES,
    "cuda/arch": SHARED | {"cuda/arch", "emulator"},
    "cuda/operands": OPERANDS,
    "cuda/tiled": TILED,
    "cuda/resident": RESIDENT,
    "cuda/ops": OPS,
    "cuda/module.cpp": OPS | {"binding.h"},
}


def room(path: str) -> str:
    """The first entry of MAY_INCLUDE that the path is or lies in."""
    found = [name for name in MAY_INCLUDE if path == name or path.startswith(f"{name}/")]
    assert found, f"csrc/{path} is in no folder that this test knows"
    return found[0]


def sources() -> list[str]:
    files = (path.relative_to(CSRC) for path in CSRC.rglob("*.*"))
    return sorted(str(path) for path in files if path.suffix in (".h", ".cpp", ".cu"))


@pytest.mark.skipif(not CSRC.exists(), reason="the source tree is not here")
def test_includes_only_go_down() -> None:
    upward = []
    for source in sources():
        for included in re.findall(r'#include "(.*)"', (CSRC / source).read_text()):
            assert (CSRC / included).exists(), f"{source} includes {included}, not a path in csrc"
            if room(included) not in MAY_INCLUDE[room(source)]:
                upward.append(f"{source} includes {included}")
    assert upward == []


@pytest.mark.skipif(not CSRC.exists(), reason="the source tree is not here")
def test_python_is_known_to_the_binding_files_alone() -> None:
    python = re.compile(r"#include (<(pybind11/|torch/|ATen/|Python\.h)|\"binding\.h)")
    found = [source for source in sources() if python.search((CSRC / source).read_text())]
    assert found == ["binding.h", "cpu/module.cpp", "cuda/module.cpp"]
