"""Training of pair models, re-ranking, and candidates from generate."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import blip
from support.errors import raises
from support.pairs import (
    FAST,
    TEXTS,
    VOCABULARY,
    check_fit_makes_a_reranker_of_captions,
    check_save_and_load,
    check_training_finds_what_belongs_together,
    check_weight_decay_spares_biases,
    drawn_pairs,
    fresh,
)
from support.tensors import normal
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    PreTrainedTokenizerFast,
)

from blip_integration import ranker_training, rerank
from blip_integration.captions import Candidates, generated_candidates
from blip_integration.joint_rbm import JointRBM, Vocabulary
from blip_integration.ranker_training import (
    CaptionBags,
    PairTraining,
    fit_cd,
    fit_contrastive,
)
from blip_integration.rerank import (
    BlipReranker,
    RBMReranker,
    Reranker,
    choose_weight,
    combined_scores,
    weight_grid,
)


def test_batches_have_every_caption_once_and_no_image_twice() -> None:
    pairs = drawn_pairs(30)
    seen = []
    for images, captions in pairs.batches(7, torch.Generator().manual_seed(1)):
        assert len(images) <= 7
        assert images.unique().numel() == len(images)
        assert torch.equal(pairs.owner[captions], images)
        seen += captions.tolist()
    assert sorted(seen) == list(range(75))
    again = [c.tolist() for _, c in pairs.batches(7, torch.Generator().manual_seed(1))]
    other = [c.tolist() for _, c in pairs.batches(7, torch.Generator().manual_seed(2))]
    assert [*itertools.chain(*again)] == seen != [*itertools.chain(*other)]


def test_parts_keep_captions_with_their_images() -> None:
    pairs = drawn_pairs(20)
    part = pairs.part(torch.tensor([7, 3]))
    assert torch.equal(part.features, pairs.features[[7, 3]])
    for new, old in enumerate((7, 3)):
        assert torch.equal(part.words[part.owner == new], pairs.words[pairs.owner == old])
    train, held_out = pairs.split(0.25, seed=4)
    assert (len(train), len(held_out)) == (15, 5)
    rows = {tuple(row) for row in torch.cat([train.features, held_out.features]).tolist()}
    assert rows == {tuple(row) for row in pairs.features.tolist()}


def test_persistent_chains_and_variances_train_too() -> None:
    train, held_out = drawn_pairs().split(0.25)
    model = fresh(JointRBM, train)
    history = fit_cd(model, train, held_out, FAST, k=2, persistent=True, learn_variance=True)
    assert max(history) > history[0] + 0.1
    assert model.log_var.abs().max() > 0.01
    fixed = fresh(JointRBM, train)
    fit_cd(fixed, train, held_out, FAST)
    assert torch.equal(fixed.log_var, torch.zeros(10))


def test_training_stops_when_no_better_epoch_comes() -> None:
    train, held_out = drawn_pairs().split(0.25)
    model = fresh(JointRBM, train)
    # A step far too small to change any rank: no epoch is better than the start.
    training = PairTraining(epochs=50, learning_rate=1e-12, patience=3, batch_size=32)
    start = copy.deepcopy(model.state_dict())
    assert len(fit_contrastive(model, train, held_out, training)) == 1 + 3
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_dropout_only_leaves_out() -> None:
    model = fresh(JointRBM, drawn_pairs())
    pairs, training = drawn_pairs(100), PairTraining(word_dropout=0.3, feature_dropout=0.4)
    batch = (pairs.features, pairs.words[:100])
    g = torch.Generator().manual_seed(0)
    features, words = ranker_training.with_dropout(model, *batch, training, g)
    assert not (words & ~batch[1]).any()
    assert (words.sum() / batch[1].sum()).item() == pytest.approx(0.7, abs=0.1)
    kept = features != model.mean
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.05)
    # What is left is larger in return, in units of the standardized features.
    z = model.standardize(batch[0]) / 0.6
    torch.testing.assert_close(model.standardize(features)[kept], z[kept], rtol=1e-4, atol=1e-4)
    nothing = PairTraining(word_dropout=0.0, feature_dropout=0.0)
    same = ranker_training.with_dropout(model, *batch, nothing, g)
    assert torch.equal(same[0], batch[0]) and torch.equal(same[1], batch[1])


class Fixed(Reranker):
    """Scores that a test gives."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, image_features: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        return self.scores


def lists_of(scores: Tensor) -> Candidates:
    n, m = scores.shape
    return Candidates(
        [str(i) for i in range(n)], [[f"{i} {j}" for j in range(m)] for i in range(n)], scores
    )


def test_rerank_takes_the_largest_sum() -> None:
    captioner, extra = normal(20, 5), normal(20, 5, seed=1, scale=7.0)
    candidates, features = lists_of(captioner), torch.zeros(20, 1)
    chosen = Fixed(extra).rerank(candidates, features, 0.2)
    for row in range(20):
        sums = [captioner[row, j].item() + 0.2 * extra[row, j].item() for j in range(5)]
        assert chosen[row] == sums.index(max(sums))
    assert torch.equal(Fixed(extra).rerank(candidates, features, 0.0), captioner.argmax(1))
    infinite = Fixed(torch.full((20, 5), -torch.inf))
    assert torch.equal(infinite.rerank(candidates, features, 0.0), captioner.argmax(1))
    assert torch.equal(Fixed(extra).rerank(candidates, features, 1e6), extra.argmax(1))


