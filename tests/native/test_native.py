"""The programs of this folder, compiled for the emulated GPU and run: they check themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import native


# The second is how stacks are switched where the assembler routine does not fit the machine.
@pytest.mark.parametrize("flags", [(), ("-DRBM_EMULATED_UCONTEXT",)], ids=["default", "ucontext"])
def test_emulated_instructions(flags: tuple[str, ...], tmp_path: Path) -> None:
    native.run(native.compile_emulated(tmp_path / "emulator", "emulator.cu", flags=flags))


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("resident") / "resident"
    return native.compile_emulated(output, "resident.cu", "resident/*.cu")


@pytest.mark.parametrize("kernel", ["block", "cluster"])
def test_resident_chains_are_those_of_plain_loops(resident: Path, kernel: str) -> None:
    native.run(resident, kernel)


@pytest.fixture(scope="module")
def tiled_sm90a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tiled_sm90a") / "tiled_sm90a"
    return native.compile_emulated(output, "tiled_sm90a.cu", "tiled/*.cu")


# 0 is round robin. In the others a stage that is released too early is overwritten in time to show.
@pytest.mark.parametrize("schedule", [0, 1, 3])
def test_hopper_products_have_the_bits_of_the_portable_ones(
    tiled_sm90a: Path, schedule: int
) -> None:
    native.run(tiled_sm90a, schedule=schedule)
