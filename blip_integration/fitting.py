"""Fitting RBMs to a captioner's vision features, which may be streamed from disk.

    fitted = fit_rbm(model, pixel_values, n_hidden=1000)
    apply_rbm_to_blip(model, fitted, strength=0.2)

``fit_rbm_to_tokens`` does the work on a ``TokenStream``: standardized rows in a seeded order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BlipForConditionalGeneration

from rbm_kernels import RBM
from rbm_kernels.inputs import as_states
from rbm_kernels.training import ContrastiveDivergence, DrawOptions, optimize

from .gated_residual import CLS_TOKENS, ClsToken, GatedResidual, RBMReconstructor
from .images import ImageFiles, image_states

MONITORED_ROWS = 2048
"""The number of rows of held-out and of training images that are evaluated after each epoch."""

Tokens: TypeAlias = Literal["all", "cls", "patches"]
_TOKENS: dict[str, slice] = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}


class TokenStream:
    """Standardized tokens of a set of images, read block by block as they are needed.

    One pass over the features computes their statistics (Chan, Golub and LeVeque's pairwise update,
    1979) and checks that they are finite. An epoch visits blocks of neighboring images in a random
    order, so that reading stays sequential, draws some tokens of every image, shuffles those of a
    block, and cuts them into batches. Memory holds one block, however many images there are.

    Args:
        features: [N, L, D] or, with one token an image, [N, D]: a tensor, or whatever has
            ``shape`` and slices of rows, such as a numpy memmap or a ``FeatureCache``. Tables,
            lists and sparse matrices become a tensor first (see ``rbm_kernels.inputs``).
        tokens: ``"all"``, ``"cls"`` (token 0) or ``"patches"`` (the others).
        held_out: The share of the images that no epoch visits, in [0, 1). Unless it is 0, one image
            or more is held out where there are two or more.
        block: The number of images that are read at a time.
        seed: The seed that chooses the held-out images.

    Attributes:
        mean: Mean [D] of all tokens, float32.
        scale: Their standard deviation [D], float32; 1 where a feature never changes.

    Raises:
        TypeError: Features that are no numbers.
        ValueError: A wrong shape or value, or features that are not finite; the message says which.

    Example:
        >>> stream = TokenStream(torch.randn(20, 5, 3), held_out=0.1)
        >>> sum(len(rows) for rows in stream.epoch(batch_size=16, tokens_per_image=2, seed=0))
        36
    """

    def __init__(
        self,
        features: Any,
        tokens: Tokens = "all",
        *,
        held_out: float = 0.05,
        block: int = 256,
        seed: int = 0,
    ) -> None:
        features = _rows_of("TokenStream", "features", features)
        shape = tuple(features.shape)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"TokenStream: features must be [N, L, D] or [N, D], got {list(shape)}"
            )
        if tokens not in _TOKENS:
            raise ValueError(f"TokenStream: tokens must be one of {tuple(_TOKENS)}, got {tokens!r}")
        if not 0 <= held_out < 1:
            raise ValueError(f"TokenStream: held_out must lie in [0, 1), got {held_out}")
        if block < 1:
            raise ValueError(f"TokenStream: block must be 1 or more, got {block}")
        length = 1 if len(shape) == 2 else shape[1]
        self._kept = range(length)[_TOKENS[tokens]]
        if not (shape[0] and len(self._kept) and shape[-1]):
            raise ValueError(
                f"TokenStream: features must hold an image or more, a token among {tokens!r} and a "
                f"feature, got {list(shape)}"
            )
        self.features = features
        self.n_images, self.n_tokens, self.width = shape[0], len(self._kept), shape[-1]
        self.block = block
        count = round(held_out * self.n_images)
        if held_out:
            count = min(max(count, 1), self.n_images - 1)
        order = torch.randperm(self.n_images, generator=_generator(seed))
        self.held_out = torch.zeros(self.n_images, dtype=torch.bool)
        self.held_out[order[:count]] = True
        self.mean, self.scale = self._statistics()

    def epoch(self, batch_size: int, tokens_per_image: int, seed: int) -> Iterator[Tensor]:
        """One pass over the images that are not held out.

        Args:
            batch_size: Rows at a time; the last batch of a block goes on in the next, and only the
                last of an epoch may be short.
            tokens_per_image: Tokens drawn from every image, without replacement; at most all.
            seed: The seed of the order and of the choice of tokens.

        Yields:
            Standardized rows [batch_size, D], float32.
        """
        generator = _generator(seed)
        starts = torch.arange(0, self.n_images, self.block)
        left = torch.empty(0, self.width)
        for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
            images = (~self.held_out[start : start + self.block]).nonzero().flatten()
            rows = self._draw(start, images, tokens_per_image, generator)
            rows = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
            whole = len(rows) // batch_size * batch_size
            for first in range(0, whole, batch_size):
                yield rows[first : first + batch_size]
            left = rows[whole:]
        if len(left):
            yield left

    def batches(self, batch_size: int, tokens_per_image: int) -> int:
        """How many batches an epoch has."""
        images = self.n_images - int(self.held_out.sum())
        return -(-images * min(tokens_per_image, self.n_tokens) // batch_size)

    def sample(self, rows: int, *, held_out: bool, seed: int = 0) -> Tensor:
        """Some standardized rows [rows or fewer, D] of the images held out or of the others."""
        generator = _generator(seed)
        images = (self.held_out if held_out else ~self.held_out).nonzero().flatten()
        per_image = min(self.n_tokens, -(-rows // max(1, len(images))))
        wanted = -(-rows // per_image)
        images = images[torch.randperm(len(images), generator=generator)[:wanted]].sort().values
        drawn = [
            self._draw(start, mine - start, per_image, generator)
            for start in range(0, self.n_images, self.block)
            if len(mine := images[(images >= start) & (images < start + self.block)])
        ]
        return torch.cat(drawn)[:rows] if drawn else torch.empty(0, self.width)

    def _read(self, start: int) -> Any:
        """A block [n, L, D] as the features give it; a slice of a memmap is not read yet."""
        block = self.features[start : start + self.block]
        return block if len(block.shape) == 3 else block[:, None]

    def _draw(
        self, start: int, images: Tensor, per_image: int, generator: torch.Generator
    ) -> Tensor:
        """Standardized rows of tokens drawn from some images of the block at ``start``."""
        per_image = min(per_image, self.n_tokens)
        choice = torch.rand(len(images), self.n_tokens, generator=generator).argsort(1)[
            :, :per_image
        ]
        tokens = choice + self._kept.start
        where = images[:, None].expand_as(tokens)
        block = self._read(start)
        index = (where, tokens) if isinstance(block, Tensor) else (where.numpy(), tokens.numpy())
        rows = _float32(block[index]).reshape(-1, self.width)
        return (rows - self.mean) / self.scale

    def _statistics(self) -> tuple[Tensor, Tensor]:
        count = 0
        mean = torch.zeros(self.width, dtype=torch.float64)
        squares = torch.zeros(self.width, dtype=torch.float64)  # of the deviations from the mean
        for start in range(0, self.n_images, self.block):
            kept = slice(self._kept.start, self._kept.stop)
            rows = _float32(self._read(start)[:, kept]).reshape(-1, self.width)
            variance, here = torch.var_mean(rows, dim=0, correction=0)
            if not bool(torch.isfinite(variance).all()):
                self._report_image(start, rows)
            total = count + len(rows)
            delta = here.double() - mean
            squares += variance.double() * len(rows) + delta.square() * (count * len(rows) / total)
            mean += delta * (len(rows) / total)
            count = total
        deviation = (squares / count).sqrt()
        # Rounding can leave a feature that never changes a tiny deviation.
        constant = deviation <= 1e-6 * mean.abs()
        return mean.float(), torch.where(constant, 1.0, deviation).float()

    def _report_image(self, start: int, rows: Tensor) -> None:
        wrong = ~torch.isfinite(rows).all(1)
        if bool(wrong.any()):
            image = start + int(wrong.nonzero()[0]) // self.n_tokens
            raise ValueError(
                f"TokenStream: features must be finite, got NaN or infinity in image {image}"
            )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows_of(where: str, name: str, features: Any) -> Any:
    """What has a shape and gives slices of rows stays as it is, unread; all else becomes a tensor.

    Raises:
        TypeError: What is given are no numbers.
    """
    sliced = hasattr(features, "shape") and not (
        hasattr(features, "to_numpy") or hasattr(features, "toarray")
    )
    if isinstance(features, np.ndarray):
        sliced = features.dtype.kind in "buif" and not isinstance(features, np.ma.MaskedArray)
    if sliced and not isinstance(features, Tensor):
        return features
    return as_states(where, name, features)


def _float32(values: Any) -> Tensor:
    """A tensor of its own from a slice of a tensor or of a numpy array."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float32)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: the same for an RBM and for what it is compared with.

    Attributes:
        epochs: The passes over the images.
        tokens_per_image: The tokens that an epoch draws from each image.
        batch_size: The rows of an update.
        learning_rate: The highest rate of Adam, between a linear warm-up and a cosine to zero.
        warmup: The share of the updates in which the learning rate rises, 0 to 1.
        seed: The seed of initial weights, order, choice of tokens, chains and noise.
    """

    epochs: int = 10
    tokens_per_image: int = 8
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "tokens_per_image", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Schedule: {name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"Schedule: learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"Schedule: warmup must lie in [0, 1], got {self.warmup}")

    def share(self, update: int, updates: int) -> float:
        """The learning rate's share of its highest value at an update, from 0."""
        rising = round(self.warmup * updates)
        if update < rising:
            return (update + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (update - rising) / max(1, updates - rising)))


