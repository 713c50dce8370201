"""Joint training: what moves, what is kept, and that a run can be resumed to the last bit."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.joint import captioner, drawn, features_of, tiny_captioner
from transformers import (
    BlipForConditionalGeneration,
    EarlyStoppingCallback,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

from blip_integration.modeling import RBMBlipForConditionalGeneration, rbm_of
from blip_integration.objective import CaptionPairs
from blip_integration.trainer import RBMBlipTrainer, RBMBlipTrainingArguments

SIZES: dict[str, Any] = {
    "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 8, "num_train_epochs": 2,
    "projection_dim": 8, "logging_strategy": "steps", "logging_steps": 1,
}  # fmt: skip
"""Arguments of all trainings here."""


def data(n: int = 12, seed: int = 0) -> CaptionPairs:
    return CaptionPairs(*drawn(n, seed))


def trainer_of(model: BlipForConditionalGeneration, folder: Path, **changes: Any) -> RBMBlipTrainer:
    """A trainer on the drawn images, with arguments and keywords in one."""
    options = {
        name: changes.pop(name)
        for name in ("heads", "metrics", "callbacks", "train_dataset", "eval_dataset")
        if name in changes
    }
    pairs = {"train_dataset": data(), "eval_dataset": data(6, seed=1)}
    args = RBMBlipTrainingArguments(str(folder), **{**SIZES, **changes})
    tokenizer = tiny_captioner()[1]
    return RBMBlipTrainer(model, args, tokenizer=tokenizer, **{**pairs, **options})


def run(model: BlipForConditionalGeneration, folder: Path, **changes: Any) -> RBMBlipTrainer:
    trainer = trainer_of(model, folder, **changes)
    trainer.train()
    return trainer


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def updates_of(trainer: RBMBlipTrainer) -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if "loss" in record]


def evaluations_of(trainer: RBMBlipTrainer) -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if "eval_loss" in record]


def rising() -> dict[str, Any]:
    """A metric that is better every time, so that the last epoch's weights are kept."""
    scores = iter(range(1000))
    return {
        "metrics": lambda _: {"rising": float(next(scores))},
        "metric_for_best_model": "rising",
    }


# What is learned.


def test_the_terms_go_down_and_every_update_is_logged(tmp_path: Path) -> None:
    model, _ = captioner(strength=0.0)
    trainer = run(
        model, tmp_path, freeze="none", num_train_epochs=6, itc_weight=0.5, itm_weight=0.5,
        cd_weight=0.01, learning_rate=1e-2, head_learning_rate=2e-2, rbm_learning_rate=1e-2,
        eval_dataset=data(), per_device_train_batch_size=6, per_device_eval_batch_size=6,
    )  # fmt: skip
    evaluations = evaluations_of(trainer)
    first, last = evaluations[0], evaluations[-1]
    assert [record["epoch"] for record in evaluations] == list(range(7))
    for term in ("lm_loss", "itc_loss", "loss"):
        assert last[f"eval_{term}"] < 0.8 * first[f"eval_{term}"], term
    assert "eval_cd_loss" not in last

    updates = updates_of(trainer)
    assert [record["step"] for record in updates] == list(range(1, 6 * 4 + 1))
    weighted = (("lm", 1.0), ("itc", 0.5), ("itm", 0.5), ("cd", 0.01))
    for record in updates:
        terms = sum(weight * record[f"{term}_loss"] for term, weight in weighted)
        assert record["loss"] == pytest.approx(terms)
        assert record["grad_norm"] > 0
    gate = rbm_of(model).gate
    assert abs(updates[0]["strength"]) < abs(updates[-1]["strength"])
    assert updates[-1]["strength"] == pytest.approx(gate.tanh().item())


