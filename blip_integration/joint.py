"""Joint training of a captioner and the RBM between its encoder and its decoder.

The loss is LM + a ITC + b ITM + c CD, see :mod:`.joint_objective`; all else here is what such a
training needs: settings, the loop, early stopping, checkpoints and a log.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    BlipForConditionalGeneration,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from rbm_kernels.training import write_atomically

from .joint_objective import (
    TERMS,
    JointHeads,
    JointObjective,
    collate_captions,
    seed_for,
)

Collate: TypeAlias = Callable[[Sequence[tuple[Tensor, str, int]]], dict[str, Tensor]]
Metric: TypeAlias = Callable[[BlipForConditionalGeneration], float]

CHECKPOINT_FORMAT = 1
CHECKPOINT_FILE = "checkpoint.pt"
LOG_FILE = "log.jsonl"

_FREEZE = ("all", "vision", "none")
_PRECISIONS = ("no", "fp16", "bf16")
# What of a run a checkpoint holds by name.
_PROGRESS = ("epoch", "batch", "update", "history", "best_epoch", "best")


@dataclass(frozen=True)
class JointSettings:
    """How :func:`train_joint` trains.

    Attributes:
        itc: Weight a of image-text contrast; 0 leaves the term out, as for the next two.
        itm: Weight b of image-text matching.
        cd: Weight c of contrastive divergence.
        cd_sweeps: Gibbs sweeps k of CD-k.
        freeze: What of BLIP stays as it is: "all" (only gate, RBM and heads learn), "vision" (the
            decoder learns, too) or "none". A parameter that is frozen already stays so.
        rbm_learning_rate: AdamW's step for the reconstructors, the highest of the schedule; so for
            the next three.
        gate_learning_rate: For the gates.
        blip_learning_rate: For BLIP.
        head_learning_rate: For the :class:`JointHeads`.
        weight_decay: On matrices of BLIP, the RBM and the heads; not on biases, norms and gates.
        epochs: Passes over the training pairs, at most.
        batch: Pairs that are compared with each other (ITC, ITM) and held in memory at a time.
        accumulate: Batches to an update. LM and CD are then what one batch of all their pairs
            gives; ITC and ITM still compare the pairs of a batch only.
        clip: Largest norm of an update's gradient; None does not clip.
        warmup: Share of the updates in which the learning rates rise from 0, before a cosine to 0.
        patience: Epochs without a better validation score after which training stops; None: never.
        monitor: The validation score where no metric is given: "lm", or "loss" = LM + a ITC + b ITM
            (which the heads alone can lower). The lowest is best.
        mixed_precision: "no", "fp16" (on a GPU) or "bf16"; weights stay float32.
        max_tokens: Longest caption, with its first and last token; the rest is cut off.
        prompt: Words that every caption starts with and that are not learnt, such as "a picture
            of" for Salesforce's BLIP.
        projection: Width of the space in which ITC compares image and text.
        checkpoint_every: Updates between checkpoints within an epoch; None: at its end alone.
        workers: Processes that load data.
        seed: Of the order of the data, dropout, negatives, Gibbs chains and new heads.
    """

    itc: float = 0.1
    itm: float = 0.1
    cd: float = 0.01
    cd_sweeps: int = 1
    freeze: str = "all"
    rbm_learning_rate: float = 1e-4
    gate_learning_rate: float = 1e-2
    blip_learning_rate: float = 1e-5
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.05
    epochs: int = 10
    batch: int = 32
    accumulate: int = 1
    clip: float | None = 1.0
    warmup: float = 0.1
    patience: int | None = 3
    monitor: str = "lm"
    mixed_precision: str = "no"
    max_tokens: int = 32
    prompt: str = ""
    projection: int = 256
    checkpoint_every: int | None = None
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("freeze", _FREEZE), ("mixed_precision", _PRECISIONS), ("monitor", ("lm", "loss")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"JointSettings: {name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        for name, least in (
            ("cd_sweeps", 1), ("epochs", 1), ("batch", 1), ("accumulate", 1), ("patience", 1),
            ("max_tokens", 3), ("projection", 1), ("checkpoint_every", 1), ("workers", 0),
            ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("patience", "checkpoint_every"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"JointSettings: {name} must be an int >= {least}, got {value!r}")
        for name in (
            "itc", "itm", "cd", "rbm_learning_rate", "gate_learning_rate", "blip_learning_rate",
            "head_learning_rate", "weight_decay",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"JointSettings: {name} must be finite and >= 0, got {getattr(self, name)}"
                )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"JointSettings: clip must be positive or None, got {self.clip}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"JointSettings: warmup must lie in [0, 1], got {self.warmup}")
        if self.batch < 2 and (self.itc or self.itm):
            raise ValueError(
                "JointSettings: batch must be 2 or more where itc or itm is on, since a pair is "
                f"compared with the others of its batch; got {self.batch}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that is on, in the loss."""
        weights = {"lm": 1.0, "itc": self.itc, "itm": self.itm, "cd": self.cd}
        return {name: weight for name, weight in weights.items() if weight}


