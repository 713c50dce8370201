"""The training loop: it learns real digits, resumes bit for bit, keeps chains and files whole."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rbm_kernels import data, likelihood, training
from rbm_kernels.training import Settings


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    train, held_out = data.split(data.load("digits"), 0.1)
    return train.values, held_out.values


def tensors_of(run: training.Run) -> dict[str, torch.Tensor]:
    """Every tensor of a run by name."""
    found = dict(run.model.state_dict())
    for number, state in run.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            found[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    for name in ("seed", "order", "sums"):
        found[name] = getattr(run, name)
    if run.chains is not None:
        found["chains"] = run.chains
    found["generator"] = run.generator.get_state()
    return found


def reproducible(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics without the timings."""
    timings = ("images_per_second", "seconds")
    return [{key: row[key] for key in row if key not in timings} for row in history]


def assert_equal_runs(first: training.Run, second: training.Run) -> None:
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert (first.epoch, first.batch) == (second.epoch, second.batch)
    assert reproducible(first.history) == reproducible(second.history)


SMALL = Settings(hidden=12, epochs=3, batch=100, chains=40, learning_rate=0.1, seed=5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"chains": 0, "k": 2}, {"optimizer": "adam", "learning_rate": 0.01}, {"momentum": 0.9}],
)
@pytest.mark.parametrize("stop_after", [1, 17, 23])
def test_interrupted_and_resumed_equals_straight(digits, tmp_path, changes, stop_after):
    settings = replace(SMALL, **changes)
    straight = training.train(*digits, training.start(digits[0], settings))
    assert not straight.interrupted and straight.epoch == 3

    seen = 0

    def interrupt(run: training.Run, rows: int) -> None:
        nonlocal seen
        seen += 1
        if seen == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "checkpoint.pt"
    before = signal.getsignal(signal.SIGINT)
    first = training.train(
        *digits, training.start(digits[0], settings), checkpoint=path, on_batch=interrupt
    )
    assert first.interrupted and signal.getsignal(signal.SIGINT) is before
    assert first.epoch * first.batches_per_epoch + first.batch == stop_after
    resumed = training.load_checkpoint(path, digits[0])
    assert_equal_runs(first, resumed)
    training.train(*digits, resumed, checkpoint=path)
    assert_equal_runs(straight, resumed)
    assert_equal_runs(straight, training.load_checkpoint(path, digits[0]))
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3]
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_same_seed_same_run(digits):
    runs = [
        training.train(*digits, training.start(digits[0], replace(SMALL, epochs=1, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert_equal_runs(runs[0], runs[1])
    assert not torch.equal(runs[0].model.W, runs[2].model.W)


def test_chains_survive_a_short_last_batch(digits):
    """1617 rows in batches of 100 end in one of 17; all 40 chains go on."""
    chains = []
    run = training.start(digits[0], replace(SMALL, epochs=2))
    before = run.chains.clone()
    training.train(*digits, run, on_batch=lambda run, rows: chains.append((rows, run.chains)))
    assert {rows for rows, _ in chains} == {100, 17}
    assert all(state.shape == before.shape for _, state in chains)
    assert not torch.equal(run.chains, before)
    assert run.seed.tolist() == [5, 2 * 1 * 2 * 17]


def test_weight_decay_leaves_biases_alone(digits):
    """With no learning but decay, W shrinks and the biases' group has none."""
    run = training.start(digits[0], replace(SMALL, weight_decay=0.5))
    groups = run.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [p is q for p, q in zip(groups[1]["params"], (run.model.b, run.model.c), strict=True)]
    assert groups[0]["params"][0] is run.model.W


def test_learning_rate_falls_to_zero(digits):
    rates = []
    run = training.start(digits[0], SMALL)
    training.train(
        *digits, run, on_batch=lambda r, rows: rates.append(r.optimizer.param_groups[0]["lr"])
    )
    assert rates[0] == 0.1 and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1 / 51)
    constant = training.train(*digits, training.start(digits[0], replace(SMALL, decay=False)))
    assert {row["learning_rate"] for row in constant.history} == {0.1}


def test_minutes_end_a_run(digits):
    settings = replace(SMALL, epochs=10**6, minutes=0.005)
    run = training.train(*digits, training.start(digits[0], settings))
    assert not run.interrupted and 0.3 <= run.elapsed < 5 and run.progress == 1.0
    assert len(run.history) == run.epoch >= 1


def test_metrics(digits):
    run = training.train(*digits, training.start(digits[0], SMALL))
    for row in run.history:
        assert row["free_energy_gap"] == row["free_energy_held_out"] - row["free_energy_train"]
        assert all(isinstance(value, (int, float)) for value in row.values())
    assert run.history[-1]["pseudo_likelihood"] > run.history[0]["pseudo_likelihood"]


def test_learns_digits_exactly_measured(digits):
    """16 hidden units: log Z is exact, so is the margin over independent pixels."""
    settings = Settings(
        hidden=16, epochs=60, batch=64, chains=100, learning_rate=0.1, momentum=0.5, seed=0
    )
    run = training.train(*digits, training.start(digits[0], settings))
    result = training.evaluate(run.model, *digits)
    print(
        f"\ndigits, 16 hidden units, held-out log-likelihood per image: {result.held_out:.2f} nats "
        f"exact; independent pixels {result.independent:.2f}"
    )
    assert result.estimate is None
    assert result.held_out > result.independent + 5
    # AIS agrees with the exact value after training, too.
    model = run.model
    estimate = likelihood.ais(
        model.W, model.b, model.c, base_visible_bias=likelihood.log_odds(digits[0]),
        n_chains=200, betas=1000, seed=0,
    )  # fmt: skip
    print(f"log Z exact {result.log_z:.3f}, AIS {estimate.log_z:.3f} +- {estimate.std:.3f}")
    assert estimate.effective_sample_size > 50
    assert abs(estimate.log_z - result.log_z) < max(4 * estimate.std, 0.05)


def test_evaluate_by_ais(digits):
    settings = Settings(hidden=18, epochs=10, batch=64, chains=64, learning_rate=0.1)
    run = training.train(*digits, training.start(digits[0], settings))
    result = training.evaluate(run.model, *digits, chains=run.chains, betas=500, exact_units=17)
    exact = training.evaluate(run.model, *digits)
    assert result.estimate is not None and result.reverse is not None
    assert exact.estimate is None and exact.reverse is None
    assert result.reverse.log_z == pytest.approx(exact.log_z, abs=1.0)
    assert result.held_out == pytest.approx(exact.held_out, abs=0.3)
    assert result.independent == exact.independent < exact.held_out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden", 0, "hidden must be at least 1, got 0"),
        ("k", 0, "k must be at least 1, got 0"),
        ("chains", -1, "chains must be at least 0, got -1"),
        ("learning_rate", float("nan"), "learning_rate must be positive, got nan"),
        ("minutes", 0.0, "minutes must be positive, got 0.0"),
        ("momentum", 1.0, r"momentum must lie in \[0, 1\), got 1.0"),
        ("weight_decay", -1.0, "weight_decay must be at least 0, got -1.0"),
        ("optimizer", "lbfgs", "optimizer must be 'sgd' or 'adam', got 'lbfgs'"),
    ],
)
def test_bad_settings(name, value, message):
    with pytest.raises(ValueError, match="train: " + message):
        Settings(**{name: value})


def test_checkpoint_errors(digits, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        training.load_checkpoint(path, digits[0])
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        training.load_checkpoint(path, digits[0])
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="checkpoint of format 1, got 99"):
        training.load_checkpoint(path, digits[0])
    training.save_checkpoint(path, training.start(digits[0], SMALL), digits[0])
    with pytest.raises(ValueError, match="trained on other data"):
        training.load_checkpoint(path, 1 - digits[0])
    with pytest.raises(ValueError, match=r"data must be \[N, V\] with N, V >= 1, got \[0, 3\]"):
        training.start(torch.zeros(0, 3), SMALL)


def test_a_failed_save_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    training.write_atomically(path, lambda name: Path(name).write_text("earlier"))

    def fail(name: str) -> None:
        Path(name).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.write_atomically(path, fail)
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["file"]
