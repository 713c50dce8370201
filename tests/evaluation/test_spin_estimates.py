"""Spin units in every estimate, against the enumeration of their own energy."""

from __future__ import annotations

import pytest
import torch
from support.enumeration import ExactSpin, in_float32, small_spin

from rbm_kernels import evaluation

SPIN = {"visible": "spin"}


@pytest.mark.parametrize("size", [(6, 5), (5, 6), (1, 7), (9, 1)])
def test_log_partition_exact(size: tuple[int, int]) -> None:
    model = small_spin(*size)
    log_z = evaluation.log_partition_exact(*in_float32(model), **SPIN)
    torch.testing.assert_close(log_z, model.log_z(), rtol=1e-13, atol=1e-11)


def test_log_likelihood_sums_to_one() -> None:
    model = small_spin()
    log_p = evaluation.log_likelihood(model.v_states, *in_float32(model), model.log_z(), **SPIN)
    torch.testing.assert_close(log_p, model.p_v().log(), rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="log_likelihood: v of spin units must be -1 or 1, got 0"):
        evaluation.log_likelihood(torch.zeros(1, 6), *in_float32(model), 0.0, **SPIN)


def test_ais_and_its_reverse_enclose_log_z() -> None:
    model = small_spin(8, 6, spread=1.5)
    base = {"base_visible_bias": torch.linspace(-0.5, 0.5, 8)}
    exact = model.log_z().item()
    up = evaluation.ais(*in_float32(model), n_chains=400, betas=150, seed=1, **base, **SPIN)
    assert up.interval[0] < exact < up.interval[1] and up.std < 0.05
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(model.p_v(), 400, replacement=True, generator=generator)
    v = model.v_states[rows].float()
    down = evaluation.reverse_ais(v, *in_float32(model), betas=150, seed=2, **base, **SPIN)
    assert down.interval[0] < exact < down.interval[1] and down.std < 0.05
    with pytest.raises(ValueError, match="reverse_ais: v of spin units must be -1 or 1, got 0"):
        evaluation.reverse_ais(v - v, *in_float32(model), **SPIN)


def conditionals(model: ExactSpin) -> torch.Tensor:
    """log p(v_i | v_-i) of every state from the table of p(v), [2**V, V]."""
    p = model.p_v()
    numbers = torch.arange(p.numel())
    columns = [(p / (p + p[numbers ^ (1 << i)])).log() for i in range(model.b.numel())]
    return torch.stack(columns, 1)


def test_pseudo_likelihood() -> None:
    model = small_spin(seed=2, spread=1.5)
    result = evaluation.pseudo_likelihood(model.v_states, *in_float32(model), **SPIN)
    torch.testing.assert_close(result.per_unit, conditionals(model), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="v of spin units must be -1 or 1, got 0"):
        evaluation.pseudo_likelihood(torch.zeros(1, 6), *in_float32(model), **SPIN)