@dataclass
class JointResult:
    """What :func:`train_joint` did; the model itself holds the best weights.

    Attributes:
        heads: As they were at the best epoch.
        history: A record for each epoch, the untrained model being epoch 0: "epoch", "update" and
            the validation's terms ("lm" in nats a token), "loss" and, where one was given,
            "metric".
        best_epoch: The epoch whose weights were kept; 0 if training made the score no better.
        stopped_early: Whether ``patience`` ended the training.
    """

    heads: JointHeads
    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool


@dataclass
class _Run:
    """A run at some update: what it works with, and what a checkpoint holds of it.

    Attributes:
        settings: see `JointSettings`.
        accelerator: devices, precision and processes.
        objective: the captioner and its heads.
        prepared: the same behind DistributedDataParallel, where there are several processes.
        optimizer: AdamW over what is trained.
        scheduler: of its learning rates.
        pairs: how many training and validation pairs there are.
        folder: of the checkpoint and the log.
        updates: of all epochs.
        score: the name in a validation's record of what is to be best: "metric" or `monitor`.
        epoch: epochs finished.
        batch: batches that this process has done in the current epoch.
        update: updates done.
        history: see `JointResult`.
        best_epoch: see `JointResult`.
        best: what is trained, as it was then, on the CPU.
    """

    settings: JointSettings
    accelerator: Accelerator
    objective: JointObjective
    prepared: nn.Module
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LRScheduler
    pairs: tuple[int, int]
    folder: Path | None
    updates: int
    score: str
    epoch: int = 0
    batch: int = 0
    update: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        patience = self.settings.patience
        stale = self.epoch - self.best_epoch
        return self.epoch >= self.settings.epochs or (patience is not None and stale >= patience)


