"""Options, the interleaving fixture, and the report written when the suite ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import Report

from rbm_kernels.cli import bench_table as bench

HERE = Path(__file__).parent
THREADS = 2


_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite."""
    group = parser.getgroup("rbm-kernels")
    group.addoption("--seconds", type=float, default=2.0, help="time for each row of a table")
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile")
    group.addoption(
        "--results", type=Path, default=HERE / "results" / "latest.json", help="JSON to write"
    )


def pytest_configure(config: pytest.Config) -> None:
    """One report a run."""
    config.stash[_REPORT] = Report()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """The report of this run."""
    return request.config.stash[_REPORT]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with bench.torch_settings(THREADS), torch.no_grad():
        yield


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Time to spend on a row."""
    return float(request.config.getoption("--seconds"))


@pytest.fixture
def compare(benchmark: Any, seconds: float) -> Callable[..., dict[str, bench.Timing]]:
    """Time variants in turn: pytest-benchmark times ``ours``, its setup times the others."""

    def run(
        variants: Mapping[str, bench.Call],
        ours: str,
        prepare: bench.Call | None = None,
        budget: float = seconds,
    ) -> dict[str, bench.Timing]:
        samples: dict[str, list[float]] = {name: [] for name in variants}
        bench.one_turn(variants, samples, 0, prepare)  # warms up
        if sum(taken[0] for taken in samples.values()) < 1.0:
            bench.one_turn(variants, samples, 0, prepare)
        one_round = sum(taken[-1] for taken in samples.values())
        rounds = min(max(int(budget / one_round), 5), 200)
        for taken in samples.values():
            taken.clear()
        others = {name: call for name, call in variants.items() if name != ours}
        turn = 0

        def setup() -> None:
            nonlocal turn
            bench.one_turn(others, samples, turn, prepare)
            turn += 1
            if prepare is not None:
                prepare()

        benchmark.pedantic(variants[ours], setup=setup, rounds=rounds, iterations=1)
        if benchmark.stats is not None:  # None under --benchmark-disable
            samples[ours] = list(benchmark.stats.stats.data)
        timings = {name: bench.summarize(taken) for name, taken in samples.items() if taken}
        benchmark.extra_info["median_seconds"] = {name: t.p50 for name, t in timings.items()}
        return timings

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables and write the files."""
    report = config.stash[_REPORT]
    sections = report.sections(THREADS)
    if not sections:
        return
    for title, texts in sections.items():
        terminalreporter.write_sep("=", title)
        for text in texts:
            terminalreporter.write_line(text + "\n")
    path: Path = config.getoption("--results")
    report.write(path, {"threads": THREADS, "seconds": config.getoption("--seconds")})
    terminalreporter.write_line(f"written: {path} and {path.with_suffix('.md').name}")
