"""The comparison on a captioner of random weights: what is chosen by which images, what is kept."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("pycocoevalcap")
pytest.importorskip("efficientnet_lite_pytorch")

from PIL import Image
from torch import Tensor, nn

from benchmarks.captioning import metrics
from benchmarks.captioning import study as comparison
from benchmarks.captioning.features import FeatureCache, extract
from benchmarks.captioning.lite_blip import (
    LiteBlipConfig,
    LiteBlipForConditionalGeneration,
    word_tokenizer,
)
from benchmarks.captioning.metrics import candidate_ciders, cider_scores
from benchmarks.captioning.study import (
    GROUPS,
    Run,
    Study,
    adjusted,
    changes_page,
    compare,
    decoding,
    markdown,
    per_image,
    remembered,
    reranked,
)
from benchmarks.captioning.train_lite import caption_losses
from blip_integration.captions import Candidates, beam_candidates

WIDTH, TOKENS = 32, 5
WORDS = ("dog", "cat", "bird", "horse")
PLACES = ("grass", "snow", "sand")


def _captions(n: int) -> list[list[str]]:
    return [
        [f"a {WORDS[i % 4]} on the {PLACES[i % 3]}", f"the {WORDS[i % 4]} is on {PLACES[i % 3]}"]
        for i in range(n)
    ]


def _features(folder: Path, n: int, seed: int) -> FeatureCache:
    table = torch.randn(n, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return extract(
        lambda rows: table[rows.long().flatten()],
        lambda name: torch.tensor([int(name)]),
        [str(i) for i in range(n)],
        folder,
        progress=False,
    )


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    for name, size in (("HIDDEN", 6), ("COMPONENTS", 3), ("PAIR_HIDDEN", 4), ("WORDS", 20)):
        monkeypatch.setattr(comparison, name, size)
    # METEOR starts a Java program for each strategy; test_blip_metrics has it.
    monkeypatch.setattr(metrics, "java_available", lambda: False)
    train, val = _captions(20), _captions(8)
    tokenizer = word_tokenizer([text for texts in train for text in texts], min_count=1)
    config = LiteBlipConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "encoder_hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "initializer_range": 0.5,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": WIDTH, "num_hidden_layers": 0, "variant": 0, "image_size": 224,
        },
        unk_token_id=tokenizer.unk_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LiteBlipForConditionalGeneration(config).eval()
    return Study(
        model,
        tokenizer,
        _features(tmp_path / "train", 20, 0),
        train,
        _features(tmp_path / "val", 8, 1),
        val,
        tmp_path / "study",
        seeds=(0, 1),
        beams=3,
        joint_epochs=1,
    )


class _Shift(nn.Module):
    """Adds a number to all features."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_all_groups_run_and_are_kept(study: Study) -> None:
    state = {name: tensor.clone() for name, tensor in study.model.state_dict().items()}
    seen: list[Run] = []
    table = compare(study, on_run=seen.append)
    assert set(table) == set(GROUPS)
    names = {row.name for rows in table.values() for row in rows}
    assert {"top-1", "oracle", "adjust: RBM", "rerank: ITC", "train: RBM, LM + CD"} <= names
    for rows in table.values():
        for row in rows:
            assert row.runs in (1, 2)
            assert (row.difference is None) == (row.name == "top-1")
            assert all(math.isfinite(value) for value in row.metrics.values())
    assert all(len(run.captions) == 8 for run in seen)
    # The study's own model is what it was, whatever learned.
    assert all(torch.equal(state[name], t) for name, t in study.model.state_dict().items())
    # The second time nothing is run again.
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.json")}
    again = compare(study)
    assert markdown(again) == markdown(table)
    assert before == {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.json")}
    assert markdown(table).count("\n") == 2 + sum(len(rows) for rows in table.values())


def test_no_choice_beats_the_oracle_and_top_1_is_the_captioners_own(study: Study) -> None:
    rows = {row.name: row for row in compare(study, ["re-evaluate"])["re-evaluate"]}
    assert set(rows) >= {"top-1", "random choice", "oracle"}
    best = rows["oracle"].metrics["CIDEr"]
    assert all(row.metrics["CIDEr"] <= best + 1e-9 for row in rows.values())
    lists = Candidates.load(study.folder / "val-beam3.json")
    kept = json.loads((study.folder / "runs" / "top_1.0.json").read_text())
    assert kept["captions"] == lists.best


def test_each_half_uses_the_gate_that_the_other_half_chose(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    even, odd = study.halves()
    assert sorted([*even.tolist(), *odd.tolist()]) == list(range(8))

    # The even images like a gate of 0.1 best, the odd ones one of 0.5.
    def losses(study: Study, adjust: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(adjust, _Shift)
        nats = torch.ones(8, dtype=torch.float64)
        nats[even] += abs(adjust.by - 0.1)
        nats[odd] += abs(adjust.by - 0.5)
        return nats, torch.ones(8, dtype=torch.float64)

    monkeypatch.setattr(comparison, "image_losses", losses)
    monkeypatch.setattr(
        comparison,
        "captions_of",
        lambda study, adjust, rows: [f"{adjust.by} {row}" for row in rows.tolist()],
    )
    run = adjusted(study, "shift", 0, _Shift, 0, gates=(0.1, 0.5))
    assert run.settings["gates"] == [0.5, 0.1]
    assert run.captions == [f"{0.5 if row % 2 == 0 else 0.1} {row}" for row in range(8)]
    assert run.loss == pytest.approx(1.4)


def test_each_half_uses_the_weight_that_the_other_half_chose(study: Study) -> None:
    # Of two candidates the second is the true caption. The re-ranker knows it for even images and
    # is wrong for odd ones: so even images choose a weight, which the odd ones must take.
    texts = [["nothing like it", own[0]] for own in study.val_captions]
    lists = Candidates([str(i) for i in range(8)], texts, torch.tensor([[0.0, -0.5]]).repeat(8, 1))
    extra = torch.zeros(8, 2)
    extra[::2, 1] = 1.0
    extra[1::2, 0] = 1.0
    run = reranked(study, "half right", 0, lists, extra, 0)
    of_even, of_odd = run.settings["weights"]
    assert of_even == 0  # the odd images would have none of it
    assert of_odd > 0.5
    assert run.captions == ["nothing like it"] * 8


def test_a_gate_changes_the_captions_only_while_it_is_there(study: Study) -> None:
    features = study.val[:4]
    vision = study.model.vision_model
    with decoding(study.model, _Shift(3.0)) as model:
        moved = model.vision_model(features).last_hidden_state
    assert torch.equal(moved, features + 3.0)
    assert study.model.vision_model is vision


def test_runs_are_kept_by_name_and_seed(study: Study) -> None:
    made = []

    def make() -> Run:
        made.append(1)
        return Run("a/b: c", 3, ["x"] * 8)

    assert remembered(study, "a/b: c", 3, make).captions == ["x"] * 8
    assert remembered(study, "a/b: c", 3, make).captions == ["x"] * 8
    assert len(made) == 1
    remembered(study, "a/b: c", 4, make)
    assert len(made) == 2


def test_per_image_scores_are_means_over_runs(study: Study) -> None:
    right = Run("right", 0, [texts[0] for texts in study.val_captions])
    wrong = Run("wrong", 0, ["nothing"] * 8)
    expected = cider_scores(right.captions, study.val_captions) / 2
    assert torch.allclose(per_image(study, [right, wrong]), expected)


def test_the_page_shows_what_changed(study: Study, tmp_path: Path) -> None:
    images = []
    for i in range(8):
        images.append(tmp_path / f"{i}.png")
        Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(images[-1])
    same = ["a dog on the grass"] * 8
    remembered(study, "top-1", 0, lambda: Run("top-1", 0, same))
    changed = ["a <b>cat</b> on the grass", *same[1:]]
    remembered(study, "other", 0, lambda: Run("other", 0, changed))
    page = changes_page(study, "other", images)
    assert "1 of 8 captions changed" in page
    assert "<b>cat</b>" not in page
    assert "0.png" in page and "1.png" not in page


def test_the_page_of_a_reranker_shows_what_words_looked_at(study: Study, tmp_path: Path) -> None:
    images = [tmp_path / f"{i}.png" for i in range(8)]
    for path in images:
        Image.new("RGB", (20, 20)).save(path)
    same = ["a dog on the grass"] * 8
    remembered(study, "top-1", 0, lambda: Run("top-1", 0, same))
    pages = []
    for name in ("rerank: other", "adjust: other"):
        changed = ["the cat is on snow", "", *same[2:]]
        remembered(study, name, 0, lambda name=name, c=changed: Run(name, 0, c))
        pages.append(changes_page(study, name, images))
    # One veil for each word of the one caption that has words.
    assert [page.count('class="veil"') for page in pages] == [5, 0]


def test_a_folder_keeps_the_runs_of_one_study(study: Study) -> None:
    study.claim_folder()
    replace(study, seeds=(0, 1, 2)).claim_folder()  # More seeds go on where others stopped.
    kept = (study.folder / "study.json").read_bytes()
    other_model = copy.deepcopy(study.model)
    with torch.no_grad():
        other_model.text_decoder.cls.predictions.bias[0] += 1
    others = {
        "beams": 2,
        "length_penalty": 0.8,
        "loss_captions": 1,
        "rated_images": 10,
        "joint_epochs": 2,
        "model": other_model,
        "val_captions": [["a dog"], *study.val_captions[1:]],
        "train": study.val,
    }
    for name, value in others.items():
        named = "val" if name == "val_captions" else name
        with pytest.raises(ValueError, match=rf"same {named}: .* got"):
            compare(replace(study, **{name: value}))
    assert (study.folder / "study.json").read_bytes() == kept
    assert not (study.folder / "runs").exists()


@pytest.mark.parametrize("beams", [3, 1])
def test_all_captions_are_searched_for_alike(study, monkeypatch, beams) -> None:
    study = replace(study, beams=beams, length_penalty=0.7)
    options = {"beams": beams, "length_penalty": 0.7}
    seen = []

    def search(*_, n=1, progress=True, **keywords):
        seen.append(keywords)
        return beam_candidates(*_, n=n, progress=False, **keywords)

    monkeypatch.setattr(comparison, "beam_candidates", search)
    lists = comparison.n_best(study, study.val, "val")
    assert comparison.captions_of(study, None, torch.arange(8)) == lists.best
    assert seen == [options, options]


def test_losses_are_of_so_many_captions_of_each_image(study: Study) -> None:
    with decoding(study.model) as model:
        for count in (1, 2):
            captions = [texts[:count] for texts in study.val_captions]
            wanted = caption_losses(model, study.tokenizer, study.val, captions)
            found = comparison.image_losses(replace(study, loss_captions=count))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _gates_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tensor]]:
    """(value, the residual's tanh(gate) there) of every gate that a strategy offers."""
    seen: list[tuple[float, Tensor]] = []

    def offered(study, name, seed, residual_at, parameters, gates=comparison.GATES):
        seen.extend((value, residual_at(value).gate.detach().tanh()) for value in gates)
        return Run(name, seed, [])

    monkeypatch.setattr(comparison, "adjusted", offered)
    return seen


def test_gates_are_values_of_their_tanh(study: Study, monkeypatch) -> None:
    seen = _gates_asked_for(monkeypatch)
    for run in comparison.adjustment_runs(replace(study, seeds=(0,))):
        assert len(seen) == len(comparison.GATES)
        for value, gate in seen:
            torch.testing.assert_close(gate, torch.full_like(gate, value), atol=1e-6, rtol=0)
        assert gate.shape == ((2,) if "apart" in run.name else ())
        seen.clear()


def test_learned_gates_are_offered_in_part(study: Study, monkeypatch) -> None:
    seen = _gates_asked_for(monkeypatch)
    captions: list[list[list[str]]] = []

    class Pairs(comparison.CaptionPairs):
        def __init__(self, features: Tensor, texts: list[list[str]]) -> None:
            captions.append(texts)
            super().__init__(features, texts)

    monkeypatch.setattr(comparison, "CaptionPairs", Pairs)
    for run in comparison.joint_runs(study):
        learned, deciding = captions
        for rows, texts in ((slice(1, 10), learned[:9]), (slice(0, 11, 10), deciding)):
            # Another caption with another seed.
            assert texts == [[each[run.seed]] for each in study.train_captions[rows]]
        captions.clear()
        if run.name == "train: decoder fine-tuned":
            assert not seen and "gate" not in run.settings
            continue
        gate = torch.tensor(run.settings["gate"])
        assert [value for value, _ in seen] == [0, 0.25, 0.5, 1]
        for share, offered in seen:
            torch.testing.assert_close(offered, share * gate, atol=1e-6, rtol=0)
        seen.clear()


def test_an_rbm_for_cls_and_one_for_the_others(study: Study) -> None:
    residual = comparison._apart(study, 0)
    features = study.train[:].float()
    for row, tokens in ((0, features[:, :1]), (1, features[:, 1:])):
        torch.testing.assert_close(residual.mean[row], tokens.mean((0, 1)), atol=1e-4, rtol=1e-4)
    assert residual.reconstructor is not residual.cls_reconstructor


def test_what_rerankers_learn_from_and_how_two_add_up(study: Study, monkeypatch) -> None:
    study = replace(study, rated_images=15, seeds=(0,))
    rated = []

    def ciders(texts, captions):
        rated.append((len(texts), captions))
        return candidate_ciders(texts, captions)

    monkeypatch.setattr(comparison, "candidate_ciders", ciders)
    runs = {run.name: run for run in comparison.reranking_runs(study)}
    assert (15, study.train_captions[:15]) in rated
    assert runs["top-1"].loss == comparison.mean_loss(comparison.image_losses(study))
    parts = [torch.tensor(runs[f"rerank: {name}"].scores, dtype=torch.float64)
             for name in ("RBM PMI (contrastive)", "ITC")]  # fmt: skip
    wanted = sum(
        part / (part - part.mean(1, keepdim=True)).square().mean().sqrt() for part in parts
    )
    found = torch.tensor(runs["rerank: RBM and ITC"].scores, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_unknown_names_are_refused(study: Study) -> None:
    with pytest.raises(ValueError, match="groups must be among"):
        compare(study, ["adjusted"])
    with pytest.raises(ValueError, match="must be a strategy that has run"):
        comparison.differences(study, [("nobody", "top-1")])
