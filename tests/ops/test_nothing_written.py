"""A call that fails has written nothing: neither chains, nor seeds, nor buffers, nor gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.errors import raises
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels.training import (
    ContrastiveDivergence,
    DrawOptions,
    NegativePhase,
    PersistentContrastiveDivergence,
)


def model(visible: str = "bernoulli") -> rk.RBM:
    torch.manual_seed(0)
    rbm = rk.RBM(7, 5, visible)
    with torch.no_grad():
        rbm.W.normal_()
    return rbm


def inferred(make: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return make()


def kept(*tensors: Tensor) -> Callable[[], None]:
    """A check that these tensors are as they are now."""
    before = [t.clone() for t in tensors]

    def check() -> None:
        assert all(same(t, was) for t, was in zip(tensors, before, strict=True))

    return check


UNWRITABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "inference": (lambda states: inferred(states.clone), "inference_mode"),
    "expanded": (lambda states: states[0].expand(3, -1), "expanded"),
    "requires grad": (lambda states: states.requires_grad_(), "require grad"),
}


@pytest.mark.parametrize("visible", ["bernoulli", "spin"])
@pytest.mark.parametrize("what", UNWRITABLE)
def test_chains_that_cannot_be_written(what: str, visible: str) -> None:
    rbm, seed = model(visible), torch.tensor([3, 4])
    spoil, word = UNWRITABLE[what]
    v, states = binary(4, 7), binary(3, 7, seed=1)
    if visible == "spin":
        v, states = 2 * v - 1, 2 * states - 1
    chains = spoil(states)
    check = kept(chains.detach(), seed)
    raises(ValueError, "cd_loss: chains", word)(lambda: rbm.cd_loss(v, chains=chains, seed=seed))
    check()
    assert rbm.W.grad is None


def test_chains_of_inference_mode_go_on_there_and_as_clones() -> None:
    rbm = model()
    chains = inferred(lambda: rbm.sample(6, k=5, seed=3))
    again = chains.clone()
    rbm.cd_loss(binary(4, 7), chains=again, seed=1)
    with torch.inference_mode():
        rbm.cd_loss(binary(4, 7), chains=chains, seed=1)
    assert torch.equal(chains, again)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda t: inferred(t.clone), "inference_mode"),
        (lambda t: t[..., :1].clone().expand(t.shape), "expanded"),
        (lambda t: t.requires_grad_(), "require grad"),
    ],
    ids=["inference", "expanded", "requires grad"],
)
def test_buffers_that_cannot_be_written(
    spoil: Callable[[Tensor], Tensor], word: str, dtype: torch.dtype, position: int
) -> None:
    """Whichever of them it is, the others are as they were."""
    out = [torch.full(shape, 2.0, dtype=dtype) for shape in ((7, 5), (7,), (5,))]
    out[position] = spoil(out[position])
    seed = torch.tensor([3, 4])
    check = kept(seed, *(t.detach() for t in out))
    name = ("grad_W", "grad_b", "grad_c")[position]
    raises(ValueError, f"cd_step: out's {name}", word)(
        lambda: rk.cd_step(
            binary(4, 7), normal(7, 5), normal(7), normal(5), out=tuple(out), seed=seed
        )
    )
    check()


CALLS: dict[str, Callable[[rk.RBM, Tensor], Any]] = {
    "sample_hidden": lambda rbm, seed: rbm.sample_hidden(binary(4, 7), seed=seed),
    "sample_visible": lambda rbm, seed: rbm.sample_visible(binary(4, 5), seed=seed),
    "gibbs_sample": lambda rbm, seed: rbm.sample(chains=binary(4, 7), k=1, seed=seed),
    "sample": lambda rbm, seed: rbm.sample(4, k=1, seed=seed),
    "cd_step": lambda rbm, seed: rbm.cd_step(binary(4, 7), seed=seed),
    "ais": lambda rbm, seed: rk.evaluation.ais(rbm.W, rbm.b, rbm.c, n_chains=2, betas=3, seed=seed),
}


@pytest.mark.parametrize("function", CALLS)
def test_seeds_that_cannot_be_advanced(function: str) -> None:
    for seed, word in (
        (inferred(lambda: torch.tensor([3, 4])), "inference_mode"),
        (torch.tensor(3).expand(2), "expanded"),
    ):
        check = kept(seed)
        raises(ValueError, f"{function}: a seed tensor", word)(
            lambda s=seed: CALLS[function](model(), s)
        )
        check()


def test_the_chains_of_a_failing_loss_stay_where_a_seed_cannot_be_advanced() -> None:
    seed, chains = inferred(lambda: torch.tensor([3, 4])), binary(3, 7)
    check = kept(chains)
    raises(ValueError, "cd_loss: a seed tensor")(
        lambda: model().cd_loss(binary(4, 7), chains=chains, seed=seed)
    )
    check()


@pytest.mark.parametrize(
    "wrong",
    [{"k": 0}, {"beta": -1.0}, {"clamp": torch.ones(3).bool()}, {"out_dtype": torch.int64}],
    ids=str,
)
def test_new_chains_that_fail_after_their_start_leave_the_seed(wrong: dict[str, Any]) -> None:
    seed = torch.tensor([3, 4])
    with pytest.raises((ValueError, TypeError)):
        model().sample(4, seed=seed, **wrong)
    assert seed.tolist() == [3, 4]
    states = model().sample(4, k=2, seed=seed)
    assert seed.tolist() == [3, 9] and same(states, model().sample(4, k=2, seed=(3, 4)))


@pytest.mark.parametrize("wrong", [{"backend": "gpu"}, {"backend": "cuda"}, {"precision": "low"}])
@pytest.mark.parametrize("function", ["sample_hidden", "gibbs_sample", "cd_step", "cd_loss"])
def test_a_refused_backend_draws_nothing_from_the_generator(
    function: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rk.backends.cuda, "unavailable_reason", lambda: "it is being tested")
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    given = (normal(7, 5), normal(7), normal(5))
    arguments = (given[0], given[2]) if function == "sample_hidden" else given
    with pytest.raises((ValueError, RuntimeError)):
        getattr(rk, function)(binary(4, 7), *arguments, generator=generator, **wrong)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "phase",
    [ContrastiveDivergence(1), PersistentContrastiveDivergence(1, binary(3, 7))],
    ids=["cd", "pcd"],
)
def test_failing_gradients_leave_none(phase: NegativePhase) -> None:
    rbm, seed = model(), torch.tensor([3, 4])
    draw: DrawOptions = {"seed": seed, "backend": None, "precision": None}
    with torch.no_grad():
        rbm.c[0] = torch.nan
    raises(ValueError, "c must be finite")(lambda: phase.gradients(rbm, binary(4, 7), draw))
    assert all(p.grad is None for p in rbm.parameters()) and seed.tolist() == [3, 4]