def test_pairs_are_told_apart_in_the_end(tmp_path: Path) -> None:
    """By ITM alone, whose negatives are then drawn evenly."""
    trainer = run(
        captioner(strength=0.0)[0], tmp_path, freeze="none", num_train_epochs=20, itc_weight=0,
        itm_weight=1.0, learning_rate=1e-2, head_learning_rate=1e-2, rbm_learning_rate=1e-2,
        train_dataset=data(24), eval_dataset=data(), per_device_train_batch_size=6,
        per_device_eval_batch_size=6, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    [first] = evaluations_of(trainer)
    assert trainer.evaluate()["eval_itm_loss"] < 0.8 * first["eval_itm_loss"]


def test_logs_between_updates_are_means(tmp_path: Path) -> None:
    every, third = (
        run(captioner()[0], tmp_path / f"{steps}", logging_steps=steps, num_train_epochs=1)
        for steps in (1, 3)
    )
    [mean] = updates_of(third)
    for name in ("loss", "lm_loss", "itc_loss", "itm_loss", "cd_loss"):
        expected = sum(record[name] for record in updates_of(every)) / 3
        assert mean[name] == pytest.approx(expected), name


def test_both_strengths_are_logged(tmp_path: Path) -> None:
    model, _ = captioner(cls_token="apart")
    record = updates_of(run(model, tmp_path, num_train_epochs=1))[-1]
    assert (record["cls_strength"], record["strength"]) == rbm_of(model).strength


def test_the_rbm_becomes_a_better_model_of_the_features(tmp_path: Path) -> None:
    """CD's value is no measure; the reconstruction error of what it was not shown is one."""
    model, _ = captioner(strength=0.0)
    residual = rbm_of(model)

    def error(_: Any = None) -> float:
        z = (features_of(model, drawn(6, seed=1)[0]) - residual.mean) / residual.scale
        return (residual.reconstructor(z.flatten(0, 1)) - z.flatten(0, 1)).square().mean().item()

    before = error()
    last: list[float] = []
    run(
        model, tmp_path, itc_weight=0, itm_weight=0, cd_weight=1.0, gate_learning_rate=0,
        rbm_learning_rate=3e-2, num_train_epochs=6, metric_for_best_model="error_loss",
        metrics=lambda _: last.append(error()) or {"error_loss": last[-1]},
    )  # fmt: skip
    assert residual.gate == 0.0
    assert error() == min(last) < 0.9 * before


FROZEN = {"all": ("vision_model.", "text_decoder."), "vision": ("vision_model.",), "none": ()}


@pytest.mark.parametrize("freeze", FROZEN)
def test_what_is_frozen_does_not_move(freeze: str, tmp_path: Path) -> None:
    model, _ = captioner(dropout=0.1)
    model.text_decoder.cls.predictions.transform.dense.bias.requires_grad_(False)
    model.text_decoder.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = state(model)
    run(model, tmp_path, freeze=freeze, num_train_epochs=1, **rising())
    changed = moved(before, state(model))
    learned = {name for name in changed if name.startswith("vision_model.rbm.")}
    assert {"vision_model.rbm.gate", "vision_model.rbm.reconstructor.rbm.W"} <= learned
    assert not any(name.startswith(FROZEN[freeze]) for name in changed - learned)
    for part in ("vision_model.", "text_decoder."):
        if part not in FROZEN[freeze]:
            assert any(name.startswith(part) for name in changed - learned), part
    assert "text_decoder.cls.predictions.transform.dense.bias" not in changed
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.text_decoder.training and not model.vision_model.training


def test_what_is_frozen_has_no_dropout(tmp_path: Path) -> None:
    losses = {}
    for freeze in ("all", "vision"):
        for dropout in (0.0, 0.5):
            model, _ = captioner(dropout=dropout)
            folder = tmp_path / f"{freeze}{dropout}"
            trainer = run(model, folder, freeze=freeze, num_train_epochs=1, itm_weight=0)
            losses[freeze, dropout] = [record["lm_loss"] for record in updates_of(trainer)]
    assert losses["all", 0.5] == losses["all", 0.0]
    assert losses["vision", 0.5] != losses["vision", 0.0]


@pytest.mark.parametrize(("term", "heads"), [("itc", {"image", "text"}), ("itm", {"match"})])
def test_each_term_trains_its_heads(term: str, heads: set[str], tmp_path: Path) -> None:
    off = {"itc_weight": 0.0, "itm_weight": 0.0, f"{term}_weight": 0.1}
    trainer = trainer_of(captioner()[0], tmp_path, num_train_epochs=1, **off, **rising())
    before = state(trainer.heads)
    trainer.train()
    changed = moved(before, state(trainer.heads))
    assert {name.split(".")[0] for name in changed} - {"log_temperature"} == heads
    assert ("log_temperature" in changed) == (term == "itc")


def test_learning_rates_rise_and_fall_and_each_part_has_its_own(tmp_path: Path) -> None:
    trainer = run(
        captioner()[0], tmp_path, freeze="vision", num_train_epochs=3, warmup_steps=2,
        rbm_learning_rate=1e-3, gate_learning_rate=2e-3, learning_rate=3e-3,
        head_learning_rate=4e-3,
    )  # fmt: skip
    updates = updates_of(trainer)
    assert len(updates) == 9  # 24 captions in batches of 8
    for i, record in enumerate(updates):
        share = i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 7)) / 2
        highest = {"rbm": 1e-3, "gate": 2e-3, "blip": 3e-3, "head": 4e-3}
        for part, rate in highest.items():
            assert record[f"{part}_learning_rate"] == pytest.approx(rate * share), part


