"""What is installed, what was built, and what can run here.

Only the standard library is imported at the top, and nothing that fails below makes the report
fail: it is for installations where something is wrong. ``python rbm_kernels/info.py`` works too
where the package itself cannot be imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tqdm",
    "triton",
    "scikit-learn",
    "mlxtend",
    "matplotlib",
    "huggingface_hub",
    "transformers",
)
_BACKENDS = ("reference", "cpu", "triton", "cuda")


def build_info() -> dict[str, Any]:
    """What setup.py recorded of the build; empty if there is no record."""
    path = Path(__file__).with_name("_build_info.json")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def why_missing(name: str, error: ImportError) -> str:
    """Why a native module did not import, by the record of the build.

    Args:
        name: ``"cpu"``, ``"cuda"`` or ``"cuda_emulated"``.
        error: What the import raised.
    """
    record = build_info().get(name, {})
    if record.get("built"):
        return f"rbm_kernels._{name} was built, but does not import: {error}"
    return f"not built: {record.get('reason', 'there is no record of a build')}"


def package_version() -> str:
    """The version of this package, read without importing it."""
    try:
        text = Path(__file__).with_name("_version.py").read_text()
        return text.split('"')[1]
    except (OSError, IndexError):
        return "unknown"


def backend_status(name: str) -> str | None:
    """Why the backend cannot run here, or None if it can. Never raises."""
    try:
        module = importlib.import_module(f"rbm_kernels.backends.{name}")
        ask = getattr(module, "unavailable_reason", None)
        if ask is None:
            return None
        reason = ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if reason is None else str(reason)


def _takes_cpu_tensors(name: str) -> bool:
    """Whether a GPU backend runs on the CPU here: the emulated build, Triton's interpreter."""
    try:
        import torch

        module = importlib.import_module(f"rbm_kernels.backends.{name}")
        return module.runs_on(torch.device("cpu")) is None
    except Exception:
        return False


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_lines() -> list[str]:
    try:
        import torch
    except Exception as error:
        return [f"  torch does not import: {type(error).__name__}: {error}"]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [
        f"  torch is built with {cuda}; {torch.get_num_threads()} threads; "
        f"float32 matmul precision {torch.get_float32_matmul_precision()}"
    ]


def _gpu_lines() -> list[str]:
    try:
        import torch

        found = range(torch.cuda.device_count())
        devices = [torch.cuda.get_device_properties(number) for number in found]
    except Exception as error:
        return [f"  unknown: {type(error).__name__}: {error}"]
    return [
        f"  cuda:{number} is {device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.multi_processor_count} multiprocessors, {device.total_memory / 2**30:.1f} GiB"
        for number, device in enumerate(devices)
    ] or ["  none that torch sees"]


def _module_lines(name: str, record: dict[str, Any]) -> list[str]:
    built = record.get(name)
    if not built:
        return [f"  _{name}: no record of a build"]
    if not built.get("built"):
        return [f"  _{name}: not built: {built.get('reason')}"]
    lines = [f"  _{name}: built with {built.get('compiler')}"]
    if name == "cpu":
        lines.append(f"    instruction sets: {', '.join(built.get('instruction_sets', []))}")
        for isa, reason in built.get("instruction_sets_left_out", {}).items():
            lines.append(f"    without {isa}: {reason}")
        lines.append(f"    OpenMP: {'yes' if built.get('openmp') else 'no, one thread'}")
    if "architectures" in built:
        lines.append(f"    architectures: {', '.join(built['architectures'])}")
    return lines


def _processor_lines() -> list[str]:
    lines = [f"  {platform.machine()}, {os.cpu_count()} logical CPUs"]
    try:
        native = importlib.import_module("rbm_kernels._cpu")
        lines.append(
            f"  instruction sets that can run here: {', '.join(native.instruction_sets())}"
        )
        lines.append(f"  in use: {native.in_use()}")
    except Exception as error:
        lines.append(f"  instruction sets unknown: {type(error).__name__}: {error}")
    return lines


def report() -> str:
    """Versions, what was built and with what, which backends can run here and why others cannot."""
    record = build_info()
    lines = [f"rbm-kernels {package_version()}"]
    lines.append(f"  Python {platform.python_version()} on {platform.platform()}")
    lines += ["", "Packages"]
    lines += [f"  {name} {_installed(name)}" for name in _PACKAGES]
    lines += _torch_lines()
    lines += ["", "Built"]
    if record:
        lines.append(f"  with Python {record.get('python')} on {record.get('platform')}")
    lines += _module_lines("cpu", record) + _module_lines("cuda", record)
    if "cuda_emulated" in record:
        lines += _module_lines("cuda_emulated", record)
    lines += ["", "Processor", *_processor_lines()]
    lines += ["", "GPUs", *_gpu_lines()]
    lines += ["", "Backends"]
    for name in _BACKENDS:
        reason = backend_status(name)
        words = "can run" if reason is None else f"cannot run: {reason}"
        if reason is None and name in ("triton", "cuda") and _takes_cpu_tensors(name):
            words += ", on CPU tensors (emulated, for tests)"
        lines.append(f"  {name}: {words}")
    variables = [
        name
        for name in sorted(os.environ)
        if name.startswith(("RBM_KERNELS_", "OMP_", "GOMP_")) or name == "TRITON_INTERPRET"
    ]
    if variables:
        lines += ["", "Environment", *(f"  {name}={os.environ[name]}" for name in variables)]
    return "\n".join(lines)


if __name__ == "__main__":
    # Run as a file, the first entry of the path is the package's own folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    print(report())
