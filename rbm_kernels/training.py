"""A plain training loop: minibatches, contrastive divergence, an optimizer, a checkpoint.

The loop is what `rbm-kernels train` runs; it uses nothing but the package's public operations, so
it also shows how to write one's own.
"""

from __future__ import annotations

import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import likelihood
from .files import write_atomically as write_atomically
from .ops.cd import cd_step
from .ops.free_energy import free_energy
from .rbm import RBM

CHECKPOINT_FORMAT = 1

# Rows of training and held-out data whose free energies are compared after every epoch.
_MONITOR_ROWS = 1000
# Seconds of work that a killed (not interrupted) run can lose, beyond the current epoch.
_SAVE_EVERY = 20.0


@dataclass(frozen=True)
class Settings:
    """What decides the course of a training run.

    Attributes:
        hidden: number of hidden units.
        k: Gibbs sweeps per update.
        chains: persistent chains (PCD, Tieleman 2008); 0 starts every update from the data (CD).
        batch: rows per update; the last of an epoch may be short.
        epochs: passes over the data.
        minutes: stop after this much training, too; None: epochs alone decide, and the run does
            not depend on the machine's speed.
        learning_rate: of the first update; falls linearly to zero over the run if `decay`.
        decay: see `learning_rate`.
        optimizer: "sgd" or "adam".
        momentum: of "sgd".
        weight_decay: on W alone, never on the biases.
        seed: governs the initial weights, the order of the data and the chains.
        backend: as for the operations.
        precision: as for the operations.
    """

    hidden: int = 500
    k: int = 1
    chains: int = 128
    batch: int = 128
    epochs: int = 100
    minutes: float | None = None
    learning_rate: float = 0.05
    decay: bool = True
    optimizer: str = "sgd"
    momentum: float = 0.5
    weight_decay: float = 1e-4
    seed: int = 0
    backend: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("k", 1), ("chains", 0), ("batch", 1), ("epochs", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"train: {name} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"train: {name} must be positive, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train: momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"train: weight_decay must be at least 0, got {self.weight_decay}")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"train: optimizer must be 'sgd' or 'adam', got {self.optimizer!r}")


