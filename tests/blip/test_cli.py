"""The command line rbm-caption: what it writes, and one line for every mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image
from support import blip
from transformers import BertConfig
from transformers.utils import logging

import blip_integration
from blip_integration import cli
from blip_integration.captions import beam_candidates
from blip_integration.gated_residual import GatedResidual
from blip_integration.images import ImageFiles, image_states, open_image
from blip_integration.modeling import apply_rbm_to_blip, load_captioner
from rbm_kernels import RBM


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return blip.draw_data(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of stock BLIP, as a hub would give it."""
    folder = tmp_path_factory.mktemp("models") / "blip"
    for each in blip.tiny_blip():
        each.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rbm(tmp_path_factory) -> Path:
    """An RBM that moves the features of that model a lot."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = RBM(blip.WIDTH, 8, "gaussian")
    with torch.no_grad():
        model.W.mul_(300)
    path = tmp_path_factory.mktemp("rbm") / "rbm.safetensors"
    model.save(path)
    return path


def pictures(data: Path) -> list[str]:
    return sorted(str(path) for path in (data.parent / "images").iterdir())


def expected_captions(folder: Path, paths: list[str], **options: int) -> list[str]:
    loaded, processor = load_captioner(folder)
    pixels = processor.image_processor([open_image(path) for path in paths], return_tensors="pt")
    pixels = pixels["pixel_values"]
    return beam_candidates(loaded, processor.tokenizer, pixels, progress=False, **options).best


def before_and_after(printed: str) -> tuple[list[str], list[str], list[float]]:
    parts = (
        re.findall(r"^  before: (.*)$", printed, re.M),
        re.findall(r"^  after:  (.*)$", printed, re.M),
        [float(x) for x in re.findall(r"before and after: (.*)$", printed, re.M)],
    )
    assert len({len(part) for part in parts}) == 1
    return parts


def test_help_is_fast():
    """It imports nothing heavy; and every command has help."""
    code = (
        "import sys; from blip_integration import cli\n"
        "names = ['fit', 'caption']\n"
        "for command in ([], *([name] for name in names)):\n"
        "    try: cli.main([*command, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    root = str(Path(blip_integration.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"usage: rbm-caption") == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"beams": 1}, {"beams": 2, "min_length": 9}, {"length_penalty": -9.0, "min_length": 2}],
)
def test_caption_says_what_generate_does(data, model, capsys, options):
    paths = pictures(data)
    words = [part for name, value in options.items()
             for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    assert cli.main(["caption", *paths, "--model", str(model), "--batch-size", "2", *words]) == 0
    printed = capsys.readouterr()
    said = expected_captions(model, paths, batch_size=2, **options)
    assert printed.out.splitlines() == [f"{p}: {c}" for p, c in zip(paths, said, strict=True)]
    assert printed.err == "" and len(set(said)) > 1


def test_caption_before_and_after_an_rbm(data, model, rbm, capsys):
    paths = pictures(data)
    command = ["caption", *paths, "--model", str(model), "--batch-size", "4", "--rbm", str(rbm)]
    assert cli.main([*command, "--strength", "0.96"]) == 0
    before, after, cosines = before_and_after(capsys.readouterr().out)
    assert before == expected_captions(model, paths) and before != after
    assert len(cosines) == len(paths) and max(cosines) < 0.99

    # The same by the library alone.
    adjusted, processor = load_captioner(model)
    apply_rbm_to_blip(adjusted, RBM.load(rbm), strength=0.96)
    pixels = processor.image_processor([open_image(p) for p in paths], return_tensors="pt")
    pixels = pixels["pixel_values"]
    assert after == beam_candidates(adjusted, processor.tokenizer, pixels, progress=False).best
    states = adjusted.vision_model(pixels).last_hidden_state
    plain = load_captioner(model)[0].vision_model(pixels).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(states, plain, dim=-1).mean(1)
    torch.testing.assert_close(torch.tensor(cosines), cosine, atol=1e-4, rtol=0)

    assert cli.main([*command, "--strength", "0"]) == 0
    before, after, cosines = before_and_after(capsys.readouterr().out)
    assert before == after and set(cosines) == {1.0}


def test_a_model_with_an_rbm_has_captions_before_and_after(data, model, rbm, tmp_path, capsys):
    adjusted, processor = load_captioner(model)
    apply_rbm_to_blip(adjusted, RBM.load(rbm), strength=0.96)
    for each in (adjusted, processor):
        each.save_pretrained(tmp_path / "adjusted")
    command = ["caption", *pictures(data), "--model"]
    assert cli.main([*command, str(tmp_path / "adjusted")]) == 0
    of_folder = capsys.readouterr().out
    assert cli.main([*command, str(model), "--rbm", str(rbm), "--strength", "0.96"]) == 0
    assert capsys.readouterr().out == of_folder
    assert cli.main([*command, str(tmp_path / "adjusted"), "--strength", "0"]) == 0
    before, after, _ = before_and_after(capsys.readouterr().out)
    assert before == after


def test_fit_an_rbm_and_use_it(data, model, tmp_path, capsys):
    out, paths = tmp_path / "rbm.safetensors", pictures(data)
    command = ["fit", str(data.parent / "images"), "--model", str(model), "--out", str(out)]
    options = ["--hidden", "5", "--epochs", "2", "--batch-size", "16"]
    assert cli.main([*command, *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "9 x 17 x 16" in printed.out and "16 x 5 units" in printed.out
    fitted = GatedResidual.load(out)
    assert fitted.reconstructor.rbm.W.shape == (16, 5)
    captioner, processor = load_captioner(model)
    states = image_states(captioner, ImageFiles(processor, paths)).float().reshape(-1, 16)
    torch.testing.assert_close(fitted.mean, states.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fitted.scale, states.std(0, correction=0), atol=1e-4, rtol=1e-4)
    assert cli.main(["caption", paths[0], "--model", str(model), "--rbm", str(out)]) == 0
    before_and_after(capsys.readouterr().out)
    # The names of images may stand in a file, one a line; the same images make the same RBM.
    (tmp_path / "names").write_text("\n".join(paths))
    again = tmp_path / "again.safetensors"
    command = ["fit", f"@{tmp_path / 'names'}", "--model", str(model), "--out", str(again)]
    assert cli.main([*command, *options]) == 0
    wanted, got = fitted.state_dict(), GatedResidual.load(again).state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_transformers_is_as_talkative_afterwards_as_before(data, model, capsys):
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        assert cli.main(["caption", pictures(data)[0], "--model", str(model)]) == 0
        assert cli.main(["caption", "nothing.png", "--model", str(model)]) == 2
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        assert cli.main(["caption", pictures(data)[0], "--model", str(model)]) == 0
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def test_an_image_with_too_many_pixels(here, model, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert cli.main(["caption", "good.png", "--model", str(model)]) == 2
    assert "good.png is too large" in capsys.readouterr().err


def test_a_bug_of_ours_shows_its_traceback(data, model, monkeypatch):
    def bug(*_):
        raise AttributeError("ours")

    monkeypatch.setattr(cli, "write_captions", bug)
    with pytest.raises(AttributeError, match="ours"):
        cli.main(["caption", pictures(data)[0], "--model", str(model)])


@pytest.fixture
def here(data, model, rbm, tmp_path, monkeypatch) -> Path:
    """A folder with what the mistakes below name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "blip").symlink_to(model)
    (tmp_path / "rbm.safetensors").symlink_to(rbm)
    (tmp_path / "captions.json").symlink_to(data)
    (tmp_path / "images").symlink_to(data.parent / "images")
    Image.new("RGB", (8, 8)).save("good.png")
    Image.effect_noise((64, 64), 50).save("broken.png")
    Path("broken.png").write_bytes(Path("broken.png").read_bytes()[:1000])
    Path("text.png").write_text("a photo of a dog")
    Path("empty.png").touch()
    Path("bad.json").write_text("{")
    BertConfig().save_pretrained("bert")
    Path("nothing").mkdir()
    RBM(9, 4, "gaussian").save("narrow.safetensors")
    RBM(blip.WIDTH, 4).save("binary.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("caption --model blip", "the following arguments are required: IMAGE"),
        ("caption good.png", "the following arguments are required: --model"),
        ("caption good.png --model blip --beams 0", "--beams: must be at least 1, got 0"),
        ("caption good.png --model blip --beams x", "--beams: invalid positive value: 'x'"),
        (
            "caption none.png --model blip",
            "IMAGE must be an image file or a folder of them, got none",
        ),
        ("caption nothing --model blip", "IMAGE must be a folder with images, got nothing"),
        ("caption empty.png --model blip", "empty.png is empty (0 bytes)"),
        ("caption text.png --model blip", "text.png is in no image format"),
        ("caption broken.png --model blip", "broken.png is damaged"),
        ("caption good.png --model nothing", "must be a folder with config.json"),
        ("caption good.png --model good.png", "must be a folder with config.json"),
        ("caption good.png --model bert", "bert must hold a BLIP model, got one of type 'bert'"),
        ("caption good.png --model some/where", "some/where"),
        ("caption good.png --model blip --strength 1", "--strength needs --rbm"),
        ("caption good.png --model blip --rbm no.safetensors", "must be a model file, got 'no."),
        ("caption good.png --model blip --rbm text.png", "is not a safetensors file"),
        ("caption good.png --model blip --rbm narrow.safetensors", "must have D = 16 visible"),
        ("caption good.png --model blip --rbm binary.safetensors", "Gaussian visible units"),
        (
            "caption good.png --model blip --rbm rbm.safetensors --strength nan",
            "must lie in [-1, 1]",
        ),
        ("caption good.png --model blip --device abacus", "abacus"),
        ("fit good.png --model blip --out nothing", "--out must be a file"),
        ("fit good.png --model blip --out r --learning-rate 0", "learning_rate must be pos"),
        ("fit good.png --model blip --out r --sigma 0", "sigma must be positive and finite"),
    ],
)
def test_mistakes_take_one_line_and_exit_2(here, capfd, command, message):
    try:
        status = cli.main(command.split())
    except SystemExit as error:
        status = error.code
    printed = capfd.readouterr()
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1 and printed.err.startswith("rbm-caption")
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("missing", "command"),
    [],
)
def test_a_missing_package_is_named_with_what_installs_it(
    here, monkeypatch, capsys, missing, command
):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(command.split()) == 2
    message = capsys.readouterr().err
    assert missing.replace("_", "-") in message.replace("_", "-") and "pip install" in message
    assert message.count("\n") == 1
    assert not (here / "new").exists()


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "demo"])
def test_a_command_that_has_moved_says_where(capsys, command):
    assert cli.main([command, "captions.json", "--out", "new"]) == 2
    message = capsys.readouterr().err
    assert f"python -m benchmarks.captioning {command}" in message and message.count("\n") == 1
