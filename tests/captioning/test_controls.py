"""Controls of equal cost: each against what it should be in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import blip
from torch import Tensor

from benchmarks.captioning.controls import (
    PCAReconstructor,
    ShrinkToMean,
    TiedAutoencoder,
    apply_to_blip,
    fit_denoising_autoencoder,
    fit_linear_adapter,
    fit_pca,
    fit_random_rbm,
    fit_shrink_to_mean,
)
from blip_integration.fitting import Schedule, TokenStream, fit_rbm_to_tokens, reconstruction_error
from blip_integration.gated_residual import GatedResidual
from rbm_kernels import RBM

WIDTH = 6


def features(n: int = 400, length: int = 5) -> Tensor:
    """Correlated Gaussian features [n, length, 6] that are neither centered nor scaled."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, WIDTH, generator=generator)
    rows = torch.randn(n, length, 3, generator=generator) @ mixing
    return 3 + rows + 0.3 * torch.randn(n, length, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    return TokenStream(features(), block=64, held_out=0.1)


def training_rows(stream: TokenStream) -> Any:
    rows = torch.cat(list(stream.epoch(4096, stream.n_tokens, seed=5)))
    return rows.double().numpy()


def test_shrink_to_mean(stream: TokenStream) -> None:
    fitted = fit_shrink_to_mean(stream)
    rows = stream.sample(2048, held_out=True)
    assert not fitted.reconstructor(rows).any()
    error = reconstruction_error(fitted.reconstructor, rows)
    assert error == pytest.approx(rows.square().mean().item())
    opened = GatedResidual(fitted.reconstructor, fitted.mean, fitted.scale, strength=1.0)
    with torch.no_grad():
        adjusted = opened(features(3))
    torch.testing.assert_close(adjusted, stream.mean.expand_as(adjusted))


def test_random_rbm_keeps_the_weights_spread(stream: TokenStream) -> None:
    rbm = fit_rbm_to_tokens(stream, 8, Schedule(epochs=1)).reconstructor.rbm
    before = {name: value.clone() for name, value in rbm.state_dict().items()}
    shuffled = fit_random_rbm(stream, rbm, seed=1).reconstructor.rbm
    for name in ("W", "c"):
        mine, theirs = getattr(shuffled, name).detach(), before[name]
        assert torch.equal(mine.flatten().sort().values, theirs.flatten().sort().values)
        assert not torch.equal(mine, theirs)
    assert torch.equal(shuffled.b, before["b"]) and torch.equal(shuffled.log_var, before["log_var"])
    assert all(torch.equal(value, before[name]) for name, value in rbm.state_dict().items())
    assert torch.equal(shuffled.W, fit_random_rbm(stream, rbm, seed=1).reconstructor.rbm.W)
    assert not torch.equal(shuffled.W, fit_random_rbm(stream, rbm, seed=2).reconstructor.rbm.W)


@pytest.mark.parametrize("n_components", [1, 3, WIDTH])
def test_pca(stream: TokenStream, n_components: int) -> None:
    """Against numpy's singular value decomposition of the rows that are not held out."""
    fitted = fit_pca(stream, n_components)
    _, _, directions = np.linalg.svd(training_rows(stream), full_matrices=False)
    leading = directions[:n_components]
    rows = stream.sample(100, held_out=True)
    expected = torch.from_numpy(rows.double().numpy() @ leading.T @ leading)
    torch.testing.assert_close(
        fitted.reconstructor(rows).detach().double(), expected, rtol=1e-4, atol=1e-4
    )


def test_linear_adapter_learns_the_best_denoiser(stream: TokenStream) -> None:
    """Of Gaussian rows with covariance C, noise s: z C (C + s^2)^-1 (Wiener)."""
    noise = 0.7
    schedule = Schedule(epochs=25, tokens_per_image=5, batch_size=64, learning_rate=0.01)
    fitted = fit_linear_adapter(stream, WIDTH, schedule, noise=noise)
    covariance = np.cov(training_rows(stream).T)
    best = covariance @ np.linalg.inv(covariance + noise**2 * np.eye(WIDTH))
    learned = fitted.reconstructor(torch.eye(WIDTH)) - fitted.reconstructor(torch.zeros(1, WIDTH))
    assert learned.detach().numpy() == pytest.approx(best, abs=0.06)


def test_denoising_autoencoder(stream: TokenStream) -> None:
    schedule = Schedule(epochs=15, tokens_per_image=5, batch_size=64, learning_rate=0.01)
    fitted = fit_denoising_autoencoder(stream, 12, schedule, noise=0.5)
    clean = stream.sample(200, held_out=True)
    generator = torch.Generator().manual_seed(9)
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        error = (fitted.reconstructor(noisy) - clean).square().mean().item()
    assert error < 0.8 * 0.25, "no better than leaving the noise in"
    assert reconstruction_error(fitted.reconstructor, clean) < 0.2


def test_costs_are_equal(stream: TokenStream) -> None:
    def weights(fitted: GatedResidual) -> int:
        trained = fitted.reconstructor.named_parameters()
        return sum(p.numel() for name, p in trained if "log_var" not in name)

    schedule = Schedule(epochs=1)
    rbm = weights(fit_rbm_to_tokens(stream, 8, schedule))
    assert weights(fit_denoising_autoencoder(stream, 8, schedule)) == rbm
    assert weights(fit_linear_adapter(stream, 4, schedule)) == rbm - 8  # no hidden biases


FITS: list[Callable[[TokenStream, Schedule], GatedResidual]] = [
    lambda stream, schedule: fit_rbm_to_tokens(stream, 4, schedule),
    lambda stream, schedule: fit_denoising_autoencoder(stream, 4, schedule),
    lambda stream, schedule: fit_linear_adapter(stream, 2, schedule),
]


def test_all_see_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TokenStream(features(100), block=32)
    original = stream.epoch
    seen: list[list[Tensor]] = []

    def recorded(*arguments: Any, **options: Any) -> Iterator[Tensor]:
        for rows in original(*arguments, **options):
            seen[-1].append(rows.clone())
            yield rows

    monkeypatch.setattr(stream, "epoch", recorded)
    for fit in FITS:
        seen.append([])
        fit(stream, Schedule(epochs=2, batch_size=64, seed=3))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("fit", FITS[1:])
def test_seeds(fit: Callable[[TokenStream, Schedule], GatedResidual]) -> None:
    stream = TokenStream(features(60))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        results.append(fit(stream, Schedule(epochs=1, seed=seed)).reconstructor.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_errors(stream: TokenStream) -> None:
    for wrong in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=rf"n_components must lie in 1\.\.6, got {wrong}"):
            fit_pca(stream, wrong)
    with pytest.raises(ValueError, match="fit_denoising_autoencoder: noise must be 0 or more"):
        fit_denoising_autoencoder(stream, 3, noise=-1.0)
    with pytest.raises(ValueError, match="fit_linear_adapter: noise must be 0 or more"):
        fit_linear_adapter(stream, 3, noise=float("inf"))
    with pytest.raises(ValueError, match="Gaussian"):
        fit_random_rbm(stream, RBM(WIDTH, 3))


@pytest.mark.parametrize(
    "control",
    [ShrinkToMean(blip.WIDTH), PCAReconstructor(blip.WIDTH, 5), TiedAutoencoder(blip.WIDTH, 3)],
    ids=lambda control: type(control).__name__,
)
def test_a_control_stands_in_a_captioner(control: torch.nn.Module) -> None:
    """What the decoder sees is what a gated residual with this control makes of the states."""
    torch.manual_seed(0)
    model, _ = blip.tiny_blip()
    width = model.config.vision_config.hidden_size
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fitted = GatedResidual(control, torch.full((width,), 0.5), torch.full((width,), 2.0))
    pixels = torch.randn(2, 3, blip.SIDE, blip.SIDE)
    with torch.inference_mode():
        states = model.vision_model(pixels).last_hidden_state
        apply_to_blip(model, fitted, strength=0.6)
        expected = GatedResidual(control, fitted.mean, fitted.scale, strength=0.6)(states)
        assert torch.equal(model.vision_model(pixels).last_hidden_state, expected)
