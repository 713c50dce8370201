"""Controls of equal cost: what else could stand behind the gate, fitted on the same stream.

An RBM earns its place only where it does better than these (see docs/captioning.md). Each function
returns a ``GatedResidual``, as ``blip_integration.fit_rbm`` does; the gate, the statistics, the
rows, their order, the batches and the learning rates are the same for all.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration

from blip_integration.fitting import DEFAULT_SCHEDULE, Schedule, TokenStream, train
from blip_integration.gated_residual import GatedResidual, RBMReconstructor
from blip_integration.modeling import apply_rbm_to_blip
from rbm_kernels import RBM


class ShrinkToMean(nn.Module):
    """The control without parameters: every feature vector is reconstructed as the mean."""

    def __init__(self, n_visible: int, n_hidden: int = 0) -> None:
        super().__init__()
        self.n_visible, self.n_hidden = n_visible, n_hidden

    def forward(self, z: Tensor) -> Tensor:
        """[N, D] to zeros [N, D], which is where standardized features have their mean."""
        return torch.zeros_like(z)


class PCAReconstructor(nn.Module):
    """Projection on the leading principal components.

    Attributes:
        components: Orthonormal columns [D, n_hidden], largest variance first.
    """

    def __init__(self, n_visible: int, n_hidden: int) -> None:
        super().__init__()
        self.n_visible, self.n_hidden = n_visible, n_hidden
        self.components = nn.Parameter(torch.empty(n_visible, n_hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the components the first coordinates."""
        nn.init.eye_(self.components)

    def forward(self, z: Tensor) -> Tensor:
        """[N, D] to its projection [N, D]."""
        projection: Tensor = (z @ self.components) @ self.components.t()
        return projection


