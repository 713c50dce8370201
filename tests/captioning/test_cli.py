"""The study's command line: what it writes, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image
from support import blip
from transformers import AutoModelForImageTextToText, BertConfig, BlipProcessor

import blip_integration
from benchmarks.captioning import cli, features, metrics, train_lite
from benchmarks.captioning import lite_blip as captioner
from benchmarks.captioning.files import save_captioner
from benchmarks.captioning.settings import (
    CaptionerSettings,
    DemoSettings,
    LiteSettings,
    LSTMSettings,
    StudySettings,
)
from blip_integration.captions import beam_candidates
from blip_integration.images import open_image
from blip_integration.modeling import apply_rbm_to_blip, load_captioner
from rbm_kernels import RBM

SHORT = ["--variant", "0", "--width", "16", "--layers", "1", "--heads", "2", "--min-count", "1"]
SHORT += ["--epochs", "2", "--batch-size", "8"]
# Of a new process: the packages where they are installed, and the repository behind them.
SITE = Path(blip_integration.__file__).parents[1]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)])}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return blip.draw_data(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of stock BLIP, as a hub would give it."""
    folder = tmp_path_factory.mktemp("models") / "blip"
    save_captioner(*blip.tiny_blip(), folder)
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


@pytest.fixture
def no_java(monkeypatch) -> None:
    """METEOR's program takes seconds to start."""
    monkeypatch.setattr(metrics, "java_available", lambda: False)


def pictures(data: Path) -> list[str]:
    return sorted(str(path) for path in (data.parent / "images").iterdir())


def expected_captions(folder: Path, paths: list[str], **options: int) -> list[str]:
    loaded, processor = load_captioner(folder)
    pixels = processor.image_processor([open_image(path) for path in paths], return_tensors="pt")
    pixels = pixels["pixel_values"]
    return beam_candidates(loaded, processor.tokenizer, pixels, progress=False, **options).best


