"""Everything that needs a GPU, without a network, in stages that cannot hurt each other.

    benchmarks/gpu_check.sh RESULTS_DIR [STAGE ...] [--limit SECONDS] [--dry-run]

First, in at most 240 seconds, and what runs where no stage is named:

    environment   the machine, its clocks, the clusters that fit, the speed of copies and products
    bits          the bits of every regime of the cuda backend, four processes at once
    figures       the speed of the cuda backend, a process for each line of bench_gpu.py
    profile       ncu's reports of the three main kernels, where ncu is installed

Then, in at most 570 seconds, those that are named:

    tests         the tests of the cuda backend
    triton        the bit tests of the triton backend, without tuning
    peers         the speed of the triton backend and of torch.compile
    sanitizer     compute-sanitizer over every regime and over triton

Every step is a process with a time limit of its own: one that hangs or faults costs what it would
have found and nothing else. The exit status is 1 if a step failed. RESULTS_DIR has eight files at
most: summary.txt, bench_gpu.json, environment.txt, bits.log, figures.log, profile.txt, tests.log
and sanitizer.log. The package is built into build/gpu_site unless gpu_build.py has done so before.
A dry run takes the same way with the emulated build and tiny sizes, on a machine without a GPU.

It takes torch, triton, pytest with pytest-xdist and pytest-timeout, scipy and hypothesis, and to
build also setuptools, pybind11, ninja and nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import gpu_build

ROOT = gpu_build.ROOT
PYTHON = sys.executable
FIRST = ("environment", "bits", "figures", "profile")
STAGES = (*FIRST, "tests", "triton", "peers", "sanitizer")
REGIMES = ("cluster", "resident", "tiled_sm90a", "tiled")

# Lines of bench_gpu.py and the seconds that each may take, by worth.
FIGURES = {
    "sampling": 30,
    "large": 40,
    "small": 25,
    "training": 20,
    "cluster": 20,
    "resident": 20,
    "tiled_sm90a": 25,
    "tiled": 25,
    "memory": 15,
}
TRITON_FIGURES = {"sampling": 40, "large": 60, "small": 40, "training": 40}
BITS_SECONDS, COMPILED_SECONDS, PROFILE_SECONDS, SANITIZER_SECONDS = 60, 150, 25, 75
# The three main kernels, and the lines whose call launches them.
PROFILED = {
    "chain_in_cluster": "sampling",
    "half_sweep_kernel": "large",
    "gradient_kernel": "large",
}
# A process that is to end is asked by these signals, with the seconds that it is given after each.
# pytest answers the first with the failures that it has seen, Python the second with its traceback.
ENDING = ((signal.SIGINT, 3.0), (signal.SIGABRT, 2.0), (signal.SIGKILL, 5.0))
HUNG = "ran longer than"


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes:
        name: What the summary calls it.
        log: The file among the results that gets its words.
        seconds: Its time limit.
        command: The program and its arguments. It runs in tests/, so that Python finds the
            installed package and not the checkout's folder.
        variables: What the environment has beside what all steps have.
        must_pass: Whether the check fails if the step does.
    """

    name: str
    log: str
    seconds: float
    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    must_pass: bool = True