def test_weight_decay_is_for_matrices_and_not_for_gates(tmp_path: Path) -> None:
    trainer = trainer_of(captioner(cls_token="apart")[0], tmp_path, freeze="none", weight_decay=0.3)
    with trainer.model.learning("none"):
        groups = trainer.create_optimizer().param_groups
    assert {group["name"] for group in groups} == {"rbm", "gate", "blip", "head"}
    for group in groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].dim() > 1 else 0.0)
        assert len({parameter.dim() > 1 for parameter in group["params"]}) == 1
    [gates] = [group for group in groups if group["name"] == "gate"]
    assert gates["params"] == [rbm_of(trainer.captioner).gate]
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(trainer.model.parameters()))


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Far below AdamW's epsilon a gradient hardly moves anything."""
    model, _ = captioner()
    before = state(model)
    trainer = run(
        model, tmp_path, max_grad_norm=1e-12, weight_decay=0.0, num_train_epochs=1, **rising()
    )
    # What is logged is the norm before clipping.
    assert all(record["grad_norm"] > 1e-3 for record in updates_of(trainer))
    for name, tensor in model.state_dict().items():
        assert (tensor - before[name]).abs().max() < 1e-5, name


SAME_UPDATES: dict[str, Any] = {
    "freeze": "vision", "itc_weight": 0, "itm_weight": 0, "warmup_steps": 0, "num_train_epochs": 1,
    "learning_rate": 0.1, "rbm_learning_rate": 0.1, "gate_learning_rate": 0.1, "optim": "sgd",
}  # fmt: skip
"""A training that shows how updates are put together: SGD's steps are the gradients, scaled."""


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) == 3
    for record, expected in zip(one, other, strict=True):
        for name in ("lm_loss", "cd_loss", "loss", "grad_norm", "strength"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Though captions differ in length, and the chains of CD are drawn at random."""
    logs, models = [], []
    for batch, accumulation in ((8, 1), (2, 4), (3, 3)):
        model, _ = captioner()
        sizes = {
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        }  # fmt: skip
        logs.append(updates_of(run(model, tmp_path / f"{batch}", **sizes, **SAME_UPDATES)))
        models.append(state(model))
    assert_alike(logs[1], logs[0])
    torch.testing.assert_close(models[1], models[0], rtol=1e-4, atol=1e-5)
    # 24 pairs in updates of 9: the last one is short, and still an update.
    assert len(logs[2]) == 3 and logs[2][-1]["lm_loss"] > 0


def test_batches_know_their_place(tmp_path: Path) -> None:
    """The update decides CD's draws, and the pairs before a batch which chains are its."""
    trainer = trainer_of(
        captioner()[0], tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_train_epochs=1,
    )  # fmt: skip
    seen = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if trainer.model.training:
            seen.append((kwargs["update"], kwargs["first_pair"]))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert seen == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 4)]


