"""A training run at some update: everything that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rbm_kernels.inputs import as_rows
from rbm_kernels.rbm import RBM
from rbm_kernels.settings import Settings

from .negative_phase import NEGATIVE_PHASES, DrawOptions, NegativePhase


@dataclass
class Run:
    """A training run at some update: everything that a checkpoint holds.

    Attributes:
        settings: What decides the run's course.
        model: The RBM; its visible units are Bernoulli units, its parameters float32.
        optimizer: The optimizer of the model's parameters.
        negative_phase: The source of the model's states.
        seed: int64[2], the (seed, offset) of the chains' next draw.
        generator: Shuffles the data.
        order: int64 [N], this epoch's permutation of the rows.
        epoch: Number of epochs finished.
        batch: Number of updates done in the current epoch.
        sums: float64 [3]: the rows seen in this epoch, and over them the sums of the free energies
            of the data and of the chains.
        training_seconds: Seconds spent in this epoch's updates, without evaluation.
        elapsed: Seconds spent on the run, over all sittings.
        history: The metrics of every epoch.
        interrupted: Whether a SIGINT ended the last sitting.
    """

    settings: Settings
    model: RBM
    optimizer: torch.optim.Optimizer
    negative_phase: NegativePhase
    seed: Tensor
    generator: torch.Generator
    order: Tensor
    epoch: int = 0
    batch: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    training_seconds: float = 0.0
    elapsed: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def chains(self) -> Tensor | None:
        """The negative phase's persistent chains [N, V], or None."""
        return self.negative_phase.chains

    @property
    def draw(self) -> DrawOptions:
        """The keywords with which an update calls the operations."""
        return {
            "seed": self.seed,
            "backend": self.settings.backend,
            "precision": self.settings.precision,
        }

    @property
    def batches_per_epoch(self) -> int:
        """Number of updates in an epoch."""
        return -(-self.order.numel() // self.settings.batch_size)

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1: by updates, or by time if that is ahead."""
        updates = self.epoch * self.batches_per_epoch + self.batch
        share = updates / (self.settings.epochs * self.batches_per_epoch)
        if self.settings.minutes is not None:
            share = max(share, self.elapsed / (60 * self.settings.minutes))
        return min(share, 1.0)


def start(data: Tensor, settings: Settings) -> Run:
    """A fresh run: small random weights, and a visible bias from the data's log-odds.

    Args:
        data: [N, V] in [0, 1], N at least 1: a tensor, a NumPy array, a table or lists (see
            ``rbm_kernels.inputs``).
        settings: What decides the run's course.

    Returns:
        A run before its first update.

    Raises:
        TypeError: Data of another kind.
        ValueError: The data have a wrong shape, or values that are out of range.
    """
    data = as_rows("train", "data", data)
    if data.shape[0] < 1 or data.shape[1] < 1:
        raise ValueError(f"train: data must be [N, V] with N, V >= 1, got {list(data.shape)}")
    generator = torch.Generator().manual_seed(settings.seed)
    model = RBM(data.shape[1], settings.n_hidden)
    with torch.no_grad():
        model.W.copy_(0.01 * torch.randn(model.W.shape, generator=generator))
    model.initialize_from_data(data)
    return Run(
        settings=settings,
        model=model,
        optimizer=make_optimizer(model, settings),
        negative_phase=NEGATIVE_PHASES[settings.negative_phase].start(model, settings, generator),
        seed=torch.tensor([settings.seed, 0]),
        generator=generator,
        order=torch.randperm(data.shape[0], generator=generator),
    )


def make_optimizer(model: RBM, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for, with weight decay on W alone."""
    groups = [
        {"params": [model.W], "weight_decay": settings.weight_decay},
        {"params": [model.b, model.c], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
