"""Builds the package for a GPU into build/gpu_site, where gpu_check.py finds it.

    python benchmarks/gpu_build.py [ARCHITECTURE ...]

For sm_90, and with it Hopper's own sm_90a, unless architectures are named ("80 90"). It takes nvcc
but no GPU, so it may run on another machine than the one with the GPU: with the same version of
Python, and build/gpu_site is what to copy. setuptools, pybind11 and ninja are this Python's own
where it has them, else pip downloads them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu_site"
STAMP = SITE / "built_from.txt"


def stamp() -> str:
    """This version of Python, and a hash of the files that the package is built from."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    files += (ROOT / "rbm_kernels").rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"{sys.implementation.cache_tag} {digest.hexdigest()}\n"


def is_built() -> bool:
    """Whether build/gpu_site holds this checkout's package for this version of Python."""
    return STAMP.exists() and STAMP.read_text() == stamp()


def build(architectures: Sequence[str]) -> None:
    """Install into build/gpu_site.

    Raises:
        subprocess.CalledProcessError: If pip fails.
    """
    shutil.rmtree(SITE, ignore_errors=True)
    built_from = stamp()  # before, as a file may change meanwhile
    variables = {
        "RBM_KERNELS_CPU": "1",
        "RBM_KERNELS_CUDA": "1",
        "RBM_KERNELS_CUDA_ARCHS": ";".join(architectures),
    }
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps"]
    if all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11", "ninja")):
        command += ["--no-index", "--no-build-isolation"]
    command += ["--target", str(SITE), str(ROOT)]
    subprocess.run(command, env={**os.environ, **variables}, check=True)
    STAMP.write_text(built_from)


def main() -> int:
    """Build, unless it is built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architectures", nargs="*", default=["90"])
    options = parser.parse_args()
    if is_built():
        print(f"{SITE} is up to date")
        return 0
    build(options.architectures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