def test_a_process_drives_one_gpu(tmp_path: Path) -> None:
    args = RBMBlipTrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 4
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size


def test_bf16_stays_close_and_leaves_weights_in_float32(tmp_path: Path) -> None:
    exact, rounded = (captioner()[0] for _ in range(2))
    changes: dict[str, Any] = {"freeze": "vision", "learning_rate": 1e-3, **rising()}
    expected = evaluations_of(run(exact, tmp_path / "a", **changes))
    found = evaluations_of(run(rounded, tmp_path / "b", bf16=True, **changes))
    for one, other in zip(expected, found, strict=True):
        for term in ("eval_lm_loss", "eval_itc_loss", "eval_itm_loss"):
            assert other[term] == pytest.approx(one[term], rel=0.05)
            assert other[term] != one[term]
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert "forward" not in vars(rounded), "autocast must not outlive the training"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_trains_on_a_gpu(tmp_path: Path) -> None:
    trainer = run(captioner()[0], tmp_path, use_cpu=False, fp16=True, freeze="vision", **rising())
    assert all(math.isfinite(record["eval_loss"]) for record in evaluations_of(trainer))


def test_a_captioner_without_rbm_is_trained_by_the_same_steps(tmp_path: Path) -> None:
    """The control of a decoder that is fine-tuned as long."""
    model, _ = tiny_captioner()
    trainer = run(
        model, tmp_path, cd_weight=0, freeze="vision", learning_rate=1e-2, eval_dataset=data(),
        num_train_epochs=3,
    )  # fmt: skip
    first, *_, last = evaluations_of(trainer)
    assert last["eval_lm_loss"] < first["eval_lm_loss"]
    assert "strength" not in updates_of(trainer)[0]


def test_data_may_be_loaded_by_workers(tmp_path: Path) -> None:
    alone, helped = (captioner()[0] for _ in range(2))
    changes: dict[str, Any] = {"num_train_epochs": 1}
    run(alone, tmp_path / "a", **changes, **rising())
    run(helped, tmp_path / "b", dataloader_num_workers=1, **changes, **rising())
    assert moved(state(alone), state(helped)) == set()


# What is kept.


