"""What the tests of training share: small runs on digits, and runs compared tensor by tensor."""

from __future__ import annotations

import torch

from rbm_kernels import training
from rbm_kernels.training import Settings

SMALL = Settings(n_hidden=12, epochs=3, batch_size=100, n_chains=40, learning_rate=0.1, seed=5)


def tensors_of(run: training.Run) -> dict[str, torch.Tensor]:
    """Every tensor of a run by name."""
    found = dict(run.model.state_dict())
    for number, state in run.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            found[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    for name in ("seed", "order", "sums"):
        found[name] = getattr(run, name)
    for name, value in run.negative_phase.state_dict().items():
        if value is not None:
            found[f"negative_phase.{name}"] = value
    found["generator"] = run.generator.get_state()
    return found


def reproducible(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics without the timings."""
    timings = ("images_per_second", "seconds")
    return [{key: row[key] for key in row if key not in timings} for row in history]


def assert_equal_runs(first: training.Run, second: training.Run) -> None:
    """Two runs are at the same update and hold the same bits, timings apart."""
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert (first.epoch, first.batch) == (second.epoch, second.batch)
    assert reproducible(first.history) == reproducible(second.history)
