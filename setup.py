"""Builds the native modules; everything else about the package is in pyproject.toml.

No torch is needed to build, and no GPU. Each module is described by a list of compile steps that
ninja runs in parallel, because one source file is compiled several times (once per instruction
set) and single files want flags of their own, neither of which setuptools can do.

Environment variables:
  RBM_KERNELS_CPU, RBM_KERNELS_CUDA   auto (default): build the module if that is possible,
                                      0: leave it out, 1: fail where it cannot be built.
  RBM_KERNELS_CUDA_EMULATED           1: build the CUDA kernels for a CPU too, as a module that only
                                      tests use (0, the default: do not).
  RBM_KERNELS_CUDA_ARCHS              compute capabilities, such as "80;90" (the default).
  CXX, CXXFLAGS, LDFLAGS              the C++ compiler and further flags.
  CUDA_HOME, NVCC                     where the CUDA toolkit is, if nvcc is not on PATH.
  MAX_JOBS                            how many compilers run at once.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"  # the one folder that includes are relative to
X86 = ("x86_64", "AMD64", "amd64")

# The instruction sets that csrc/cpu/isa.cpp is compiled for: name, machines, flags. RBM_ISA_<NAME>
# tells that compilation which it is; RBM_HAVE_<NAME> tells all sources what was built, among which
# csrc/cpu/dispatch.cpp chooses at run time. The emulated AMX lets a processor without it test
# everything but the tile instructions themselves.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2"]
ISAS: list[tuple[str, tuple[str, ...], list[str]]] = [
    ("amx", X86, [*AVX512, "-mamx-tile", "-mamx-int8"]),
    ("amx_emulated", X86, AVX512),
    ("avx512", X86, AVX512),
    ("avx2", X86, ["-mavx2", "-mfma", "-mbmi2"]),
    ("plain", (), []),
]
# No -march=native: the wheel must run elsewhere. No contraction: a * b + c that is written as two
# operations must round twice, or instruction sets would draw different samples.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
CXX_FLAGS += ["-ffp-contract=off", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
# gcc 12 warns of uninitialized values inside its own AVX-512 header; clang lacks that warning.
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-lineinfo"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]


class Unavailable(Exception):
    """Why a module cannot be built here, in words for the person who installs."""


@dataclass
class Step:
    """One run of a compiler: `command` makes `output` from `source`."""

    source: str
    output: str
    command: list[str]
    headers: str = ""  # a make-style list of headers that the compiler writes
    log: str = ""  # where the compiler's words are kept


@dataclass
class Plan:
    """How one module is made, and what to remember of it."""

    steps: list[Step]
    link: list[str]
    info: dict[str, Any] = field(default_factory=dict)


def setting(name: str) -> str:
    """Value of an auto|0|1 environment variable."""
    value = os.environ.get(name, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def find_cxx() -> list[str]:
    """The C++ compiler's command. One that CXX names is the only one that is tried."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if run([*command, "--version"]).returncode == 0:
            return command
    tried = ", ".join(command[0] for command in candidates)
    raise Unavailable(f"no C++ compiler that runs (tried {tried})")


def accepts(cxx: list[str], flags: list[str], text: str = "int main() { return 0; }\n") -> bool:
    """Whether the compiler takes these flags and makes a shared library with them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(text)
        output = str(Path(folder, "probe.so"))
        return run([*cxx, *flags, "-fPIC", "-shared", str(source), "-o", output]).returncode == 0


def runs(cxx: list[str], flags: list[str], text: str) -> bool:
    """Whether a program compiled with these flags ends with status 0 here."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), str(Path(folder, "probe"))
        source.write_text(text)
        compiled = run([*cxx, *flags, str(source), "-o", program]).returncode == 0
        return compiled and run([program]).returncode == 0


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise Unavailable(
            "pybind11 is not installed (pip installs it unless --no-build-isolation is given)"
        ) from error
    paths = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    return [f"-I{path}" for path in dict.fromkeys([*paths, pybind11.get_include()])]


def shared_library_flags() -> list[str]:
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared"]


def object_of(source: Path, objects: Path) -> Path:
    """Where a source's object file goes: at the source's own path, as names repeat in folders."""
    return objects / f"{source.relative_to(CSRC)}.o"


def compile_cxx(cxx: list[str], flags: list[str], source: Path, output: Path) -> Step:
    # What the environment adds comes first, so that our flags have the last word.
    command = [*cxx, *shlex.split(os.environ.get("CXXFLAGS", "")), *CXX_FLAGS, *flags]
    headers = f"{output}.d"
    command += ["-MMD", "-MF", headers, "-c", str(source), "-o", str(output)]
    return Step(str(source), str(output), command, headers)


def plan_cpu(objects: Path, output: Path) -> Plan:
    """The steps that make rbm_kernels/_cpu.

    Raises:
        Unavailable: if there is nothing to build it with, or from.
    """
    sources = sorted((CSRC / "cpu").rglob("*.cpp"))
    if not sources:
        raise Unavailable("csrc/cpu holds no sources")
    cxx = find_cxx()
    openmp = ["-fopenmp"]
    # torch ships an OpenMP runtime of the same name (libgomp.so.1) and is imported first, so this
    # module shares torch's threads. Apple's clang has no OpenMP; one thread serves there.
    probe = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    if not accepts(cxx, openmp, probe):
        openmp = []

    here = [isa for isa in ISAS if not isa[1] or platform.machine() in isa[1]]
    left_out = (
        {name: "not for this processor family" for name, machines, _ in ISAS if machines}
        if platform.machine() not in X86
        else {}
    )
    built: list[tuple[str, list[str]]] = []
    for name, _, flags in here:
        if accepts(cxx, flags):
            built.append((name, flags))
        else:
            left_out[name] = f"the compiler refuses {' '.join(flags)}"
    have = [f"-DRBM_HAVE_{name.upper()}" for name, _ in built]

    steps = []
    for source in sources:
        flags = [f"-I{CSRC}", *openmp, *have]
        if source.name == "isa.cpp":
            for name, isa_flags in built:
                flags_of_isa = [*flags, *isa_flags, f"-DRBM_ISA_{name.upper()}"]
                steps.append(compile_cxx(cxx, flags_of_isa, source, objects / f"isa_{name}.o"))
            continue
        if source.name == "module.cpp":
            flags += python_includes()
        steps.append(compile_cxx(cxx, flags, source, object_of(source, objects)))
    link = [*cxx, *shared_library_flags(), *shlex.split(os.environ.get("LDFLAGS", ""))]
    link += ["-o", str(output), *(step.output for step in steps), *openmp]
    info: dict[str, Any] = {
        "compiler": first_line(run([*cxx, "--version"]).stdout),
        "instruction_sets": [name for name, _ in built],
        "instruction_sets_left_out": left_out,
        "openmp": bool(openmp),
    }
    return Plan(steps, link, info)


def find_nvcc() -> str:
    named = os.environ.get("NVCC", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    at_home = str(Path(home, "bin", "nvcc")) if home else ""
    nvcc = named or (at_home if at_home and Path(at_home).exists() else shutil.which("nvcc"))
    if not nvcc:
        raise Unavailable("nvcc is not on PATH (and neither NVCC nor CUDA_HOME names one)")
    return nvcc


def cuda_library_folder(nvcc: str) -> Path:
    """Where the toolkit's libcudart_static.a lies.

    nvcc on PATH can be a wrapper script, so only nvcc itself knows where its toolkit is; a dry run
    prints that as `#$ TOP=`.
    """
    dry_run = run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    if dry_run.returncode != 0:
        raise Unavailable(f"{nvcc} does not run: {first_line(dry_run.stderr)}")
    tops = [line[7:] for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
    if not tops:
        raise Unavailable(f"{nvcc} --dryrun names no toolkit (no TOP= in what it prints)")
    top = Path(os.path.realpath(tops[0].strip()))
    for folder in [top / "lib64", *sorted(top.glob("targets/*/lib")), top / "lib"]:
        if (folder / "libcudart_static.a").exists():
            return folder
    raise Unavailable(f"the CUDA toolkit of {nvcc} has no libcudart_static.a")


def cuda_archs() -> list[str]:
    value = os.environ.get("RBM_KERNELS_CUDA_ARCHS", "").strip() or "80;90"
    archs = [arch.strip().replace(".", "") for arch in value.replace(",", ";").split(";")]
    if not all(arch[:2].isdigit() and arch.isalnum() for arch in archs):
        raise SystemExit(
            f"RBM_KERNELS_CUDA_ARCHS must be a list of compute capabilities such as 80;90, "
            f"got {value!r}"
        )
    return archs


def cuda_sources() -> list[Path]:
    """The kernels of csrc/cuda.

    Raises:
        Unavailable: if there are none.
    """
    kernels = sorted((CSRC / "cuda").rglob("*.cu"))
    if not kernels:
        raise Unavailable("csrc/cuda holds no sources")
    return kernels


def plan_cuda(objects: Path, output: Path) -> Plan:
    """The steps that make rbm_kernels/_cuda.

    Raises:
        Unavailable: if there is nothing to build it with, or from.
    """
    kernels = cuda_sources()
    archs = cuda_archs()
    nvcc = find_nvcc()
    library = cuda_library_folder(nvcc)
    cxx = find_cxx()
    include = f"-I{CSRC}"

    # Code for each architecture, and PTX of the last for GPUs that are newer than all of them.
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
    host = ["-ccbin", cxx[0]] if os.environ.get("CXX") and len(cxx) == 1 else []
    steps = []
    for source in sorted((CSRC / "cuda").rglob("*.cpp")):
        flags = [include, *python_includes()] if source.name == "module.cpp" else [include]
        steps.append(compile_cxx(cxx, flags, source, object_of(source, objects)))
    for source in kernels:
        target = object_of(source, objects)
        code = hopper if source.stem.endswith("_sm90a") else codes
        command = [nvcc, *host, *NVCC_FLAGS, *code, include, "-MD", "-MF", f"{target}.d"]
        command += ["-c", str(source), "-o", str(target)]
        # ptxas tells registers and spills; they are kept beside the object files.
        log = f"{target}.ptxas.txt"
        steps.append(Step(str(source), str(target), command, f"{target}.d", log))
    link = [*cxx, *shared_library_flags(), *shlex.split(os.environ.get("LDFLAGS", ""))]
    link += ["-o", str(output), *(step.output for step in steps)]
    # The runtime is linked in, so that the module imports where there is no driver.
    link += [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    version = [line for line in run([nvcc, "--version"]).stdout.splitlines() if "release" in line]
    info = {"compiler": first_line("\n".join(version)), "architectures": archs}
    return Plan(steps, link, info)


def plan_cuda_emulated(objects: Path, output: Path) -> Plan:
    """The steps that make rbm_kernels/_cuda_emulated: the kernels as C++ for this machine's CPU.

    Raises:
        Unavailable: if there is nothing to build it with, or from.
    """
    cxx = find_cxx()
    flags = ["-DRBM_EMULATED", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    # For std::fma as one instruction. The module is run where it was built.
    runs_here = 'int main() { return __builtin_cpu_supports("fma") ? 0 : 1; }\n'
    if platform.machine() in X86 and runs(cxx, ["-mfma"], runs_here):
        flags.append("-mfma")
    steps = []
    cpp = sorted([*(CSRC / "cuda").rglob("*.cpp"), *(CSRC / "emulator").rglob("*.cpp")])
    for source in [*cuda_sources(), *cpp]:
        includes = python_includes() if source.name == "module.cpp" else []
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        target = object_of(source, objects)
        steps.append(compile_cxx(cxx, [*flags, *includes, *language], source, target))
    link = [*cxx, *shared_library_flags(), *shlex.split(os.environ.get("LDFLAGS", ""))]
    link += ["-o", str(output), *(step.output for step in steps)]
    return Plan(steps, link, {"compiler": first_line(run([*cxx, "--version"]).stdout)})


def find_ninja() -> str:
    try:
        import ninja

        packaged = Path(ninja.BIN_DIR, "ninja")
        if packaged.exists():
            return str(packaged)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if not found:
        raise Unavailable(
            "ninja is not installed (pip installs it unless --no-build-isolation is given)"
        )
    return found


def quote(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def path_in_ninja(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(plan: Plan, output: Path, file: Path) -> None:
    """Writes the plan as a build.ninja."""
    lines = ["ninja_required_version = 1.5", "rule run", "  command = $run", "  depfile = $headers"]
    lines += ["  deps = gcc", "  description = compile $out"]
    lines += ["rule link", "  command = $run", "  description = link $out"]
    for step in plan.steps:
        command = quote(step.command)
        if step.log:
            log = quote([step.log])
            command = f"{command} > {log} 2>&1 || {{ cat {log}; exit 1; }}"
        lines.append(f"build {path_in_ninja(step.output)}: run {path_in_ninja(step.source)}")
        lines += [f"  run = {command}", f"  headers = {path_in_ninja(step.headers)}"]
    objects = " ".join(path_in_ninja(step.output) for step in plan.steps)
    lines += [f"build {path_in_ninja(str(output))}: link {objects}", f"  run = {quote(plan.link)}"]
    file.write_text("\n".join(lines) + "\n")


def execute(plan: Plan, output: Path, objects: Path) -> None:
    """Runs the plan.

    Raises:
        Unavailable: if a compiler fails; its words have been printed by then.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write_ninja(plan, output, objects / "build.ninja")
    command = [find_ninja(), "-C", str(objects)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    if subprocess.run(command, check=False).returncode != 0:
        raise Unavailable("compilation failed (the compiler's words are above; pip install -v)")


def kernel_resources(logs: list[str]) -> list[dict[str, Any]]:
    """What ptxas told of each kernel and architecture: registers, and bytes spilled to memory."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = [match for log in logs for match in pattern.findall(Path(log).read_text())]
    names = run(["c++filt", *(mangled for mangled, *_ in found)]).stdout.splitlines()
    if len(names) != len(found):  # there is no c++filt here
        names = [mangled for mangled, *_ in found]
    return [
        {
            "kernel": re.sub(
                r"^.*?(\w+(<[^()]*>)?)\(.*$", r"\1", name.replace("(anonymous namespace)", "")
            ),
            "architecture": architecture,
            "registers": int(registers),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
        }
        for name, (_, architecture, stack, stores, loads, registers) in zip(
            names, found, strict=True
        )
    ]


PLANS = {"_cpu": plan_cpu, "_cuda": plan_cuda, "_cuda_emulated": plan_cuda_emulated}


class BuildNative(build_ext):
    """Builds what can be built here, and records it in rbm_kernels/_build_info.json."""

    def run(self) -> None:
        self.record: dict[str, Any] = {}  # what becomes _build_info.json
        super().run()
        self.record["python"] = platform.python_version()
        self.record["platform"] = f"{platform.system()} {platform.machine()}"
        # In the source folder for in-place and editable builds, beside the modules otherwise.
        package = Path(self.get_ext_fullpath("rbm_kernels._cpu")).parent
        package.mkdir(parents=True, exist_ok=True)
        for name in PLANS:
            # A module of an earlier build must not stand in for one that could not be built now.
            if not self.record.get(name.lstrip("_"), {"built": False})["built"]:
                Path(self.get_ext_fullpath(f"rbm_kernels.{name}")).unlink(missing_ok=True)
        text = json.dumps(self.record, indent=2, sort_keys=True)
        (package / "_build_info.json").write_text(text + "\n")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        variable = f"RBM_KERNELS{name.upper()}"
        wanted = setting(variable)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if wanted == "0":
                raise Unavailable(f"{variable}=0 was set at build time")
            objects = Path(self.build_temp, name.lstrip("_")).resolve()
            objects.mkdir(parents=True, exist_ok=True)
            plan = PLANS[name](objects, output)
            execute(plan, output, objects)
            details = ", ".join(f"{key}={value}" for key, value in plan.info.items())
            logs = [step.log for step in plan.steps if step.log]
            if logs:
                plan.info["kernels"] = kernel_resources(logs)
            report = {"built": True, "reason": None, **plan.info}
            print(f"rbm-kernels: built {ext.name}: {details}", flush=True)
        except Unavailable as reason:
            if wanted == "1":
                # Not a CompileError: setuptools only warns of those where a module is optional.
                raise SystemExit(
                    f"{variable}=1, but {ext.name} cannot be built: {reason}"
                ) from None
            output.unlink(missing_ok=True)  # of an earlier build
            report = {"built": False, "reason": str(reason)}
            print(f"rbm-kernels: {ext.name} is NOT built: {reason}", file=sys.stderr, flush=True)
            print("rbm-kernels: installing without it.", file=sys.stderr, flush=True)
        self.record[name.lstrip("_")] = report


setting("RBM_KERNELS_CPU"), setting("RBM_KERNELS_CUDA")
modules = ["_cpu", "_cuda"]
if setting("RBM_KERNELS_CUDA_EMULATED") == "1":
    modules.append("_cuda_emulated")

setup(
    # Without sources: BuildNative knows them. Optional: a build that leaves one out succeeds.
    ext_modules=[Extension(f"rbm_kernels.{name}", sources=[], optional=True) for name in modules],
    cmdclass={"build_ext": BuildNative},
)
