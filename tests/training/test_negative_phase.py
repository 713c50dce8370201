"""Negative phases: the fused gradients are those of the states that ``advance`` gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.runs import SMALL

from rbm_kernels import RBM, settings, training
from rbm_kernels.training import (
    ContrastiveDivergence,
    DrawOptions,
    NegativePhase,
    PersistentContrastiveDivergence,
)
from rbm_kernels.training.negative_phase import NEGATIVE_PHASES


def options(seed: int = 3) -> DrawOptions:
    return {"seed": torch.tensor([seed, 0]), "backend": None, "precision": "highest"}


def model_and_rows(visible: str) -> tuple[RBM, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    model = RBM(7, 5, visible)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    rows = torch.rand(11, 7, generator=generator)
    return model, rows if visible == "gaussian" else (rows < 0.5).float()


def phases(rows: torch.Tensor) -> dict[str, NegativePhase]:
    return {
        "cd": ContrastiveDivergence(2),
        "pcd": PersistentContrastiveDivergence(2, rows[:4].clone()),
    }


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("name", NEGATIVE_PHASES)
def test_fused_gradients_are_those_of_the_states(name, visible):
    """A phase that has ``advance`` alone gets the same gradients, by autograd."""
    model, rows = model_and_rows(visible)
    fused, plain = phases(rows)[name], phases(rows)[name]
    draws = options(), options()
    fused_energies = fused.gradients(model, rows, draws[0])
    found = [parameter.grad.clone() for parameter in model.parameters()]
    plain_energies = NegativePhase.gradients(plain, model, rows, draws[1])
    expected = [parameter.grad for parameter in model.parameters()]
    assert len(found) == (4 if visible == "gaussian" else 3)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_energies, plain_energies, rtol=1e-5, atol=1e-5)
    assert draws[0]["seed"].tolist() == draws[1]["seed"].tolist() == [3, 4]
    if name == "pcd":
        assert torch.equal(fused.chains, plain.chains)
        assert not torch.equal(fused.chains, rows[:4])
    else:
        assert fused.chains is plain.chains is None


def test_gradients_go_into_the_buffers_that_are_there():
    model, rows = model_and_rows("bernoulli")
    buffers = [torch.full_like(parameter, 9.0) for parameter in model.parameters()]
    for parameter, buffer in zip(model.parameters(), buffers, strict=True):
        parameter.grad = buffer
    ContrastiveDivergence(1).gradients(model, rows, options())
    for parameter, buffer in zip(model.parameters(), buffers, strict=True):
        assert parameter.grad is buffer and not bool((buffer == 9.0).any())


def test_persistent_chains_start_from_independent_pixels(digits):
    run = training.start(digits[0], SMALL)
    assert run.chains.shape == (40, 64) and set(run.chains.unique().tolist()) == {0.0, 1.0}
    many = PersistentContrastiveDivergence.start(
        run.model, training.Settings(n_chains=20000), torch.Generator().manual_seed(0)
    )
    expected = digits[0].double().mean(0)
    torch.testing.assert_close(many.chains.double().mean(0), expected, rtol=0, atol=0.02)


def test_every_phase_has_a_name_in_the_settings():
    assert tuple(NEGATIVE_PHASES) == settings.NEGATIVE_PHASES


def test_a_phase_of_ones_own_trains(digits, tmp_path):
    """One class is all: no kernel, no change of the loop, and it is kept in checkpoints."""

    class Shuffled(NegativePhase):
        """Units permuted among the rows: the model must become one of dependent units."""

        turns = 0

        @classmethod
        def start(cls, model, settings, generator):
            return cls()

        def advance(self, model, batch, draw):
            self.turns += 1
            order = torch.rand(batch.shape, generator=torch.Generator().manual_seed(self.turns))
            return batch.float().gather(0, order.argsort(0))

        def state_dict(self):
            return {"turns": self.turns}

        def load_state_dict(self, state):
            self.turns = state["turns"]

    faster = replace(SMALL, learning_rate=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NEGATIVE_PHASES, "pcd", Shuffled)
        run = training.train(*digits, training.start(digits[0], faster))
        assert run.chains is None and run.negative_phase.turns == 51
        training.save_checkpoint(tmp_path / "run.pt", run, digits[0])
        resumed = training.load_checkpoint(tmp_path / "run.pt", digits[0])
        assert resumed.negative_phase.turns == 51
    rows = digits[0]
    shuffled = Shuffled().advance(run.model, rows, run.draw)
    energy = run.model.free_energy(rows).mean() - run.model.free_energy(shuffled).mean()
    assert energy < -0.5
