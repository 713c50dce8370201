"""The command line: what it writes, how it resumes, and one line for every mistake."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rbm_kernels
from rbm_kernels import cli, data, rbm
from rbm_kernels.rbm import RBM

SMALL = ["--hidden", "10", "--batch", "200", "--pcd", "30"]
PICTURES = ["filters.png", "samples.png", "reconstructions.png", "curves.png"]
FILES = ["model.safetensors", "metrics.csv", "checkpoint.pt"]


def train(out: Path, *options: str) -> int:
    return cli.main(["train", "digits", "--out", str(out), *SMALL, *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(out, "--epochs", "4") == 0
    return out


def metrics(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_info_is_the_default(capsys):
    assert cli.main([]) == 0
    default = capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == default.splitlines()[0]
    assert "rbm-kernels" in default and "reference" in default


def test_train_writes_everything(trained):
    assert sorted(os.listdir(trained)) == sorted(FILES + PICTURES)
    for name in PICTURES:
        assert (trained / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    model = RBM.load(trained / "model.safetensors")
    assert model.W.shape == (64, 10) and torch.isfinite(model.W).all()
    rows = metrics(trained)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["images_per_second"]) > 0


def test_train_prints_an_exact_log_likelihood(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "1", "--no-plots") == 0
    out = capsys.readouterr().out
    assert "1,617 images to train on, 180 held out; 64 x 10 units, PCD-1, 30 chains" in out
    assert "nats (exact)" in out and "independent pixels, held out: -24.90" in out
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_train_on_a_file_by_cd_without_images(tmp_path, capsys):
    """22 hidden units, 30 visible ones: AIS; 30 is no square, so only curves are drawn."""
    v = (np.random.default_rng(0).random((300, 30)) < 0.3).astype(np.float64)
    np.save(tmp_path / "v.npy", v)
    out = tmp_path / "run"
    command = ["train", str(tmp_path / "v.npy"), "--out", str(out), "--hidden", "22", "--cd"]
    command += ["--epochs", "2", "--ais-betas", "50", "--ais-chains", "16", "--optimizer", "adam"]
    assert cli.main(command) == 0
    assert "CD-1" in (printed := capsys.readouterr().out) and "effective sample size" in printed
    assert sorted(os.listdir(out)) == sorted([*FILES, "curves.png"])


def test_train_on_grey_values(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "1", "--no-plots", "--grey") == 0
    # Judged on binary images all the same.
    assert "independent pixels, held out: -24.90" in capsys.readouterr().out


def test_minutes(tmp_path):
    assert train(tmp_path, "--minutes", "0.003", "--no-plots") == 0
    assert len(metrics(tmp_path)) >= 1


def test_interrupted_and_resumed_writes_what_a_straight_run_writes(tmp_path, monkeypatch, capsys):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert train(straight, "--epochs", "3", "--no-plots") == 0
    step, calls = rbm.cd_step, []

    def interrupting_step(*arguments, **options):
        calls.append(None)
        if len(calls) in (5, 13):
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(rbm, "cd_step", interrupting_step)
    capsys.readouterr()
    assert train(parts, "--epochs", "3", "--no-plots") == 130
    message = capsys.readouterr().err
    assert "interrupted in epoch 1" in message and "--resume" in message
    assert RBM.load(parts / "model.safetensors").W.shape == (64, 10)
    assert train(parts, "--epochs", "3", "--no-plots", "--resume") == 130
    assert [row["epoch"] for row in metrics(parts)] == ["1"]
    assert train(parts, "--no-plots", "--resume") == 0
    models = [RBM.load(out / "model.safetensors").state_dict() for out in (straight, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    timings = ("images_per_second", "seconds")
    a, b = (
        [{k: v for k, v in row.items() if k not in timings} for row in metrics(out)]
        for out in (straight, parts)
    )
    assert a == b


def test_resume_goes_on_with_more_epochs(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "1", "--no-plots") == 0
    assert train(tmp_path, "--no-plots", "--resume") == 0
    assert "finished run: give more --epochs" in capsys.readouterr().out
    assert train(tmp_path, "--epochs", "3", "--no-plots", "--resume") == 0
    assert [row["epoch"] for row in metrics(tmp_path)] == ["1", "2", "3"]


def test_ctrl_c_in_a_process(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rbm_kernels", "train", "digits", "--out", str(out), *SMALL]
    root = str(Path(rbm_kernels.__file__).parents[1])
    process = subprocess.Popen(
        [*command, "--epochs", "1000000", "--no-plots"],
        env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has SIGINT ignored, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert "1,617 images" in process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "interrupted in epoch" in err
    assert sorted(os.listdir(out)) == sorted(FILES)


@pytest.mark.parametrize("form", ["png", "npy"])
def test_sample(trained, tmp_path, form):
    out = tmp_path / f"samples.{form}"
    command = ["sample", str(trained), "-n", "7", "-k", "5", "--seed", "3", "--out", str(out)]
    assert cli.main(command) == 0
    first = out.read_bytes()
    assert cli.main(command) == 0 and out.read_bytes() == first
    if form == "npy":
        v = np.load(out)
        assert v.shape == (7, 64) and v.dtype == np.uint8 and set(np.unique(v)) <= {0, 1}
        assert cli.main([*command, "--means"]) == 0
        assert np.load(out).dtype == np.float32


def test_samples_that_bytes_cannot_hold(tmp_path):
    RBM(12, 5, "spin").save(tmp_path / "model.safetensors")
    out = tmp_path / "samples.npy"
    assert cli.main(["sample", str(tmp_path), "-n", "4", "-k", "2", "--out", str(out)]) == 0
    samples = np.load(out)
    assert samples.dtype == np.float32 and set(np.unique(samples)) == {-1.0, 1.0}


def test_sample_given_half(trained, tmp_path):
    out = tmp_path / "samples.npy"
    command = ["sample", str(trained / "model.safetensors"), "-n", "5", "-k", "20"]
    command += ["--out", str(out), "--data", "digits", "--clamp", "top"]
    assert cli.main(command) == 0
    digits = data.load("digits").values[[0, 449, 898, 1347, 1796]].numpy()
    v = np.load(out)
    assert np.array_equal(v[:, :32], digits[:, :32])
    assert not np.array_equal(v[:, 32:], digits[:, 32:])
    assert cli.main([*command, "--means"]) == 0
    assert np.array_equal(np.load(out)[:, :32], digits[:, :32])


def test_bench(capsys, monkeypatch):
    from rbm_kernels.cli import bench_table

    monkeypatch.setattr(bench_table, "SHAPES", ((8, 16, 12),))
    assert cli.main(["bench", "--seconds", "0.02", "--no-compile"]) == 0
    assert "8 x 16 x 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "no-such-file.npy"], "no-such-file.npy"),
        (["train", "digits", "--hidden", "0"], "n_hidden must be at least 1, got 0"),
        (["train", "digits", "--pcd", "0"], "n_chains must be at least 1, got 0"),
        (["train", "digits", "--cd", "--pcd", "9"], "--pcd: not allowed with argument --cd"),
        (["train", "digits", "--hidden", "many"], "--hidden: invalid int value: 'many'"),
        (["train", "digits", "--k", "0"], "k must be at least 1, got 0"),
        (["train", "digits", "--held-out", "2"], r"held_out must lie in (0, 1), got 2.0"),
        (["train", "digits", "--threshold", "-1"], "threshold must lie in (0, 1]"),
        (["train", "digits", "--backend", "cuda"], "cannot run"),
        (["train", "digits", "--backend", "abacus"], "invalid choice: 'abacus'"),
        (["train", "digits", "--resume"], "checkpoint must be an existing file"),
        (["train"], "the following arguments are required: DATA"),
        (["sample", "nowhere"], "nowhere"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_mistakes_take_one_line_and_exit_2(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("rbm-kernels")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "samples.jpg"], "out must end in .png or .npy, got samples.jpg"),
        (["-n", "0"], "n must be at least 1, got 0"),
        (["--shape", "8by8"], "shape must be HEIGHTxWIDTH, got '8by8'"),
        (["--shape", "8x9"], "shape must have height * width = V = 64, got 8x9"),
        (["--clamp", "top"], "clamp needs data"),
        (["--data", "mnist5k"], "data must have V = 64 units as the model, got 784"),
    ],
)
def test_mistakes_of_sample(trained, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(trained), *options]) == 2
    assert message in capsys.readouterr().err


def test_resume_with_other_settings_or_data(trained, capsys):
    before = (trained / "checkpoint.pt").read_bytes()
    assert train(trained, "--resume", "--hidden", "11") == 2
    assert "n_hidden must be as in the run that is resumed = 10, got 11" in capsys.readouterr().err
    assert train(trained, "--resume", "--held-out", "0.3") == 2
    assert "trained on other data" in capsys.readouterr().err
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_without_matplotlib_training_does_not_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(tmp_path, "--epochs", "1") == 2
    assert "pip install 'rbm-kernels[train]'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    assert train(tmp_path, "--epochs", "1", "--no-plots") == 0


def test_negative_phase_by_its_name(tmp_path, capsys):
    command = ["train", "digits", "--epochs", "1", "--no-plots", "--hidden", "10"]
    assert cli.main([*command, "--out", str(tmp_path), "--negative-phase", "cd"]) == 0
    assert "64 x 10 units, CD-1\n" in capsys.readouterr().out
    assert cli.main([*command, "--out", str(tmp_path), "--chains", "7"]) == 0
    assert "PCD-1, 7 chains" in capsys.readouterr().out
