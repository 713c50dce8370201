"""Restricted Boltzmann Machines in PyTorch, on fused kernels.

The operations take plain tensors (:func:`cd_step`, :func:`cd_loss`, :func:`free_energy`,
:func:`gibbs_sample`, :func:`sample_hidden`, :func:`sample_visible`); :class:`RBM` is the module.
``python -m rbm_kernels`` prints which backends can run here.
"""

from rbm_kernels._version import __version__
from rbm_kernels.ops.cd import CDStep, cd_loss, cd_step
from rbm_kernels.ops.free_energy import free_energy
from rbm_kernels.ops.gibbs import gibbs_sample
from rbm_kernels.ops.sample import sample_hidden, sample_visible
from rbm_kernels.rbm import RBM

__all__ = [
    "RBM",
    "CDStep",
    "__version__",
    "cd_loss",
    "cd_step",
    "free_energy",
    "gibbs_sample",
    "sample_hidden",
    "sample_visible",
]
