"""Which backend a call gets, what is said of the others, and how the tests reach a GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.backends import GPU_BACKENDS, Moved, needs_cpu, why_not_on
from support.errors import raises
from support.tensors import normal, same

import rbm_kernels as rk
from rbm_kernels import backends
from rbm_kernels.arguments import Draw, Model
from rbm_kernels.backends import cpu, reference, select
from rbm_kernels.units import Bernoulli, Gaussian

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")
FLOAT32, FLOAT64 = torch.float32, torch.float64


class Standing:
    """What backends say of themselves, set by a test instead of by this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reasons: dict[str, str | None] = {"cpu": None, "triton": None, "cuda": None}
        self.emulated: set[str] = set()
        monkeypatch.delenv("RBM_KERNELS_BACKEND", raising=False)
        monkeypatch.setattr(backends, "_told", set())
        # What is chosen once is kept, and here backends come and go.
        monkeypatch.setattr(backends, "_automatic", backends._automatic.__wrapped__)
        for name in self.reasons:
            module = backends.BACKENDS[name]
            monkeypatch.setattr(module, "unavailable_reason", lambda n=name: self.reasons[n])
            monkeypatch.setattr(module, "runs_on", lambda d, n=name: self.runs_on(n, d))

    def runs_on(self, name: str, device: torch.device) -> str | None:
        takes = "cpu" if name in ("cpu", *self.emulated) else "cuda"
        return None if device.type == takes else f"{name} takes no tensors on {device}"


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Standing:
    return Standing(monkeypatch)


def chosen(device: torch.device, dtype: torch.dtype = FLOAT32, op: str = "cd_step") -> str:
    module = select(op, None, device, dtype)
    return next(name for name, other in backends.BACKENDS.items() if other is module)


def test_auto_takes_the_first_that_can_run(standing: Standing) -> None:
    assert chosen(CPU) == "cpu"
    assert chosen(GPU) == "cuda"
    assert chosen(OTHER) == "reference"
    standing.reasons["cuda"] = "not built"
    assert chosen(GPU) == "triton"
    standing.reasons["triton"] = "not installed"
    assert chosen(GPU) == "reference"
    standing.reasons["cpu"] = "not built"
    assert chosen(CPU) == "reference"


def test_auto_never_chooses_an_emulated_backend(standing: Standing) -> None:
    standing.emulated = {"cuda", "triton"}
    standing.reasons["cpu"] = "not built"
    assert chosen(CPU) == "reference"
    assert select("cd_step", "cuda", CPU, FLOAT32) is backends.cuda
    assert select("cd_step", "triton", CPU, FLOAT32) is backends.triton


def test_layers_too_large_for_a_gpu_backend_fall_back(standing: Standing) -> None:
    assert select("cd_step", None, GPU, FLOAT32, 65_535) is backends.cuda
    assert select("cd_step", None, GPU, FLOAT32, 65_536) is reference
    assert select("cd_step", None, CPU, FLOAT32, 65_536) is backends.cpu


def test_float64_free_energies_are_the_references(standing: Standing) -> None:
    for device in (CPU, GPU):
        assert chosen(device, FLOAT64, "free_energy") == "reference"
        assert chosen(device, FLOAT64) != "reference"
    for name, device in (("cpu", CPU), ("triton", GPU), ("cuda", GPU)):
        raises(RuntimeError, "free_energy", repr(name), "float64")(
            lambda n=name, d=device: select("free_energy", n, d, FLOAT64)
        )


class Unknown(Bernoulli):
    """A kind of unit that is new to every backend but the reference."""

    label = "Unknown"


