"""The demonstration: whole or not at all, reproducible, and with claims that are counted right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("pycocoevalcap")

from benchmarks.captioning import cli, demo
from benchmarks.captioning.data import load_captions
from benchmarks.captioning.demo import DemoRow, run_demo, table
from benchmarks.captioning.scenes import check_caption, load_scenes
from benchmarks.captioning.settings import DemoSettings
from blip_integration.captions import Candidates
from blip_integration.gated_residual import GatedResidual
from blip_integration.modeling import load_captioner

TINY = DemoSettings(
    scenes=20, pixels=64, width=16, epochs=1, hidden=8, beams=2, shown=2, held_out=0.4
)
NAMES = ["captioner", "with an RBM inside", "re-ranked by an RBM"]


pytestmark = pytest.mark.usefixtures("untrained_encoder")


def test_everything_is_written_and_the_same_seed_gives_the_same_table(tmp_path):
    lines = []
    rows = run_demo(tmp_path / "a", TINY, say=lines.append, progress=False)
    assert [row.name for row in rows] == NAMES
    assert all(0 <= share <= 1 for row in rows for share in [row.correct, *row.claims.values()])
    assert lines[0] == "12 scenes to train on, 8 others"
    written = ["adjusted.html", "captioner", "features", "rbm.safetensors", "reranked.html"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*written, "scenes"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    model, processor = load_captioner(tmp_path / "a" / "captioner")
    assert processor.image_processor.size == {"height": 64, "width": 64}
    fitted = GatedResidual.load(tmp_path / "a" / "rbm.safetensors")
    assert fitted.reconstructor.rbm.W.shape == (16, 8) and fitted.mean.shape == (16,)
    assert model.config.vision_config.hidden_size == 16
    page = (tmp_path / "a" / "adjusted.html").read_text()
    assert page.count("<article") == 2 and "cosine before to after" in page
    assert "cosine before to after" not in (tmp_path / "a" / "reranked.html").read_text()
    assert run_demo(tmp_path / "b", TINY, say=lambda _: None, progress=False) == rows


def test_claims_are_counted_on_the_half_that_chose_nothing(tmp_path, monkeypatch):
    """Captions of people, who only say what is true, and those of the scene before."""
    made = {}

    def people_then_wrong(model, tokenizer, images, **_):
        if not made:
            file = next(tmp_path.glob(".a-*/scenes/captions.json"))
            made["captions"] = load_captions(file, "val").captions
            made["scenes"] = list(load_scenes(file).values())[-len(made["captions"]) :]
            texts = [[each[0], each[0]] for each in made["captions"]]
        else:
            right = made["captions"][1::2]
            texts = made["wrong"] = [[each[0], each[0]] for each in right[-1:] + right[:-1]]
        return Candidates([str(i) for i in range(len(texts))], texts, torch.zeros(len(texts), 2))

    def recorded(name, argument):
        function = getattr(demo, name)

        def call(*arguments, **options):
            made[name] = arguments[argument]
            return function(*arguments, **options)

        monkeypatch.setattr(demo, name, call)

    monkeypatch.setattr(demo, "beam_candidates", people_then_wrong)
    recorded("candidate_ciders", 1)
    recorded("evaluate", 1)
    plain, adjusted, reranked = run_demo(tmp_path / "a", TINY, say=lambda _: None, progress=False)
    assert plain.correct == 1.0 and set(plain.claims.values()) == {1.0} and plain.cider > 1.0
    assert reranked == dataclasses.replace(plain, name=reranked.name)

    pairs = zip(made["scenes"][1::2], made["wrong"], strict=True)
    checks = [check_caption(scene, texts[0]) for scene, texts in pairs]
    claims = [claim.true for check in checks for claim in check.claims]
    assert adjusted.claims["all"] == sum(claims) / len(claims) < 1.0
    assert adjusted.correct == sum(check.correct for check in checks) / 4 < 1.0
    # What chose and what is reported are different scenes.
    assert len(made["candidate_ciders"]) == len(made["evaluate"]) == 4
    references = [tuple(map(tuple, made[name])) for name in ("candidate_ciders", "evaluate")]
    assert not set(references[0]) & set(references[1])


def test_a_table_has_a_column_for_each_kind_that_was_claimed():
    rows = [
        DemoRow("captioner", 0.25, {"all": 0.5, "object": 1.0}, 1.25),
        DemoRow("re-ranked by an RBM", 1.0, {"all": 0.625, "object": 0.5, "relation": 1.0}, 0.0),
    ]
    assert [line.split() for line in table(rows).splitlines()] == [
        ["all", "true", "claims", "object", "relation", "CIDEr"],
        ["captioner", "25.0", "50.0", "100.0", "-", "125.0"],
        ["re-ranked", "by", "an", "RBM", "100.0", "62.5", "50.0", "100.0", "0.0"],
    ]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fit_rbm_to_tokens", interrupt)
    assert (
        cli.main(["demo", "--out", str(tmp_path / "a"), "--scenes", "10", "--epochs", "1"]) == 130
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("scenes", [1, 5])
def test_too_few_scenes(tmp_path, capsys, scenes):
    command = ["demo", "--out", str(tmp_path / "a"), "--scenes", str(scenes)]
    assert cli.main(command) == 2
    assert f"scenes must be at least 10, got {scenes}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
