"""What a run of the benchmarks found: tables to print, figures to keep, and what they are of."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rbm_kernels import __version__
from rbm_kernels.cli import bench_table as bench

OTHERS = ("naive", "compile", "naive medium", "products")


@dataclass
class Report:
    """What the benchmarks found.

    Attributes:
        texts: Tables, and lines beside them, by title.
        data: Figures for the JSON file, by section.
        results: The cases of the main table.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    results: list[bench.Result] = field(default_factory=list)

    def table(self, title: str, text: str) -> None:
        """Add a table, or a line, under a title."""
        self.texts.setdefault(title, []).append(text)

    def sections(self, threads: int) -> dict[str, list[str]]:
        """All texts by title, those of the main table first."""
        if not self.results:
            return self.texts
        where = environment()
        header = bench.header(self.results[0].backend, threads)
        header += (
            " products: the bare float32 matrix products of the same operation. "
            f"Commit {where['commit']}."
        )
        table = bench.results_table(self.results, OTHERS)
        return {"Operations": [header, table], **self.texts}

    def write(self, path: Path, settings: dict[str, Any]) -> None:
        """Write a JSON file, and the texts into a Markdown file beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        operations = [
            {
                **asdict(result),
                "ratios": {
                    f"{precision} vs {other}": result.ratio(precision, other)
                    for precision in bench.PRECISIONS
                    for other in OTHERS
                },
            }
            for result in self.results
        ]
        record = {
            "environment": environment(),
            "settings": settings,
            "operations": operations,
            **self.data,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        sections = self.sections(settings["threads"])
        path.with_suffix(".md").write_text(
            "\n\n".join(f"## {title}\n\n" + "\n\n".join(texts) for title, texts in sections.items())
            + "\n"
        )


def environment() -> dict[str, str]:
    """Device, versions and commit, for the record."""
    return {
        "cpu": bench.processor(),
        "isa": bench.instruction_set(),
        "openmp": bench.wait_policy(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rbm_kernels": __version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Short commit of this checkout, with a plus sign when files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A copy may lie inside some other repository's folder.
        if not git("ls-files", "."):
            return "unknown"
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