def train_joint(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    val: Dataset,
    settings: JointSettings | None = None,
    *,
    heads: JointHeads | None = None,
    metric: Callable[[BlipForConditionalGeneration], float] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> JointResult:
    """Train a captioner and the RBM inside it by LM + a ITC + b ITM + c CD.

    Runs as it is on a CPU or a GPU, and on several under ``accelerate launch``; pairs are then
    compared with those of the same process. After every epoch the model is validated, and in the
    end it has the weights of the best epoch, that before training included.

    A run with a ``folder`` goes on bit for bit where it was interrupted, given the same model,
    data and settings. Data sets that draw random numbers must draw them from PyTorch's default
    generator and be read without ``workers`` for that.

    Args:
        model: A captioner with an RBM in it (``apply_rbm_to_blip``), or without one if
            ``cd`` is 0. Changed in place; its dropout and label smoothing are in its own
            configuration.
        tokenizer: Its tokenizer.
        train: Items (pixel values, caption, image number), such as :class:`CaptionPairs`.
        val: Likewise, other images.
        settings: See :class:`JointSettings`.
        heads: To go on from; None makes new ones.
        metric: Scores the model after an epoch, e.g. by the CIDEr of its captions; the highest is
            best. Called in evaluation mode, on the main process.
        folder: For ``checkpoint.pt`` and ``log.jsonl``, which has a line for every update (all
            terms, gates, gradient norm, learning rates) and for every validation.
        resume: Go on from the folder's checkpoint where there is one.
        progress: Show a progress bar.

    Returns:
        See :class:`JointResult`.

    Raises:
        TypeError: A model that is not BLIP.
        ValueError: No training or validation pairs, nothing to train, weights in half precision, a
            model without an RBM though ``cd`` is on, or a checkpoint of another run.
        FileExistsError: The folder holds a checkpoint and ``resume`` is False.
        FloatingPointError: A loss is not finite; the weights are those before that update.
    """
    settings = settings or JointSettings()
    pairs = (len(train), len(val))  # type: ignore[arg-type]
    for name, count in zip(("train", "val"), pairs, strict=True):
        if count == 0:
            raise ValueError(f"train_joint: {name} must hold one pair or more, got none")
    if not isinstance(model, BlipForConditionalGeneration):
        raise TypeError(
            f"train_joint: model must be a BlipForConditionalGeneration, got {type(model).__name__}"
        )
    target = None if folder is None else Path(folder)
    resumed = target is not None and (target / CHECKPOINT_FILE).exists()
    if resumed and not resume:
        raise FileExistsError(
            f"train_joint: folder must hold no {CHECKPOINT_FILE} if resume is False, got {target}"
        )
    collate = partial(
        collate_captions,
        tokenizer=tokenizer,
        config=model.config.text_config,
        max_tokens=settings.max_tokens,
        prompt=settings.prompt,
    )
    with _accelerator(settings) as accelerator, _random_numbers(settings, accelerator):
        heads = heads or JointHeads.for_model(model, settings.projection)
        objective = JointObjective(
            model, heads, settings.weights, cd_sweeps=settings.cd_sweeps, seed=settings.seed
        )
        with _learning(objective, settings):
            score = settings.monitor if metric is None else "metric"
            run = _start(settings, objective, accelerator, pairs, target, score)
            if resumed:
                _load_checkpoint(run)
            else:
                _empty_log(run)
                _finish_epoch(run, val, collate, metric)
            with tqdm(
                total=run.updates,
                initial=run.update,
                desc="joint training",
                unit="update",
                disable=not (progress and accelerator.is_main_process),
            ) as bar:
                while not run.finished:
                    _train_epoch(run, train, collate, bar)
                    run.epoch, run.batch = run.epoch + 1, 0
                    _finish_epoch(run, val, collate, metric)
            _restore(objective, run.best)
    return JointResult(heads, run.history, run.best_epoch, run.epoch < settings.epochs)


def _start(
    settings: JointSettings,
    objective: JointObjective,
    accelerator: Accelerator,
    pairs: tuple[int, int],
    folder: Path | None,
    score: str,
) -> _Run:
    """A run before its first update."""
    optimizer = torch.optim.AdamW(_parameter_groups(objective, settings))
    batches = -(-pairs[0] // settings.batch) // accelerator.num_processes
    if batches == 0:
        raise ValueError(
            f"train_joint: train must hold a batch of {settings.batch} for each of "
            f"{accelerator.num_processes} processes, got {pairs[0]} pairs"
        )
    updates = settings.epochs * -(-batches // settings.accumulate)
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, round(settings.warmup * updates), updates
    )
    prepared, stepper = accelerator.prepare(objective, optimizer)
    return _Run(
        settings, accelerator, objective, prepared, stepper, scheduler, pairs, folder, updates,
        score,
    )  # fmt: skip


@contextmanager
def _accelerator(settings: JointSettings) -> Iterator[Accelerator]:
    """An Accelerator, whose precision does not outlive it unless the caller has one, too.

    Accelerate keeps the precision of the first Accelerator of a program for all that follow.
    """
    callers = is_initialized()
    try:
        # Not every batch has every term: a last one of one image has nothing to contrast.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision, kwargs_handlers=[unused]
        )
        if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would compute in float32 and say nothing.
            raise ValueError(
                "train_joint: mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'"
            )
        yield accelerator
    finally:
        if not callers:
            AcceleratorState._reset_state()


@contextmanager
def _random_numbers(settings: JointSettings, accelerator: Accelerator) -> Iterator[None]:
    """Dropout and new heads draw from PyTorch's default generators: seeded, then put back."""
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed_for(settings.seed, "torch", accelerator.process_index))
        yield


