"""Checkpoints: a run goes on bit for bit, and a file that is no good is told by name."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import SMALL, assert_equal_runs

from rbm_kernels import training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_phase": "cd", "k": 2},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"momentum": 0.9},
    ],
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


def test_checkpoint_errors(digits, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        training.load_checkpoint(path, digits[0])
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        training.load_checkpoint(path, digits[0])
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="checkpoint of format 2, got 99"):
        training.load_checkpoint(path, digits[0])
    training.save_checkpoint(path, training.start(digits[0], SMALL), digits[0])
    with pytest.raises(ValueError, match="trained on other data"):
        training.load_checkpoint(path, 1 - digits[0])


# Norms of W, b and c at the end of runs that the version with format 1 made without a break.
FORMAT_1 = {
    "pcd": (0.2066846, 1.3913079, 0.0076133),
    "cd": (0.1468973, 1.3355791, 0.0383822),
}


@pytest.mark.parametrize("phase", FORMAT_1)
def test_a_checkpoint_of_format_1_goes_on(phase):
    """The files were written by that version, after 7 of 15 updates."""
    generator = torch.Generator().manual_seed(0)
    data = (torch.rand(21, 6, generator=generator) < 0.4).byte()
    run = training.load_checkpoint(Path(__file__).parent / "format_1" / f"{phase}.pt", data)
    assert (run.epoch, run.batch) == (1, 2)
    assert (run.settings.n_hidden, run.settings.batch_size) == (4, 5)
    assert run.settings.negative_phase == phase
    training.train(data, data, run)
    norms = [p.detach().double().norm().item() for p in run.model.parameters()]
    assert norms == pytest.approx(FORMAT_1[phase], rel=1e-4)
