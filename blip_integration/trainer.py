"""Joint training of a captioner and the RBM inside it, as a ``transformers.Trainer``.

The loss is LM + a ITC + b ITM + c CD, see ``objective.py``. The loop, accumulation, clipping,
schedules, precision, processes, early stopping, logs and checkpoints are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BlipForConditionalGeneration,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .objective import CaptionCollator, JointHeads, JointObjective

FREEZE = ("all", "vision", "none")


@dataclass
class RBMBlipTrainingArguments(TrainingArguments):
    """How ``RBMBlipTrainer`` trains: transformers' arguments, some with other defaults, and ours.

    transformers' ``learning_rate`` is that of BLIP, and ``weight_decay`` is for matrices alone.
    The weights with the best ``metric_for_best_model`` are kept: "lm_loss", "loss" = LM + a ITC + b
    ITM, which the heads alone can lower, or a metric of the caller's. Checkpoints within an epoch
    need evaluations there, too: ``eval_strategy="steps"`` and ``save_strategy="steps"``.

    Attributes:
        itc_weight: The weight a of image-text contrast; 0 leaves the term out, as for the next two.
        itm_weight: The weight b of image-text matching.
        cd_weight: The weight c of contrastive divergence.
        k: The Gibbs sweeps of CD-k.
        freeze: What of BLIP stays as it is: "all" (only gate, RBM and heads learn), "vision" (the
            decoder learns too) or "none". A parameter that is frozen already stays so.
        rbm_learning_rate: The highest learning rate of the RBM.
        gate_learning_rate: The highest learning rate of the gate.
        head_learning_rate: The highest learning rate of the heads of ITC and ITM.
        projection_dim: The width of the space in which ITC compares images and texts.
        max_length: The most tokens of a caption, with its first and its last one.
        prompt: Words that every caption starts with and that are not learned.
    """

    itc_weight: float = 0.1
    itm_weight: float = 0.1
    cd_weight: float = 0.01
    k: int = 1
    freeze: str = "all"
    learning_rate: float = 1e-5
    rbm_learning_rate: float = 1e-4
    gate_learning_rate: float = 1e-2
    head_learning_rate: float = 1e-3
    projection_dim: int = 256
    max_length: int = 32
    prompt: str = ""

    seed: int = 42
    data_seed: int | None = None
    num_train_epochs: float = 10
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    weight_decay: float = 0.05
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_strategy: str = "epoch"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "lm_loss"
    report_to: str | list[str] | None = "none"
    # The weights before training are one of those to choose from, and so are evaluated.
    eval_on_start: bool = True
    # A patience that is half used up must be so after a resumption.
    restore_callback_states_from_checkpoint: bool = True
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed
        name = type(self).__name__
        if self.freeze not in FREEZE:
            raise ValueError(f"{name}: freeze must be one of {FREEZE}, got {self.freeze!r}")
        for field_name, least in (("k", 1), ("projection_dim", 1), ("max_length", 3)):
            value = getattr(self, field_name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: {field_name} must be an int >= {least}, got {value!r}")
        for field_name in (
            "itc_weight", "itm_weight", "cd_weight", "learning_rate", "rbm_learning_rate",
            "gate_learning_rate", "head_learning_rate", "weight_decay",
        ):  # fmt: skip
            value = getattr(self, field_name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: {field_name} must be finite and >= 0, got {value}")
        if self.per_device_train_batch_size < 2 and (self.itc_weight or self.itm_weight):
            raise ValueError(
                f"{name}: per_device_train_batch_size must be 2 or more where itc_weight or "
                "itm_weight is on, since a pair is compared with the others of its batch; "
                f"got {self.per_device_train_batch_size}"
            )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight in the loss of each term that is on."""
        weights = {"lm": 1.0, "itc": self.itc_weight, "itm": self.itm_weight, "cd": self.cd_weight}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def n_gpu(self) -> int:
        """At most 1: a process that drove several would divide the pairs that ITC compares."""
        return min(super().n_gpu, 1)