DEFAULT_SCHEDULE = Schedule()
Report: TypeAlias = Callable[[dict[str, float]], None]


def fit_rbm(
    model: BlipForConditionalGeneration,
    images_or_states: Any,
    n_hidden: int = 1000,
    schedule: Schedule = DEFAULT_SCHEDULE,
    *,
    cls_token: ClsToken = "shared",
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Any,
) -> GatedResidual:
    """Fit an RBM to what a captioner's vision model says of images.

    Args:
        model: The captioner that the RBM is for; it is not changed.
        images_or_states: Images: ``ImageFiles``, or ``pixel_values`` [N, 3, S, S] of the
            captioner's processor. Or the ``last_hidden_state`` [N, L, D] of its vision model: a
            tensor, or whatever has ``shape`` and gives slices of rows. The states of images are
            kept in memory; ``image_states`` keeps them on disk.
        n_hidden: The number H of hidden units.
        schedule: How long and how fast to train.
        cls_token: ``"shared"``: one RBM for all tokens. ``"skip"``: the CLS token is left alone.
            ``"apart"``: it has an RBM, statistics and a gate of its own.
        batch_size: Images that the vision model encodes at a time.
        device: Where to compute; None takes the model's device.
        progress: Show progress bars.
        **options: Further keywords of ``fit_rbm_to_tokens``.

    Returns:
        The RBM with the statistics of the features, for ``apply_rbm_to_blip``; its strength is 0.

    Raises:
        ValueError: A wrong shape or value, or features that are not finite.
    """
    width = model.config.vision_config.hidden_size
    shape = tuple(getattr(images_or_states, "shape", ()))
    are_images = isinstance(images_or_states, ImageFiles) or len(shape) == 4
    if not are_images and (len(shape) != 3 or shape[-1] != width):
        raise ValueError(
            "fit_rbm: images_or_states must be ImageFiles, pixel values [N, 3, S, S] or states "
            f"[N, L, D] = [N, L, {width}], got {list(shape) or type(images_or_states).__name__}"
        )
    if cls_token not in CLS_TOKENS:
        raise ValueError(f"fit_rbm: cls_token must be one of {CLS_TOKENS}, got {cls_token!r}")
    states = images_or_states
    if are_images:
        states = image_states(model, images_or_states, batch_size=batch_size, progress=progress)
    options |= {"device": model.device if device is None else device, "progress": progress}

    def fit_to(tokens: Tokens) -> GatedResidual:
        stream = TokenStream(states, tokens, seed=schedule.seed)
        return fit_rbm_to_tokens(stream, n_hidden, schedule, **options)

    if cls_token == "apart":
        return residual_of(fit_to("patches"), fit_to("cls"))
    fitted = fit_to("all" if cls_token == "shared" else "patches")
    fitted.cls_token = cls_token
    return fitted