def execute(step: Step, seconds: float, variables: dict[str, str]) -> tuple[str, str]:
    """Run a step for so many seconds at most: how it ended, and its words."""
    process = subprocess.Popen(
        step.command,
        cwd=ROOT / "tests",
        env={**os.environ, **variables, **step.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output, hung = b"", False
    for number, grace in ((None, seconds), *ENDING):
        if number is not None:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # and all that it started
        try:
            output, _ = process.communicate(timeout=grace)
            break
        except subprocess.TimeoutExpired as error:
            output = error.output or output
    # A process that even the last signal did not end waits in the driver; it is left behind.
    words = output[-2_000_000:].decode(errors="replace")
    if hung:
        return f"{HUNG} {seconds:.0f} s", words
    return "passed" if process.returncode == 0 else f"failed ({process.returncode})", words


class Check:
    """Runs steps until the time is over, and writes down what became of them.

    Args:
        results: The folder for the results.
        limit: Seconds for all steps together.
        variables: What the environment of every step has.
    """

    def __init__(self, results: Path, limit: float, variables: dict[str, str]) -> None:
        self.results, self.variables = results, variables
        self.deadline = time.monotonic() + limit
        self.failed: list[str] = []
        self.one_at_a_time = threading.Lock()  # writes
        results.mkdir(parents=True, exist_ok=True)
        (results / "summary.txt").write_text("")

    def tell(self, name: str, status: str) -> None:
        """Add a line to the summary."""
        line = f"{name:<36} {status}"
        print(line, flush=True)
        with open(self.results / "summary.txt", "a") as summary:
            summary.write(line + "\n")

    def run(self, steps: Sequence[Step], at_once: int = 1) -> dict[str, str]:
        """Run steps, so many at a time, and say by name how each ended."""
        with ThreadPoolExecutor(at_once) as pool:
            return dict(pool.map(self._run_one, steps))

    def _run_one(self, step: Step) -> tuple[str, str]:
        start = time.monotonic()
        # A process may take all of its grace to end.
        seconds = min(step.seconds, self.deadline - start - sum(grace for _, grace in ENDING))
        status, words = "no time left", ""
        if seconds >= 1:
            try:
                status, words = execute(step, seconds, self.variables)
            except OSError as error:  # the program is not there, say
                status = f"failed ({error})"
        with self.one_at_a_time:
            with open(self.results / step.log, "a") as log:
                log.write(f"\n==== {step.name}: {' '.join(step.command)}\n{words}")
            print(f"\n==== {step.name}", *words.splitlines()[-25:], sep="\n")
            if status != "passed" and step.must_pass:
                self.failed.append(step.name)
            self.tell(step.name, f"{status}, {time.monotonic() - start:.0f} s")
        return step.name, status


class Plan:
    """The steps of each stage.

    Args:
        results: The folder for the results.
        dry_run: Whether the emulated build takes the place of the GPU.
    """

    def __init__(self, results: Path, dry_run: bool) -> None:
        self.results, self.dry_run = results, dry_run
        self.peer = "cpu" if dry_run else "triton"

    def line(self, word: str, seconds: float, backend: str, name: str) -> Step:
        """One line of bench_gpu.py, or, without a word, what it begins with.

        Either fails where the backend cannot run, as the tests do not, which are skipped then.
        """
        command = [PYTHON, str(ROOT / "benchmarks" / "bench_gpu.py"), str(self.results)]
        command += ["--backends", backend, "--only", *([word] if word else [])]
        if self.dry_run:
            command += ["--dry-run", "--seconds", "0"]
        return Step(name, "figures.log" if word else "environment.txt", seconds, command)

    def pytest(self, name: str, log: str, seconds: float, *arguments: str) -> Step:
        """A run of pytest."""
        command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]
        return Step(name, log, seconds, command, {"OMP_NUM_THREADS": "2"})

    def environment(self) -> list[Step]:
        """The machine, the package, and the beginning of bench_gpu.json."""
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        words = f"nvidia-smi; nvidia-smi --query-gpu={query} --format=csv; nvcc --version; nproc"
        log = "environment.txt"
        return [
            Step("machine", log, 15, ["bash", "-c", words]),
            Step("package", log, 60, [PYTHON, "-m", "rbm_kernels"]),  # torch's first import
            self.line("", 40, "cuda", "ceilings"),
        ]

    def bits(self) -> list[Step]:
        """The bits of each regime."""
        steps = []
        for regime in REGIMES:
            which = regime if regime != "tiled" else "tiled and not sm90a"
            arguments = ["-v", "-rs", "--maxfail=8", "backends/test_cuda_regimes.py", "-k", which]
            steps.append(self.pytest(f"bits of {regime}", "bits.log", BITS_SECONDS, *arguments))
        return steps

    def figures(self, hung: Sequence[str]) -> list[Step]:
        """The lines of the cuda backend, without those of regimes that hung."""
        return [
            self.line(word, seconds, "cuda", f"figures of {word}")
            for word, seconds in FIGURES.items()
            if word not in hung
        ]

    def profile(self) -> list[Step]:
        """ncu's reports. It leaves the clocks as they are."""
        steps = []
        for kernel, word in PROFILED.items():
            command = [PYTHON, str(ROOT / "benchmarks" / "bench_gpu.py"), str(self.results)]
            command += ["--once", "--only", word, *(["--dry-run"] if self.dry_run else [])]
            ncu = ["ncu", "--clock-control", "none", "--set", "full", "--launch-count", "1"]
            ncu += ["--kernel-name", f"regex:{kernel}"]
            command = command if self.dry_run else ncu + command
            steps.append(Step(f"profile of {kernel}", "profile.txt", PROFILE_SECONDS, command))
        return steps

    def tests(self) -> list[Step]:
        """The tests of the cuda backend. A worker that hangs or breaks the device is replaced."""
        files = "test_gpu or test_select"
        which = ["ops", "backends", "-k", f"(cuda or {files}) and not triton"]
        if self.dry_run:
            which = ["backends/test_cuda_regimes.py", "-k", "resident"]
        tests = self.pytest("tests of cuda", "tests.log", 300, *self.in_workers(4), *which)
        return [self.line("", 30, "cuda", "cuda can run"), tests]

    def triton(self) -> list[Step]:
        """The bit tests of the triton backend, in workers that run nothing of cuda."""
        which = ["ops", "backends", "-k", "triton and not compiled and not interpreted"]
        if self.dry_run:
            which += ["--collect-only"]
        options = [*self.in_workers(8), "-p", "support.untuned"]
        tests = self.pytest("tests of triton", "tests.log", 240, *options, *which)
        return [self.line("", 30, self.peer, f"{self.peer} can run"), tests]

    @staticmethod
    def in_workers(number: int) -> list[str]:
        """pytest's options for so many workers that are replaced when they break."""
        options = ["-q", "-rs", "-n", str(number), "--max-worker-restart=60", "--durations=10"]
        return [*options, "--timeout=60", "--timeout-method=thread", "-p", "support.fresh_workers"]

    def peers(self) -> list[Step]:
        """The lines of triton, and torch.compile beside cuda."""
        steps = [
            self.line(word, seconds, self.peer, f"figures of {word}, {self.peer}")
            for word, seconds in TRITON_FIGURES.items()
        ]
        return [*steps, self.line("compiled", COMPILED_SECONDS, "cuda", "figures of compiled")]

    def sanitizer(self) -> list[Step]:
        """compute-sanitizer over small calls, with each regime forced.

        Racecheck watches shared memory, which in Triton's kernels is the compiler's affair. What
        it reports of kernels whose copies complete barriers is to be read: it may not know them.
        """
        runs = [(tool, "cuda", regime) for tool in ("memcheck", "racecheck") for regime in REGIMES]
        runs += [("memcheck", "triton", "")]
        if self.dry_run:
            runs = [run for run in runs if run[:2] == ("memcheck", "cuda")]
        steps = []
        for tool, backend, regime in runs:
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            if tool == "memcheck":
                # Libraries probe the driver with calls that fail; Python raises those that matter.
                sanitizer += ["--report-api-errors", "no"]
            command = [PYTHON, str(ROOT / "benchmarks" / "gpu_small_cases.py"), backend]
            command += ["--regime", regime] if regime else []
            command = [*command, "--device", "cpu"] if self.dry_run else sanitizer + command
            steps.append(
                Step(
                    f"{tool} of {regime or backend}",
                    "sanitizer.log",
                    SANITIZER_SECONDS,
                    command,
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    must_pass=tool == "memcheck" or regime in ("resident", "tiled"),
                )
            )
        return steps


def run_stages(check: Check, plan: Plan, stages: Sequence[str]) -> None:
    """Run stages in the order of STAGES."""
    hung: list[str] = []
    for stage in (stage for stage in STAGES if stage in stages):
        tool = {"profile": "ncu", "sanitizer": "compute-sanitizer"}.get(stage)
        if tool and not plan.dry_run and shutil.which(tool) is None:
            check.tell(stage, f"left out: {tool} is not there")
        elif stage == "bits":
            ended = check.run(plan.bits(), at_once=len(REGIMES))
            hung = [name.split()[-1] for name, status in ended.items() if status.startswith(HUNG)]
        elif stage == "figures":
            for regime in hung:
                check.tell(f"figures of {regime}", "left out: its bits hung")
            check.run(plan.figures(hung))
        else:
            # Several sanitizers do not mind each other; figures would.
            check.run(getattr(plan, stage)(), at_once=3 if stage == "sanitizer" else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if a step failed."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder for the results")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--limit", type=float, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="emulated, with tiny sizes")
    options = parser.parse_args(arguments)
    results, stages = options.results.resolve(), options.stages or FIRST
    if unknown := set(stages) - set(STAGES):
        parser.error(f"stages are {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    limit = options.limit or (240 if set(stages) <= set(FIRST) else 570)
    variables = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "8")
    if options.dry_run:
        variables["RBM_KERNELS_CUDA_EMULATED"] = "1"
    else:
        paths = [str(gpu_build.SITE), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    check = Check(results, limit, variables)
    if not options.dry_run and not gpu_build.is_built():
        command = [PYTHON, str(ROOT / "benchmarks" / "gpu_build.py")]
        check.run([Step("build", "environment.txt", 150, command)])
    run_stages(check, Plan(results, options.dry_run), stages)
    print("\n" + (results / "summary.txt").read_text(), end="")
    if check.failed:
        print(f"failed: {', '.join(check.failed)}")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
