"""What decides the course of a training run.

torch is not imported here, so that the command line can tell the defaults without it.
"""

from __future__ import annotations

from dataclasses import dataclass

# The names of the classes in training/negative_phase.py.
NEGATIVE_PHASES = ("pcd", "cd")
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Settings:
    """What decides the course of a training run.

    Attributes:
        n_hidden: Number of hidden units.
        negative_phase: Where the negative phase's states come from: ``"pcd"``, persistent chains
            (Tieleman 2008), or ``"cd"``, chains that start from the data at every update (Hinton
            2002).
        k: Gibbs sweeps per update.
        n_chains: Number of persistent chains; ``"cd"`` has as many chains as the batch has rows.
        batch_size: Rows per update; the last batch of an epoch may be shorter.
        epochs: Passes over the data.
        minutes: The training also stops after this time. None leaves the end to ``epochs``, and
            the run does not depend on the machine's speed.
        learning_rate: The learning rate of the first update.
        decay: Whether the learning rate falls linearly to zero over the run.
        optimizer: ``"sgd"`` or ``"adam"`` (AdamW).
        momentum: The momentum of ``"sgd"``, in [0, 1).
        weight_decay: Weight decay of W; the biases have none.
        seed: Governs the initial weights, the order of the data and the chains.
        backend: As for the operations.
        precision: As for the operations.

    Raises:
        ValueError: A value is out of range.
    """

    n_hidden: int = 500
    negative_phase: str = "pcd"
    k: int = 1
    n_chains: int = 128
    batch_size: int = 128
    epochs: int = 100
    minutes: float | None = None
    learning_rate: float = 0.05
    decay: bool = True
    optimizer: str = "sgd"
    momentum: float = 0.5
    weight_decay: float = 1e-4
    seed: int = 0
    backend: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name in ("n_hidden", "k", "n_chains", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"train: {name} must be positive, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train: momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"train: weight_decay must be at least 0, got {self.weight_decay}")
        for name, known in (("negative_phase", NEGATIVE_PHASES), ("optimizer", OPTIMIZERS)):
            value = getattr(self, name)
            if value not in known:
                expected = " or ".join(repr(choice) for choice in known)
                raise ValueError(f"train: {name} must be {expected}, got {value!r}")