def test_training_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    model, _ = captioner()
    seen: list[dict[str, Tensor]] = []
    scores = [0.1, 0.2, 0.5, 0.4, 0.5, 0.9]

    def measure(judged: BlipForConditionalGeneration) -> dict[str, float]:
        assert judged is model and not judged.training
        seen.append(state(judged))
        return {"score": scores[len(seen) - 1]}

    trainer = run(
        model, tmp_path, num_train_epochs=6, freeze="none", metrics=measure,
        metric_for_best_model="score", callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    assert trainer.state.best_global_step == 2 * 3 and trainer.state.global_step == 4 * 3
    assert [record["eval_score"] for record in evaluations_of(trainer)] == scores[:5]
    assert moved(seen[2], state(model)) == set()
    assert moved(seen[2], seen[4]) != set()


WORSE: dict[str, Any] = {"freeze": "none", "learning_rate": 5.0, "warmup_steps": 0}
"""A training that helps nothing."""


def test_training_that_helps_nothing_gives_back_the_model_untouched(tmp_path: Path) -> None:
    model, _ = captioner()
    before = state(model)
    trainer = trainer_of(
        model, tmp_path, num_train_epochs=5, callbacks=[EarlyStoppingCallback(1)], **WORSE
    )
    heads = state(trainer.heads)
    trainer.train()
    start, *others = evaluations_of(trainer)
    assert len(others) == 1 and others[0]["eval_lm_loss"] > start["eval_lm_loss"]
    assert moved(before, state(model)) == set() == moved(heads, state(trainer.heads))


def test_the_whole_validation_loss_can_decide(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "freeze": "all", "rbm_learning_rate": 0, "gate_learning_rate": 0, "itc_weight": 1.0,
        "head_learning_rate": 1e-2, "itm_weight": 0, "eval_dataset": data(),
    }  # fmt: skip
    heads_alone = run(captioner()[0], tmp_path / "a", metric_for_best_model="lm_loss", **changes)
    assert not heads_alone.state.best_global_step
    whole = run(captioner()[0], tmp_path / "b", metric_for_best_model="loss", **changes)
    assert whole.state.best_global_step == 2 * 3


def special_tokens(model: BlipForConditionalGeneration) -> list[int]:
    config = model.config.text_config
    return [getattr(config, f"{name}_token_id") for name in ("bos", "eos", "sep", "pad")]


def test_a_checkpoint_is_a_captioner(tmp_path: Path) -> None:
    model, tokenizer = captioner()
    # As with Salesforce's BLIP, whose BOS is not its tokenizer's.
    model.config.text_config.bos_token_id = tokenizer.convert_tokens_to_ids("red")
    before = special_tokens(model)
    run(model, tmp_path, freeze="none", **rising())
    loaded, info = RBMBlipForConditionalGeneration.from_pretrained(
        get_last_checkpoint(tmp_path), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(name.startswith("heads.") for name in info["unexpected_keys"])
    assert moved(state(model), state(loaded)) == set()
    assert special_tokens(model) == special_tokens(loaded) == before


def test_evaluations_average_over_all_tokens_and_pairs(tmp_path: Path) -> None:
    """So that the size of their batches makes no difference for LM."""
    model, _ = captioner()
    whole, parts = (
        trainer_of(model, tmp_path, per_device_eval_batch_size=size, itm_weight=0, itc_weight=0)
        for size in (12, 5)
    )
    expected, found = whole.evaluate(), parts.evaluate()
    assert found["eval_lm_loss"] == pytest.approx(expected["eval_lm_loss"], rel=1e-5)
    contrasted = trainer_of(model, tmp_path, per_device_eval_batch_size=5)
    first, again = contrasted.evaluate(), contrasted.evaluate()
    terms = ("eval_lm_loss", "eval_itc_loss", "eval_itm_loss", "eval_loss")
    one_image = CaptionPairs(drawn(1)[0], drawn(1)[1])
    alone = contrasted.evaluate(one_image)
    assert alone["eval_loss"] == alone["eval_lm_loss"] and "eval_itc_loss" not in alone
    assert [first[name] for name in terms] == [again[name] for name in terms]


# Runs that go on.


class Interrupted(Exception):
    pass


class Interruption(TrainerCallback):
    """Ends a run between two batches of an update."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.updates:
            raise Interrupted


def stir_random_numbers() -> None:
    """The caller's random numbers have no part in a training."""
    random.seed(123)
    np.random.seed(123)  # noqa: NPY002  It is what transformers seeds.
    torch.manual_seed(123)


def history_of(trainer: RBMBlipTrainer) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    clock = ("_runtime", "_per_second")
    return [
        {name: value for name, value in record.items() if not name.endswith(clock)}
        for record in trainer.state.log_history
        if "train_runtime" not in record
    ]


# 6 batches and 3 updates an epoch: a checkpoint after update 2 lies within the first one.
RESUMABLE: dict[str, Any] = {
    "freeze": "none", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3, "num_train_epochs": 2, "max_grad_norm": 0.5,
}  # fmt: skip
WITHIN_EPOCHS: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def noisy_captioner(mode: str) -> BlipForConditionalGeneration:
    """One that draws random numbers in training."""
    return captioner(dropout=0.2, mode=mode)[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the trainer and the folder of a run that was not interrupted."""

    @cache
    def whole(mode: str, strategy: str | None) -> tuple[RBMBlipTrainer, Path]:
        folder = tmp_path_factory.mktemp("whole")
        changes = {**RESUMABLE, **(WITHIN_EPOCHS if strategy else {})}
        return run(noisy_captioner(mode), folder, **changes), folder

    return lambda mode, strategy: whole(mode, strategy.get("eval_strategy"))


@pytest.mark.parametrize(
    ("mode", "updates", "strategy"),
    [
        ("mean_field", 0, WITHIN_EPOCHS),  # before there is a checkpoint
        ("mean_field", 2, WITHIN_EPOCHS),  # right after one
        ("mean_field", 3, WITHIN_EPOCHS),  # an epoch after one
        ("mean_field", 5, WITHIN_EPOCHS),  # in the last update
        ("mean_field", 4, {}),  # after a checkpoint between epochs
        ("gibbs", 3, WITHIN_EPOCHS),  # where the residual draws too
    ],
)
def test_a_resumed_run_is_the_same_to_the_last_bit(
    mode: str, updates: int, strategy: dict[str, Any], uninterrupted: Any, tmp_path: Path
) -> None:
    expected, whole = uninterrupted(mode, strategy)
    changes = {**RESUMABLE, **strategy}
    with pytest.raises(Interrupted):
        run(noisy_captioner(mode), tmp_path, callbacks=[Interruption(updates)], **changes)
    trainer = trainer_of(noisy_captioner(mode), tmp_path, **changes)
    checkpoint = get_last_checkpoint(tmp_path)
    assert (checkpoint is None) == (updates == 0)
    if checkpoint is not None:
        stir_random_numbers()
    trainer.train(resume_from_checkpoint=checkpoint)

    assert moved(state(expected.model), state(trainer.model)) == set()
    assert history_of(trainer) == history_of(expected)
    assert trainer.state.best_global_step == expected.state.best_global_step
    for name, part in (("optimizer.pt", "state"), ("rng_state.pth", "cpu")):
        one, other = (
            torch.load(Path(get_last_checkpoint(each)) / name, weights_only=False)[part]
            for each in (tmp_path, whole)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    model, again = (captioner()[0] for _ in range(2))
    history = history_of(run(model, tmp_path, num_train_epochs=1))
    trainer = trainer_of(again, tmp_path, num_train_epochs=1)
    trainer.train(resume_from_checkpoint=True)
    assert history_of(trainer) == history
    assert moved(state(model), state(again)) == set()


def test_the_best_weights_outlive_an_interruption(tmp_path: Path) -> None:
    changes = {**RESUMABLE, **WORSE}
    with pytest.raises(Interrupted):
        run(captioner()[0], tmp_path, callbacks=[Interruption(4)], **changes)
    model, _ = captioner()
    before = state(model)
    trainer = trainer_of(model, tmp_path, **changes)
    trainer.train(resume_from_checkpoint=True)
    assert not trainer.state.best_global_step
    assert moved(before, state(model)) == set()


def test_patience_outlives_an_interruption(tmp_path: Path) -> None:
    """Half of it is used up in the first epoch, the other half in the second."""
    changes = {**RESUMABLE, **WORSE, "num_train_epochs": 4}
    stopping = [EarlyStoppingCallback(2)]
    with pytest.raises(Interrupted):
        run(captioner()[0], tmp_path, callbacks=[*stopping, Interruption(4)], **changes)
    trainer = trainer_of(captioner()[0], tmp_path, callbacks=[EarlyStoppingCallback(2)], **changes)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 * 3


# Several processes.

PROCESS = """
import sys
from pathlib import Path
import torch
from support.joint import captioner
from test_trainer import SAME_UPDATES, run, updates_of

folder = Path(sys.argv[1])
trainer = run(captioner()[0], folder, per_device_train_batch_size=4, **SAME_UPDATES)
if trainer.is_world_process_zero():
    torch.save([updates_of(trainer), trainer.captioner.state_dict()], folder / "result.pt")
"""


@pytest.mark.slow
def test_two_processes_are_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    script, folder = tmp_path / "train.py", tmp_path / "out"
    script.write_text(PROCESS)
    here = Path(__file__).parent
    paths = [*map(str, (here, here.parent)), *sys.path]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(folder)],
        check=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    updates, weights = torch.load(folder / "result.pt", weights_only=False)
    model, _ = captioner()
    assert_alike(updates, updates_of(run(model, tmp_path / "one", **SAME_UPDATES)))
    torch.testing.assert_close(weights, state(model), rtol=1e-4, atol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "encoder"}, "freeze must be one of .*, got 'encoder'"),
        ({"k": 0}, "k must be an int >= 1, got 0"),
        ({"k": 1.5}, "k must be an int >= 1, got 1.5"),
        ({"projection_dim": True}, "projection_dim must be an int >= 1, got True"),
        ({"max_length": 2}, "max_length must be an int >= 3, got 2"),
        ({"cd_weight": -0.1}, "cd_weight must be finite and >= 0, got -0.1"),
        ({"itc_weight": math.nan}, "itc_weight must be finite and >= 0, got nan"),
        ({"rbm_learning_rate": math.inf}, "rbm_learning_rate must be finite and >= 0, got inf"),
        (
            {"per_device_train_batch_size": 1},
            "per_device_train_batch_size must be 2 or more where itc_weight or.*got 1",
        ),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"RBMBlipTrainingArguments: {message}"):
        RBMBlipTrainingArguments(str(tmp_path), use_cpu=True, **changes)
    alone = RBMBlipTrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=1, itc_weight=0, itm_weight=0
    )
    assert alone.term_weights == {"lm": 1.0, "cd": 0.01}


def test_bad_models_and_data_are_named(tmp_path: Path) -> None:
    plain, _ = tiny_captioner()
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="cd must be 0 for a model without an RBM.*got 0.01"):
        run(plain, folder)
    with pytest.raises(TypeError, match="must be a BlipForConditionalGeneration, got Linear"):
        run(torch.nn.Linear(2, 2), folder)  # type: ignore[arg-type]
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"{name} must hold one pair or more, got none"):
            run(captioner()[0], folder, **{name: []})
    assert not folder.exists()
    with pytest.raises(ValueError, match="something to train with freeze='all'"):
        run(plain, folder, cd_weight=0, itc_weight=0, itm_weight=0)
    assert all(p.requires_grad for p in plain.parameters())
    with pytest.raises(ValueError, match="must be float32 to be trained, got torch.bfloat16"):
        run(captioner()[0].to(torch.bfloat16), folder)


def test_what_is_not_finite_stops_before_it_is_learned(tmp_path: Path) -> None:
    images, captions = drawn(12)
    images[3] = math.nan
    model, _ = captioner()
    before = state(model)
    bad = CaptionPairs(images, captions)
    with pytest.raises(FloatingPointError, match=r"vision features must be finite.*images \[3"):
        run(model, tmp_path, train_dataset=bad, per_device_train_batch_size=24)
    with pytest.raises(FloatingPointError, match="eval_score must be finite, got nan"):
        run(model, tmp_path, metrics=lambda _: {"score": math.nan}, metric_for_best_model="score")
    assert moved(before, state(model)) == set()
    undefined, _ = captioner()
    with torch.no_grad():
        undefined.text_decoder.cls.predictions.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="eval_lm_loss must be finite, got nan at"):
        run(undefined, tmp_path)
    with pytest.raises(FloatingPointError, match="gradients must be finite.*update 2"):
        run(
            model, tmp_path, cd_weight=0, freeze="vision", learning_rate=1e30, max_grad_norm=0,
            warmup_steps=0,
        )  # fmt: skip
    assert all(bool(p.isfinite().all()) for p in model.parameters())
