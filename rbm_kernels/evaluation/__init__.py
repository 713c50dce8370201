"""How good a model is, in nats: exact and annealed log Z, log-likelihoods, pseudo-likelihoods.

Energies and symbols are those of ``rbm_kernels.textbook``: v [B, V], h [B, H], W [V, H], visible
bias b [V] and hidden bias c [H]; visible units are Gaussian where ``log_var`` [V] is given.
"""

from .ais import AIS, ais, log_mean_exp, reverse_ais
from .log_likelihood import (
    Evaluation,
    evaluate,
    independent_log_likelihood,
    log_likelihood,
    log_odds,
)
from .partition import log_partition_exact
from .pseudo_likelihood import PseudoLikelihood, pseudo_likelihood

__all__ = [
    "AIS",
    "Evaluation",
    "PseudoLikelihood",
    "ais",
    "evaluate",
    "independent_log_likelihood",
    "log_likelihood",
    "log_mean_exp",
    "log_odds",
    "log_partition_exact",
    "pseudo_likelihood",
    "reverse_ais",
]