def residual_of(patches: GatedResidual, cls: GatedResidual) -> GatedResidual:
    """One residual of two: one for the patches, and one for the CLS token.

    Args:
        patches: Fitted to the patches.
        cls: Fitted to the CLS tokens.
    """
    return GatedResidual(
        patches.reconstructor,
        torch.stack([cls.mean, patches.mean]),
        torch.stack([cls.scale, patches.scale]),
        cls_token="apart",
        cls_reconstructor=cls.reconstructor,
    ).eval()


def fit_rbm_to_tokens(
    stream: TokenStream,
    n_hidden: int,
    schedule: Schedule = DEFAULT_SCHEDULE,
    *,
    sigma: float = 0.5,
    learn_sigma: bool = False,
    k: int = 1,
    weight_decay: float = 0.0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    precision: str | None = None,
    on_epoch: Report | None = None,
    progress: bool = False,
) -> GatedResidual:
    """Fit a Gaussian-Bernoulli RBM to tokens by contrastive divergence (Hinton 2002).

    Args:
        stream: The tokens.
        n_hidden: The number H of hidden units.
        schedule: How long and how fast to train.
        sigma: Standard deviation of the visible units, in standard deviations of the features. One
            that is well below 1 leaves the hidden units something to explain.
        learn_sigma: Learn one for each feature, from ``sigma`` on, not below a tenth of it.
        k: The Gibbs sweeps of an update.
        weight_decay: The decay of W, per unit of learning rate.
        device: Where to compute.
        backend: The backend of ``rbm_kernels.cd_step``.
        precision: The precision of ``rbm_kernels.cd_step``.
        on_epoch: Called with the figures of ``train``, before the first epoch and after each, and
            with "free_energy_gap": the mean free energy of held-out rows less that of rows of the
            training images, in nats, which grows when the RBM overfits (Hinton 2010, section 6).
            It is NaN where nothing is held out.
        progress: Show a progress bar.

    Returns:
        The RBM with the statistics of the tokens, in evaluation mode, its strength 0.

    Raises:
        ValueError: A value out of range; or parameters that are not finite any more, since the
            learning rate is too high.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"fit_rbm: sigma must be positive and finite, got {sigma}")
    generator = _generator(schedule.seed)
    rbm = RBM(stream.width, n_hidden, "gaussian")
    assert rbm.log_var is not None
    with torch.no_grad():
        rbm.W.copy_(0.01 * torch.randn(rbm.W.shape, generator=generator))
        rbm.log_var.fill_(2 * math.log(sigma))
    rbm.to(device)
    groups: list[dict[str, Any]] = [
        {"params": [rbm.W], "weight_decay": weight_decay},
        {"params": [rbm.b, rbm.c]},
    ]
    if learn_sigma:
        # Slower than the weights, as Cho, Ilin and Raiko (ICANN 2011) advise: otherwise the noise
        # swallows what the hidden units have not yet found.
        groups.append({"params": [rbm.log_var], "lr_scale": 0.1})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    monitored = [stream.sample(MONITORED_ROWS, held_out=each).to(device) for each in (True, False)]
    phase = ContrastiveDivergence(k)
    draw: DrawOptions = {
        "seed": torch.tensor([schedule.seed, 0], device=device),
        "backend": backend,
        "precision": precision,
    }

    @torch.no_grad()
    def after_update() -> None:
        # A feature that the hidden units explain exactly would drive its variance to zero.
        if learn_sigma and rbm.log_var is not None:
            rbm.log_var.clamp_(min=2 * math.log(0.1 * sigma))

    def report() -> dict[str, float]:
        held_out, train = (rbm.free_energy(rows, backend=backend) for rows in monitored)
        return {"free_energy_gap": (held_out.double().mean() - train.double().mean()).item()}

    reconstructor = RBMReconstructor(rbm)
    train(
        stream,
        reconstructor,
        optimizer,
        lambda rows: phase.gradients(rbm, rows, draw),
        schedule,
        after_update=after_update,
        report=report,
        on_epoch=on_epoch,
        device=device,
        progress=progress,
    )
    rbm.zero_grad(set_to_none=True)
    return GatedResidual(reconstructor.cpu(), stream.mean, stream.scale).eval()


def train(
    stream: TokenStream,
    reconstructor: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: Callable[[Tensor], object],
    schedule: Schedule,
    *,
    after_update: Callable[[], object] = lambda: None,
    report: Callable[[], dict[str, float]] = dict,
    on_epoch: Report | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Train on the batches of a stream, and evaluate on held-out rows after each epoch.

    Args:
        stream: The tokens.
        reconstructor: What is being fitted.
        optimizer: Its learning rates follow the schedule, times a group's "lr_scale" where it has
            one.
        gradients: Writes the gradients of rows [B, D] into the parameters' ``grad``.
        schedule: How long and how fast to train.
        after_update: Called after every step of the optimizer.
        report: More figures for ``on_epoch``.
        on_epoch: Called before the first epoch, as epoch 0, and after each with a dictionary:
            "epoch"; "reconstruction_error" of held-out rows, the mean square per feature (the mean
            of the features misses about 1); "rows" and "seconds" so far; and what ``report`` says.
        device: Where the rows go.
        progress: Show a progress bar.
    """
    batch_size, tokens = schedule.batch_size, schedule.tokens_per_image
    updates = schedule.epochs * stream.batches(batch_size, tokens)
    held_out = stream.sample(MONITORED_ROWS, held_out=True).to(device)
    rows_seen, start = 0, time.monotonic()

    def batches(epoch: int) -> Iterator[Tensor]:
        # Orders that differ between the epochs of one fit and between fits of neighboring seeds.
        for rows in stream.epoch(batch_size, tokens, schedule.seed * 1_000_003 + epoch):
            yield rows.to(device)

    def count(rows: Tensor, result: object) -> None:
        nonlocal rows_seen
        after_update()
        rows_seen += len(rows)
        bar.update()

    def evaluate(epoch: int) -> None:
        seconds = time.monotonic() - start
        error = reconstruction_error(reconstructor, held_out)
        if on_epoch is not None:
            figures = {"epoch": epoch, "reconstruction_error": error, "rows": rows_seen}
            on_epoch({**figures, "seconds": seconds, **report()})
        bar.set_postfix(epoch=epoch, error=f"{error:.3f}")

    with tqdm(total=updates, disable=not progress, unit="batch") as bar:
        evaluate(0)
        optimize(
            optimizer,
            batches,
            gradients,
            lambda update: schedule.learning_rate * schedule.share(update, updates),
            epochs=range(schedule.epochs),
            after_update=count,
            after_epoch=lambda epoch: evaluate(epoch + 1),
        )


@torch.no_grad()
def reconstruction_error(reconstructor: nn.Module, rows: Tensor) -> float:
    """Mean square of what a reconstruction of standardized rows [N, D] misses; NaN without rows."""
    return (reconstructor(rows) - rows).square().mean().item()
