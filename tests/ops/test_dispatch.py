"""The one way from a public function to a backend, which the tests on a GPU redirect."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.operations import everything, operands
from support.tensors import binary, normal, same

import rbm_kernels as rk
from rbm_kernels.arithmetic import digits_of
from rbm_kernels.ops import _dispatch

ARGUMENTS = {
    "v": binary(4, 7),
    "h": binary(4, 5),
    "W": normal(7, 5),
    "b": normal(7),
    "c": normal(5),
}


def operations() -> dict[str, Callable[..., Any]]:
    """Every function of rbm_kernels/ops that users call."""
    return {
        name: function
        for name, function in vars(rk).items()
        if inspect.isfunction(function) and function.__module__.startswith("rbm_kernels.ops.")
    }


def registered() -> set[str]:
    prefix = "rbm_kernels::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def test_every_operation_is_registered_under_its_name() -> None:
    assert registered() == set(operations())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations for which a backend is chosen during a test, in their order."""
    names: list[str] = []
    select = _dispatch.select
    monkeypatch.setattr(
        _dispatch, "select", lambda op, *rest: names.append(op) or select(op, *rest)
    )
    return names


@pytest.mark.parametrize("name", operations())
def test_every_operation_is_dispatched_in_one_place(name: str, asked: list[str]) -> None:
    """A new operation that chose its backend elsewhere would never be tested on a GPU."""
    function = operations()[name]
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
    ]
    function(**{argument: ARGUMENTS[argument] for argument in needed}, backend="reference")
    assert asked == [name]


@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_no_operation_misses_the_bit_tests(kind: str, asked: list[str]) -> None:
    """Which run `everything` in each regime and on every backend, on a GPU too."""
    everything(operands(3, 5, 4, kind), "reference", "highest")
    assert set(asked) == set(operations())


@pytest.mark.parametrize("gaussian", [False, True])
def test_no_operation_misses_the_sanitizer(
    gaussian: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    cases = importlib.import_module("gpu_small_cases")
    cases.run("reference", "cpu", (3, 5, 4), gaussian)
    assert set(asked) == set(operations())


def test_nothing_else_chooses_a_backend() -> None:
    select = _dispatch.select
    modules = [module for name, module in sys.modules.items() if name.startswith("rbm_kernels")]
    having = {module.__name__ for module in modules if getattr(module, "select", None) is select}
    assert having == {"rbm_kernels.backends", "rbm_kernels.ops._dispatch"}


def test_no_backend_calls_the_reference() -> None:
    reference = sys.modules["rbm_kernels.backends.reference"]
    for name, module in sys.modules.items():
        if name.startswith("rbm_kernels.backends."):
            held = list(vars(module).values())
            assert reference not in held, f"{name} imports the reference"


def test_a_compiled_function_follows_the_precision() -> None:
    """The number of digits is a constant of a compiled function, which torch compiles anew."""
    torch._dynamo.reset()
    v, W, c = binary(4, 300), normal(300, 5), normal(5)

    def p() -> torch.Tensor:
        return rk.sample_hidden(v, W, c, return_probs=True, seed=0)[1]

    compiled = torch.compile(p, fullgraph=True, backend="aot_eager")
    before = torch.get_float32_matmul_precision()
    results = {}
    try:
        for precision in ("highest", "high", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            results[digits_of("", None)] = compiled()
            assert same(compiled(), p())
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(results[2], results[3])
