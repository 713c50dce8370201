"""The comparison on a captioner of random weights: what is chosen by which images, what is kept."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("pycocoevalcap")
pytest.importorskip("efficientnet_lite_pytorch")

from PIL import Image
from torch import Tensor, nn

from benchmarks.captioning import metrics, strategies
from benchmarks.captioning import study as study_module
from benchmarks.captioning.compare import (
    changes_page,
    compare,
    difference,
    markdown,
    per_image,
)
from benchmarks.captioning.compare import row as row_of
from benchmarks.captioning.features import FeatureCache, extract
from benchmarks.captioning.lite_blip import (
    LiteBlipConfig,
    LiteBlipForConditionalGeneration,
    word_tokenizer,
)
from benchmarks.captioning.metrics import candidate_ciders, cider_scores
from benchmarks.captioning.settings import StudySettings
from benchmarks.captioning.strategies import GROUPS
from benchmarks.captioning.study import (
    TOP_1,
    Strategy,
    StrategyResult,
    Study,
    adapted,
    cached_result,
    decoding,
    kept_results,
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
        StudySettings(
            seeds=2,
            beams=3,
            loss_captions=5,
            joint_epochs=1,
            hidden=6,
            components=3,
            words=20,
            pair_hidden=4,
        ),
    )


def changed(study: Study, **values: object) -> Study:
    """The study with other settings."""
    return replace(study, settings=replace(study.settings, **values))


class _Shift(nn.Module):
    """Adds a number to all features."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_all_groups_run_and_are_kept(study: Study) -> None:
    state = {name: tensor.clone() for name, tensor in study.model.state_dict().items()}
    seen: list[StrategyResult] = []
    table = compare(study, on_result=seen.append)
    assert set(table) == set(GROUPS)
    titles = {row.strategy.title for rows in table.values() for row in rows}
    assert {"top-1", "oracle", "adapter: RBM", "rerank: ITC", "finetune: RBM, LM + CD"} <= titles
    assert strategies.SHOWN in [row.strategy for row in table["rerank"]]
    for group, rows in table.items():
        assert {row.strategy.group for row in rows} <= {group, None}
    for rows in table.values():
        for row in rows:
            assert row.runs in (1, 2)
            assert (row.difference is None) == (row.strategy == TOP_1)
            assert all(math.isfinite(value) for value in row.metrics.values())
    assert all(len(result.captions) == 8 for result in seen)
    # The study's own model is what it was, whatever learned.
    assert all(torch.equal(state[name], t) for name, t in study.model.state_dict().items())
    # The second time nothing is run again.
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.json")}
    again = compare(study)
    assert markdown(again) == markdown(table)
    assert before == {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.json")}
    assert markdown(table).count("\n") == 2 + sum(len(rows) for rows in table.values())


def test_no_choice_beats_the_oracle_and_top_1_is_the_captioners_own(study: Study) -> None:
    rows = {row.strategy.title: row for row in compare(study, ["rerank"])["rerank"]}
    assert set(rows) >= {"top-1", "random choice", "oracle"}
    best = rows["oracle"].metrics["CIDEr"]
    assert all(row.metrics["CIDEr"] <= best + 1e-9 for row in rows.values())
    lists = Candidates.load(study.folder / "val-beam3.json")
    kept = json.loads((study.folder / "runs" / "top_1.0.json").read_text())
    assert kept["captions"] == lists.best


def test_each_half_uses_the_strength_that_the_other_half_chose(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    even, odd = study.halves()
    assert sorted([*even.tolist(), *odd.tolist()]) == list(range(8))

    # The even images like a strength of 0.1 best, the odd ones one of 0.5.
    def losses(study: Study, adapter: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        assert isinstance(adapter, _Shift)
        nats = torch.ones(8, dtype=torch.float64)
        nats[even] += abs(adapter.by - 0.1)
        nats[odd] += abs(adapter.by - 0.5)
        return nats, torch.ones(8, dtype=torch.float64)

    monkeypatch.setattr(study_module, "image_losses", losses)
    monkeypatch.setattr(
        study_module,
        "captions_of",
        lambda study, adapter, rows: [f"{adapter.by} {row}" for row in rows.tolist()],
    )
    result = adapted(study, Strategy("adapter", "shift"), 0, _Shift, 0, strengths=(0.1, 0.5))
    assert result.settings["strengths"] == [0.5, 0.1]
    assert result.captions == [f"{0.5 if row % 2 == 0 else 0.1} {row}" for row in range(8)]
    assert result.loss == pytest.approx(1.4)


def test_each_half_uses_the_weight_that_the_other_half_chose(study: Study) -> None:
    # Of two candidates the second is the true caption. The re-ranker knows it for even images and
    # is wrong for odd ones: so even images choose a weight, which the odd ones must take.
    texts = [["nothing like it", own[0]] for own in study.val_captions]
    lists = Candidates([str(i) for i in range(8)], texts, torch.tensor([[0.0, -0.5]]).repeat(8, 1))
    extra = torch.zeros(8, 2)
    extra[::2, 1] = 1.0
    extra[1::2, 0] = 1.0
    result = reranked(study, Strategy("rerank", "half right"), 0, lists, extra, 0)
    of_even, of_odd = result.settings["weights"]
    assert of_even == 0  # the odd images would have none of it
    assert of_odd > 0.5
    assert result.captions == ["nothing like it"] * 8


def test_an_adapter_changes_the_captions_only_while_it_is_there(study: Study) -> None:
    features = study.val[:4]
    vision = study.model.vision_model
    with decoding(study.model, _Shift(3.0)) as model:
        moved = model.vision_model(features).last_hidden_state
    assert torch.equal(moved, features + 3.0)
    assert study.model.vision_model is vision


def test_results_are_kept_by_strategy_and_seed(study: Study) -> None:
    made = []
    strategy = Strategy("adapter", "a/b: c")

    def make() -> StrategyResult:
        made.append(1)
        return StrategyResult(strategy, 3, ["x"] * 8, settings={"strengths": [0.1, 0.2]})

    first = cached_result(study, strategy, 3, make)
    assert cached_result(study, strategy, 3, make) == first
    assert len(made) == 1
    cached_result(study, strategy, 4, make)
    cached_result(study, Strategy("rerank", "a/b: c"), 3, make)
    assert len(made) == 3
    assert len(kept_results(study, strategy)) == 2


@pytest.mark.parametrize(("group", "old"), [("adapter", "adjust"), ("finetune", "train")])
def test_results_of_release_0_1_are_read(study: Study, group: str, old: str) -> None:
    """They were named "adjust: RBM" and "train: RBM", in a folder that noted fewer settings."""
    study = replace(study, settings=StudySettings())
    study.claim_folder()
    noted = json.loads((study.folder / "study.json").read_text())
    names = ("beams", "length_penalty", "loss_captions", "rated_images", "joint_epochs")
    old_note = {name: noted[name] for name in ("model", "train", "val", *names)}
    (study.folder / "study.json").write_text(json.dumps(old_note))
    study.claim_folder()
    (study.folder / "runs").mkdir()
    content = {"name": f"{old}: RBM", "seed": 1, "captions": ["x"] * 8, "loss": 2.0}
    (study.folder / "runs" / f"{old}__RBM.1.json").write_text(json.dumps(content))
    result = cached_result(study, Strategy(group, "RBM"), 1, lambda: pytest.fail("made again"))
    assert (result.strategy, result.captions, result.loss) == (
        Strategy(group, "RBM"), ["x"] * 8, 2.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="same hidden: .* 512, got 500"):
        changed(study, hidden=500).claim_folder()


def test_per_image_scores_are_means_over_results(study: Study) -> None:
    strategy = Strategy("rerank", "any")
    right = StrategyResult(strategy, 0, [texts[0] for texts in study.val_captions])
    wrong = StrategyResult(strategy, 0, ["nothing"] * 8)
    expected = cider_scores(right.captions, study.val_captions) / 2
    assert torch.allclose(per_image(study, [right, wrong]), expected)


def test_two_strategies_are_compared_by_what_is_kept(study: Study) -> None:
    strategy = Strategy("rerank", "right")
    said = [texts[0] for texts in study.val_captions[:5]] + ["a dog"] * 3
    right = StrategyResult(strategy, 0, said)
    top_1 = StrategyResult(TOP_1, 0, ["nothing"] * 8)
    cached_result(study, strategy, 0, lambda: right)
    cached_result(study, TOP_1, 0, lambda: top_1)
    mean, low, high = difference(study, strategy, TOP_1)
    assert mean == pytest.approx(100 * per_image(study, [right]).mean().item())
    assert 0 < low < mean < high
    assert row_of(study, [right], [top_1]).difference == (mean, low, high)


def test_the_page_shows_what_changed(study: Study, tmp_path: Path) -> None:
    images = []
    for i in range(8):
        images.append(tmp_path / f"{i}.png")
        Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(images[-1])
    same = ["a dog on the grass"] * 8
    cached_result(study, TOP_1, 0, lambda: StrategyResult(TOP_1, 0, same))
    other = Strategy("finetune", "other")
    captions = ["a <b>cat</b> on the grass", *same[1:]]
    cached_result(study, other, 0, lambda: StrategyResult(other, 0, captions))
    page = changes_page(study, other, images)
    assert "1 of 8 captions changed" in page
    assert "<b>cat</b>" not in page
    assert "0.png" in page and "1.png" not in page


def test_the_page_of_a_reranker_shows_what_words_looked_at(study: Study, tmp_path: Path) -> None:
    images = [tmp_path / f"{i}.png" for i in range(8)]
    for path in images:
        Image.new("RGB", (20, 20)).save(path)
    same = ["a dog on the grass"] * 8
    cached_result(study, TOP_1, 0, lambda: StrategyResult(TOP_1, 0, same))
    pages = []
    for strategy in (Strategy("rerank", "other"), Strategy("adapter", "other")):
        result = StrategyResult(strategy, 0, ["the cat is on snow", "", *same[2:]])
        cached_result(study, strategy, 0, lambda result=result: result)
        pages.append(changes_page(study, strategy, images))
    # One veil for each word of the one caption that has words.
    assert [page.count('class="veil"') for page in pages] == [5, 0]


def test_a_folder_keeps_the_results_of_one_study(study: Study) -> None:
    study.claim_folder()
    changed(study, seeds=3).claim_folder()  # More seeds go on where others stopped.
    kept = (study.folder / "study.json").read_bytes()
    other_model = copy.deepcopy(study.model)
    with torch.no_grad():
        other_model.text_decoder.cls.predictions.bias[0] += 1
    others: dict[str, Study] = {
        "model": replace(study, model=other_model),
        "val": replace(study, val_captions=[["a dog"], *study.val_captions[1:]]),
        "train": replace(study, train=study.val),
    }
    for each in fields(StudySettings):
        value = getattr(study.settings, each.name)
        other = value[1:] if isinstance(value, tuple) else value + 1
        if each.name != "seeds":
            others[each.name] = changed(study, **{each.name: other})
    assert {"beams", "hidden", "words", "strengths"} < set(others)
    for name, other_study in others.items():
        with pytest.raises(ValueError, match=rf"same {name}: .* got"):
            compare(other_study)
    assert (study.folder / "study.json").read_bytes() == kept
    assert not (study.folder / "runs").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"strengths": ()}, "strengths must be one or more of 0 to 1"),
        ({"learned_parts": (0.5, 1.5)}, "learned_parts must be one or more of 0 to 1"),
        ({"length_penalty": math.nan}, "length_penalty must be finite"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudySettings(**values)


@pytest.mark.parametrize("beams", [3, 1])
def test_all_captions_are_searched_for_alike(study, monkeypatch, beams) -> None:
    study = changed(study, beams=beams, length_penalty=0.7)
    options = {"beams": beams, "length_penalty": 0.7}
    seen = []

    def search(*_, n=1, progress=True, **keywords):
        seen.append(keywords)
        return beam_candidates(*_, n=n, progress=False, **keywords)

    monkeypatch.setattr(study_module, "beam_candidates", search)
    lists = study_module.n_best(study, study.val, "val")
    assert study_module.captions_of(study, None, torch.arange(8)) == lists.best
    assert seen == [options, options]


def test_losses_are_of_so_many_captions_of_each_image(study: Study) -> None:
    with decoding(study.model) as model:
        for count in (1, 2):
            captions = [texts[:count] for texts in study.val_captions]
            wanted = caption_losses(model, study.tokenizer, study.val, captions)
            found = study_module.image_losses(changed(study, loss_captions=count))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _strengths_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Tensor]]:
    """(value, the residual's tanh(gate) there) of every strength that a strategy offers."""
    seen: list[tuple[float, Tensor]] = []

    def offered(study, strategy, seed, adapter_at, parameters, strengths):
        seen.extend((value, adapter_at(value).gate.detach().tanh()) for value in strengths)
        return StrategyResult(strategy, seed, [])

    monkeypatch.setattr(strategies, "adapted", offered)
    return seen