def test_standardized_scores_do_not_depend_on_their_scale() -> None:
    captioner, extra = normal(20, 5), normal(20, 5, seed=1)
    extra[3] = 4.0  # a list without a difference
    plain = combined_scores(captioner, extra, 0.5, standardize=True)
    shifted = combined_scores(captioner, 100 * extra + 3.0, 0.5, standardize=True)
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-4)
    added = (plain - captioner) / 0.5
    assert torch.equal(plain[3], captioner[3])
    rest = torch.arange(20) != 3
    torch.testing.assert_close(added[rest].std(1, correction=0), torch.ones(19))
    torch.testing.assert_close(added.mean(1), torch.zeros(20), rtol=0, atol=1e-5)


def test_choose_weight_is_the_best_of_all() -> None:
    captioner, extra, quality = normal(40, 5), normal(40, 5, seed=1), normal(40, 5, seed=2)
    quality += extra
    weights = [0.0, 0.3, 1.0, 3.0, 100.0]
    means = [
        quality.gather(1, (captioner + w * extra).argmax(1, keepdim=True)).mean() for w in weights
    ]
    best = choose_weight(captioner, extra, quality, weights)
    assert best == weights[means.index(max(means))] > 0
    assert choose_weight(captioner, extra, torch.ones(40, 5), [3.0, 0.0, 1.0]) == 0.0
    # By default the grid follows the spread of the scores.
    default = choose_weight(captioner, extra, quality)
    assert default in weight_grid(captioner, extra)
    assert choose_weight(captioner, 1000 * extra, quality) == pytest.approx(default / 1000)
    standardized = choose_weight(captioner, extra, quality, standardize=True)
    again = choose_weight(captioner, 1000 * extra, quality, standardize=True)
    assert standardized == pytest.approx(again, rel=1e-4)


@pytest.fixture(scope="module")
def rbm() -> JointRBM:
    g = torch.Generator().manual_seed(2)
    model = JointRBM(10, len(VOCABULARY), 6, init_std=0.5, generator=g)
    with torch.no_grad():
        model.b_words.copy_(torch.randn(len(VOCABULARY), generator=g))
    return model


def test_rbm_reranker_scores_texts(rbm: JointRBM) -> None:
    features = normal(3, 10)
    scores = RBMReranker(rbm, VOCABULARY).score(features, TEXTS)
    joint = RBMReranker(rbm, VOCABULARY, energy="joint").score(features, TEXTS)
    assert scores.shape == (3, 2) and not scores.requires_grad
    with torch.no_grad():
        for row, texts in enumerate(TEXTS):
            words = VOCABULARY.encode(texts)
            image = features[row : row + 1].expand(2, -1)
            both = -rbm.free_energy(image, words)
            torch.testing.assert_close(joint[row], both, rtol=1e-5, atol=1e-5)
            pmi = both + rbm.free_energy(image) + rbm.free_energy(words=words)
            pmi = pmi + torch.nn.functional.softplus(rbm.c).sum()
            torch.testing.assert_close(scores[row], pmi, rtol=1e-4, atol=1e-5)
    assert scores[1].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)  # no known word
    assert scores[2, 0] == scores[2, 1]


