"""The CUDA C++ kernels. Importing this module touches no device."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from rbm_kernels.info import why_missing

if TYPE_CHECKING:
    from torch import Tensor

_module: ModuleType | None = None
_failure = ""
try:
    _module = importlib.import_module("rbm_kernels._cuda")
except ImportError as error:
    _failure = why_missing("cuda", error)


@functools.cache
def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can. The first call asks the driver."""
    if _module is None:
        return _failure
    count, error = _module.device_count()
    if count == 0:
        return f"no CUDA device: {error}"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None


def sample_bernoulli(
    x: Tensor,
    bias: Tensor,
    *,
    seed: Tensor,
    beta: float = 1.0,
    chain_offset: int = 0,
    stream: int = 0,
    half_sweep: int = 0,
    return_probs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Draws Bernoulli units from their weighted sums, on torch's current stream.

    Args:
        x: float32 [B, N], contiguous, on a CUDA device: the weighted sums of the other layer.
        bias: float32 [N], contiguous, on the same device.
        seed: int64 [2], contiguous, on the same device: seed and offset. It is read there and not
            advanced.
        beta: inverse temperature.
        chain_offset: global index of the first row.
        stream: number of the random stream, 0 to 255.
        half_sweep: index t of the half-sweep; the draw is of half-sweep offset + t.
        return_probs: whether p is computed and returned.

    Returns:
        The states, float32 [B, N] of 0 and 1, on where u < sigmoid(beta * (x + bias)); and p,
        float32 [B, N], or None.

    Raises:
        ValueError: if a tensor has another shape, dtype, layout or device.
        RuntimeError: if the backend cannot run here, or the launch fails.
    """
    import torch

    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"sample_bernoulli: the cuda backend cannot run: {reason}")
    assert _module is not None
    if x.dim() != 2:
        raise ValueError(f"sample_bernoulli: x must be [B, N], got {list(x.shape)}")
    batch, units = x.shape
    expected = (
        ("x", x, torch.float32, (batch, units)),
        ("bias", bias, torch.float32, (units,)),
        ("seed", seed, torch.int64, (2,)),
    )
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"sample_bernoulli: {name} must be a contiguous {dtype} {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        if tensor.device.type != "cuda" or tensor.device != x.device:
            raise ValueError(
                f"sample_bernoulli: {name} must be on a CUDA device, the same for all arguments, "
                f"got {tensor.device} (x is on {x.device})"
            )
    states = torch.empty_like(x)
    probs = torch.empty_like(x) if return_probs else None
    status = _module.sample_bernoulli(
        x=x.data_ptr(),
        bias=bias.data_ptr(),
        beta=beta,
        seed=seed.data_ptr(),
        chain_offset=chain_offset & 0xFFFFFFFF,
        stream_id=stream,
        half_sweep=half_sweep,
        batch=batch,
        units=units,
        states=states.data_ptr(),
        probabilities=0 if probs is None else probs.data_ptr(),
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    if status != 0:
        words = _module.error_string(status)
        raise RuntimeError(f"sample_bernoulli: the kernel was not launched: {words}")
    return states, probs
