"""What the tests of the operations share: backends to run on, draws, thresholds."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_map

import rbm_kernels as rk
from rbm_kernels import backends
from rbm_kernels.units import KINDS

# So that tree_map finds the parameters of a model's units.
for _kind in KINDS.values():
    register_pytree_node(
        _kind,
        lambda units: ([parameter for _, parameter in units.parameters()], type(units)),
        lambda parameters, kind: kind(*parameters),
    )


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run here, or None."""
    probe = torch.zeros(1, 1)
    try:
        rk.sample_hidden(probe, probe, torch.zeros(1), seed=0, backend=backend)
    except RuntimeError as reason:
        return str(reason)
    return None


def why_not_on(backend: str, device: str) -> str | None:
    """Why the GPU backend `backend` cannot take tensors of this device, or None."""
    module = backends.BACKENDS[backend]
    reason: str | None = module.unavailable_reason()
    return reason or module.runs_on(torch.device(device))


CPU_RUNS = unavailable("cpu") is None
# GPU backends that run here: on the tests' own tensors where they are emulated (the emulated build,
# Triton's interpreter), and otherwise on a GPU, to which `on_the_gpu` moves a call.
EMULATED = [name for name in ("triton", "cuda") if why_not_on(name, "cpu") is None]
ON_GPU = [
    name for name in ("triton", "cuda") if name not in EMULATED and not why_not_on(name, "cuda:0")
]
GPU_BACKENDS = [*EMULATED, *ON_GPU]
# The cuda backend's regimes, as RBM_KERNELS_CUDA_REGIME names them (docs/gpu.md).
CUDA_REGIMES = ("resident", "cluster", "tiled", "tiled_sm90a")

_cpu_mark = pytest.mark.skipif(not CPU_RUNS, reason=f"cpu: {unavailable('cpu')}")
BACKENDS = ["reference", pytest.param("cpu", marks=_cpu_mark), *GPU_BACKENDS]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_cpu = pytest.mark.skipif(not CPU_RUNS, reason=f"cpu backend: {unavailable('cpu')}")


class Moved:
    """A backend whose calls run on another device: arguments go there and results come back.

    Whole storages travel, so that strides stay what they were and a write beside a strided buffer
    shows. What a call writes into its arguments (`out`) is written back into them.
    """

    def __init__(self, module: ModuleType, device: str) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._module, name)
        if not callable(operation):
            return operation

        def call(*arguments: Any) -> Any:
            storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
            originals: dict[int, Tensor] = {}

            def there(t: Any) -> Any:
                if not isinstance(t, Tensor):
                    return t
                here = t.untyped_storage()
                if here._cdata not in storages:
                    copy = torch.UntypedStorage(here.nbytes(), device=self._device).copy_(here)
                    storages[here._cdata] = (here, copy)
                moved = torch.empty(0, dtype=t.dtype, device=self._device)
                moved.set_(storages[here._cdata][1], t.storage_offset(), t.shape, t.stride())
                originals[id(moved)] = t
                return moved

            def back(t: Any) -> Any:
                if id(t) in originals:
                    return originals[id(t)]
                return t.cpu() if isinstance(t, Tensor) else t

            moved = tree_map(there, arguments)
            result = tree_map(back, operation(*moved))
            for here, copy in storages.values():
                here.copy_(copy)
            return result

        return call


def on_the_gpu(select: Callable[..., ModuleType]) -> Callable[..., Any]:
    """`select` for tests whose tensors are on the CPU: backends of `ON_GPU` run on the GPU."""

    def chosen(operation: str, backend: str | None, device: torch.device, *weights: Any) -> Any:
        if backend in ON_GPU and device.type == "cpu":
            return Moved(select(operation, backend, torch.device("cuda:0"), *weights), "cuda:0")
        return select(operation, backend, device, *weights)

    return chosen


def draws(n: int, backend: str) -> int:
    """How many chains a statistical test takes: n, or a sixth on the plain PyTorch backend.

    The reference is an order of magnitude slower, and test_bitwise.py shows that it draws what cpu
    draws; where there is no cpu backend it does all the work itself. Emulated kernels are slower
    still, and compared in the same way.
    """
    slow = backend in EMULATED or (backend == "reference" and CPU_RUNS)
    return n // 6 // 12 * 12 if slow else n
