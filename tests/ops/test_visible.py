"""The keyword that names the kind of visible units."""

from __future__ import annotations

import pytest
from support.tensors import binary, normal, same

import rbm_kernels as rk


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
def test_kinds_that_need_no_name_may_have_one(visible: str) -> None:
    W, b, c = normal(6, 5), normal(6), normal(5)
    v = binary(3, 6)
    extra = {"log_var": normal(6, seed=3, scale=0.3)} if visible == "gaussian" else {}
    named = rk.cd_step(v, W, b, c, seed=1, visible=visible, **extra)
    for got, want in zip(named, rk.cd_step(v, W, b, c, seed=1, **extra), strict=True):
        assert same(got, want)
    h = rk.sample_hidden(v, W, c, seed=1, **extra)
    assert same(h, rk.sample_hidden(v, W, c, seed=1, visible=visible, **extra))


def test_wrong_names_are_refused() -> None:
    W, b, c = normal(6, 5), normal(6), normal(5)
    v, h = binary(3, 6), binary(3, 5)
    calls = {
        "sample_hidden": lambda **kind: rk.sample_hidden(v, W, c, **kind),
        "sample_visible": lambda **kind: rk.sample_visible(h, W, b, **kind),
        "gibbs_sample": lambda **kind: rk.gibbs_sample(v, W, b, c, **kind),
        "free_energy": lambda **kind: rk.free_energy(v, W, b, c, **kind),
        "cd_step": lambda **kind: rk.cd_step(v, W, b, c, **kind),
        "cd_loss": lambda **kind: rk.cd_loss(v, W, b, c, **kind),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: visible must be one of .* got 'ising'"):
            call(visible="ising")
        with pytest.raises(ValueError, match=rf"{name}: Bernoulli units have .* got \['log_var'\]"):
            call(visible="bernoulli", log_var=b)
        with pytest.raises(ValueError, match=rf"{name}: Gaussian units have .* got \[\]"):
            call(visible="gaussian")