def test_strengths_are_values_of_the_gates_tanh(study: Study, monkeypatch) -> None:
    seen = _strengths_asked_for(monkeypatch)
    for result in strategies.adapter_results(changed(study, seeds=1)):
        assert [value for value, _ in seen] == [0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0]
        for value, gate in seen:
            torch.testing.assert_close(gate, torch.full_like(gate, value), atol=1e-6, rtol=0)
        assert gate.shape == ((2,) if "apart" in result.strategy.name else ())
        seen.clear()


def test_learned_strengths_are_offered_in_part(study: Study, monkeypatch) -> None:
    seen = _strengths_asked_for(monkeypatch)
    captions: list[list[list[str]]] = []

    class Pairs(strategies.CaptionPairs):
        def __init__(self, features: Tensor, texts: list[list[str]]) -> None:
            captions.append(texts)
            super().__init__(features, texts)

    monkeypatch.setattr(strategies, "CaptionPairs", Pairs)
    for result in strategies.finetune_results(study):
        learned, deciding = captions
        for rows, texts in ((slice(1, 10), learned[:9]), (slice(0, 11, 10), deciding)):
            # Another caption with another seed.
            assert texts == [[each[result.seed]] for each in study.train_captions[rows]]
        captions.clear()
        if result.strategy.name == "decoder fine-tuned":
            assert not seen and "learned_strength" not in result.settings
            continue
        strength = torch.tensor(result.settings["learned_strength"])
        assert [value for value, _ in seen] == [0, 0.25, 0.5, 1]
        for part, offered in seen:
            torch.testing.assert_close(offered, part * strength, atol=1e-6, rtol=0)
        seen.clear()


