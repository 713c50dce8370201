"""Training: one loop, and one small object for what differs between CD, PCD and their kin.

``run`` holds a run's state, ``negative_phase`` the sources of its chains, ``loop`` the loop, and
``checkpoint`` the files from which a run goes on bit for bit. All of it is written with the
package's public operations alone, so it also shows how to write a loop of one's own.
"""

from rbm_kernels.evaluation import Evaluation, evaluate
from rbm_kernels.files import write_atomically
from rbm_kernels.settings import Settings

from .checkpoint import load_checkpoint, save_checkpoint
from .loop import optimize, train
from .negative_phase import (
    ContrastiveDivergence,
    DrawOptions,
    NegativePhase,
    PersistentContrastiveDivergence,
)
from .run import Run, start

__all__ = [
    "ContrastiveDivergence",
    "DrawOptions",
    "Evaluation",
    "NegativePhase",
    "PersistentContrastiveDivergence",
    "Run",
    "Settings",
    "evaluate",
    "load_checkpoint",
    "optimize",
    "save_checkpoint",
    "start",
    "train",
    "write_atomically",
]