@dataclass
class Run:
    """A training run at some update: everything that a checkpoint holds.

    Attributes:
        settings: see `Settings`.
        model: Bernoulli-Bernoulli, float32.
        optimizer: over the model's parameters.
        chains: [N, V] persistent chains, or None for CD.
        seed: int64[2], the (seed, offset) of the chains' next draw.
        generator: shuffles the data.
        order: this epoch's permutation of the rows, int64 [N].
        epoch: epochs finished.
        batch: updates done in the current epoch.
        sums: float64 [3], data rows seen in this epoch and the sums over them of the free
            energies of data and chains.
        training_seconds: in the updates of this epoch, without evaluation.
        elapsed: seconds over all sittings.
        history: metrics of every epoch.
        interrupted: whether a SIGINT ended the last sitting.
    """

    settings: Settings
    model: RBM
    optimizer: torch.optim.Optimizer
    chains: Tensor | None
    seed: Tensor
    generator: torch.Generator
    order: Tensor
    epoch: int = 0
    batch: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    training_seconds: float = 0.0
    elapsed: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.order.numel() // self.settings.batch)

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1: by updates, or by time if that is ahead."""
        updates = self.epoch * self.batches_per_epoch + self.batch
        share = updates / (self.settings.epochs * self.batches_per_epoch)
        if self.settings.minutes is not None:
            share = max(share, self.elapsed / (60 * self.settings.minutes))
        return min(share, 1.0)


def start(data: Tensor, settings: Settings) -> Run:
    """A fresh run: small random weights, visible bias from the data's log-odds, chains from it.

    Args:
        data: [N, V] in [0, 1], uint8 or float32, N at least 1.
        settings: see `Settings`.

    Returns:
        A run before its first update.

    Raises:
        ValueError: the data's shape.
    """
    if data.dim() != 2 or data.shape[0] < 1 or data.shape[1] < 1:
        raise ValueError(f"train: data must be [N, V] with N, V >= 1, got {list(data.shape)}")
    generator = torch.Generator().manual_seed(settings.seed)
    model = RBM(data.shape[1], settings.hidden)
    with torch.no_grad():
        model.W.copy_(0.01 * torch.randn(model.W.shape, generator=generator))
    model.initialize_from_data(data)
    chains = None
    if settings.chains:
        # Independent pixels: no chain starts in the basin of one digit.
        mean = torch.sigmoid(model.b.detach())
        chains = torch.rand(settings.chains, data.shape[1], generator=generator) < mean
        chains = chains.float()
    seed = torch.tensor([settings.seed, 0])
    order = torch.randperm(data.shape[0], generator=generator)
    return Run(settings, model, _optimizer(model, settings), chains, seed, generator, order)


def train(
    data: Tensor,
    held_out: Tensor,
    run: Run,
    *,
    checkpoint: Path | None = None,
    on_batch: Callable[[Run, int], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> Run:
    """Train until the settings' epochs or minutes are over, or a SIGINT (Ctrl-C) asks to stop.

    A SIGINT is obeyed after the update in progress, so that what is saved is whole; a second one
    raises KeyboardInterrupt at once.

    Args:
        data: [N, V], what `run` was started with.
        held_out: [M, V] binary, for the metrics.
        run: from `start` or `load_checkpoint`; changed in place.
        checkpoint: written at the end, when interrupted, and now and then.
        on_batch: called after every update with the run and the rows seen.
        on_epoch: called after every epoch; `run.history[-1]` has its metrics.

    Returns:
        `run`; its `interrupted` says how it ended.
    """
    settings, model = run.settings, run.model
    gradients = [torch.zeros_like(p) for p in (model.W, model.b, model.c)]
    for parameter, gradient in zip((model.W, model.b, model.c), gradients, strict=True):
        parameter.grad = gradient
    weights = (model.W.detach(), model.b.detach(), model.c.detach())
    run.interrupted = False
    last_save = clock = time.monotonic()
    with _interrupt_flag() as stop:
        while run.progress < 1.0 and not stop.is_set():
            first = run.batch * settings.batch
            rows = data[run.order[first : first + settings.batch]]
            for group in run.optimizer.param_groups:
                group["lr"] = settings.learning_rate
                if settings.decay:
                    group["lr"] *= 1.0 - run.progress
            step = cd_step(
                rows,
                *weights,
                settings.k,
                chains=run.chains,
                out=tuple(gradients),
                seed=run.seed,
                backend=settings.backend,
                precision=settings.precision,
            )
            if settings.chains:
                run.chains = step.chains
            run.optimizer.step()
            count = rows.shape[0]
            run.sums[0] += count
            run.sums[1:] += count * step.free_energies.double()
            run.batch += 1
            now = time.monotonic()
            run.training_seconds += now - clock
            run.elapsed += now - clock
            clock = now
            if on_batch is not None:
                on_batch(run, count)
            if run.batch == run.batches_per_epoch or run.progress >= 1.0:
                _finish_epoch(run, data, held_out)
                if on_epoch is not None:
                    on_epoch(run)
                now = time.monotonic()
                run.elapsed += now - clock
                clock = now
                if checkpoint is not None and now - last_save > _SAVE_EVERY:
                    save_checkpoint(checkpoint, run, data)
                    last_save = now
        run.interrupted = stop.is_set() and run.progress < 1.0
        if checkpoint is not None:
            save_checkpoint(checkpoint, run, data)
    return run


def _optimizer(model: RBM, settings: Settings) -> torch.optim.Optimizer:
    groups = [
        {"params": [model.W], "weight_decay": settings.weight_decay},
        {"params": [model.b, model.c], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def _finish_epoch(run: Run, data: Tensor, held_out: Tensor) -> None:
    model, settings = run.model, run.settings
    rows, data_sum, chain_sum = run.sums.tolist()
    rate = rows / run.training_seconds if run.training_seconds else float("nan")
    run.epoch += 1
    run.batch = 0

    def mean_free_energy(v: Tensor) -> float:
        energies = free_energy(
            v[:_MONITOR_ROWS], model.W.detach(), model.b.detach(), model.c.detach(),
            backend=settings.backend, precision=settings.precision,
        )  # fmt: skip
        return energies.double().mean().item()

    train_energy, held_out_energy = mean_free_energy(data), mean_free_energy(held_out)
    # The same random unit of every row in all epochs, so that the curve shows the model's change.
    pseudo = likelihood.pseudo_likelihood(
        held_out, model.W, model.b, model.c, units="random",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    run.history.append(
        {
            "epoch": run.epoch,
            "free_energy_train": train_energy,
            "free_energy_held_out": held_out_energy,
            "free_energy_gap": held_out_energy - train_energy,
            "pseudo_likelihood": pseudo.total.mean().item(),
            "free_energy_data": data_sum / rows,
            "free_energy_chain": chain_sum / rows,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "images_per_second": rate,
            "seconds": run.elapsed,
        }
    )
    run.sums.zero_()
    run.training_seconds = 0.0
    run.order = torch.randperm(data.shape[0], generator=run.generator)


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that SIGINT sets; a second SIGINT raises KeyboardInterrupt as ever."""
    stop = threading.Event()

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def save_checkpoint(path: Path, run: Run, data: Tensor) -> None:
    """Write everything a run needs to go on bit for bit into one file, whole or not at all."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "settings": asdict(run.settings),
        "data": _fingerprint(data),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "chains": run.chains,
        "seed": run.seed,
        "generator": run.generator.get_state(),
        "order": run.order,
        "epoch": run.epoch,
        "batch": run.batch,
        "sums": run.sums,
        "training_seconds": run.training_seconds,
        "elapsed": run.elapsed,
        "history": run.history,
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, data: Tensor, **changes: Any) -> Run:
    """The run saved in `path`, ready to go on with `train`.

    Args:
        path: written by `save_checkpoint`.
        data: [N, V], what the run was started with.
        changes: settings to change, such as more epochs. The learning rate then follows the
            longer run's schedule.

    Returns:
        The run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of this package, other data, or bad settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: checkpoint must be an existing file, got {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"resume: {path} is no checkpoint that can be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"resume: {path} must be a checkpoint of format {CHECKPOINT_FORMAT}, got {found}"
        )
    if content["data"] != _fingerprint(data):
        raise ValueError(
            f"resume: {path} was trained on other data: rows, values and split must be the same "
            f"({content['data']['shape']}, got {list(data.shape)})"
        )
    settings = Settings(**{**content["settings"], **changes})
    model = RBM(data.shape[1], settings.hidden)
    model.load_state_dict(content["model"])
    optimizer = _optimizer(model, settings)
    optimizer.load_state_dict(content["optimizer"])
    generator = torch.Generator()
    generator.set_state(content["generator"])
    return Run(
        settings=settings,
        model=model,
        optimizer=optimizer,
        generator=generator,
        **{
            name: content[name]
            for name in (
                "chains", "seed", "order", "epoch", "batch", "sums", "training_seconds", "elapsed",
                "history",
            )
        },
    )  # fmt: skip


