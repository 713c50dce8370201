"""Options, the interleaving fixture, and the report written when the suite ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rbm_kernels import benchmark as bench

HERE = Path(__file__).parent
THREADS = 2


@dataclass
class Report:
    """What the benchmarks found: tables to print and data to keep, by section."""

    tables: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    results: list[bench.Result] = field(default_factory=list)

    def table(self, title: str, text: str) -> None:
        """Add a table, or a line, under a title."""
        self.tables.setdefault(title, []).append(text)


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
    """Time variants in turn: pytest-benchmark times `ours`, its setup times the others."""

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
        timings = {name: bench.summarise(taken) for name, taken in samples.items() if taken}
        benchmark.extra_info["median_seconds"] = {name: t.p50 for name, t in timings.items()}
        return timings

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables and write the JSON."""
    found = config.stash[_REPORT]
    if found.results:
        backend = found.results[0].backend
        found.tables = {
            "Operations": [bench.header(backend, THREADS), bench.results_table(found.results)],
            **found.tables,
        }
    if not found.tables:
        return
    for title, texts in found.tables.items():
        terminalreporter.write_sep("=", title)
        for text in texts:
            terminalreporter.write_line(text + "\n")
    path: Path = config.getoption("--results")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": bench.environment(HERE),
        "settings": {"threads": THREADS, "seconds": config.getoption("--seconds")},
        "operations": [
            {
                **asdict(result),
                "ratios": {
                    f"{precision} vs {against}": result.ratio(precision, against)
                    for precision in bench.PRECISIONS
                    for against in ("naive", "compile", "naive medium", "products")
                },
            }
            for result in found.results
        ],
        **found.data,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(
        "\n\n".join(f"## {title}\n\n" + "\n\n".join(texts) for title, texts in found.tables.items())
        + "\n"
    )
    terminalreporter.write_line(f"written: {path} and {path.with_suffix('.md').name}")
