"""What is shipped, and how the build behaves where something is missing.

These tests run setup.py's builds in copies of the source tree, without pip's isolation, which would
download the build requirements again each time.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("csrc", "rbm_kernels", "blip_integration")
NO_CUDA = {"RBM_KERNELS_CUDA": "0"}
NO_COMPILER = {"CXX": "/nonexistent/c++", "RBM_KERNELS_CUDA": "0"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the source tree is not here"
)


def _run(
    command: list[str], cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RBM_KERNELS", "CXX"))}
    # The folder of this interpreter first: pip and ninja of a virtual environment lie there.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    kept["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def _setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "setup.py", *arguments], tree, environment)


def _copy_of_the_sources(to: Path) -> Path:
    to.mkdir()
    for name in SHIPPED:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=built)
    return to


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, nothing built."""
    return _copy_of_the_sources(tmp_path / "tree")


@dataclass
class Built:
    """An sdist, the wheel that pip makes of it, and what pip said."""

    sdist: Path
    wheel: Path
    log: str


def _wheel(source: Path, into: Path, environment: dict[str, str]) -> Built:
    arguments = ["wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(into), str(source)]
    result = _run([sys.executable, "-m", "pip", *arguments], into.parent, environment)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    return Built(source, next(into.glob("*.whl")), log)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    result = _setup(_copy_of_the_sources(folder / "tree"), "sdist", "-d", str(folder / "dist"))
    assert result.returncode == 0, result.stderr
    return next((folder / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="session")
def built(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of the sdist with the CPU module, without CUDA."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    environment = {**NO_CUDA, "RBM_KERNELS_CPU": "1"}
    return _wheel(sdist, tmp_path_factory.mktemp("wheel") / "dist", environment)


@pytest.fixture(scope="session")
def built_without_compiler(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _wheel(sdist, tmp_path_factory.mktemp("bare") / "dist", NO_COMPILER)


def _sources(pattern: str, folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}


def _record(wheel: Path) -> dict[str, dict[str, Any]]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("rbm_kernels/_build_info.json"))


def _unpacked(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


def test_the_sdist_has_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "pyproject.toml", "setup.py", "rbm_kernels/py.typed"}
    for pattern in ("*.h", "*.cpp", "*.cu"):
        wanted |= _sources(pattern, "csrc")
    wanted |= _sources("*.py", "rbm_kernels") | _sources("*.py", "blip_integration")
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


@pytest.mark.slow
def test_the_wheel_has_modules_and_no_sources(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    wanted = _sources("*.py", "rbm_kernels") | {"rbm_kernels/py.typed"}
    assert wanted <= names, sorted(wanted - names)
    assert any(name.startswith("rbm_kernels/_cpu.") for name in names)
    assert not any(name.startswith("rbm_kernels/_cuda.") for name in names)
    assert not [
        n
        for n in names
        if n.startswith(("csrc", "tests", "benchmarks")) or n.endswith((".cpp", ".h"))
    ]
    assert b"rbm-kernels = rbm_kernels.cli:main" in entry_points

    fields = HeaderParser().parsestr(metadata)
    version: dict[str, str] = {}
    exec((ROOT / "rbm_kernels" / "_version.py").read_text(), version)
    assert fields["Name"] == "rbm-kernels"
    assert fields["Version"] == version["__version__"]
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["License-Expression"] == "Apache-2.0"
    required = [r for r in fields.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(required) == ["numpy", "safetensors", "torch>=2.6", "tqdm"]
    extras = set(fields.get_all("Provides-Extra", []))
    assert extras >= {"train", "hub", "test", "bench", "triton", "blip", "captioning"}


@pytest.mark.slow
def test_the_build_record_tells_what_was_built(built: Built) -> None:
    record = _record(built.wheel)
    assert record["cpu"]["built"] is True
    assert "plain" in record["cpu"]["instruction_sets"]
    assert record["cuda"] == {"built": False, "reason": "RBM_KERNELS_CUDA=0 was set at build time"}


@pytest.mark.slow
def test_the_built_module_imports_without_torch(built: Built, tmp_path: Path) -> None:
    folder = _unpacked(built.wheel, tmp_path / "site")
    code = (
        "import importlib.util, glob, sys\n"
        f"path = glob.glob({str(folder / 'rbm_kernels' / '_cpu.*')!r})[0]\n"
        "spec = importlib.util.spec_from_file_location('rbm_kernels._cpu', path)\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = _run([sys.executable, "-I", "-c", code], tmp_path)
    assert result.returncode == 0, result.stderr


def test_without_a_compiler_the_reference_still_installs(
    built_without_compiler: Built, tmp_path: Path
) -> None:
    assert "_cpu is NOT built: no C++ compiler that runs" in built_without_compiler.log
    record = _record(built_without_compiler.wheel)
    assert record["cpu"]["built"] is False
    assert "no C++ compiler" in str(record["cpu"]["reason"])

    site = _unpacked(built_without_compiler.wheel, tmp_path / "site")
    code = (
        "import torch, rbm_kernels\n"
        "W, b, c = torch.randn(6, 5), torch.zeros(6), torch.zeros(5)\n"
        "step = rbm_kernels.cd_step(torch.ones(4, 6), W, b, c, seed=1)\n"
        "assert step.grad_W.shape == W.shape\n"
        "print(rbm_kernels.__file__)\n"
        "from rbm_kernels.info import report\n"
        "print(report())\n"
        "try:\n"
        "    rbm_kernels.cd_step(torch.ones(4, 6), W, b, c, seed=1, backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    print('refused:', error)\n"
    )
    result = _run([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(site)})
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout
    assert "_cpu: not built: no C++ compiler that runs" in result.stdout
    refusal = result.stdout.partition("refused:")[2]
    assert "not built" in refusal


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RBM_KERNELS_CUDA": "yes"}, "RBM_KERNELS_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"RBM_KERNELS_CPU": "2"}, "RBM_KERNELS_CPU must be auto, 0 or 1, got '2'"),
        (
            {**NO_COMPILER, "RBM_KERNELS_CPU": "1"},
            "RBM_KERNELS_CPU=1, but rbm_kernels._cpu cannot be built: no C++ compiler",
        ),
        (
            {"PATH": "/nonexistent", "RBM_KERNELS_CUDA": "0", "RBM_KERNELS_CPU": "1"},
            "no C++ compiler that runs (tried c++, g++, clang++)",
        ),
        (
            {"RBM_KERNELS_CPU": "0", "RBM_KERNELS_CUDA": "1", "NVCC": "/nonexistent/nvcc"},
            "RBM_KERNELS_CUDA=1, but rbm_kernels._cuda cannot be built: /nonexistent/nvcc",
        ),
        (
            {"RBM_KERNELS_CPU": "0", "RBM_KERNELS_CUDA_ARCHS": "hopper"},
            "RBM_KERNELS_CUDA_ARCHS must be a list of compute capabilities such as 80;90, "
            "got 'hopper'",
        ),
    ],
)
def test_what_cannot_be_is_an_error(tree: Path, environment: dict[str, str], words: str) -> None:
    result = _setup(tree, "build_ext", **environment)
    assert result.returncode != 0
    assert words in result.stderr


def test_an_editable_install_puts_the_modules_into_the_source_folder(
    tree: Path, tmp_path: Path
) -> None:
    # A stand-in for the compiler: it makes empty files, and the test fast.
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do case "$1" in -o|-MF) shift; : > "$1" ;; esac; shift; done\n'
    )
    compiler.chmod(0o755)
    # What pip calls for `pip install -e . --no-build-isolation`.
    build = "from setuptools import build_meta; build_meta.build_editable('dist')"
    environment = {**NO_CUDA, "CXX": str(compiler)}
    result = _run([sys.executable, "-c", build], tree, environment)
    assert result.returncode == 0, result.stderr
    assert list((tree / "rbm_kernels").glob("_cpu.*"))
    assert json.loads((tree / "rbm_kernels" / "_build_info.json").read_text())["cpu"]["built"]

    site = _unpacked(next((tree / "dist").glob("*.whl")), tmp_path / "site")
    code = (
        "import importlib.util, site\n"
        f"site.addsitedir({str(site)!r})\n"
        "for package in ('rbm_kernels', 'blip_integration'):\n"
        "    print(importlib.util.find_spec(package).origin)\n"
    )
    # -S: without this environment's own packages, among which an installed copy may be.
    result = _run([sys.executable, "-I", "-S", "-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    origins = [tree / package / "__init__.py" for package in ("rbm_kernels", "blip_integration")]
    assert result.stdout.splitlines() == [str(origin) for origin in origins]


@pytest.fixture
def write_nvcc(tree: Path) -> Callable[[str], str]:
    """Writes a shell script that stands for nvcc and gives its path."""

    def write(body: str) -> str:
        path = tree / "nvcc"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.slow
def test_a_failing_nvcc_makes_a_smaller_package(
    tree: Path, write_nvcc: Callable[[str], str]
) -> None:
    (tree / "lib64").mkdir()
    (tree / "lib64" / "libcudart_static.a").touch()
    nvcc = write_nvcc(
        f'case "$*" in\n'
        f'  *--dryrun*) echo "#$ TOP={tree}" >&2 ;;\n'
        "  *--version*) echo release 0 ;;\n"
        "  *) echo this nvcc always fails; exit 1 ;;\n"
        "esac"
    )
    environment = {"RBM_KERNELS_CPU": "0", "NVCC": nvcc}
    result = _setup(tree, "build_ext", "--inplace", **environment)
    assert result.returncode == 0, result.stderr
    assert "this nvcc always fails" in result.stdout
    record = json.loads((tree / "rbm_kernels" / "_build_info.json").read_text())
    assert record["cuda"]["built"] is False
    assert "compilation failed" in record["cuda"]["reason"]


def test_the_report_works_where_the_package_does_not_import(tree: Path) -> None:
    (tree / "rbm_kernels" / "_cpu.py").write_text("raise ImportError('a broken module')\n")
    (tree / "torch.py").write_text("raise ImportError('no torch here')\n")
    result = _run([sys.executable, "rbm_kernels/info.py"], tree)
    assert result.returncode == 0, result.stderr
    assert "rbm-kernels 0." in result.stdout
    assert "torch does not import: ImportError: no torch here" in result.stdout
    assert "cpu: cannot run: " in result.stdout


def test_import_touches_no_device_and_is_quick(tmp_path: Path) -> None:
    code = (
        "import time, torch, numpy\n"
        "start = time.perf_counter()\n"
        "import rbm_kernels\n"
        "seconds = time.perf_counter() - start\n"
        "import sys\n"
        "assert not torch.cuda.is_initialized()\n"
        "for heavy in ('sklearn', 'mlxtend', 'matplotlib', 'triton', 'transformers'):\n"
        "    assert heavy not in sys.modules, heavy\n"
        "print(seconds)\n"
    )
    import rbm_kernels

    # The folder that this test imports from: installed, or the source tree.
    site = str(Path(rbm_kernels.__file__).parents[1])
    result = _run([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": site})
    assert result.returncode == 0, result.stderr
    seconds = float(result.stdout)
    print(f"import rbm_kernels, after torch: {seconds * 1e3:.0f} ms")
    assert seconds < 5.0  # two orders above the usual, for a machine that is busy


def test_the_installed_version_is_the_source_version() -> None:
    try:
        installed = importlib.metadata.version("rbm-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is imported from its source tree")
    import rbm_kernels

    assert installed == rbm_kernels.__version__


def test_hooks_and_make_take_the_same_linters() -> None:
    """The linters' versions stand in constraints.txt, and again in the pre-commit hooks."""
    pattern = re.compile(r"\b((?:ruff|clang-format)==[\d.]+)")
    pinned = set(pattern.findall((ROOT / "constraints.txt").read_text()))
    hooks = set(pattern.findall((ROOT / ".pre-commit-config.yaml").read_text()))
    assert len(pinned) == 2
    assert hooks == pinned


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    pages += ROOT.glob("blip_integration/*.md")
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