class Pairs(Protocol):
    """What a training needs of a data set, such as ``CaptionPairs``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, str, int]:
        """Pixel values, caption and image number."""


class RBMBlipTrainer(Trainer):
    """Trains a captioner and the RBM inside it by LM + a ITC + b ITM + c CD.

    The captioner is changed in place. In the end it has the best weights, those before training
    included, and ``heads`` those that went with them. A run that goes on from a checkpoint,
    ``train(resume_from_checkpoint=...)``, gives the same bits as one that was not interrupted, if
    model, data, arguments and callbacks are the same and the data set draws no random numbers. A
    checkpoint is also a folder that the captioner's class loads.

    LM is averaged over the tokens of an update, the other terms over its pairs, so that it does not
    matter for LM and CD how an update is divided into batches and processes. ITC and ITM compare
    the pairs of a batch.

    Args:
        model: A captioner with an RBM in it (``apply_rbm_to_blip``), or without one if
            ``cd_weight`` is 0. Its dropout and label smoothing are in its own configuration.
        args: The arguments.
        train_dataset: Items (pixel values, caption, image number), such as ``CaptionPairs``.
        eval_dataset: Items of other images.
        tokenizer: The captioner's tokenizer.
        heads: Heads to go on from; by default there are new ones.
        metrics: A function that measures the captioner after every evaluation of the terms, for
            example by the CIDEr of its captions. It is called in evaluation mode, on the main
            process. Its numbers are logged and can be the ``metric_for_best_model``.
        **options: Further arguments of ``transformers.Trainer``, such as ``callbacks``.

    Raises:
        TypeError: ``model`` is no BLIP captioner.
        ValueError: There are no pairs, or CD has a weight but the model has no RBM. Later, in
            ``train``: there is nothing to train, or something is to be trained in half precision.
        FloatingPointError: In ``train``, when features, gradients or the metric by which the best
            weights are chosen are not finite. The weights are those before that update.

    Example::

        args = RBMBlipTrainingArguments("out", num_train_epochs=5, bf16=True)
        trainer = RBMBlipTrainer(
            model, args, train_dataset=CaptionPairs(images, captions), eval_dataset=others,
            tokenizer=tokenizer, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )
        trainer.train()
        model.save_pretrained("captioner")
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        args: RBMBlipTrainingArguments,
        *,
        train_dataset: Pairs,
        eval_dataset: Pairs,
        tokenizer: PreTrainedTokenizerBase,
        heads: JointHeads | None = None,
        metrics: Callable[[BlipForConditionalGeneration], Mapping[str, float]] | None = None,
        **options: Any,
    ) -> None:
        for name, pairs in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if len(pairs) == 0:
                raise ValueError(f"RBMBlipTrainer: {name} must hold one pair or more, got none")
        if not isinstance(model, BlipForConditionalGeneration):
            raise TypeError(
                "RBMBlipTrainer: model must be a BlipForConditionalGeneration, "
                f"got {type(model).__name__}"
            )
        set_seed(args.seed)
        self.captioner = model
        self.heads = heads or JointHeads.for_model(model, args.projection_dim)
        self.measure = metrics
        self._sums: dict[str, Tensor] = {}
        self._updates = 0
        self._rates: dict[str, float] = {}
        super().__init__(
            JointObjective(model, self.heads, args.term_weights, k=args.k, seed=args.seed),
            args,
            # Trainer would align the captioner's BOS and EOS with a tokenizer that it knew, and
            # BLIP's BOS is another than its tokenizer's.
            CaptionCollator(tokenizer, model.config.text_config, args.max_length, args.prompt),
            train_dataset,
            eval_dataset,
            **options,
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As in ``transformers.Trainer``; the best weights may be those before training."""
        self._sums, self._updates = {}, 0
        eval_on_start = self.args.eval_on_start
        # A checkpoint holds the evaluation before training already.
        self.args.eval_on_start = eval_on_start and not resume_from_checkpoint
        try:
            with self.model.learning(self.args.freeze):
                before = {name: value.cpu().clone() for name, value in self.model.learned().items()}
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start
        if eval_on_start and self.args.load_best_model_at_end and not self.state.best_global_step:
            self.model.load_state_dict(before, strict=False)
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of ``args.optim``, with a learning rate for each part of the model."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self._parameter_groups(), **options)
            self.optimizer.register_step_pre_hook(self._before_step)
        return self.optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """BLIP, gate, RBM and heads, each with and without weight decay."""
        rates = {
            "blip": self.args.learning_rate,
            "gate": self.args.gate_learning_rate,
            "rbm": self.args.rbm_learning_rate,
            "head": self.args.head_learning_rate,
        }
        residual = self.model.residual
        within = set() if residual is None else set(residual.parameters())
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"RBMBlipTrainer: {name} must be float32 to be trained, got "
                    f"{parameter.dtype}; load the model in float32 and set bf16 or fp16"
                )
            part = "head" if name.startswith("heads.") else "blip"
            if parameter in within:
                part = "gate" if parameter is residual.gate else "rbm"
            groups.setdefault((part, part != "gate" and parameter.dim() > 1), []).append(parameter)
        if not groups:
            raise ValueError(
                f"RBMBlipTrainer: model must have something to train with freeze="
                f"{self.args.freeze!r}, got neither an RBM nor a term with heads"
            )
        return [
            {
                "name": part,
                "params": parameters,
                "lr": rates[part],
                "weight_decay": self.args.weight_decay if decayed else 0.0,
            }
            for (part, decayed), parameters in groups.items()
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Note the learning rates, and stop before a gradient that is not finite is learned.

        The optimizer calls it, except where the scaler of fp16 drops an update that overflowed.
        """
        groups = optimizer.param_groups
        self._rates = {f"{group['name']}_learning_rate": group["lr"] for group in groups}
        gradients = [
            parameter.grad
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"RBMBlipTrainer: gradients must be finite, got a norm of {norm.item()} at update "
                f"{self.state.global_step + 1}; try smaller learning rates or max_grad_norm"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Take the batches of an update and count its tokens and pairs, those of all processes."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = sum(len(batch["labels"]) for batch in batches)
        pairs = self.accelerator.gather(torch.tensor([own], device=device))  # [processes]
        first = int(pairs[: self.args.process_index].sum())
        for batch in batches:
            batch["first_pair"] = first
            first += len(batch["labels"])
        self._updates += 1
        return batches, None if tokens is None else torch.stack([tokens, pairs.sum()])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """A batch's part of the loss of its update.

        Args:
            model: The objective, as it is wrapped for several processes.
            inputs: What ``CaptionCollator`` made, and the number of the update's first pairs.
            return_outputs: Whether to return the terms, too.
            num_items_in_batch: The tokens and the pairs of the whole update, int64 [2].
        """
        terms = model(**inputs, update=self.state.global_step)
        counts = _counts(inputs["labels"])
        tokens, pairs = counts if num_items_in_batch is None else num_items_in_batch
        loss = torch.zeros((), device=counts.device)
        for name, term in terms.items():
            share = counts[0] / tokens if name == "lm" else counts[1] / pairs
            loss = loss + self.args.term_weights[name] * share * term
            self._sums[name] = self._sums.get(name, 0.0) + (share * term).detach()
        # Several processes average their gradients, and here their parts are to be summed.
        loss = loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in ``transformers.Trainer``; training's logs hold terms, rates and strength, too.

        The terms, without their weights, are means over the updates since the last log. The
        learning rates of the parts are those of the last update; "learning_rate" is the first's.
        """
        if "loss" in logs:
            zero = torch.zeros((), device=self.args.device)
            sums = torch.stack([self._sums.get(name, zero) for name in self.args.term_weights])
            means = self.accelerator.reduce(sums, "sum") / self._updates
            for name, mean in zip(self.args.term_weights, means.tolist(), strict=True):
                logs[f"{name}_loss"] = mean
            logs |= self._rates
            residual = self.model.residual
            if residual is not None:
                strengths = residual.gate.tanh().flatten().tolist()
                logs |= dict(zip(("strength", "cls_strength"), reversed(strengths), strict=False))
            self._sums, self._updates = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in ``transformers.Trainer``.

        Raises:
            FloatingPointError: In training, the ``metric_for_best_model`` is not finite.
        """
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.is_in_train and self.args.metric_for_best_model is not None:
            name = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
            if not math.isfinite(found.get(name, 0.0)):
                raise FloatingPointError(
                    f"RBMBlipTrainer: {name} must be finite, got {found[name]} at update "
                    f"{self.state.global_step}"
                )
            if self.state.global_step == 0:
                # Trainer's best is that of the checkpoints, of which the start is none.
                self.state.best_metric = found[name]
        return found

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean of each term without CD, LM over all tokens, and what ``metrics`` measures.

        Negatives are drawn alike at every evaluation, so that evaluations can be compared. Where
        several processes share the batches, the last ones are filled up with pairs from the start.
        """
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        generator = torch.Generator().manual_seed(self.args.seed)
        names = [name for name in self.args.term_weights if name != "cd"]
        sums = torch.zeros(len(names), 2, device=self.args.device)
        samples = 0
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            terms = self.model(**batch, generator=generator)
            tokens, pairs = _counts(batch["labels"])
            for i, name in enumerate(names):
                if name in terms:
                    count = tokens if name == "lm" else pairs
                    sums[i] += torch.stack([count * terms[name], count])
            samples += len(batch["labels"])
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        totals = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        means = {name: total / count for name, (total, count) in totals.items() if count}
        found = {f"{name}_loss": mean for name, mean in means.items()}
        found["loss"] = sum(self.args.term_weights[name] * mean for name, mean in means.items())
        if self.measure is not None:
            own = dict(self.measure(self.captioner)) if self.is_world_process_zero() else {}
            found |= broadcast_object_list([own])[0]
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in found.items()},
            num_samples=samples,
        )


def _counts(labels: Tensor) -> Tensor:
    """How many tokens and pairs a batch of labels [B, T] has, int64 [2]."""
    pairs = torch.tensor(len(labels), device=labels.device)
    return torch.stack([(labels != -100).sum(), pairs])