class TiedAutoencoder(nn.Module):
    """``z -> W sigmoid(W'z + c) + b``: the RBM's mean field with parameters of its own making.

    An RBM of as many hidden units has as many parameters. To be fitted as a denoising autoencoder
    (Vincent et al., "Extracting and composing robust features with denoising autoencoders", ICML
    2008) by ``fit_denoising_autoencoder``.
    """

    def __init__(self, n_visible: int, n_hidden: int) -> None:
        super().__init__()
        self.n_visible, self.n_hidden = n_visible, n_hidden
        self.W = nn.Parameter(torch.empty(n_visible, n_hidden))
        self.b = nn.Parameter(torch.empty(n_visible))
        self.c = nn.Parameter(torch.empty(n_hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``W ~ N(0, 0.01^2)``, as an RBM does, and set the biases to zero."""
        nn.init.normal_(self.W, std=0.01)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)

    def forward(self, z: Tensor) -> Tensor:
        """[N, D] to its reconstruction [N, D]."""
        hidden = torch.sigmoid(z @ self.W + self.c)
        reconstruction: Tensor = hidden @ self.W.t() + self.b
        return reconstruction


class LinearAdapter(nn.Module):
    """``z -> z + V(U'z) + b`` of rank ``n_hidden``: a residual adapter without a nonlinearity.

    Half the rank of an RBM's hidden units makes as many weights.
    """

    def __init__(self, n_visible: int, n_hidden: int) -> None:
        super().__init__()
        self.n_visible, self.n_hidden = n_visible, n_hidden
        self.down = nn.Parameter(torch.empty(n_visible, n_hidden))
        self.up = nn.Parameter(torch.empty(n_hidden, n_visible))
        self.bias = nn.Parameter(torch.empty(n_visible))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it the identity, with ``down`` ready to learn (Houlsby et al., ICML 2019)."""
        nn.init.normal_(self.down, std=0.01)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.bias)

    def forward(self, z: Tensor) -> Tensor:
        """[N, D] to [N, D]."""
        adapted: Tensor = z + (z @ self.down) @ self.up + self.bias
        return adapted


def fit_shrink_to_mean(stream: TokenStream) -> GatedResidual:
    """The control without parameters: the gate mixes in the mean of the features."""
    return _unchanging(ShrinkToMean(stream.width), stream)


def fit_random_rbm(stream: TokenStream, rbm: RBM, *, seed: int = 0) -> GatedResidual:
    """An RBM whose weights say nothing: those of a fitted one in a random order.

    All moments of the weights and of the hidden biases stay what they were; the visible biases and
    log-variances, which speak of single features, are kept.

    Args:
        stream: The tokens.
        rbm: A fitted Gaussian RBM, which is copied.
        seed: Seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = RBM(rbm.n_visible, rbm.n_hidden, rbm.visible, dtype=rbm.W.dtype)
    shuffled.load_state_dict(rbm.state_dict())
    with torch.no_grad():
        for weight in (shuffled.W, shuffled.c):
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return _unchanging(RBMReconstructor(shuffled), stream)


def fit_pca(stream: TokenStream, n_components: int) -> GatedResidual:
    """The leading principal components of the standardized tokens, from one pass over them.

    Args:
        stream: The tokens; those of held-out images are left out.
        n_components: From 1 to D. An RBM of H hidden units has more weights than D components, so
            no number makes the costs equal; choose it like the gate.

    Raises:
        ValueError: A number out of range.
    """
    if not 1 <= n_components <= stream.width:
        raise ValueError(f"fit_pca: n_components must lie in 1..{stream.width}, got {n_components}")
    from sklearn.decomposition import IncrementalPCA

    incremental = IncrementalPCA()  # Of all components: it is exact as long as it drops none.
    for rows in stream.epoch(4096, stream.n_tokens, seed=0):
        incremental.partial_fit(rows.numpy())
    pca = PCAReconstructor(stream.width, n_components)
    with torch.no_grad():
        pca.components.copy_(torch.from_numpy(incremental.components_[:n_components].T))
    return _unchanging(pca, stream)


def fit_denoising_autoencoder(
    stream: TokenStream,
    n_hidden: int,
    schedule: Schedule = DEFAULT_SCHEDULE,
    *,
    noise: float = 0.5,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> GatedResidual:
    """A tied autoencoder that gives back clean rows for noisy ones (Vincent et al. 2008).

    Its mean field has the form and the parameters of an RBM's with ``n_hidden`` hidden units, and
    it has as many updates of as many rows; only what it learns from differs.

    Args:
        stream: The tokens.
        n_hidden: Hidden units H.
        schedule: How long and how fast to train.
        noise: Standard deviation of the Gaussian noise, in standard deviations of the features.
        device: Where to compute.
        progress: Show a progress bar.

    Raises:
        ValueError: A negative or infinite ``noise``.
    """
    model = TiedAutoencoder(stream.width, n_hidden)
    with torch.no_grad():
        model.W.copy_(0.01 * torch.randn(model.W.shape, generator=_generator(schedule)))
    return _fit_denoiser(
        "fit_denoising_autoencoder", model, stream, schedule, noise, device, progress
    )


def fit_linear_adapter(
    stream: TokenStream,
    rank: int,
    schedule: Schedule = DEFAULT_SCHEDULE,
    *,
    noise: float = 0.5,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> GatedResidual:
    """A linear residual adapter that gives back clean rows for noisy ones.

    Args:
        stream: The tokens.
        rank: Rank of the adapter; H / 2 makes as many weights as an RBM of H hidden units has.
        schedule: How long and how fast to train.
        noise: As in ``fit_denoising_autoencoder``.
        device: Where to compute.
        progress: Show a progress bar.

    Raises:
        ValueError: A negative or infinite ``noise``.
    """
    model = LinearAdapter(stream.width, rank)
    with torch.no_grad():
        model.down.copy_(0.01 * torch.randn(model.down.shape, generator=_generator(schedule)))
    return _fit_denoiser("fit_linear_adapter", model, stream, schedule, noise, device, progress)


def _generator(schedule: Schedule) -> torch.Generator:
    return torch.Generator().manual_seed(schedule.seed)


def _unchanging(reconstructor: torch.nn.Module, stream: TokenStream) -> GatedResidual:
    """What took no updates to fit."""
    return GatedResidual(reconstructor, stream.mean, stream.scale).eval()


def _fit_denoiser(
    name: str,
    model: TiedAutoencoder | LinearAdapter,
    stream: TokenStream,
    schedule: Schedule,
    noise: float,
    device: torch.device | str,
    progress: bool,
) -> GatedResidual:
    if not 0 <= noise < math.inf:
        raise ValueError(f"{name}: noise must be 0 or more and finite, got {noise}")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    generator = _generator(schedule)

    def gradients(rows: Tensor) -> None:
        noisy = rows + noise * torch.randn(rows.shape, generator=generator).to(rows.device)
        loss = (model(noisy) - rows).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

    train(stream, model, optimizer, gradients, schedule, device=device, progress=progress)
    model.zero_grad(set_to_none=True)
    return GatedResidual(model.cpu(), stream.mean, stream.scale).eval()


def apply_to_blip(
    model: BlipForConditionalGeneration, fitted: GatedResidual, strength: float
) -> None:
    """Put an RBM or a control between a captioner's vision model and its decoder, in place.

    A saved model's config describes RBMs alone, so one with a control is not to be saved.

    Args:
        model: The captioner.
        fitted: What stands between them; copied.
        strength: The share of its reconstruction in the features.
    """
    apply_rbm_to_blip(model, RBM(fitted.n_visible, 1, "gaussian"))
    residual = copy.deepcopy(fitted)
    residual.set_strength(strength)
    model.vision_model.rbm = residual.to(model.device, model.dtype).train(model.training)
