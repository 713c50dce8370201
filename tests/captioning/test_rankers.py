"""The models beside a joint RBM in re-ranking, and fitting to what a measure says of candidates."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from support.errors import raises
from support.pairs import (
    COLORS,
    FAST,
    THINGS,
    VOCABULARY,
    check_candidate_scores_are_those_of_all_pairs,
    check_fit_makes_a_reranker_of_captions,
    check_save_and_load,
    check_training_finds_what_belongs_together,
    check_weight_decay_spares_biases,
    drawn_captions,
    drawn_pairs,
    fresh,
)
from support.tensors import normal

from benchmarks.captioning.metrics import candidate_ciders
from benchmarks.captioning.rankers import (
    ITCReranker,
    ITMReranker,
    MatchMLP,
    RatedCandidates,
    TwoTower,
    fit_matching,
    fit_to_quality,
    listwise_loss,
    pairwise_loss,
)
from blip_integration.joint_rbm import JointRBM, PairModel
from blip_integration.ranker_training import CaptionBags, fit_contrastive
from blip_integration.rerank import PairReranker, RBMReranker


def test_listwise_loss_is_a_cross_entropy() -> None:
    scores, quality = normal(3, 4), normal(3, 4, seed=1)
    p, q = (quality / 0.5).softmax(1), scores.softmax(1)
    expected = -(p * q.log()).sum(1).mean()
    torch.testing.assert_close(listwise_loss(scores, quality, 0.5), expected)
    # Least where the scores are the quality over the temperature.
    assert listwise_loss(quality / 0.5, quality, 0.5) < expected


def test_pairwise_loss_by_loops() -> None:
    scores = normal(3, 4)
    quality = torch.tensor([[0.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [0.5, 0.1, 0.9, 0.2]])
    terms = [
        max(
            0.0, (quality[i, a] - quality[i, b]).item() / 0.5 - (scores[i, a] - scores[i, b]).item()
        )
        for i in range(3)
        for a, b in itertools.permutations(range(4), 2)
        if quality[i, a] > quality[i, b]
    ]
    expected = sum(terms) / len(terms)
    assert pairwise_loss(scores, quality, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert pairwise_loss(3 * quality, quality, 0.5) == 0  # every margin is kept
    assert pairwise_loss(scores, torch.ones(3, 4), 0.5) == 0  # nothing to tell apart


@pytest.mark.parametrize("loss", ["listwise", "pairwise"])
@pytest.mark.parametrize("anchored", [False, True])
def test_fit_to_quality_ranks_new_lists(loss: str, anchored: bool) -> None:
    pairs = drawn_pairs()
    train, held_out = pairs.split(0.25)

    def rated(part: CaptionBags) -> RatedCandidates:
        # Right words count 1 each, whatever else is said; candidates are of one or two words.
        texts = [" ".join(words) for words in itertools.product(COLORS, THINGS)]
        words = VOCABULARY.encode(texts)[None].expand(len(part), -1, -1)
        own = torch.zeros(len(part), len(VOCABULARY))
        own.index_add_(0, part.owner, part.words.float())
        quality = (words & (own > 0)[:, None]).sum(2).float()
        return RatedCandidates(part.features, words, quality)

    lists, new = rated(train), rated(held_out)
    model = fresh(JointRBM, train)
    history = fit_to_quality(
        model, lists, new, FAST, loss=loss, temperature=0.5, pairs=train if anchored else None
    )
    assert max(history) > history[0]
    with torch.no_grad():
        chosen = model.candidate_scores(new.features, new.words).argmax(1, keepdim=True)
    assert new.quality.gather(1, chosen).mean() > 1.8  # chance is 0.5, the most is 2


def test_mean_of_candidate_ciders_is_the_corpus_cider() -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    references = [
        ["a red dog runs", "the dog is running in grass"],
        ["two men play ball", "men with a ball on a field"],
        ["a black house", "the house is old and black"],
    ]
    texts = [
        ["a red dog runs", "a dog", "two men", "a red house"],
        ["a dog", "men play ball on a field", "two men", "the field"],
        ["a black house", "a red house", "the house is old", "black"],
    ]
    ciders = candidate_ciders(texts, references)
    chosen = torch.tensor([1, 1, 2])
    numbered = {i: own for i, own in enumerate(references)}
    picked = {i: [texts[i][c]] for i, c in enumerate(chosen.tolist())}
    corpus, _ = Cider().compute_score(numbered, picked)
    assert ciders.gather(1, chosen[:, None]).mean().item() == pytest.approx(corpus)
    assert ciders.argmax(1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("model_class", [TwoTower, MatchMLP])
def test_candidate_scores_are_those_of_all_pairs(
    model_class: type[PairModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_candidate_scores_are_those_of_all_pairs(model_class, monkeypatch)


@pytest.mark.parametrize(
    ("model_class", "fit"), [(TwoTower, fit_contrastive), (MatchMLP, fit_matching)]
)
def test_training_finds_what_belongs_together(model_class: type[PairModel], fit: Any) -> None:
    check_training_finds_what_belongs_together(model_class, fit)


@pytest.mark.parametrize("model_class", [TwoTower, MatchMLP])
def test_weight_decay_spares_biases(model_class: type[PairModel]) -> None:
    check_weight_decay_spares_biases(model_class)


@pytest.mark.parametrize("reranker_class", [ITCReranker, ITMReranker])
def test_fit_makes_a_reranker_of_captions(reranker_class: type[PairReranker]) -> None:
    check_fit_makes_a_reranker_of_captions(reranker_class, None)
    features, captions = drawn_captions(20)
    raises(ValueError, reranker_class.__name__, "'cd'")(
        lambda: reranker_class.fit(features, captions, objective="cd")
    )


@pytest.mark.parametrize("reranker_class", [RBMReranker, ITCReranker, ITMReranker])
def test_save_and_load(reranker_class: type[PairReranker], tmp_path: Path) -> None:
    others = {RBMReranker, ITCReranker, ITMReranker} - {reranker_class}
    check_save_and_load(reranker_class, [*others], tmp_path)


def test_errors_name_what_came() -> None:
    rbm = JointRBM(10, len(VOCABULARY), 6)
    raises(ValueError, "loss", "'hinge'")(
        lambda: fit_to_quality(rbm, None, None, loss="hinge")  # type: ignore[arg-type]
    )
    raises(ValueError, "temperature", "0")(
        lambda: fit_to_quality(rbm, None, None, temperature=0)  # type: ignore[arg-type]
    )
    raises(ValueError, "one length", "1 to 2")(
        lambda: RatedCandidates.encode(normal(2, 3), [["a"], ["a", "b"]], normal(2, 2), VOCABULARY)
    )
    raises(ValueError, "[2, 1, 8]", "[2, 3]")(
        lambda: RatedCandidates.encode(normal(2, 3), [["a"], ["b"]], normal(2, 3), VOCABULARY)
    )
