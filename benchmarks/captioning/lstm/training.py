"""Training of ``AttentionCaptioner``: Adam, StepLR, checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from rbm_kernels.training import write_atomically

from ..features import FeatureCache
from ..settings import LSTMSettings
from ..train_lite import caption_labels
from .show_attend_tell import AttentionCaptioner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class History:
    """How a training run went; losses are cross-entropies in nats per word.

    Attributes:
        losses: The loss of every update.
        epochs: For every epoch ``epoch`` (from 1), ``updates`` (so far), ``train_loss`` (mean over
            its updates), ``val_loss`` (where there are validation captions), ``learning_rate`` and
            ``seconds``.
    """

    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)

    def table(self, updates: Iterable[int]) -> list[tuple[int, int, float]]:
        """Rows (update, epoch, loss) of those updates, counted from 0, that there are."""
        if not self.losses:
            return []
        per_epoch = len(self.losses) // len(self.epochs)
        return [
            (update, update // per_epoch + 1, self.losses[update])
            for update in updates
            if 0 <= update < len(self.losses)
        ]


def train_attention_captioner(
    model: AttentionCaptioner,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor | FeatureCache,
    captions: Sequence[Sequence[str]],
    settings: LSTMSettings,
    *,
    val_features: Tensor | FeatureCache | None = None,
    val_captions: Sequence[Sequence[str]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> History:
    """Fit the decoder by cross-entropy with Adam and StepLR; the encoder stays as it is.

    Afterwards the model is in evaluation mode and has the weights of the epoch whose validation
    loss was least (of the last epoch without validation captions). With a ``folder`` these are kept
    there as they come, with the tokenizer, ``history.json`` and ``training.pt``, from which a
    stopped run goes on as if it had not stopped.

    Args:
        model: Trained on the device it is on.
        tokenizer: The one the model was made for.
        features: [N, L, C], a tensor or a cache.
        captions: For each of the N images its captions.
        settings: See ``LSTMSettings``.
        val_features: As ``features``, of other images.
        val_captions: As ``captions``, of those.
        folder: Where to keep the model; made where it is missing.
        resume: Go on after the last epoch that is kept in ``folder``.
        progress: Show a progress bar.

    Returns:
        The losses.

    Raises:
        ValueError: Captions that do not match the features or are empty, one validation argument
            without the other, or ``resume`` without ``folder`` or with other settings than before
            (except for ``epochs``).
        FileNotFoundError: ``resume``, and the folder holds no run.
        FloatingPointError: The loss became infinite or NaN.
    """
    data = _pairs("captions", tokenizer, features, captions, settings.max_length)
    val = None
    if val_features is not None and val_captions is not None:
        val = _pairs("val_captions", tokenizer, val_features, val_captions, settings.max_length)
    elif val_features is not None or val_captions is not None:
        raise ValueError(
            "train_attention_captioner: val_features and val_captions must be given together, "
            "got one of them"
        )
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings.step_epochs, settings.gamma)
    run = _Run(model, optimizer, scheduler, settings, History(), best=_copy(model))
    if resume:
        run.load(folder)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
    for epoch in range(len(run.history.epochs), settings.epochs):
        began = time.monotonic()
        losses = _train_epoch(run, data, epoch, progress)
        run.history.losses += losses
        record = {
            "epoch": epoch + 1,
            "updates": len(run.history.losses),
            "train_loss": sum(losses) / len(losses),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        if val is not None:
            record["val_loss"] = _mean_loss(model, val, settings.batch_size)
        record["seconds"] = time.monotonic() - began
        run.history.epochs.append(record)
        scheduler.step()
        run.keep(folder)
    model.load_state_dict(run.best)
    model.eval()
    return run.history


class _Pairs(NamedTuple):
    """Images with captions, one pair for each of P captions.

    Attributes:
        features: [N, L, C].
        images: Int64 [P], rows of the features.
        tokens: Int64 [P, T].
        lengths: Int64 [P], tokens that are no pads.
    """

    features: Tensor | FeatureCache
    images: Tensor
    tokens: Tensor
    lengths: Tensor

    def batch(self, index: Tensor, model: AttentionCaptioner) -> tuple[Tensor, Tensor]:
        """Features [B, L, C] and tokens [B, T'] of some pairs, T' for the longest of them."""
        weight = model.output.weight
        tokens = self.tokens[index, : int(self.lengths[index].max())]
        maps = self.features[self.images[index]]
        return maps.to(weight.device, weight.dtype), tokens.to(weight.device)


def _pairs(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor | FeatureCache,
    captions: Sequence[Sequence[str]],
    max_length: int,
) -> _Pairs:
    if len(captions) != len(features):
        raise ValueError(
            f"train_attention_captioner: {name} must have a list of captions for each of the "
            f"{len(features)} images, got {len(captions)}"
        )
    images = [image for image, texts in enumerate(captions) for _ in texts]
    texts = [text for of_image in captions for text in of_image]
    if not texts:
        raise ValueError(f"train_attention_captioner: {name} must hold a caption or more, got none")
    tokens, mask, _ = caption_labels(tokenizer, texts, max_length)
    lengths = mask.sum(1)
    if int(lengths.min()) <= 2:
        number = int(lengths.argmin())
        raise ValueError(
            f"train_attention_captioner: {name} must have words, got {texts[number]!r} for image "
            f"{images[number]}"
        )
    return _Pairs(features, torch.tensor(images), tokens, lengths)


@dataclass
class _Run:
    """What a training run keeps from epoch to epoch, in memory and in its folder."""

    model: AttentionCaptioner
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.StepLR
    settings: LSTMSettings
    history: History
    best: dict[str, Tensor]

    def keep(self, folder: str | os.PathLike[str] | None) -> None:
        """Note the weights if they are the best so far, and write all of it to the folder."""
        last, *earlier = [epoch.get("val_loss", -math.inf) for epoch in self.history.epochs[::-1]]
        improved = last <= min(earlier, default=math.inf)
        if improved:
            self.best = _copy(self.model)
        if folder is None:
            return
        if improved:
            self.model.save_pretrained(folder)
        history = asdict(self.history)
        content = {
            "settings": asdict(self.settings),
            "history": history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        text = json.dumps(history, indent=1) + "\n"
        write_atomically(Path(folder) / "history.json", lambda file: Path(file).write_text(text))
        write_atomically(Path(folder) / "training.pt", lambda file: torch.save(content, file))

    def load(self, folder: str | os.PathLike[str] | None) -> None:
        """Take up the run that the folder holds."""
        if folder is None:
            raise ValueError("train_attention_captioner: resume needs a folder, got None")
        path = Path(folder) / "training.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"train_attention_captioner: resume needs {path.name} in the folder, got {folder}"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
        # More epochs than before are what one resumes for.
        asked = {**asdict(self.settings), "epochs": content["settings"]["epochs"]}
        if asked != content["settings"]:
            raise ValueError(
                "train_attention_captioner: resume needs the settings of the run, "
                f"{content['settings']}, got {asdict(self.settings)}"
            )
        self.best = load_file(Path(folder) / "model.safetensors")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.history = History(**content["history"])


def _copy(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _train_epoch(run: _Run, data: _Pairs, epoch: int, progress: bool) -> list[float]:
    """One pass over the captions in random order; the loss of every update."""
    model, optimizer, settings = run.model, run.optimizer, run.settings
    model.train()
    losses: list[float] = []
    # A seed of the epoch's own: a resumed run needs the weights alone.
    seed = settings.seed * 1_000_003 + epoch
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    bar = tqdm(
        order.split(settings.batch_size),
        desc=f"epoch {epoch + 1}/{settings.epochs}",
        unit="batch",
        disable=not progress,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for index in bar:
            loss = model.loss(*data.batch(index, model))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"train_attention_captioner: the loss of update {len(losses)} of epoch "
                    f"{epoch + 1} is {losses[-1]}; a smaller learning_rate than "
                    f"{optimizer.param_groups[0]['lr']:g} may help"
                )
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def _mean_loss(model: AttentionCaptioner, data: _Pairs, batch_size: int) -> float:
    """Cross-entropy in nats per word, over all words."""
    model.eval()
    total = 0.0
    for index in torch.arange(len(data.images)).split(batch_size):
        total += model.loss(*data.batch(index, model), reduction="sum").item()
    # The first token is given, not predicted.
    return total / int((data.lengths - 1).sum())
