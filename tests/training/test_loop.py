"""The loop: it learns real digits, keeps its chains whole, and ends when it is told to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.runs import SMALL, assert_equal_runs

from rbm_kernels import evaluation, training
from rbm_kernels.training import Settings


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
        n_hidden=16, epochs=60, batch_size=64, n_chains=100, learning_rate=0.1, momentum=0.5, seed=0
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
    estimate = evaluation.ais(
        model.W, model.b, model.c, base_visible_bias=evaluation.log_odds(digits[0]),
        n_chains=200, betas=1000, seed=0,
    )  # fmt: skip
    print(f"log Z exact {result.log_z:.3f}, AIS {estimate.log_z:.3f} +- {estimate.std:.3f}")
    assert estimate.effective_sample_size > 50
    assert abs(estimate.log_z - result.log_z) < max(4 * estimate.std, 0.05)


def test_optimize_stops_and_reports_whole_epochs():
    """Plain gradient descent on a number, with everything that a caller may ask for."""
    x = torch.nn.Parameter(torch.tensor(1.0))
    y = torch.nn.Parameter(torch.tensor(1.0))
    groups = [{"params": [x]}, {"params": [y], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=99.0)
    updates, epochs, rates = [], [], []

    def gradients(batch):
        x.grad, y.grad = torch.tensor(batch), torch.tensor(batch)
        return batch + 1

    def rate(update):
        rates.append(update)
        return 0.1 * (update + 1)

    training.optimize(
        optimizer,
        lambda epoch: [1.0, 2.0, float(epoch)],
        gradients,
        rate,
        epochs=range(5, 9),
        stop=lambda: len(updates) == 5,
        after_update=lambda batch, result: updates.append((batch, result)),
        after_epoch=epochs.append,
    )
    assert updates == [(1.0, 2.0), (2.0, 3.0), (5.0, 6.0), (1.0, 2.0), (2.0, 3.0)]
    assert epochs == [5] and rates == [0, 1, 2, 3, 4]
    steps = 0.1 * (1 * 1 + 2 * 2 + 3 * 5 + 4 * 1 + 5 * 2)
    assert x.item() == pytest.approx(1 - steps) and y.item() == pytest.approx(1 - steps / 2)


def test_a_batch_at_which_the_training_stops_is_not_used():
    x = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([x], lr=1.0)
    training.optimize(
        optimizer,
        lambda epoch: [1.0],
        pytest.fail,
        lambda update: 1.0,
        epochs=[0],
        stop=lambda: True,
    )
    assert x.item() == 1.0