def test_an_rbm_for_cls_and_one_for_the_others(study: Study) -> None:
    residual = strategies.fit_cls_apart(study, 0)
    features = study.train[:].float()
    for place, tokens in ((0, features[:, :1]), (1, features[:, 1:])):
        torch.testing.assert_close(residual.mean[place], tokens.mean((0, 1)), atol=1e-4, rtol=1e-4)
    assert residual.reconstructor is not residual.cls_reconstructor


def test_what_rerankers_learn_from_and_how_two_add_up(study: Study, monkeypatch) -> None:
    study = changed(study, rated_images=15, seeds=1)
    rated = []

    def ciders(texts, captions):
        rated.append((len(texts), captions))
        return candidate_ciders(texts, captions)

    monkeypatch.setattr(strategies, "candidate_ciders", ciders)
    results = {result.strategy.name: result for result in strategies.rerank_results(study)}
    assert (15, study.train_captions[:15]) in rated
    assert results["top-1"].loss == study_module.mean_loss(study_module.image_losses(study))
    parts = [torch.tensor(results[name].scores, dtype=torch.float64)
             for name in ("RBM PMI (contrastive)", "ITC")]  # fmt: skip
    wanted = sum(
        part / (part - part.mean(1, keepdim=True)).square().mean().sqrt() for part in parts
    )
    found = torch.tensor(results["RBM and ITC"].scores, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_unknown_names_are_refused(study: Study) -> None:
    with pytest.raises(ValueError, match="groups must be among rerank, adapter, finetune"):
        compare(study, ["adjust"])
    with pytest.raises(ValueError, match="must have results of the strategy, got none"):
        difference(study, Strategy("rerank", "nobody"), TOP_1)
