"""Features with captions that belong together, and what every model of pairs must do with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip_integration import joint_rbm
from blip_integration.joint_rbm import PairModel, Vocabulary
from blip_integration.ranker_training import CaptionBags, PairTraining, recall_of, train_ranker
from blip_integration.rerank import PairReranker

from .errors import raises
from .tensors import normal

COLORS = ("red", "green", "blue", "black")


THINGS = ("dog", "ball", "house", "tree")


VOCABULARY = Vocabulary((*COLORS, *THINGS))


FAST = PairTraining(
    epochs=12, batch_size=32, learning_rate=0.02, weight_decay=0.0, word_dropout=0.1,
    feature_dropout=0.1, patience=12,
)  # fmt: skip


def drawn_captions(n: int, seed: int = 0) -> tuple[Tensor, list[list[str]]]:
    """Images of one colored thing, whose features show both, with two or three captions each."""
    g = torch.Generator().manual_seed(seed)
    color, thing = torch.randint(0, 4, (2, n), generator=g)
    features = 0.3 * torch.randn(n, 10, generator=g) + 5.0
    features[torch.arange(n), color] += 2.0
    features[torch.arange(n), 4 + thing] += 2.0
    captions = []
    for i, (c, t) in enumerate(zip(color.tolist(), thing.tolist(), strict=True)):
        own = [f"a {COLORS[c]} {THINGS[t]}", f"the {THINGS[t]}"]
        captions.append(own + [f"it is {COLORS[c]}"] * (i % 2))
    return features, captions


def drawn_pairs(n: int = 160) -> CaptionBags:
    return CaptionBags.encode(*drawn_captions(n), VOCABULARY)


def fresh(model_class: type[PairModel], pairs: CaptionBags, n_hidden: int = 16) -> Any:
    model = model_class(10, len(VOCABULARY), n_hidden, generator=torch.Generator().manual_seed(0))
    model.initialize_from_data(pairs.features, pairs.words)
    return model


TEXTS = [["a red dog", "the blue tree"], ["", "something unheard of"], ["Dog. Dog!", "a dog"]]


def check_training_finds_what_belongs_together(model_class: type[PairModel], fit: Any) -> None:
    train, held_out = drawn_pairs().split(0.25)
    model = fresh(model_class, train)
    before = copy.deepcopy(train)
    state = torch.get_rng_state()
    history = fit(model, train, held_out, FAST)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(before.features, train.features) and torch.equal(before.words, train.words)
    assert recall_of(model, held_out).mean == max(history)  # the best epoch is the one kept
    assert max(history) > history[0] + 0.15
    again = fresh(model_class, train)
    assert fit(again, train, held_out, FAST) == history
    # A true caption beats one with the other color or thing for nearly every image.
    candidates = torch.stack([VOCABULARY.encode(["red dog", "blue dog", "red tree"])] * 8)
    features = torch.full((8, 10), 5.0) + normal(8, 10, scale=0.1)
    features[:, 0] += 2.0
    features[:, 4] += 2.0
    with torch.no_grad():
        assert (model.candidate_scores(features, candidates).argmax(1) == 0).all()


def check_weight_decay_spares_biases(model_class: type[PairModel]) -> None:
    model = fresh(model_class, drawn_pairs())
    start = copy.deepcopy(dict(model.named_parameters()))
    epochs = iter(range(10))
    training = PairTraining(epochs=1, learning_rate=0.1, weight_decay=2.0)
    no_gradient = sum(0.0 * p.sum() for p in model.parameters())
    train_ranker(model, lambda: iter([no_gradient]), lambda: next(epochs), training)
    for name, parameter in model.named_parameters():
        kept = 0.8 if name in ("W_image", "W_words") else 1.0
        torch.testing.assert_close(parameter, kept * start[name], msg=name)


def check_fit_makes_a_reranker_of_captions(
    reranker_class: type[PairReranker], objective: str | None
) -> None:
    features, captions = drawn_captions(120)
    reranker = reranker_class.fit(
        features, captions, n_words=6, n_hidden=16, objective=objective, training=FAST
    )
    assert type(reranker.model) is reranker_class.model_class
    assert len(reranker.vocabulary) == 6
    true = [own[:1] for own in captions]
    others = [[*own, *other] for own, other in zip(true, true[1:] + true[:1], strict=True)]
    differ = torch.tensor([own != other for own, other in others])
    scores = reranker.score(features, others)
    assert (scores[:, 0] >= scores[:, 1])[differ].float().mean() > 0.8
    raises(ValueError, "objective", "'ranking'")(
        lambda: reranker_class.fit(features, captions, objective="ranking")
    )


def check_save_and_load(
    reranker_class: type[PairReranker], others: Sequence[type[PairReranker]], tmp_path: Path
) -> None:
    model_class = reranker_class.model_class
    model = fresh(model_class, drawn_pairs(20))
    reranker = reranker_class(model, VOCABULARY)
    reranker.save_pretrained(tmp_path / "model")
    loaded = reranker_class.from_pretrained(tmp_path / "model")
    assert type(loaded) is reranker_class and loaded.vocabulary == VOCABULARY
    features = normal(3, 10)
    assert torch.equal(loaded.score(features, TEXTS), reranker.score(features, TEXTS))
    for other in others:
        raises(ValueError, model_class.__name__, other.__name__)(
            lambda other=other: other.from_pretrained(tmp_path / "model")
        )
        raises(TypeError, model_class.__name__)(lambda other=other: other(model, VOCABULARY))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        reranker_class.from_pretrained(tmp_path / "model")


def check_candidate_scores_are_those_of_all_pairs(
    model_class: type[PairModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    D, T, H = 3, 4, 5
    g = torch.Generator().manual_seed(3)
    model = model_class(D, T, H, init_std=0.7, generator=g)
    features, words = normal(7, D, seed=1), torch.rand(11, T, generator=g) < 0.5
    scores = model(features, words)
    assert scores.shape == (7, 11)
    lists = words[None].expand(7, 11, T)
    torch.testing.assert_close(model.candidate_scores(features, lists), scores)
    scores.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    # Two rows at a time, so that the last block is short.
    monkeypatch.setattr(joint_rbm, "_PAIR_BLOCK", 2 * 11 * H)
    in_blocks = model(features, words)
    torch.testing.assert_close(in_blocks, scores)
    in_blocks.square().sum().backward()
    for p, gradient in zip(
        (p for p in model.parameters() if p.grad is not None), gradients, strict=True
    ):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)