def test_units_that_a_backend_lacks_are_the_references(
    standing: Standing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rbm_kernels")
    for device in (CPU, GPU):
        for kinds in ((Gaussian,), (Bernoulli, Gaussian), (Bernoulli, Unknown), (Unknown,)):
            found = [select("cd_step", None, device, FLOAT32, 0, kinds) for _ in range(2)]
            assert all((module is reference) == (Unknown in kinds) for module in found)
    assert select("cd_step", "reference", CPU, FLOAT32, 0, (Unknown,)) is reference
    raises(RuntimeError, "gibbs_sample", "'cpu'", "no Unknown units")(
        lambda: select("gibbs_sample", "cpu", CPU, FLOAT32, 0, (Gaussian, Unknown))
    )
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 2  # one a device
    assert all("the reference backend runs (c" in line for line in lines)


def test_an_operation_that_a_backend_lacks_is_the_references(
    standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that an operation may be written for one backend after the other."""
    assert select("anneal", None, CPU, FLOAT32, kernel="gibbs_sample") is backends.cpu
    assert select("anneal", None, CPU, FLOAT32, kernel="anneal") is reference
    raises(RuntimeError, "anneal", "'cpu'", "it has no anneal")(
        lambda: select("anneal", "cpu", CPU, FLOAT32, kernel="anneal")
    )
    monkeypatch.setattr(backends.cpu, "anneal", lambda: None, raising=False)
    assert select("anneal", None, CPU, FLOAT32, kernel="anneal") is backends.cpu


def test_empty_calls_are_the_references_where_the_backend_could_run(standing: Standing) -> None:
    assert select("cd_step", None, GPU, FLOAT32, empty=True) is reference
    assert select("cd_step", "cuda", GPU, FLOAT32, empty=True) is reference
    raises(RuntimeError, "'cuda'", "cpu")(
        lambda: select("cd_step", "cuda", CPU, FLOAT32, empty=True)
    )


def test_a_fall_back_is_logged_once(standing: Standing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rbm_kernels")
    for _ in range(3):
        chosen(CPU), chosen(GPU)
    assert not caplog.records
    standing.reasons["cuda"] = "the driver sleeps"
    for op in ("cd_step", "free_energy", "cd_step"):
        assert chosen(GPU, op=op) == "triton"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "cd_step: the triton backend runs (cuda: the driver sleeps)"
    standing.reasons["triton"] = "there is no compiler"
    chosen(GPU), chosen(GPU)
    (line,) = [record.getMessage() for record in caplog.records][1:]
    assert "the reference backend runs" in line
    assert "the driver sleeps" in line and "there is no compiler" in line


def test_a_named_backend_that_cannot_run_raises(standing: Standing) -> None:
    for name, device in (("cpu", GPU), ("triton", CPU), ("cuda", CPU), ("cuda", OTHER)):
        raises(RuntimeError, "gibbs_sample", repr(name), str(device))(
            lambda n=name, d=device: select("gibbs_sample", n, d, FLOAT32)
        )
    standing.reasons["cuda"] = "the driver sleeps"
    raises(RuntimeError, "gibbs_sample", "'cuda'", "the driver sleeps")(
        lambda: select("gibbs_sample", "cuda", GPU, FLOAT32)
    )
    assert select("gibbs_sample", "reference", GPU, FLOAT32) is reference
    raises(ValueError, "gibbs_sample", "'gpu'", "triton")(
        lambda: select("gibbs_sample", "gpu", GPU, FLOAT32)
    )


def test_the_environment_names_a_backend(
    standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBM_KERNELS_BACKEND", "triton")
    assert chosen(GPU) == "triton"
    assert select("cd_step", "cuda", GPU, FLOAT32) is backends.cuda
    assert select("cd_step", "auto", GPU, FLOAT32) is backends.cuda
    raises(RuntimeError, "'triton'", "cpu")(lambda: chosen(CPU))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_gpu_backend_runs_or_says_why_not(backend: str) -> None:
    """Where it runs, every test of an operation has a case of it; here is why it may not."""
    reason = why_not_on(backend, "cpu") and why_not_on(backend, "cuda:0")
    assert (reason is None) == (backend in GPU_BACKENDS)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    W, c = torch.zeros(3, 4), torch.full((4,), 50.0)
    assert same(rk.sample_hidden(torch.ones(2, 3), W, c, backend=backend), torch.ones(2, 4))


@needs_cpu
def test_a_moved_call_is_the_call() -> None:
    """support.Moved, which takes the tests to a GPU, tried from the CPU to the CPU."""
    v, W, b, c = normal(9, 7), normal(7, 5), normal(7), normal(5)
    model = Model(W, b, c, Gaussian(normal(7, seed=1)))
    draw = Draw(torch.tensor([5, 6]), 3, 1.0, 3)

    def step(module: Any, averages: tuple[torch.Tensor, ...]) -> Any:
        return module.cd_step(
            "cd_step", v.T.contiguous().T, model, 2, v[::2], draw, averages, False
        )

    # The buffers lie in one storage, with gaps that belong to somebody else.
    def buffers() -> tuple[torch.Tensor, ...]:
        store = torch.full((80,), float("nan"))
        return store[:56].view(7, 8)[:, 2:7], store[60:67], store[70:75]

    moved = Moved(cpu, "cpu")
    mine, theirs = buffers(), buffers()
    got, expected = step(moved, mine), step(cpu, theirs)
    assert all(same(x, y) for x, y in zip(got, expected, strict=True))
    assert all(same(x, y) and not x.isnan().any() for x, y in zip(mine, theirs, strict=True))
    store = torch.empty(0).set_(mine[1].untyped_storage())
    assert store[:56].view(7, 8)[:, [0, 1, 7]].isnan().all()
    assert store[56:60].isnan().all() and store[67:70].isnan().all() and store[75:].isnan().all()
    assert moved.unavailable_reason() is None


def test_a_moved_call_has_tensors_of_its_own() -> None:
    """The backend sees other memory with the same values and strides; plain values pass."""
    seen: list[Any] = []
    module = SimpleNamespace(call=lambda *a: seen.append(a) or (a[0] + 1, a[1]))
    store = torch.arange(12.0)
    arguments = (store[1::2], store.view(3, 4).T, 7, None, "name", torch.zeros(0, 4))
    result = Moved(module, "cpu").call(*arguments)  # type: ignore[arg-type]
    (there,) = seen
    for x, y in zip(arguments, there, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y) and x.stride() == y.stride()
            assert x.numel() == 0 or x.data_ptr() != y.data_ptr()
        else:
            assert x is y
    assert there[0].untyped_storage().data_ptr() == there[1].untyped_storage().data_ptr()
    assert torch.equal(result[0], store[1::2] + 1) and result[1] is arguments[1]


def test_a_moved_call_moves_the_units_parameters() -> None:
    seen: list[Any] = []
    model = Model(normal(2, 3), normal(2), normal(3), Gaussian(normal(2, seed=1)))
    Moved(SimpleNamespace(call=seen.append), "cpu").call(model)  # type: ignore[arg-type]
    (there,) = seen
    assert isinstance(there, Model) and isinstance(there.units, Gaussian)
    for x, y in ((model.W, there.W), (model.units.log_var, there.units.log_var)):
        assert same(x, y) and x.data_ptr() != y.data_ptr()
