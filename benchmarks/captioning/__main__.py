"""``python -m benchmarks.captioning``, from the root of the repository."""

import sys
from pathlib import Path

# ``python -m`` puts the current folder first, where the sources of rbm_kernels lie, as a rule
# without their compiled modules. Put last, it yields to the installed package.
_ROOT = Path(__file__).resolve().parents[2]
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == _ROOT)

from .cli import main  # noqa: E402  Only now is the package found where it is installed.

if __name__ == "__main__":
    sys.exit(main())
