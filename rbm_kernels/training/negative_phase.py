"""Where the states of the negative phase come from: what tells CD, PCD and their kin apart.

The gradient of the mean negative log-likelihood is an average over the model's states less one over
the data (Hinton 2002). A negative phase supplies those states. A new one is a class here, with an
entry in ``NEGATIVE_PHASES`` and its name in ``settings.NEGATIVE_PHASES``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from rbm_kernels.rbm import RBM
from rbm_kernels.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self


class DrawOptions(TypedDict):
    """The keywords with which an update calls the operations.

    Attributes:
        seed: int64[2], (seed, offset); every draw advances the offset.
        backend: As for the operations.
        precision: As for the operations.
    """

    seed: Tensor
    backend: str | None
    precision: str | None


class NegativePhase(ABC):
    """A source of states of the model, and the gradient that they give.

    Attributes:
        chains: [N, V] states that go on from one update to the next, or None.
    """

    chains: Tensor | None = None

    @classmethod
    @abstractmethod
    def start(cls, model: RBM, settings: Settings, generator: torch.Generator) -> Self:
        """The negative phase of a run before its first update.

        Args:
            model: Its visible bias is that of independent units fitted to the data.
            settings: The run's settings.
            generator: Draws what is random in the start, on the CPU.
        """

    @abstractmethod
    def advance(self, model: RBM, batch: Tensor, draw: DrawOptions) -> Tensor:
        """The states [N, V] of this update's negative phase.

        Args:
            model: The RBM at this update.
            batch: [B, V], this update's data.
            draw: Keywords for the operations.
        """

    def gradients(self, model: RBM, batch: Tensor, draw: DrawOptions) -> Tensor:
        """Write the gradient of this update into the parameters' ``.grad``.

        Here the states of ``advance`` are put into the two averages by autograd. CD and PCD
        override this by one fused call for both phases.

        Args:
            model: The RBM at this update.
            batch: [B, V], this update's data.
            draw: Keywords for the operations.

        Returns:
            float32 [2], the mean free energies of the data and of the states, in nats.
        """
        chains = self.advance(model, batch, draw)
        options = {"backend": draw["backend"], "precision": draw["precision"]}
        with torch.enable_grad():
            data = model.free_energy(batch, **options).mean()
            negative = model.free_energy(chains, **options).mean()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(data - negative, parameters)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        return torch.stack([data, negative]).detach().float()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the negative phase to go on bit for bit."""
        return {"chains": self.chains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.chains = state["chains"]


class ContrastiveDivergence(NegativePhase):
    """CD-k: the chains of every update start from its data (Hinton 2002).

    Args:
        k: Gibbs sweeps per update.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    @classmethod
    def start(cls, model: RBM, settings: Settings, generator: torch.Generator) -> Self:
        return cls(settings.k)

    def advance(self, model: RBM, batch: Tensor, draw: DrawOptions) -> Tensor:
        return model.sample(chains=batch, k=self.k, **draw)

    def gradients(self, model: RBM, batch: Tensor, draw: DrawOptions) -> Tensor:
        buffers = _gradient_buffers(model)
        step = model.cd_step(batch, self.k, out=buffers, **draw)
        _keep_gradients(model, buffers)
        return step.free_energies


class PersistentContrastiveDivergence(NegativePhase):
    """PCD-k: the chains go on from one update to the next (Tieleman 2008).

    Args:
        k: Gibbs sweeps per update.
        chains: [N, V] initial states, N at least 1.
    """

    chains: Tensor

    def __init__(self, k: int, chains: Tensor) -> None:
        self.k = k
        self.chains = chains

    @classmethod
    def start(cls, model: RBM, settings: Settings, generator: torch.Generator) -> Self:
        """Chains of independent pixels, so that none starts in the basin of one image."""
        mean = torch.sigmoid(model.b.detach())
        noise = torch.rand(settings.n_chains, model.n_visible, generator=generator)
        return cls(settings.k, (noise < mean).float())

    def advance(self, model: RBM, batch: Tensor, draw: DrawOptions) -> Tensor:
        self.chains = model.sample(chains=self.chains, k=self.k, **draw)
        return self.chains

    def gradients(self, model: RBM, batch: Tensor, draw: DrawOptions) -> Tensor:
        buffers = _gradient_buffers(model)
        step = model.cd_step(batch, self.k, chains=self.chains, out=buffers, **draw)
        _keep_gradients(model, buffers)
        self.chains = step.chains
        return step.free_energies


NEGATIVE_PHASES: dict[str, type[NegativePhase]] = {
    "pcd": PersistentContrastiveDivergence,
    "cd": ContrastiveDivergence,
}


def _gradient_buffers(model: RBM) -> tuple[Tensor, ...]:
    """The parameters' ``.grad``, which the kernels write, or new buffers where there is none."""
    return tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def _keep_gradients(model: RBM, buffers: tuple[Tensor, ...]) -> None:
    """Hand new buffers to the parameters, once they hold gradients."""
    for parameter, buffer in zip(model.parameters(), buffers, strict=True):
        if parameter.grad is None:
            parameter.grad = buffer