def test_help_is_fast():
    """It imports nothing heavy; and every command has help."""
    code = (
        "import sys; from benchmarks.captioning import cli\n"
        "names = 'train lstm fit caption evaluate compare demo'.split()\n"
        "for command in ([], *([name] for name in names)):\n"
        "    try: cli.main([*command, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"usage: python -m benchmarks.captioning") == 8


def test_train_caption_and_train_again(data, tmp_path, untrained_encoder, monkeypatch, capfd):
    encoder_class = type(captioner.LiteEncoder(0))
    out = tmp_path / "new" / "model"
    options = ["--validation", "val", *SHORT]
    assert cli.main(["train", str(data), "--out", str(out), *options]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "6 images with 12 captions, 13 words and marks" in printed.out
    assert "epoch 1: loss " in printed.out and "epoch 2: loss " in printed.out
    assert re.search(r"trained for .* s: loss .* to .* \(smoothed\); val \d.* nats", printed.out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["model", "model-features"]
    trained = AutoModelForImageTextToText.from_pretrained(out)
    assert type(trained) is captioner.LiteBlipForConditionalGeneration

    paths = pictures(data)[:2]
    capfd.readouterr()
    assert cli.main(["caption", *paths, "--model", str(out)]) == 0
    printed = capfd.readouterr()
    said = expected_captions(out, paths)
    assert printed.out.splitlines() == [f"{p}: {c}" for p, c in zip(paths, said, strict=True)]
    assert printed.err == ""

    # The features are there now.
    def fail(*_):
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr(encoder_class, "forward", fail)
    again = tmp_path / "again"
    cache = ["--cache", str(tmp_path / "new" / "model-features")]
    assert cli.main(["train", str(data), "--out", str(again), *cache, *options]) == 0
    wanted, got = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (out, again)
    )
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("during", ["training", "saving"])
def test_ctrl_c_leaves_the_features_and_no_model(
    data, tmp_path, untrained_encoder, monkeypatch, capsys, during
):
    if during == "training":
        monkeypatch.setattr(train_lite, "train_captioner", interrupt)
    else:
        monkeypatch.setattr(BlipProcessor, "save_pretrained", interrupt)
    command = ["train", str(data), "--out", str(tmp_path / "model"), *SHORT]
    assert cli.main(command) == 130
    assert capsys.readouterr().err == f"\n{cli.PROGRAM}: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model-features"]
    monkeypatch.undo()
    assert len(features.FeatureCache(tmp_path / "model-features" / "train")) == 6


def test_train_never_writes_over_anything(data, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert cli.main(["train", str(data), "--out", str(tmp_path)]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def before_and_after(printed: str) -> tuple[list[str], list[str], list[float]]:
    parts = (
        re.findall(r"^  before: (.*)$", printed, re.M),
        re.findall(r"^  after:  (.*)$", printed, re.M),
        [float(x) for x in re.findall(r"before and after: (.*)$", printed, re.M)],
    )
    assert len({len(part) for part in parts}) == 1
    return parts


def test_a_process_says_captions_and_nothing_else(data, tmp_path):
    """Of a small captioner with an RBM: a fresh process has to know that class by itself."""
    pytest.importorskip("efficientnet_lite_pytorch")
    _, processor = blip.tiny_blip()
    width = blip.WIDTH
    config = captioner.LiteVisionConfig(variant=0, hidden_size=width, num_hidden_layers=0)
    vision = captioner.LiteVisionModel(config)
    small = captioner.lite_blip(vision, processor.tokenizer, layers=1, heads=2)
    apply_rbm_to_blip(small, RBM(width, 3, "gaussian"), strength=0.5)
    save_captioner(small, processor, tmp_path / "small")
    command = [sys.executable, "-m", "benchmarks.captioning", "caption", pictures(data)[0]]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "small")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [len(part) for part in before_and_after(done.stdout)] == [1, 1, 1]
    assert len(done.stdout.splitlines()) == 4


class Images(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.pictures = self.veils = 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            kind = dict(attributes).get("class")
            self.veils += kind == "veil"
            self.pictures += kind is None


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_page_with_attention_to_each_word(data, model, rbm, tmp_path, capsys, adjusted):
    page = tmp_path / "new" / "page.html"
    paths = pictures(data)[:3]
    command = ["caption", *paths, "--model", str(model), "--html", str(page)]
    command += ["--rbm", str(rbm), "--strength", "0.762"] if adjusted else []
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    if adjusted:
        said = before_and_after(printed)[1]
    else:
        said = [line.split(": ")[1] for line in printed.splitlines()[:3]]
    text = page.read_text()
    found = Images(text)
    assert found.pictures == 3 and found.veils == sum(len(c.split()) for c in said)
    assert all(Path(path).name in text for path in paths)
    assert ("cosine before to after" in text) == adjusted
    assert ("share of 0.762" in text) == adjusted


def test_evaluate_scores_the_captions_that_it_writes(data, model, tmp_path, no_java, capsys):
    pytest.importorskip("pycocoevalcap")
    out = tmp_path / "new" / "scores.json"
    command = ["evaluate", str(data), "--model", str(model), "--batch-size", "2", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    content = json.loads(out.read_text())
    paths = pictures(data)[6:]
    captions = [each["caption"] for each in content["captions"]]
    assert captions == expected_captions(model, paths)
    assert [each["id"] for each in content["captions"]] == [6, 7, 8]
    references = [each["references"] for each in content["captions"]]
    assert references[0] == ["A red circle on white.", "a circle is red"]
    assert content["scores"] == metrics.evaluate(captions, references)
    assert printed.err == "" and "split val: 3 images, 3 beams" in printed.out
    table = dict(line.split() for line in printed.out.splitlines()[1:])
    assert table.keys() == content["scores"].keys()
    for name, value in content["scores"].items():
        shown = value if name.startswith(("distinct", "length")) else 100 * value
        assert float(table[name]) == pytest.approx(shown, abs=0.051)


def test_evaluate_with_an_rbm_and_on_all_images(data, model, rbm, tmp_path, no_java):
    pytest.importorskip("pycocoevalcap")
    out = tmp_path / "scores.json"
    command = ["evaluate", str(data), "--model", str(model), "--split", "all", "--first", "4"]
    command += ["--rbm", str(rbm), "--strength", "0.96", "--beams", "1", "--out", str(out)]
    assert cli.main(command) == 0
    said = [each["caption"] for each in json.loads(out.read_text())["captions"]]
    assert len(said) == 4 and said != expected_captions(model, pictures(data)[:4], beams=1)


def test_compare_studies_what_it_is_told(data, model, tmp_path, monkeypatch, capsys):
    """The comparison itself has its own tests."""
    pytest.importorskip("matplotlib")
    from benchmarks.captioning import compare
    from benchmarks.captioning.strategies import SHOWN
    from benchmarks.captioning.study import TOP_1, StrategyResult

    called = []

    def comparison(study, groups, on_result):
        called.append((study, groups))
        on_result(StrategyResult(TOP_1, 0, [], seconds=2.0))
        row = compare.Row(SHOWN, 2, {"CIDEr": 0.5}, 0.1, None, {}, 7, 1.0)
        return {"rerank": [row]}

    monkeypatch.setattr(compare, "compare", comparison)
    monkeypatch.setattr(compare, "markdown", lambda table: f"| {list(table)} |\n")
    monkeypatch.setattr(
        compare, "changes_page", lambda study, strategy, images: f"{strategy.title}: {images}"
    )
    out = tmp_path / "study"
    command = ["compare", str(data), "--model", str(model), "--out", str(out), "--seeds", "2"]
    command += ["--length-penalty", "0.5", "--hidden", "7", "--strengths", "0.1", "1"]
    command += ["--groups", "adapter", "--beams", "4", "--cache", str(tmp_path / "cache")]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("top-1, seed 0: 2 s\n| ['rerank'] |\n")
    assert (out / "table.md").read_text() == "| ['rerank'] |\n"
    [row] = json.loads((out / "table.json").read_text())["rerank"]
    assert row["metrics"] == {"CIDEr": 0.5} and row["parameters"] == 7
    assert row["strategy"] == {"group": "rerank", "name": SHOWN.name}
    assert Image.open(out / "differences.png").format == "PNG"
    page = (out / "changes.html").read_text()
    assert page.startswith(f"{SHOWN.title}: ") and page.count(".png") == 3
    [(study, groups)] = called
    assert (groups, study.folder) == (["adapter"], out)
    assert study.settings == StudySettings(
        seeds=2, beams=4, length_penalty=0.5, hidden=7, strengths=(0.1, 1.0)
    )
    assert study.train.shape == (6, 17, 16) and len(study.train_captions) == 6
    assert study.val.shape == (3, 17, 16) and len(study.val_captions) == 3
    loaded, processor = load_captioner(model)
    pixels = processor.image_processor(open_image(pictures(data)[7]), return_tensors="pt")
    with torch.inference_mode():
        states = loaded.vision_model(pixels["pixel_values"]).last_hidden_state[0]
    torch.testing.assert_close(study.val[1], states, atol=2e-3, rtol=2e-3)


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
        ("caption good.png --model blip --html nothing", "--html must be a file, got the folder"),
        ("evaluate captions.json --model blip --split test", "split 'test' has no images"),
        ("evaluate bad.json --model blip", "bad.json is no JSON file"),
        ("evaluate no.json --model blip", "must be a JSON file, got no.json"),
        ("evaluate captions.json --images nothing --model blip", "3 of 3 images"),
        ("train captions.json --out blip", "must be new or empty, got blip"),
        ("train captions.json", "the following arguments are required: --out"),
        ("train captions.json --out new --variant 7", "--variant: invalid choice: 7"),
        ("train captions.json --out new --split test", "split 'test' has no images"),
        ("train captions.json --out new --min-count 99", "a word that occurs 99 times or more"),
        ("compare captions.json --model blip --out s --groups fly", "must be among rerank"),
        ("compare captions.json --model blip --out s --hidden 0", "must be at least 1, got 0"),
        ("compare captions.json --model blip --out s --strengths 2", "one or more of 0 to 1"),
        ("compare captions.json --model blip --out s --split x", "split 'x' has no images"),
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
    assert printed.err.count("\n") == 1 and printed.err.startswith(cli.PROGRAM)
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("transformers", "caption good.png --model blip"),
        ("pycocoevalcap", "evaluate captions.json --model blip"),
        ("efficientnet_lite_pytorch", "train captions.json --out new --variant 0 --min-count 1"),
    ],
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


def test_the_lstm_is_trained_and_scored(data, tmp_path, no_java, capsys):
    """On the features of train, with word vectors from a file, and again where it stopped."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("matplotlib")
    caches = tmp_path / "features"
    for split, rows in (("train", 6), ("val", 3)):
        table = torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(rows))
        features.extract(
            lambda images, table=table: table[images.long().flatten()],
            lambda name: torch.tensor([int(name)]),
            [str(i) for i in range(rows)],
            caches / split,
            progress=False,
        )
    many = json.loads(data.read_text())
    # Five of each: the words of fewer captions would be unknown.
    many["annotations"] = [each for each in many["annotations"] for _ in range(5)]
    (data.parent / "many.json").write_text(json.dumps(many))
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("a 0.1 0.2 0.3\ncircle 0.4 0.5 0.6\n")
    out = tmp_path / "lstm"
    command = ["lstm", str(data.parent / "many.json"), str(caches), "--out", str(out)]
    command += ["--vectors", str(vectors), "--beams", "2"]
    assert cli.main([*command, "--epochs", "1"]) == 0
    figures = json.loads((out / "figures.json").read_text())
    assert figures["word_vectors"] == 2 and len(figures["epochs"]) == 1
    assert len(figures["captions"]) == 1 and figures["scores"].keys() >= {"CIDEr", "BLEU-4"}
    assert Image.open(out / "curves.png").format == "PNG"
    assert cli.main([*command, "--epochs", "2", "--resume"]) == 0
    again = json.loads((out / "figures.json").read_text())
    assert len(again["epochs"]) == 2 and again["epochs"][0] == figures["epochs"][0]
    capsys.readouterr()
    assert cli.main([*command, "--epochs", "3", "--gamma", "0.1", "--resume"]) == 2
    assert "resume needs the settings of the run" in capsys.readouterr().err


def field_help(kind: type, name: str) -> str:
    """What the docstring says of a field; the next field ends it."""
    text = " ".join((kind.__doc__ or "").split())
    after = text.split(f" {name}: ")[1]
    return re.split(r"\.(?: \w+: | Raises:|$)", after)[0]


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("train", [LiteSettings, CaptionerSettings]),
        ("compare", [StudySettings]),
        ("lstm", [LSTMSettings]),
        ("demo", [DemoSettings]),
    ],
)
def test_every_setting_is_a_flag_that_help_explains(capsys, monkeypatch, command, kinds):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for kind in kinds:
        for field in dataclasses.fields(kind):
            flag = f"--{field.name.replace('_', '-')}"
            found = re.search(rf" {flag} [^-]*({re.escape(field_help(kind, field.name))})", said)
            assert found is not None and len(found.group(1).split()) > 2, flag