def test_scores_do_not_depend_on_how_many_at_a_time(
    rbm: JointRBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker, features = RBMReranker(rbm, VOCABULARY), normal(3, 10)
    scores = reranker.score(features, TEXTS)
    monkeypatch.setattr(rerank, "_IMAGES_AT_A_TIME", 2)
    torch.testing.assert_close(reranker.score(features, TEXTS), scores)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return blip.tiny_tokenizer()


@pytest.fixture(scope="module")
def captioner() -> BlipForConditionalGeneration:
    return blip.tiny_blip()[0]


def generate(model: BlipForConditionalGeneration, **options: Any) -> Any:
    return model.generate(
        normal(3, 3, 32, 32), max_length=9, return_dict_in_generate=True, output_scores=True,
        **options,
    )  # fmt: skip


def test_beam_output_becomes_candidates(
    captioner: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rbm: JointRBM
) -> None:
    output = generate(captioner, num_beams=4, num_return_sequences=4)
    candidates = generated_candidates(output, tokenizer, 3)
    assert torch.equal(candidates.scores, output.sequences_scores.view(3, 4))
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    assert [text for each in candidates.texts for text in each] == texts
    reranker, features = RBMReranker(rbm, VOCABULARY), normal(3, 10)
    expected = candidates.chosen(reranker.rerank(candidates, features, 0.7))
    assert reranker.rerank_generated(output, tokenizer, features, 0.7) == expected
    assert reranker.rerank_generated(output, tokenizer, features, 0.0) == candidates.best


def test_sampled_output_is_scored_by_its_mean_log_probability(
    captioner: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(1)
    output = generate(captioner, do_sample=True, temperature=3.0, num_return_sequences=3)
    candidates = generated_candidates(output, tokenizer, 3)
    steps = captioner.text_decoder.compute_transition_scores(
        output.sequences, output.scores, normalize_logits=True
    )
    drawn = output.sequences[:, -steps.shape[1] :]
    expected = [
        sum(s for s, token in zip(row, tokens, strict=True) if token) / sum(t > 0 for t in tokens)
        for row, tokens in zip(steps.tolist(), drawn.tolist(), strict=True)
    ]
    assert (drawn == 0).any() and (drawn[:, -1] != 0).any()  # of different lengths
    torch.testing.assert_close(candidates.scores.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_blip_reranker_equals_the_model(head: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = blip.tiny_config()
    config.text_config.hidden_dropout_prob = 0.5
    model = BlipForImageTextRetrieval(config).train()
    reranker = BlipReranker(model, tokenizer, head, batch_size=4)
    pixels = normal(3, 3, 32, 32)
    texts = [["a red circle", "white", "on"], ["blue grey", "a", "on on"], ["red", "a a a a", "on"]]
    with torch.no_grad():
        embeddings = model.vision_model(pixels).last_hidden_state
        scores = reranker.score(embeddings, texts)
        for row, each in enumerate(texts):
            for column, text in enumerate(each):
                tokens = tokenizer([text], return_tensors="pt")
                output = model(
                    input_ids=tokens["input_ids"], pixel_values=pixels[row : row + 1],
                    attention_mask=tokens["attention_mask"], use_itm_head=head == "itm",
                ).itm_score  # fmt: skip
                expected = output.softmax(1)[0, 1].logit() if head == "itm" else output[0, 0]
                torch.testing.assert_close(scores[row, column], expected, rtol=1e-4, atol=1e-4)
    assert scores.shape == (3, 3) and scores.std() > 1e-3


def test_errors_name_what_came(rbm: JointRBM, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, reranker = drawn_pairs(5), RBMReranker(rbm, VOCABULARY)
    raises(ValueError, "2 lists", "got 3")(lambda: reranker.score(normal(2, 10), TEXTS))
    raises(ValueError, "one length", "[1, 2]")(
        lambda: reranker.score(normal(2, 10), [["a"], ["a", "b"]])
    )
    raises(ValueError, "features", "[3, 9]")(lambda: reranker.score(normal(3, 9), TEXTS))
    raises(ValueError, "8 words", "got 1")(lambda: RBMReranker(rbm, Vocabulary(("dog",))))
    raises(ValueError, "energy", "'free'")(lambda: RBMReranker(rbm, VOCABULARY, "free"))
    raises(ValueError, "head", "'lm'")(lambda: BlipReranker(None, tokenizer, "lm"))
    raises(ValueError, "weight", "nan")(
        lambda: combined_scores(normal(2, 2), normal(2, 2), float("nan"))
    )
    raises(ValueError, "[2, 2]", "[2, 3]")(lambda: combined_scores(normal(2, 2), normal(2, 3), 1))
    raises(ValueError, "quality", "[3]")(
        lambda: choose_weight(normal(2, 2), normal(2, 2), normal(3), [1.0])
    )
    raises(ValueError, "weights")(
        lambda: choose_weight(normal(2, 2), normal(2, 2), normal(2, 2), [])
    )
    output = SimpleNamespace(sequences=torch.zeros(4, 2, dtype=torch.int64))
    raises(ValueError, "output_scores=True")(lambda: generated_candidates(output, tokenizer, 2))
    output.sequences_scores = torch.zeros(4)
    raises(ValueError, "4 sequences", "3 images")(
        lambda: generated_candidates(output, tokenizer, 3)
    )
    raises(ValueError, "word_dropout", "1.0")(lambda: PairTraining(word_dropout=1.0))
    raises(ValueError, "epochs", "0")(lambda: PairTraining(epochs=0))
    raises(ValueError, "learning_rate", "0")(lambda: PairTraining(learning_rate=0))
    raises(ValueError, "held_out", "1.5")(lambda: pairs.split(1.5))
    raises(ValueError, "captions", "2 images", "got 1")(
        lambda: CaptionBags.encode(normal(2, 3), [["dog"]], VOCABULARY)
    )
    raises(ValueError, "each of the 2 images", "1 different")(
        lambda: CaptionBags.encode(normal(2, 3), [["dog"], []], VOCABULARY)
    )


@pytest.mark.parametrize("fit", [fit_contrastive, fit_cd])
def test_training_finds_what_belongs_together(fit: Any) -> None:
    check_training_finds_what_belongs_together(JointRBM, fit)


def test_weight_decay_spares_biases() -> None:
    check_weight_decay_spares_biases(JointRBM)


@pytest.mark.parametrize("objective", [None, "cd"])
def test_fit_makes_a_reranker_of_captions(objective: str | None) -> None:
    check_fit_makes_a_reranker_of_captions(RBMReranker, objective)


def test_save_and_load(tmp_path: Path) -> None:
    check_save_and_load(RBMReranker, [], tmp_path)
