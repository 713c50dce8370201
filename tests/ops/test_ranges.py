"""Values that Bernoulli units do not take: refused by name before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import CPU_RUNS, EMULATED
from support.errors import raises
from support.tensors import binary, normal, same
from torch import Tensor

import rbm_kernels as rk
from rbm_kernels import evaluation
from rbm_kernels.ops import _checks

# Those that read the values of their arguments.
BACKENDS = ["reference", *(["cpu"] if CPU_RUNS else [])]

MODEL = (normal(37, 5), normal(37), normal(5))
W, b, c = MODEL


def rows(n: int = 4, units: int = 37) -> Tensor:
    return binary(n, units)


Call = Callable[..., Any]
CALLS: dict[str, tuple[str, Call]] = {
    "sample_hidden": ("v", lambda x, **o: rk.sample_hidden(x, W, c, **o)),
    "sample_visible": ("h", lambda x, **o: rk.sample_visible(x, W.t(), c, **o)),
    "gibbs_sample": ("v", lambda x, **o: rk.gibbs_sample(x, *MODEL, **o)),
    "free_energy": ("v", lambda x, seed, **o: rk.free_energy(x, *MODEL, **o)),
    "cd_step": ("v", lambda x, **o: rk.cd_step(x, *MODEL, **o)),
    "cd_step, chains": ("chains", lambda x, **o: rk.cd_step(rows(), *MODEL, chains=x, **o)),
    "cd_loss": ("v", lambda x, **o: rk.cd_loss(x, *MODEL, **o)),
    "cd_loss, chains": ("chains", lambda x, **o: rk.cd_loss(rows(), *MODEL, chains=x, **o)),
}
READING: dict[str, tuple[str, Call]] = {
    "log_likelihood": ("v", lambda x: evaluation.log_likelihood(x, *MODEL, 1.0)),
    "pseudo_likelihood": ("v", lambda x: evaluation.pseudo_likelihood(x, *MODEL)),
    "reverse_ais": ("v", lambda x: evaluation.reverse_ais(x, *MODEL, betas=3, seed=0)),
    "log_odds": ("v", evaluation.log_odds),
    "independent_log_likelihood": (
        "v", lambda x: evaluation.independent_log_likelihood(x, torch.zeros(37)),
    ),
    "initialize_from_data": ("v", lambda x: rk.RBM(37, 2).initialize_from_data(x)),
}  # fmt: skip


def ratings() -> Tensor:
    return torch.arange(4 * 37).reshape(4, 37) % 5 + 1


def with_one(value: float, place: int, n: int = 4) -> Tensor:
    x = rows(n)
    x.view(-1)[place] = value
    return x


WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "-1 for missing": (lambda: with_one(-1.0, 5), "from -1 to 1"),
    "-1 everywhere": (lambda: torch.full((4, 37), -1.0), "from -1 to -1"),
    "ratings": (ratings, "from 1 to 5"),
    "ratings in bytes": (lambda: ratings().to(torch.uint8), "from 1 to 5"),
    "pixels": (lambda: (rows() * 255).to(torch.uint8), "from 0 to 255"),
    "just above": (lambda: with_one(1.002, 0), "from 0 to 1.002"),
    "just below": (lambda: with_one(-0.002, 4 * 37 - 1), "from -0.002"),
    "doubles": (lambda: with_one(1.5, 50).double(), "to 1.5"),
    "bfloat16": (lambda: with_one(-0.5, 50).bfloat16(), "from -0.5"),
    "strided": (lambda: with_one(7.0, 20).t().contiguous().t(), "to 7"),
    "many rows": (lambda: with_one(7.0, 3999 * 37 + 36, 4000), "to 7"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("entry", CALLS)
def test_operations_refuse_values_outside(entry: str, wrong: str, backend: str) -> None:
    name, call = CALLS[entry]
    make, words = WRONG[wrong]
    x, seed = make(), torch.tensor([3, 4])
    if entry == "cd_loss, chains" and not x.is_contiguous():
        x = x.contiguous()
    before = x.clone()
    raises(ValueError, f"{entry.split(',')[0]}: {name} must lie in [0, 1] for Bernoulli", words)(
        lambda: call(x, seed=seed, backend=backend)
    )
    assert same(x, before) and seed.tolist() == [3, 4]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("entry", READING)
def test_estimates_refuse_values_outside(entry: str, wrong: str) -> None:
    name, call = READING[entry]
    make, words = WRONG[wrong]
    raises(ValueError, f"{entry}: {name} must lie in [0, 1] for Bernoulli units", words)(
        lambda: call(make())
    )


@pytest.mark.parametrize("entry", READING)
def test_estimates_refuse_what_is_not_finite(entry: str) -> None:
    _, call = READING[entry]
    for value in (torch.nan, torch.inf):
        raises(ValueError, f"{entry}: v must be finite")(lambda x=value: call(with_one(x, 7)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", CALLS)
def test_what_lies_between_is_taken(entry: str, backend: str) -> None:
    """Probabilities, zero of either sign, what rounding adds; NaN is named before a range."""
    _, call = CALLS[entry]
    x = torch.rand(4, 37, generator=torch.Generator().manual_seed(0))
    x[0, :5] = torch.tensor([0.0, -0.0, 1.0, -0.0019, 1.0019])
    call(x.clone(), seed=0, backend=backend)
    x[1, 4], x[2, 2] = torch.nan, -3.0
    raises(ValueError, "must be finite")(lambda: call(x, seed=0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_units_take_other_values(backend: str) -> None:
    x, log_var = 9 * normal(4, 37), torch.zeros(37)
    options: dict[str, Any] = {"log_var": log_var, "seed": 0, "backend": backend}
    rk.sample_hidden(x, W, c, **options)
    rk.gibbs_sample(x, *MODEL, clamp=torch.ones(37).bool(), **options)
    rk.cd_step(x, *MODEL, chains=x, **options)
    rk.free_energy(x, *MODEL, log_var=log_var, backend=backend)
    # The hidden units are Bernoulli units in every model.
    raises(ValueError, "sample_visible: h must lie in [0, 1]")(
        lambda: rk.sample_visible(normal(4, 5), W, b, **options)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamped_values(backend: str) -> None:
    """Held values are looked at, in place of what they replace; those that are not held are not."""
    mask = torch.arange(37) < 20
    v = torch.where(mask, -1.0, rows())
    values = torch.where(mask, rows(4), -1.0)

    def call(v: Tensor, values: Tensor, mask: Tensor = mask) -> Tensor:
        return rk.gibbs_sample(v, *MODEL, clamp=(mask, values), seed=0, backend=backend)

    found = call(v, values)
    assert same(found[:, :20], values[:, :20])
    raises(ValueError, "gibbs_sample: clamp's values must lie in [0, 1]", "to 5")(
        lambda: call(rows(), with_one(5.0, 19))
    )
    raises(ValueError, "gibbs_sample: clamp's values must lie in [0, 1]")(
        lambda: call(rows(), torch.full((37,), -1.0))
    )
    raises(ValueError, "gibbs_sample: v must lie in [0, 1]", "to 5")(
        lambda: call(with_one(5.0, 20), rows())
    )
    raises(ValueError, "gibbs_sample: v must lie in [0, 1]")(
        lambda: rk.gibbs_sample(v, *MODEL, clamp=mask, seed=0, backend=backend)
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_every_position_is_looked_at(threads: int) -> None:
    torch.set_num_threads(threads)
    for n in (1, 700):
        for place in {0, 15, 16, 31, 32, 36, n * 37 // 2, n * 37 - 1}:
            for value in (-0.25, 1.25):
                x = with_one(value, place, n)
                raises(ValueError, "free_energy: v must lie in [0, 1]")(
                    lambda x=x: rk.free_energy(x, *MODEL)
                )


@pytest.mark.skipif("cuda" not in EMULATED, reason="needs the emulated GPU")
@pytest.mark.parametrize("entry", CALLS)
def test_the_debug_switch_looks_where_kernels_do_not(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, call = CALLS[entry]
    call(with_one(5.0, 9), seed=0, backend="cuda")
    monkeypatch.setattr(_checks, "LOOK", True)
    for x, words in ((with_one(5.0, 9), "lie in [0, 1]"), (with_one(torch.nan, 9), "finite")):
        raises(ValueError, f": {name} must", words)(lambda x=x: call(x, seed=0, backend="cuda"))
    call(rows(), seed=0, backend="cuda")


def test_a_bias_of_values_a_little_too_large_is_finite() -> None:
    data = torch.full((1000, 2), 1.0019)
    expected = rk.RBM.from_data(torch.ones(1000, 2), 2).b
    assert torch.equal(rk.RBM.from_data(data, 2).b, expected)
    assert torch.equal(evaluation.log_odds(data), evaluation.log_odds(torch.ones(1000, 2)))
