"""Streams of tokens, and RBMs fitted to them: against numpy and exact likelihoods."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blip_integration.fitting import (
    Schedule,
    TokenStream,
    fit_rbm,
    fit_rbm_to_tokens,
    reconstruction_error,
)
from blip_integration.gated_residual import RBMReconstructor
from rbm_kernels import RBM

KINDS: dict[str, slice] = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}


def features(n: int = 50, length: int = 7, width: int = 5) -> Any:
    """Features far from standardized: other means and scales for each, and one that is constant."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, length, width)) * np.arange(1, width + 1) + 10
    rows[..., 2] = 3.0
    return rows.astype(np.float16)


def two_causes(n: int = 3000, noise: float = 0.5) -> Tensor:
    """Rows [n, 6] made by two binary causes and Gaussian noise."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randint(0, 2, (n, 2), generator=generator).float()
    patterns = torch.tensor([[2.0, 2, 2, 0, 0, 0], [0, 0, -2, 2, 2, 2]])
    return causes @ patterns + noise * torch.randn(n, 6, generator=generator)


def exact_log_likelihood(rbm: RBM, v: Tensor) -> float:
    """Mean log p(v) in nats, Z summed over all hidden states."""
    W, b, c, log_var = (p.detach().double() for p in rbm.parameters())
    variance = log_var.exp()
    h = torch.tensor(np.indices((2,) * rbm.n_hidden).reshape(rbm.n_hidden, -1).T).double()
    mean = b + h @ W.T
    log_weights = h @ c + ((mean.square() - b.square()) / (2 * variance)).sum(1)
    log_z = torch.logsumexp(log_weights, 0) + 0.5 * (2 * math.pi * variance).log().sum()
    v = v.double()
    hidden = torch.nn.functional.softplus(c + (v / variance) @ W).sum(1)
    return (hidden - ((v - b).square() / (2 * variance)).sum(1) - log_z).mean().item()


class Recorder:
    """Features that are made when they are asked for; notes what was read and what is alive."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.reads: list[tuple[int, int]] = []
        self.alive: list[weakref.ref[Any]] = []
        self.most_alive = 0

    def __getitem__(self, rows: slice) -> Any:
        start, stop, _ = rows.indices(self.shape[0])
        self.reads.append((start, stop))
        self.most_alive = max(self.most_alive, 1 + sum(ref() is not None for ref in self.alive))
        made = np.random.default_rng(start).normal(size=(stop - start, *self.shape[1:]))
        self.alive = [weakref.ref(made)]
        return made


@pytest.mark.parametrize("tokens", KINDS)
@pytest.mark.parametrize("block", [1, 8, 1000])
def test_statistics(tokens: Any, block: int) -> None:
    given = features()
    stream = TokenStream(given, tokens, block=block)
    kept = given[:, KINDS[tokens]].astype(np.float64).reshape(-1, 5)
    scale = kept.std(0)
    scale[2] = 1.0
    np.testing.assert_allclose(stream.mean.numpy(), kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stream.scale.numpy(), scale, rtol=1e-5)


def test_statistics_of_large_means() -> None:
    """Where sums of squares would lose every digit."""
    rows = torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    stream = TokenStream(rows, block=7)
    assert stream.scale.numpy() == pytest.approx(
        rows.double().std((0, 1), correction=0).numpy(), 1e-3
    )


@pytest.mark.parametrize("source", ["tensor", "memmap", "cache", "pooled"])
def test_sources_agree(source: str, tmp_path: Path) -> None:
    given = features(length=1 if source == "pooled" else 7)
    expected = TokenStream(torch.from_numpy(given), block=16)
    other: Any = given
    if source == "memmap":
        np.save(tmp_path / "features.npy", given)
        other = np.load(tmp_path / "features.npy", mmap_mode="r")
    elif source == "cache":  # as FeatureCache does: slices are float32 tensors

        class Cache:
            shape = given.shape

            def __getitem__(self, rows: slice) -> Tensor:
                return torch.from_numpy(given[rows].astype(np.float32))

        other = Cache()
    elif source == "pooled":
        other = given[:, 0]
    stream = TokenStream(other, block=16)
    assert torch.equal(stream.mean, expected.mean)
    batches = list(stream.epoch(32, 3, seed=1))
    assert all(b.dtype == torch.float32 for b in batches)
    for got, rows in zip(batches, expected.epoch(32, 3, seed=1), strict=True):
        assert torch.equal(got, rows)