@contextmanager
def _learning(objective: JointObjective, settings: JointSettings) -> Iterator[None]:
    """Freezes what the settings say; at the end all flags and modes are as they were."""
    flags = {parameter: parameter.requires_grad for parameter in objective.parameters()}
    modes = {module: module.training for module in objective.modules()}
    heads = objective.heads
    try:
        if settings.freeze == "all":
            _freeze(objective.model, but=objective.gated)
        elif settings.freeze == "vision":
            _freeze(objective.model.vision_model, but=objective.gated)
        if not settings.itc:
            heads.log_temperature.requires_grad_(False)
            _freeze(heads.image)
            _freeze(heads.text)
        if not settings.itm:
            _freeze(heads.match)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def _freeze(module: nn.Module, but: nn.Module | None = None) -> None:
    kept = set() if but is None else set(but.parameters())
    for parameter in module.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def _training_mode(objective: JointObjective) -> None:
    """Training mode, except for what is frozen as a whole: no dropout and no statistics there."""
    objective.train()
    for module in objective.model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _parameter_groups(objective: JointObjective, settings: JointSettings) -> list[dict[str, Any]]:
    """AdamW's groups: RBM, gate, BLIP and heads, each with and without weight decay."""
    rates = {
        "rbm": settings.rbm_learning_rate,
        "gate": settings.gate_learning_rate,
        "blip": settings.blip_learning_rate,
        "heads": settings.head_learning_rate,
    }
    residual = objective.gated
    gates = set() if residual is None else {residual.gate}
    within = set() if residual is None else set(residual.parameters())
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"train_joint: {name} must be float32 to be trained, got {parameter.dtype}; load "
                "the model in float32 and set mixed_precision"
            )
        part = "heads" if name.startswith("heads.") else "blip"
        if parameter in within:
            part = "gate" if parameter in gates else "rbm"
        groups.setdefault((part, part != "gate" and parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise ValueError(
            f"train_joint: model must have something to train with freeze={settings.freeze!r}, "
            "got neither an RBM nor a term with heads"
        )
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "name": part,
        }
        for (part, decayed), parameters in groups.items()
    ]


def _batches(run: _Run) -> list[list[int]]:
    """This process's batches of row numbers in the current epoch, in their order."""
    generator = torch.Generator().manual_seed(seed_for(run.settings.seed, "order", run.epoch))
    order = torch.randperm(run.pairs[0], generator=generator).split(run.settings.batch)
    # Batches that do not go round all processes are left to other epochs.
    processes = run.accelerator.num_processes
    last = len(order) // processes * processes
    return [rows.tolist() for rows in order[run.accelerator.process_index : last : processes]]


def _train_epoch(run: _Run, train: Dataset, collate: Collate, bar: Any) -> None:
    """The rest of an epoch."""
    settings = run.settings
    _training_mode(run.objective)
    loader = iter(
        DataLoader(
            train,
            batch_sampler=_batches(run)[run.batch :],
            collate_fn=collate,
            num_workers=settings.workers,
            pin_memory=run.accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed_for(settings.seed, "workers", run.epoch)),
        )
    )
    while window := list(islice(loader, settings.accumulate)):
        record = _update(run, window)
        run.batch += len(window)
        run.update += 1
        _write_log(run, record)
        bar.update()
        bar.set_postfix(epoch=run.epoch + 1, loss=f"{record['loss']:.3f}", lm=f"{record['lm']:.3f}")
        if settings.checkpoint_every and run.update % settings.checkpoint_every == 0:
            _save_checkpoint(run)


