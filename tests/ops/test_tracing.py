"""Compiled functions whose numbers change from call to call, and torch.jit.trace."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tensors import binary, normal, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import rbm_kernels as rk

V, H = 6, 4
W, B, C = normal(V, H, seed=2), normal(V, seed=3), normal(H, seed=4)
BETAS = (0.5, 0.7, 0.9, 1.1, 0.25, 0.3, 0.35, 0.4, 0.45, 0.55)
INTS = (1, 2, 3, 5, 7, 9, 11, 13, 15, 17)
SEEDS = (*INTS, 2**62, 0, -5)

CHANGING: dict[str, tuple[Callable[[Tensor, Any], Any], tuple[Any, ...]]] = {
    "free_energy beta": (lambda v, x: rk.free_energy(v, W, B, C, beta=x), BETAS),
    "float64 free_energy beta": (
        lambda v, x: rk.free_energy(v, W.double(), B.double(), C.double(), beta=x), BETAS,
    ),
    "sample_hidden beta": (
        lambda v, x: rk.sample_hidden(v, W, C, beta=x, seed=0, return_probs=True), BETAS,
    ),
    "sample_hidden seed": (lambda v, x: (rk.sample_hidden(v, W, C, seed=x),), SEEDS),
    "sample_hidden offset": (lambda v, x: rk.sample_hidden(v, W, C, seed=(5, x)), SEEDS),
    "sample_hidden chain_offset": (
        lambda v, x: rk.sample_hidden(v, W, C, seed=1, chain_offset=x), INTS,
    ),
    "gibbs_sample beta": (lambda v, x: rk.gibbs_sample(v, W, B, C, beta=x, seed=0), BETAS),
    "gibbs_sample k": (lambda v, x: rk.gibbs_sample(v, W, B, C, x, seed=0), INTS),
    "cd_step k and seed": (lambda v, x: rk.cd_step(v, W, B, C, x, seed=x)[:3], INTS),
    "cd_loss k and seed": (lambda v, x: rk.cd_loss(v, W, B, C, x, seed=x), INTS),
    "free_energy rows": (lambda v, x: rk.free_energy(v[:x], W, B, C), INTS),
}  # fmt: skip


def tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CHANGING)
def test_numbers_that_change_compile_twice_at_most(name: str, dynamic: bool | None) -> None:
    """Once for the first number and once for all others; sizes 0 and 1 are torch's own cases."""
    torch._dynamo.reset()
    function, numbers = CHANGING[name]
    v = binary(20, V, seed=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for x in numbers:
        for got, want in zip(tensors(compiled(v, x)), tensors(function(v, x)), strict=True):
            assert same(got, want)
    assert counter.frame_count <= (3 if "rows" in name else 2)


def test_a_tempering_loop_by_the_default_compiler() -> None:
    torch._dynamo.reset()

    def rung(v: Tensor, k: int, beta: float, seed: int) -> tuple[Tensor, Tensor]:
        v = rk.gibbs_sample(v, W, B, C, k, beta=beta, seed=seed)
        return v, rk.free_energy(v, W, B, C, beta=beta)

    compiled = torch.compile(rung, fullgraph=True)
    v = again = binary(5, V, seed=1)
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
        for i, beta in enumerate(BETAS):
            v, energy = rung(v, 1 + i, beta, i)
            again, energy_again = compiled(again, 1 + i, beta, i)
            assert torch.equal(v, again)
            torch.testing.assert_close(energy, energy_again)


def test_errors_of_numbers_stay_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda v, beta: rk.free_energy(v, W, B, C, beta=beta), backend="eager", fullgraph=True
    )
    for beta in (-1.0, float("inf"), float("nan")):
        with pytest.raises(Exception, match="beta must be finite and not negative"):
            compiled(binary(3, V), beta)


class Traced(nn.Module):
    """What torch.jit.trace takes: a module, whose call is one of its model's methods."""

    def __init__(self, rbm: rk.RBM, call: Callable[[rk.RBM, Tensor], Any]) -> None:
        super().__init__()
        self.rbm, self.call = rbm, call

    def forward(self, v: Tensor) -> Any:
        return self.call(self.rbm, v)


METHODS: dict[str, Callable[[rk.RBM, Tensor], Any]] = {
    "free_energy": lambda rbm, v: rbm.free_energy(v, beta=0.5),
    "sample_hidden": lambda rbm, v: rbm.sample_hidden(v, seed=1, return_probs=True),
    "sample_visible": lambda rbm, v: rbm.sample_visible(v[:, :H] > 0, seed=(1, 2)),
    "sample": lambda rbm, v: rbm.sample(chains=v, k=3, seed=2),
    "cd_step": lambda rbm, v: rbm.cd_step(v, seed=3)[:3],
    "cd_loss": lambda rbm, v: rbm.cd_loss(v, seed=4),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["bernoulli", "gaussian", "spin"])
@pytest.mark.parametrize("name", METHODS)
def test_jit_trace_records_the_operation(name: str, kind: str) -> None:
    """The numbers of eager, for another batch too, with gradients, after saving and loading."""
    torch.manual_seed(0)
    rbm = rk.RBM(V, H, kind)
    module = Traced(rbm, METHODS[name])
    v, other = (2 * binary(n, V, seed=n) - 1 if kind == "spin" else binary(n, V) for n in (7, 3))
    traced = torch.jit.trace(module, v)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for rows in (v, other):
        for got, want in zip(tensors(loaded(rows)), tensors(module(rows)), strict=True):
            assert same(got, want)
    if name in ("free_energy", "cd_loss"):
        grads = []
        for call in (traced, module):
            rbm.zero_grad()
            call(other).sum().backward()
            grads.append([p.grad for p in rbm.parameters()])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)