@pytest.mark.parametrize("tokens", KINDS)
def test_epoch_draws_tokens_of_every_image(tokens: Any) -> None:
    n, length = 45, 6
    numbers = torch.arange(n * length, dtype=torch.float32).reshape(n, length, 1)
    stream = TokenStream(numbers, tokens, held_out=0.2, block=8)
    asked = 4
    batches = list(stream.epoch(10, asked, seed=3))
    assert len(batches) == stream.batches(10, asked)
    assert {len(b) for b in batches[:-1]} == {10}
    seen = (torch.cat(batches) * stream.scale + stream.mean).round().long().flatten()
    assert len(seen.unique()) == len(seen), "a token came twice"
    images, kept = seen // length, torch.arange(length)[KINDS[tokens]]
    assert set((seen % length).tolist()) <= set(kept.tolist())
    counts = torch.bincount(images, minlength=n)
    assert counts[stream.held_out].sum() == 0
    assert set(counts[~stream.held_out].tolist()) == {min(asked, len(kept))}
    assert int(stream.held_out.sum()) == 9
    held = (stream.sample(20, held_out=True) * stream.scale + stream.mean).round().long().flatten()
    assert bool(stream.held_out[held // length].all())
    again = list(stream.epoch(10, asked, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], next(stream.epoch(10, asked, seed=4)))


def test_tokens_are_drawn_evenly() -> None:
    """Chi-square over the positions of the tokens drawn in many epochs."""
    stream = TokenStream(torch.arange(8.0).repeat(40, 1)[..., None], held_out=0.0)
    drawn = torch.cat([rows for seed in range(50) for rows in stream.epoch(64, 2, seed)])
    counts = torch.bincount((drawn * stream.scale + stream.mean).round().long().flatten())
    expected = 40 * 2 * 50 / 8
    assert ((counts - expected).square() / expected).sum() < 24.3  # 0.999 quantile of 7 degrees


def test_memory_holds_one_block() -> None:
    """Reading never asks for more than a block, and lets go of it before the next one."""
    source = Recorder((600, 9, 4))
    stream = TokenStream(source, block=50)
    assert source.reads == [(start, start + 50) for start in range(0, 600, 50)]
    source.reads.clear()
    history: list[dict[str, float]] = []
    schedule = Schedule(epochs=2, tokens_per_image=2, batch_size=64)
    fit_rbm_to_tokens(stream, 3, schedule, on_epoch=history.append)
    assert all(stop - start == 50 for start, stop in source.reads)
    assert source.most_alive == 1
    # Two epochs, and the rows that are monitored: held-out ones twice.
    assert len(source.reads) <= (2 + 3) * 12
    assert history[-1]["rows"] == 2 * 2 * 570


def test_fit_finds_two_causes() -> None:
    """Likelihoods of held-out rows against those of independent Gaussian features."""
    stream = TokenStream(two_causes()[:, None], held_out=0.1)
    schedule = Schedule(epochs=30, batch_size=64, learning_rate=0.01)
    history: list[dict[str, float]] = []
    fitted = fit_rbm_to_tokens(stream, 2, schedule, on_epoch=history.append)
    held_out = stream.sample(300, held_out=True)
    independent = RBM(6, 1, "gaussian")
    with torch.no_grad():
        independent.W.zero_()
    gain = exact_log_likelihood(fitted.reconstructor.rbm, held_out)
    gain -= exact_log_likelihood(independent, held_out)
    assert gain > 1.5
    # The noise is all that the two causes leave unexplained.
    noise = (0.5 / stream.scale).square().mean().item()
    assert history[-1]["reconstruction_error"] == pytest.approx(noise, rel=0.1)
    assert history[0]["reconstruction_error"] == pytest.approx(1, abs=0.1)


def test_learned_sigma() -> None:
    """Learned, it comes nearer to the noise's than where it started, and the likelihood rises."""
    stream = TokenStream(two_causes()[:, None], held_out=0.1)
    schedule = Schedule(epochs=20, batch_size=64, learning_rate=0.01)
    truth = 0.5 / stream.scale
    held_out = stream.sample(300, held_out=True)
    fixed, learned = (
        fit_rbm_to_tokens(stream, 2, schedule, sigma=0.8, learn_sigma=each).reconstructor.rbm
        for each in (False, True)
    )
    assert torch.equal(fixed.log_var, torch.full((6,), 2 * math.log(0.8)))
    assert bool(((0.5 * learned.log_var).exp() - truth < 0.8 - truth).all())
    assert exact_log_likelihood(learned, held_out) > exact_log_likelihood(fixed, held_out) + 0.2


def test_learned_sigma_has_a_floor() -> None:
    """Features that the hidden units explain exactly would drive their variances to zero."""
    stream = TokenStream(two_causes(noise=0.0)[:, None], held_out=0.1)
    schedule = Schedule(epochs=30, batch_size=32, learning_rate=0.1)
    rbm = fit_rbm_to_tokens(stream, 4, schedule, learn_sigma=True).reconstructor.rbm
    assert rbm.log_var.min().item() == pytest.approx(2 * math.log(0.05))


def test_fit_depends_on_its_seed_alone() -> None:
    stream = TokenStream(features())
    schedule = Schedule(epochs=2, batch_size=32, seed=7)
    first = fit_rbm_to_tokens(stream, 4, schedule).reconstructor.rbm
    torch.manual_seed(123)
    second = fit_rbm_to_tokens(stream, 4, schedule, backend="reference").reconstructor.rbm
    third = fit_rbm_to_tokens(
        stream, 4, Schedule(epochs=2, batch_size=32, seed=8)
    ).reconstructor.rbm
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.W, third.W)
    assert all(p.grad is None for p in first.parameters())


def test_history() -> None:
    stream = TokenStream(features(200), held_out=0.2)
    history: list[dict[str, float]] = []
    schedule = Schedule(epochs=2, batch_size=32)
    fitted = fit_rbm_to_tokens(stream, 4, schedule, on_epoch=history.append)
    assert [h["epoch"] for h in history] == [0, 1, 2]
    held_out, train = (stream.sample(2048, held_out=each) for each in (True, False))
    rbm, last = fitted.reconstructor.rbm, history[-1]
    gap = rbm.free_energy(held_out).mean() - rbm.free_energy(train).mean()
    assert last["free_energy_gap"] == pytest.approx(gap.item(), rel=1e-3, abs=1e-3)
    W, b, c, log_var = (p.detach().double().numpy() for p in rbm.parameters())
    z = held_out.double().numpy()
    mean_field = 1 / (1 + np.exp(-(z / np.exp(log_var)) @ W - c)) @ W.T + b
    assert last["reconstruction_error"] == pytest.approx(((mean_field - z) ** 2).mean(), rel=1e-5)
    everything = TokenStream(features(), held_out=0.0)
    fit_rbm_to_tokens(everything, 4, Schedule(epochs=1), on_epoch=history.append)
    nothing = history[-1]
    assert math.isnan(nothing["free_energy_gap"]) and math.isnan(nothing["reconstruction_error"])


def test_schedule_rates() -> None:
    schedule = Schedule(warmup=0.1)
    shares = [schedule.share(update, 100) for update in range(100)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert shares[10:] == pytest.approx([math.cos(math.pi / 2 * i / 90) ** 2 for i in range(90)])
    assert Schedule(warmup=0.0).share(0, 5) == 1.0
    assert Schedule(warmup=1.0).share(4, 5) == 1.0


def test_reconstruction_error() -> None:
    rows = torch.randn(20, 3)
    reconstruct = RBMReconstructor(RBM(3, 2, "gaussian"))
    with torch.no_grad():
        reconstruct.rbm.W.zero_()
    assert reconstruction_error(reconstruct, rows) == pytest.approx(rows.square().mean().item())


def test_errors() -> None:
    given = features()
    for match, arguments, options in (
        (r"\[N, L, D\] or \[N, D\], got \[50\]", (given[:, 0, 0],), {}),
        (r"a token among 'patches'.*\[50, 1, 5\]", (given[:, :1], "patches"), {}),
        (r"an image or more.*\[0, 7, 5\]", (given[:0],), {}),
        ("tokens must be one of", (given, "patch"), {}),
        ("held_out must lie in", (given,), {"held_out": 1.0}),
        ("block must be 1 or more, got 0", (given,), {"block": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            TokenStream(*arguments, **options)
    for wrong in (np.nan, np.inf):
        bad = given.copy()
        bad[33, 2, 1] = wrong
        with pytest.raises(ValueError, match="NaN or infinity in image 33"):
            TokenStream(bad, block=8)
    stream = TokenStream(given)
    with pytest.raises(ValueError, match=r"sigma must be positive and finite, got 0\.0"):
        fit_rbm_to_tokens(stream, 3, sigma=0.0)
    with pytest.raises(ValueError, match="n_hidden must be an int of 1 or more"):
        fit_rbm_to_tokens(stream, 0)
    with pytest.raises(ValueError, match="must be finite"):
        fit_rbm_to_tokens(stream, 3, Schedule(epochs=2, batch_size=8, learning_rate=1e30))
    for name, value in (("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("warmup", 1.5)):
        with pytest.raises(ValueError, match=f"Schedule: {name} must"):
            Schedule(**{name: value})


@pytest.mark.parametrize("cls_token", ["shared", "skip", "apart"])
def test_fit_to_a_captioners_images(cls_token: Any) -> None:
    """Statistics, widths and RBMs are those of the tokens that each of them adjusts."""
    pytest.importorskip("transformers")
    from support import blip

    model, _ = blip.tiny_blip()
    pixels = torch.randn(12, 3, blip.SIDE, blip.SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = model.vision_model(pixels).last_hidden_state  # [12, 17, 16]
    schedule = Schedule(epochs=2, batch_size=16)
    fitted = fit_rbm(model, pixels, 5, schedule, cls_token=cls_token, batch_size=5)
    assert fitted.cls_token == cls_token and fitted.strength in (0.0, (0.0, 0.0))
    parts = {"shared": [states], "skip": [states[:, 1:]], "apart": [states[:, :1], states[:, 1:]]}
    rows = [part.flatten(0, 1) for part in parts[cls_token]]
    mean = torch.stack([each.mean(0) for each in rows]).view_as(fitted.mean)
    scale = torch.stack([each.std(0, correction=0) for each in rows]).view_as(fitted.scale)
    torch.testing.assert_close(fitted.mean, mean, atol=2e-3, rtol=2e-3)  # states in float16
    torch.testing.assert_close(fitted.scale, scale, atol=2e-3, rtol=2e-3)
    assert fitted.reconstructor.n_hidden == 5
    # The states themselves make the same RBM, whatever the captioner is asked for besides.
    again = fit_rbm(model, states.half(), 5, schedule, cls_token=cls_token)
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match=r"\[N, L, 16\], got \[12, 17, 9\]"):
        fit_rbm(model, states[..., :9])
    with pytest.raises(ValueError, match="must be ImageFiles, .* got list"):
        fit_rbm(model, ["a.jpg"])
    with pytest.raises(ValueError, match="cls_token must be one of"):
        fit_rbm(model, states, cls_token="both")
    with pytest.raises(ValueError, match="one image or more"):
        fit_rbm(model, pixels[:0])


@pytest.mark.parametrize("kind", ["list", "table", "sparse", "int64", "tensor int16"])
def test_features_of_other_kinds(kind: str) -> None:
    rows = np.random.default_rng(0).integers(-3, 4, (12, 5))
    data = {
        "list": rows.tolist(),
        "table": pytest.importorskip("pandas").DataFrame(rows),
        "sparse": pytest.importorskip("scipy.sparse").csr_array(rows),
        "int64": rows,
        "tensor int16": torch.from_numpy(rows.astype(np.int16)),
    }[kind]
    expected = TokenStream(torch.from_numpy(rows).float())
    found = TokenStream(data)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.scale, expected.scale)
    for x, y in zip(found.epoch(4, 1, 0), expected.epoch(4, 1, 0), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "features", ["text", None, np.array([["a"]]), np.ones((4, 3)) * 1j, [["a", "b"]]], ids=repr
)
def test_features_that_are_no_numbers(features: Any) -> None:
    with pytest.raises(TypeError, match="TokenStream: features must"):
        TokenStream(features)
