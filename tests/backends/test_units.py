"""One contract for every backend and every kind of unit that it says it has.

Expected values come from the units' own definitions in float64 (tests/units proves those), never
from another backend.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.backends import ON_GPU, Moved, each_backend
from support.statistics import assert_mean
from support.tensors import binary, normal, same
from torch import Tensor

from rbm_kernels import backends
from rbm_kernels.arguments import Draw, Layer, Model
from rbm_kernels.units import Bernoulli, Gaussian, Units

N_VISIBLE, N_HIDDEN = 5, 4
HIDDEN = Bernoulli()
CASES: dict[type[Units], Units] = {
    Bernoulli: Bernoulli(),
    Gaussian: Gaussian(normal(N_VISIBLE, seed=1, scale=0.3)),
}
each_kind = pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.kind)


def module_of(backend: str, kind: type[Units]) -> Any:
    """The backend, which runs on a GPU where it must, if it has such units."""
    module = backends.BACKENDS[backend]
    if backend != "reference" and kind not in module.UNITS:
        pytest.skip(f"{backend} has no {kind.label} units")
    return Moved(module, "cuda:0") if backend in ON_GPU else module


def model_of(kind: type[Units]) -> Model:
    W = normal(N_VISIBLE, N_HIDDEN, seed=2, scale=0.5)
    return Model(W, normal(N_VISIBLE, seed=3), normal(N_HIDDEN, seed=4), CASES[kind])


def draw_of(offset: int = 0, beta: float = 1.0) -> Draw:
    return Draw(torch.tensor([7, offset]), 0, beta, 3)


def states_of(model: Model, rows: int, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return model.units.sample(model.units.mean(model.b.expand(rows, -1)))


def exact(model: Model) -> Model:
    W, b, c, units = model
    return Model(W.double(), b.double(), c.double(), units.to(torch.float64))


def test_every_kind_that_a_backend_has_is_tested_here() -> None:
    for name in ("cpu", "triton", "cuda"):
        assert set(backends.BACKENDS[name].UNITS) <= set(CASES)


@each_backend
@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_a_layer_is_drawn_with_its_means(backend: str, kind: type[Units], beta: float) -> None:
    module, model = module_of(backend, kind), model_of(kind)
    (W, b, c, units), rows = exact(model), 3000
    v, h = states_of(model, 1).expand(rows, -1), binary(1, N_HIDDEN, seed=6).expand(rows, -1)
    up = Layer(model.W, model.c, model.units, HIDDEN)
    down = Layer(model.W.t(), model.b, HIDDEN, model.units)
    draw = draw_of(beta=beta)
    for op, given, layer, mean in (
        ("sample_hidden", v, up, HIDDEN.mean(c + units.given(v.double()) @ W, beta)),
        ("sample_visible", h, down, units.mean(b + h.double() @ W.t(), beta)),
    ):
        states, means = module.sample_layer(op, given, layer, draw, True, torch.float32)
        torch.testing.assert_close(means.double(), mean, rtol=1e-5, atol=1e-5)
        assert_mean(states, mean[0])
        again, nothing = module.sample_layer(op, given, layer, draw, False, torch.float32)
        assert nothing is None and same(again, states)


@each_backend
@each_kind
def test_a_sweep_is_two_half_sweeps(backend: str, kind: type[Units]) -> None:
    module, model = module_of(backend, kind), model_of(kind)
    v, mask = states_of(model, 9), binary(9, N_VISIBLE, seed=8).bool()
    state = v
    for sweep in range(2):
        up = Layer(model.W, model.c, model.units, HIDDEN)
        down = Layer(model.W.t(), model.b, HIDDEN, model.units)
        h, _ = module.sample_layer(
            "sample_hidden", state, up, draw_of(2 * sweep), False, torch.float32
        )
        state, _ = module.sample_layer(
            "sample_visible", h, down, draw_of(2 * sweep + 1), False, torch.float32
        )
        state = torch.where(mask, v, state)
    swept = module.gibbs_sample("gibbs_sample", v, model, 2, draw_of(), mask, None, torch.float32)
    assert same(swept, state)


@each_backend
@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_the_free_energy_sums_over_hidden_states(
    backend: str, kind: type[Units], beta: float
) -> None:
    module, model = module_of(backend, kind), model_of(kind)
    W, b, c, units = exact(model)
    v = states_of(model, 9)
    h = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N_HIDDEN)), dtype=torch.float64)
    seen = units.given(v.double())
    energy = units.energy(v.double(), b)[:, None] - (c + seen @ W) @ h.t()  # [B, 2^H]
    expected = -torch.logsumexp(-beta * energy, dim=1)
    found = module.free_energies("free_energy", v, model, beta, 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@each_backend
@each_kind
@pytest.mark.parametrize("accumulate", [False, True])
def test_averages_of_both_phases(backend: str, kind: type[Units], accumulate: bool) -> None:
    """<v p(h|v)>, <v> and <p(h|v)> of the chains less those of the data, and mean free energies."""
    module, model = module_of(backend, kind), model_of(kind)
    W, _, c, units = exact(model)
    v, chains = states_of(model, 9), states_of(model, 6, seed=9)
    averages = tuple(torch.full(x.shape, 3.0) for x in model[:3])
    advanced, energies = module.cd_step(
        "cd_step", v, model, 2, chains, draw_of(), averages, accumulate
    )
    moved = module.gibbs_sample("cd_step", chains, model, 2, draw_of(), None, None, torch.float32)
    assert same(advanced.float(), moved)
    phases = []
    for states in (v.double(), moved.double()):
        p = torch.sigmoid(c + units.given(states) @ W)
        count = states.shape[0]
        phases.append((states.t() @ p / count, states.mean(0), p.mean(0)))
    for found, of_data, of_chains in zip(averages, *phases, strict=True):
        expected = of_chains - of_data + 3.0 * accumulate
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for found, states in zip(energies, (v, moved), strict=True):
        expected = module.free_energies("free_energy", states, model, 1.0, 3).mean()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