def _update(run: _Run, window: list[dict[str, Tensor]]) -> dict[str, Any]:
    """One step of the optimizer on some batches; returns its line of the log.

    LM is averaged over the tokens of all batches and processes, the other terms over the pairs, so
    that it does not matter how they are divided.
    """
    accelerator, settings, residual = run.accelerator, run.settings, run.objective.gated
    tokens = [int((batch["labels"] != -100).sum()) for batch in window]
    images = [len(batch["labels"]) for batch in window]
    counts = gather_object([(sum(tokens), sum(images))])
    all_tokens, all_images = (sum(each) for each in zip(*counts, strict=True))
    first = sum(count for _, count in counts[: accelerator.process_index])
    sums: dict[str, float] = {}
    for i, batch in enumerate(window):
        last = i == len(window) - 1
        with nullcontext() if last else accelerator.no_sync(run.prepared):
            terms = run.prepared(
                **send_to_device(batch, accelerator.device),
                update=run.update,
                first_image=first + sum(images[:i]),
                draw=seed_for(settings.seed, "negatives", run.update, i, accelerator.process_index),
            )
            parts = {
                name: (tokens[i] / all_tokens if name == "lm" else images[i] / all_images) * term
                for name, term in terms.items()
            }
            loss = sum(settings.weights[name] * part for name, part in parts.items())
            # DistributedDataParallel averages over the processes; here their parts are summed.
            accelerator.backward(loss * accelerator.num_processes)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.item()
    values = _summed(sums)
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = float(accelerator.clip_grad_norm_(trained, settings.clip or math.inf))
    # A gradient that overflows in fp16 is dropped by the scaler, which then scales less.
    finite = all(map(math.isfinite, values.values()))
    if not finite or (accelerator.scaler is None and not math.isfinite(norm)):
        run.optimizer.zero_grad()
        raise FloatingPointError(
            f"train_joint: losses and gradients must be finite, got {values} and a gradient norm "
            f"of {norm} at update {run.update + 1}; try smaller learning rates or clip"
        )
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    run.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        run.scheduler.step()
    run.optimizer.zero_grad()
    return {
        "epoch": run.epoch + 1,
        "update": run.update + 1,
        **values,
        "loss": sum(settings.weights[name] * value for name, value in values.items()),
        "gate": None if residual is None else residual.gate.tanh().tolist(),
        "gradient_norm": norm if math.isfinite(norm) else None,
        "learning_rates": rates,
    }


def _summed(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, in the order of the terms."""
    parts = gather_object([values])
    return {
        name: sum(part.get(name, 0.0) for part in parts)
        for name in TERMS
        if any(name in part for part in parts)
    }


@torch.no_grad()
def _validate(run: _Run, val: Dataset, collate: Collate) -> dict[str, float]:
    """Means of the validation's terms, and their weighted sum "loss"."""
    accelerator, settings, objective = run.accelerator, run.settings, run.objective
    objective.eval()
    rows = torch.arange(run.pairs[1]).split(settings.batch)
    own = range(accelerator.process_index, len(rows), accelerator.num_processes)
    loader = DataLoader(
        val,
        batch_sampler=[rows[i].tolist() for i in own],
        collate_fn=collate,
        num_workers=settings.workers,
        generator=torch.Generator().manual_seed(seed_for(settings.seed, "workers")),
    )
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for i, batch in zip(own, loader, strict=True):
        terms = objective(
            **send_to_device(batch, accelerator.device),
            draw=seed_for(settings.seed, "validation", i),
        )
        for name, term in terms.items():
            count = len(batch["labels"]) if name != "lm" else int((batch["labels"] != -100).sum())
            sums[name] = sums.get(name, 0.0) + count * term.item()
            counts[name] = counts.get(name, 0.0) + count
    sums, counts = _summed(sums), _summed(counts)
    means = {name: sums[name] / counts[name] for name in sums}
    return {**means, "loss": sum(settings.weights[name] * mean for name, mean in means.items())}


def _finish_epoch(run: _Run, val: Dataset, collate: Collate, metric: Metric | None) -> None:
    """Validate, keep the weights if they are the best so far, and write it all down."""
    record = {"epoch": run.epoch, "update": run.update, **_validate(run, val, collate)}
    if metric is not None:
        found = [float(metric(run.objective.model)) if run.accelerator.is_main_process else 0.0]
        record["metric"] = broadcast_object_list(found)[0]
    if not math.isfinite(record[run.score]):
        raise FloatingPointError(
            f"train_joint: the validation's {run.score} must be finite, got {record[run.score]} "
            f"after epoch {run.epoch}"
        )
    sign = 1 if metric is not None else -1
    best = run.history[run.best_epoch][run.score] if run.history else -sign * math.inf
    if sign * record[run.score] > sign * best:
        run.best_epoch = run.epoch
        run.best = {key: value.cpu().clone() for key, value in _learned(run.objective).items()}
    run.history.append(record)
    _write_log(run, {**record, "validation": True})
    _save_checkpoint(run)


def _learned(objective: JointObjective) -> dict[str, Tensor]:
    """The live tensors that training changes: what is not frozen, and all buffers."""
    learned = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    return {name: t.detach() for name, t in {**learned, **dict(objective.named_buffers())}.items()}


def _restore(objective: JointObjective, values: dict[str, Tensor]) -> None:
    for name, tensor in _learned(objective).items():
        tensor.copy_(values[name])


def _empty_log(run: _Run) -> None:
    if run.folder is not None and run.accelerator.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / LOG_FILE).write_text("")


