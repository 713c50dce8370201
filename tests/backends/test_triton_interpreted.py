"""Runs triton_interpreted.py in a process of its own: Triton reads TRITON_INTERPRET on import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rbm_kernels

pytest.importorskip("triton")


def test_the_kernels_interpreted() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=5", "triton_interpreted.py"],
        cwd=here,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(rbm_kernels.__file__).parents[1]), str(here)]),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout
