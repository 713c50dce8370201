"""The command line is quick to help, and chooses how OpenMP waits before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rbm_kernels

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def python(code: str, **environment: str) -> str:
    """What a Python of its own prints, with the package importable and no policy but the given."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    root = str(Path(rbm_kernels.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout


# Runs the command line on the arguments given, and tells the environment as torch's import saw it.
WATCHED_IMPORT = """
import json, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not seen:
            seen.append([os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")])

seen = []
sys.meta_path.insert(0, Watch())
from %s import main
before = list(seen)
try:
    main(%s)
except SystemExit:
    pass
print()
print(json.dumps({"at import of cli": before, "seen": seen}))
"""


def watch(
    arguments: list[str], program: str = "rbm_kernels.cli", **environment: str
) -> dict[str, list]:
    """The two variables as they were when torch was imported, or nothing where it was not."""
    return json.loads(python(WATCHED_IMPORT % (program, arguments), **environment).splitlines()[-1])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["passive", None]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", None]),
        ({"GOMP_SPINCOUNT": "5000"}, [None, "5000"]),
    ],
)
def test_the_policy_is_set_before_torch_and_the_users_own_wins(environment, expected):
    assert watch(["info"], **environment) == {"at import of cli": [], "seen": [expected]}


def test_rbm_caption_sets_it_too():
    pytest.importorskip("transformers")
    arguments = ["caption", "no-such-picture.png", "--model", "no-such-folder"]
    assert watch(arguments, "blip_integration.cli")["seen"] == [["passive", None]]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"]])
def test_help_does_without_torch(arguments):
    assert watch(arguments)["seen"] == []


def test_the_module_run_as_a_program_sets_it():
    code = "import runpy, sys, os; sys.argv[1:] = ['info']\n"
    code += "try: runpy.run_module('rbm_kernels', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "import torch; print(os.environ['OMP_WAIT_POLICY'], torch.__config__.parallel_info())"
    *_, line = [text for text in python(code).splitlines() if text.startswith("passive")]
    assert line


def test_a_library_sets_nothing():
    code = "import os, rbm_kernels; rbm_kernels.cd_step; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert python(code).strip() == "None"


def test_after_torch_it_is_too_late():
    code = "import os, torch\nfrom rbm_kernels.openmp import wait_passively\n"
    code += "print(wait_passively(), os.environ.get('OMP_WAIT_POLICY'))"
    assert python(code).strip() == "False None"


def test_operators_are_registered_with_torch_already_there():
    code = "import torch, rbm_kernels; print(torch.ops.rbm_kernels.cd_step)"
    assert "rbm_kernels.cd_step" in python(code)


def test_names_are_imported_when_they_are_used():
    code = "import sys, rbm_kernels; names = dir(rbm_kernels); print('torch' in sys.modules)\n"
    code += "from rbm_kernels import *\nprint(RBM(2, 3), set(rbm_kernels.__all__) <= set(names))\n"
    code += "print(hasattr(rbm_kernels, 'no_such_name'))"
    lines = python(code).splitlines()
    assert lines[0] == "False" and "n_hidden=3" in lines[1] and lines[2] == "False"
    assert lines[1].endswith("True")