def _fingerprint(data: Tensor) -> dict[str, Any]:
    values = data.contiguous()
    return {
        "shape": list(data.shape),
        "dtype": str(data.dtype),
        "crc32": zlib.crc32(values.view(torch.uint8).numpy().tobytes()),
    }


@dataclass(frozen=True)
class Evaluation:
    """Mean log-likelihoods in nats per row.

    Attributes:
        train: of the training rows.
        held_out: of the held-out rows.
        independent: of the held-out rows under the independent-pixels model of the training rows.
        log_z: the partition function used.
        estimate: the AIS behind `log_z`, or None where it is exact.
        reverse: reverse AIS from the given chains, whose log Z is too high on average where that
            of `estimate` is too low; None where there are no chains or log Z is exact.
    """

    train: float
    held_out: float
    independent: float
    log_z: float
    estimate: likelihood.AIS | None
    reverse: likelihood.AIS | None = None


def evaluate(
    model: RBM,
    data: Tensor,
    held_out: Tensor,
    *,
    chains: Tensor | None = None,
    exact_units: int = 20,
    n_chains: int = 256,
    betas: int = 1000,
    seed: int = 0,
    backend: str | None = None,
    precision: str | None = None,
) -> Evaluation:
    """Log-likelihoods: exact where the smaller layer is small, by AIS otherwise.

    Args:
        model: Bernoulli-Bernoulli.
        data: [N, V] binary, the training rows.
        held_out: [M, V] binary.
        chains: [N, V] long-run samples of the model, such as its persistent chains.
        exact_units: enumerate a layer of up to this many units.
        n_chains: of AIS.
        betas: temperatures of AIS.
        seed: of AIS.
        backend: of AIS.
        precision: of AIS.

    Returns:
        See `Evaluation`. AIS is low for log Z on average, hence high for the likelihood: look at
        `estimate.effective_sample_size` and `estimate.interval`.
    """
    weights = (model.W.detach(), model.b.detach(), model.c.detach())
    bias = likelihood.log_odds(data)
    estimate = reverse = None
    if min(model.n_visible, model.n_hidden) <= exact_units:
        log_z = likelihood.log_partition_exact(*weights, max_units=exact_units).item()
    else:
        options: Any = {
            "base_visible_bias": bias, "betas": betas, "backend": backend, "precision": precision,
        }  # fmt: skip
        estimate = likelihood.ais(*weights, n_chains=n_chains, seed=(seed, 0), **options)
        log_z = estimate.log_z
        if chains is not None:
            reverse = likelihood.reverse_ais(chains, *weights, seed=(seed, 2 * betas), **options)

    def mean(rows: Tensor) -> float:
        return likelihood.log_likelihood(rows, *weights, log_z).mean().item()

    return Evaluation(
        train=mean(data),
        held_out=mean(held_out),
        independent=likelihood.independent_log_likelihood(held_out, bias).mean().item(),
        log_z=log_z,
        estimate=estimate,
        reverse=reverse,
    )
