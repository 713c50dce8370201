"""The CUDA module: what it says without a device, and its kernel where there is one."""

from __future__ import annotations

import pytest
import torch

from rbm_kernels import arithmetic, info
from rbm_kernels.backends import cuda

built = info.build_info().get("cuda", {}).get("built", False)
reason = cuda.unavailable_reason()


def _arguments(batch: int, units: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, units, generator=generator) * 3
    bias = torch.randn(units, generator=generator)
    # A seed and an offset that use both of their words.
    seed = torch.tensor([(5 << 40) + 7, (1 << 33) + 11], dtype=torch.int64)
    arguments = {"x": x, "bias": bias, "seed": seed}
    return {name: tensor.to(device) for name, tensor in arguments.items()}


@pytest.mark.skipif(built or reason is None, reason="the CUDA module is built")
def test_a_build_without_cuda_says_why() -> None:
    assert reason is not None
    assert reason.startswith("not built: ")


@pytest.mark.skipif(not built, reason=f"{reason}")
def test_the_module_imports_and_counts_devices_without_a_driver() -> None:
    from rbm_kernels import _cuda

    count, words = _cuda.device_count()
    assert count >= 0
    assert (count == 0) == bool(words)
    assert not torch.cuda.is_initialized()
    if count == 0:
        assert reason == f"no CUDA device: {words}"


@pytest.mark.skipif(reason is None, reason="there is a CUDA device")
def test_without_a_device_the_kernel_refuses() -> None:
    with pytest.raises(RuntimeError, match="the cuda backend cannot run: "):
        cuda.sample_bernoulli(**_arguments(2, 3, "cpu"))


@pytest.mark.skipif(reason is not None, reason=f"{reason}")
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (64, 500), (5000, 12), (0, 4)])
def test_the_kernel_draws_the_samples_of_the_contract(shape: tuple[int, int]) -> None:
    arguments = _arguments(*shape, "cuda")
    states, probs = cuda.sample_bernoulli(
        **arguments, beta=0.7, chain_offset=9, half_sweep=2, return_probs=True
    )
    cpu = _arguments(*shape, "cpu")
    total = (cpu["x"] + cpu["bias"]) * torch.tensor(0.7)
    chains = torch.arange(9, 9 + shape[0])
    words = arithmetic.random_words(cpu["seed"], 2, chains, shape[1])
    assert torch.equal(states.cpu(), arithmetic.bernoulli(total, words).float())
    assert probs is not None
    assert torch.equal(probs.cpu(), arithmetic.sigmoid(total))
