"""benchmarks/gpu_check.py without a GPU: what hangs or faults costs its own figures alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# In the place of Python: one line of the benchmark hangs and does not hear that it is to end, as a
# process does whose kernel hangs; another one dies of a fault, as after an illegal access.
STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time
line = sys.argv[-1] if "--only" not in sys.argv else sys.argv[sys.argv.index("--only") + 1]
if line == "sampling":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    print("about to hang", flush=True)
    time.sleep(600)
if line == "large":
    print("about to fault", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


@pytest.fixture
def stand_in(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "stand_in"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check, "PYTHON", str(program))
    ending = tuple((number, 0.2) for number, _ in gpu_check.ENDING)
    monkeypatch.setattr(gpu_check, "ENDING", ending)


@pytest.mark.skipif(
    importlib.util.find_spec("rbm_kernels._cuda_emulated") is None,
    reason="the emulated kernels are not built",
)
@pytest.mark.usefixtures("stand_in")
def test_other_figures_survive_a_hang_and_a_fault(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {"sampling": 1, "large": 100, "cluster": 100, "memory": 100}
    monkeypatch.setattr(gpu_check, "FIGURES", seconds)
    results = tmp_path / "results"
    assert gpu_check.main([str(results), "figures", "--dry-run"]) == 1
    summary = (results / "summary.txt").read_text().splitlines()
    assert [line.split()[2] for line in summary] == list(seconds)
    endings = ("ran longer than 1 s", "failed (-11)", "passed", "passed")
    for line, ending in zip(summary, endings, strict=True):
        assert ending in line
    log = (results / "figures.log").read_text()
    assert "about to hang" in log and "about to fault" in log
    found = json.loads((results / "bench_gpu.json").read_text())
    assert list(found["lines"]) == ["cluster of cuda", "memory of cuda"]
    assert found["lines"]["cluster of cuda"]["figures"]
    assert "of 2 blocks" in found["environment"]["clusters_at_once"]


def runs(pid: str) -> bool:
    """Whether a process is there, and not only waits for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("stand_in")
def test_a_process_that_started_others_ends_with_them(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    """A worker of pytest holds the device, and the pipe that is read, as much as pytest does."""
    pid = tmp_path / "pid"
    words = f"sleep 600 & echo $! > {pid}; echo started; wait"
    step = gpu_check.Step("a step", "a.log", 5, ["bash", "-c", words])
    start = time.monotonic()
    status, output = gpu_check.execute(step, 0.5, {})
    assert time.monotonic() - start < 10
    assert status.startswith(gpu_check.HUNG) and output == "started\n"
    while runs(pid.read_text().strip()):  # as a killed process does for a moment
        assert time.monotonic() - start < 20, "the child runs on"
        time.sleep(0.05)


def test_a_regime_that_hung_is_not_timed_alone(gpu_check: ModuleType, tmp_path: Path) -> None:
    plan = gpu_check.Plan(tmp_path, dry_run=True)
    steps = [step.name for step in plan.figures(["cluster"])]
    assert "figures of cluster" not in steps and "figures of sampling" in steps


def test_no_step_starts_when_the_time_is_over(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, 0.5, {})
    step = gpu_check.Step("a step", "a.log", 60, ["touch", str(tmp_path / "ran")])
    assert check.run([step]) == {"a step": "no time left"}
    assert check.failed == ["a step"] and not (tmp_path / "ran").exists()


def test_the_stages_write_eight_files_at_most(gpu_check: ModuleType, tmp_path: Path) -> None:
    plan = gpu_check.Plan(tmp_path, dry_run=False)
    steps = [*plan.figures([])]
    for stage in gpu_check.STAGES:
        steps += getattr(plan, stage)() if stage != "figures" else []
    logs = {step.log for step in steps}
    assert len(logs | {"summary.txt", "bench_gpu.json"}) <= 8
    assert all(name in gpu_check.__doc__ for name in (*logs, *gpu_check.STAGES))


def test_an_unknown_stage_is_refused(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path), "figure"])
    assert "got figure" in capsys.readouterr().err


TESTS = """
import time
import pytest
from support import fresh_workers

state = {"broken": False}

fresh_workers.broken = lambda: state["broken"]

@pytest.fixture(autouse=True)
def device():
    assert not state["broken"], "the device is broken"

def test_0_breaks_the_device():
    state["broken"] = True
    assert False, "an illegal access"

def test_1_hangs():
    time.sleep(600)

def test_2_passes():
    pass

def test_3_fails_and_breaks_nothing():
    assert False, "other bits"

def test_4_passes():
    pass
"""


def test_a_broken_device_fails_one_test(tmp_path: Path) -> None:
    """A sticky error and a hang each cost their own test: a fresh worker runs the others."""
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_timeout")
    (tmp_path / "test_planted.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "1", "--timeout=2", "--timeout-method=thread",
         "-p", "support.fresh_workers", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
         str(tmp_path)],
        cwd=BENCHMARKS.parent / "tests",
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    words = done.stdout + done.stderr
    assert "3 failed, 2 passed" in done.stdout, words
    assert "broke the device" in words and "an illegal access" in words


def test_a_build_of_other_sources_is_not_used(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = gpu_check.gpu_build
    kernel = tmp_path / "csrc" / "cuda" / "kernel.cu"
    for path in (kernel, tmp_path / "rbm_kernels" / "rbm.py"):
        path.parent.mkdir(parents=True)
    for path in (kernel, tmp_path / "setup.py", tmp_path / "pyproject.toml"):
        path.write_text("")
    site = tmp_path / "build" / "gpu_site"
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "SITE", site)
    monkeypatch.setattr(build, "STAMP", site / "built_from.txt")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: site.mkdir(parents=True))
    assert not build.is_built()
    build.build(["90"])
    assert build.is_built()
    kernel.write_text("// other code")
    assert not build.is_built()