def _write_log(run: _Run, record: dict[str, Any]) -> None:
    if run.folder is not None and run.accelerator.is_main_process:
        with open(run.folder / LOG_FILE, "a") as file:
            file.write(json.dumps(record) + "\n")


def _save_checkpoint(run: _Run) -> None:
    """Write all that a run goes on from into one file, whole or not at all."""
    if run.folder is None:
        return
    generators = gather_object([_generator_states(run.accelerator.device)])
    if not run.accelerator.is_main_process:
        return
    scaler = run.accelerator.scaler
    content = {
        "format": CHECKPOINT_FORMAT,
        "run": _identity(run),
        "weights": _learned(run.objective),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "generators": generators,
        "log_bytes": (run.folder / LOG_FILE).stat().st_size,
        **{name: getattr(run, name) for name in _PROGRESS},
    }
    write_atomically(run.folder / CHECKPOINT_FILE, partial(torch.save, content))


def _identity(run: _Run) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    return {
        **asdict(run.settings),
        "pairs of train and val": list(run.pairs),
        "processes": run.accelerator.num_processes,
        "what is to be best": run.score,
        "trained tensors": {name: list(t.shape) for name, t in _learned(run.objective).items()},
    }


def _load_checkpoint(run: _Run) -> None:
    """Put a run in the state of its folder's checkpoint, and cut its log off there.

    Raises:
        ValueError: no checkpoint that can be read, or one of another run.
    """
    assert run.folder is not None
    path = run.folder / CHECKPOINT_FILE
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"train_joint: {path} is no checkpoint to resume ({error})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != CHECKPOINT_FORMAT:
        raise ValueError(
            f"train_joint: {path} must be a checkpoint of format {CHECKPOINT_FORMAT}, got {found}"
        )
    for name, value in _identity(run).items():
        saved = content["run"].get(name)
        if saved != value:
            raise ValueError(
                f"train_joint: to resume {path}, {name} must be {saved!r}, got {value!r}"
            )
    _restore(run.objective, content["weights"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.scheduler.load_state_dict(content["scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    for name in _PROGRESS:
        setattr(run, name, content[name])
    cpu, *cuda = content["generators"][run.accelerator.process_index]
    torch.set_rng_state(cpu)
    for state in cuda:
        torch.cuda.set_rng_state(state, run.accelerator.device)
    if run.accelerator.is_main_process:
        with open(run.folder / LOG_FILE, "ab") as log:
            log.truncate(min(log.tell(), content["log_bytes"]))


def _generator_states(device: torch.device) -> list[Tensor]:
    """States of PyTorch's default generators, of the CPU and of a GPU in use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
