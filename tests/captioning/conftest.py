"""The study is no part of the installed package: its tests find it in the repository."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that an installed rbm_kernels wins over the source folder beside the study.
sys.path.append(str(Path(__file__).parents[2]))
