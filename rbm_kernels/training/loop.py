"""The training loop, and the run of the command line on it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rbm_kernels.evaluation import pseudo_likelihood
from rbm_kernels.inputs import as_rows

from .checkpoint import save_checkpoint
from .run import Run

Batch = TypeVar("Batch")
Result = TypeVar("Result")

# Rows of training and held-out data whose free energies are compared after every epoch.
_MONITOR_ROWS = 1000
# Seconds of work that a killed (not interrupted) run can lose, beyond the current epoch.
_SAVE_EVERY = 20.0


def optimize(
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Batch]],
    gradients: Callable[[Batch], Result],
    learning_rate: Callable[[int], float],
    *,
    epochs: Iterable[int],
    stop: Callable[[], bool] = lambda: False,
    after_update: Callable[[Batch, Result], object] | None = None,
    after_epoch: Callable[[int], object] | None = None,
) -> None:
    """Epochs of updates: gradients, then a step of the optimizer.

    The loop asks nothing of the model, so it trains whatever has gradients.

    Args:
        optimizer: Its parameters' ``.grad`` are what ``gradients`` writes.
        batches: The batches of an epoch, given its number: a list, or a stream from disk.
        gradients: Writes the gradients of a batch.
        learning_rate: The learning rate, given the number of the update, counted from 0 in this
            call. A parameter group with a value ``lr_scale`` gets that multiple of it.
        epochs: The numbers of the epochs, such as ``range(10)``.
        stop: Asked before every update whether to end the training there.
        after_update: Called after every update with its batch and what ``gradients`` returned.
        after_epoch: Called with the number of every epoch that has come to its end.

    Example:
        >>> from rbm_kernels import RBM
        >>> from rbm_kernels.evaluation import log_likelihood, log_partition_exact
        >>> from rbm_kernels.training import ContrastiveDivergence, DrawOptions
        >>> rows = torch.eye(4).repeat(30, 1)  # one unit on in each row
        >>> rbm = RBM.from_data(rows, n_hidden=8)
        >>> phase = ContrastiveDivergence(k=1)
        >>> draw: DrawOptions = {"seed": torch.tensor([0, 0]), "backend": None, "precision": None}
        >>> optimize(
        ...     torch.optim.SGD(rbm.parameters(), momentum=0.9),
        ...     batches=lambda epoch: rows.split(60),
        ...     gradients=lambda batch: phase.gradients(rbm, batch, draw),
        ...     learning_rate=lambda update: 0.1,
        ...     epochs=range(500),
        ... )
        >>> weights = (rbm.W, rbm.b, rbm.c)
        >>> mean = log_likelihood(rows, *weights, log_partition_exact(*weights)).mean()
        >>> bool(mean > -1.6)  # independent units have -2.2, the best model has -log 4 = -1.4
        True
    """
    update = 0
    for epoch in epochs:
        for batch in batches(epoch):
            if stop():
                return
            rate = learning_rate(update)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            result = gradients(batch)
            optimizer.step()
            update += 1
            if after_update is not None:
                after_update(batch, result)
        if after_epoch is not None:
            after_epoch(epoch)


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
        data: [N, V], what ``run`` was started with.
        held_out: [M, V] binary, for the metrics.
        run: From ``start`` or ``load_checkpoint``; changed in place.
        checkpoint: A file that is written at the end, when interrupted, and now and then.
        on_batch: Called after every update with the run and the number of rows seen.
        on_epoch: Called after every epoch; ``run.history[-1]`` has its metrics.

    Returns:
        ``run``; its ``interrupted`` says how it ended.
    """
    settings, model, draw = run.settings, run.model, run.draw
    data = as_rows("train", "data", data, model.n_visible)
    held_out = as_rows("train", "held_out", held_out, model.n_visible)
    if data.shape[0] != run.order.numel():
        raise ValueError(
            f"train: data must be what the run was started with, {run.order.numel()} rows, got "
            f"{data.shape[0]}"
        )
    # Found out here, and not after an epoch.
    if not ((held_out == 0) | (held_out == 1)).all():
        raise ValueError("train: held_out must hold only 0 and 1, got other values")
    run.interrupted = False
    last_save = clock = time.monotonic()

    def batches(epoch: int) -> Iterator[Tensor]:
        """What is left of the epoch, which a resumed run begins in its midst."""
        for rows in run.order[run.batch * settings.batch_size :].split(settings.batch_size):
            yield data[rows]

    def learning_rate(update: int) -> float:
        left = 1.0 - run.progress if settings.decay else 1.0
        return settings.learning_rate * left

    def spent() -> float:
        """Seconds since the last call, which are added to the run's."""
        nonlocal clock
        before, clock = clock, time.monotonic()
        run.elapsed += clock - before
        return clock - before

    def after_update(rows: Tensor, energies: Tensor) -> None:
        count = rows.shape[0]
        run.sums[0] += count
        run.sums[1:] += count * energies.double()
        run.batch += 1
        run.training_seconds += spent()
        if on_batch is not None:
            on_batch(run, count)

    def after_epoch(epoch: int) -> None:
        nonlocal last_save
        _finish_epoch(run, data, held_out)
        if on_epoch is not None:
            on_epoch(run)
        spent()
        if checkpoint is not None and clock - last_save > _SAVE_EVERY:
            save_checkpoint(checkpoint, run, data)
            last_save = clock

    with _interrupt_flag() as interrupted:
        optimize(
            run.optimizer,
            batches,
            lambda rows: run.negative_phase.gradients(model, rows, draw),
            learning_rate,
            epochs=range(run.epoch, settings.epochs),
            stop=lambda: run.progress >= 1.0 or interrupted.is_set(),
            after_update=after_update,
            after_epoch=after_epoch,
        )
        if run.batch and run.progress >= 1.0:  # time was over in the midst of an epoch
            after_epoch(run.epoch)
        run.interrupted = interrupted.is_set() and run.progress < 1.0
        if checkpoint is not None:
            save_checkpoint(checkpoint, run, data)
    return run


def _finish_epoch(run: Run, data: Tensor, held_out: Tensor) -> None:
    """Add the epoch's metrics to the history, and shuffle the data for the next one."""
    model, settings = run.model, run.settings
    rows, data_sum, chain_sum = run.sums.tolist()
    rate = rows / run.training_seconds if run.training_seconds else float("nan")
    run.epoch += 1
    run.batch = 0

    @torch.no_grad()
    def mean_free_energy(v: Tensor) -> float:
        energies = model.free_energy(
            v[:_MONITOR_ROWS], backend=settings.backend, precision=settings.precision
        )
        return energies.double().mean().item()

    train_energy, held_out_energy = mean_free_energy(data), mean_free_energy(held_out)
    # The same random unit of every row in all epochs, so that the curve shows the model's change.
    unit_choice = torch.Generator().manual_seed(0)
    pseudo = pseudo_likelihood(
        held_out, model.W, model.b, model.c, units="random", generator=unit_choice
    )
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
