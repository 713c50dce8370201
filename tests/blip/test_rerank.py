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
from support.errors import raises
from support.tensors import normal
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    PreTrainedTokenizerFast,
)

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
from blip_integration import ranker_training, rerank
from blip_integration.captions import Candidates, generated_candidates
from blip_integration.joint_rbm import JointRBM, PairModel, Vocabulary
from blip_integration.ranker_training import (
    CaptionBags,
    PairTraining,
    fit_cd,
    fit_contrastive,
    recall_of,
)
from blip_integration.rerank import (
    BlipReranker,
    PairReranker,
    RBMReranker,
    Reranker,
    choose_weight,
    combined_scores,
    weight_grid,
)

COLOURS = ("red", "green", "blue", "black")
THINGS = ("dog", "ball", "house", "tree")
VOCABULARY = Vocabulary((*COLOURS, *THINGS))
FAST = PairTraining(
    epochs=12, batch_size=32, learning_rate=0.02, weight_decay=0.0, word_dropout=0.1,
    feature_dropout=0.1, patience=12,
)  # fmt: skip


def drawn_captions(n: int, seed: int = 0) -> tuple[Tensor, list[list[str]]]:
    """Images of one coloured thing, whose features show both, with two or three captions each."""
    g = torch.Generator().manual_seed(seed)
    colour, thing = torch.randint(0, 4, (2, n), generator=g)
    features = 0.3 * torch.randn(n, 10, generator=g) + 5.0
    features[torch.arange(n), colour] += 2.0
    features[torch.arange(n), 4 + thing] += 2.0
    captions = []
    for i, (c, t) in enumerate(zip(colour.tolist(), thing.tolist(), strict=True)):
        own = [f"a {COLOURS[c]} {THINGS[t]}", f"the {THINGS[t]}"]
        captions.append(own + [f"it is {COLOURS[c]}"] * (i % 2))
    return features, captions


def drawn_pairs(n: int = 160) -> CaptionBags:
    return CaptionBags.encode(*drawn_captions(n), VOCABULARY)


def fresh(model_class: type[PairModel], pairs: CaptionBags, n_hidden: int = 16) -> Any:
    model = model_class(10, len(VOCABULARY), n_hidden, generator=torch.Generator().manual_seed(0))
    model.initialize_from_data(pairs.features, pairs.words)
    return model


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


@pytest.mark.parametrize(
    ("model_class", "fit"),
    [
        (JointRBM, fit_contrastive),
        (TwoTower, fit_contrastive),
        (MatchMLP, fit_matching),
        (JointRBM, fit_cd),
    ],
)
def test_training_finds_what_belongs_together(model_class: type[PairModel], fit: Any) -> None:
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
    # A true caption beats one with the other colour or thing for nearly every image.
    candidates = torch.stack([VOCABULARY.encode(["red dog", "blue dog", "red tree"])] * 8)
    features = torch.full((8, 10), 5.0) + normal(8, 10, scale=0.1)
    features[:, 0] += 2.0
    features[:, 4] += 2.0
    with torch.no_grad():
        assert (model.candidate_scores(features, candidates).argmax(1) == 0).all()


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
    model = fresh(TwoTower, train)
    # A step far too small to change any rank: no epoch is better than the start.
    training = PairTraining(epochs=50, learning_rate=1e-12, patience=3, batch_size=32)
    start = copy.deepcopy(model.state_dict())
    assert len(fit_contrastive(model, train, held_out, training)) == 1 + 3
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_class", [JointRBM, TwoTower, MatchMLP])
def test_weight_decay_spares_biases(model_class: type[PairModel]) -> None:
    model = fresh(model_class, drawn_pairs())
    start = copy.deepcopy(dict(model.named_parameters()))
    epochs = iter(range(10))
    training = PairTraining(epochs=1, learning_rate=0.1, weight_decay=2.0)
    no_gradient = sum(0.0 * p.sum() for p in model.parameters())
    ranker_training.train_ranker(model, lambda: iter([no_gradient]), lambda: next(epochs), training)
    for name, parameter in model.named_parameters():
        kept = 0.8 if name in ("W_image", "W_words") else 1.0
        torch.testing.assert_close(parameter, kept * start[name], msg=name)


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
    # What is left is larger in return, in units of the standardised features.
    z = model.standardize(batch[0]) / 0.6
    torch.testing.assert_close(model.standardize(features)[kept], z[kept], rtol=1e-4, atol=1e-4)
    nothing = PairTraining(word_dropout=0.0, feature_dropout=0.0)
    same = ranker_training.with_dropout(model, *batch, nothing, g)
    assert torch.equal(same[0], batch[0]) and torch.equal(same[1], batch[1])


@pytest.mark.parametrize("loss", ["listwise", "pairwise"])
@pytest.mark.parametrize("anchored", [False, True])
def test_fit_to_quality_ranks_new_lists(loss: str, anchored: bool) -> None:
    pairs = drawn_pairs()
    train, held_out = pairs.split(0.25)

    def rated(part: CaptionBags) -> RatedCandidates:
        # Right words count 1 each, whatever else is said; candidates are of one or two words.
        texts = [" ".join(words) for words in itertools.product(COLOURS, THINGS)]
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


def test_standardised_scores_do_not_depend_on_their_scale() -> None:
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
    standardised = choose_weight(captioner, extra, quality, standardize=True)
    again = choose_weight(captioner, 1000 * extra, quality, standardize=True)
    assert standardised == pytest.approx(again, rel=1e-4)


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


@pytest.fixture(scope="module")
def rbm() -> JointRBM:
    g = torch.Generator().manual_seed(2)
    model = JointRBM(10, len(VOCABULARY), 6, init_std=0.5, generator=g)
    with torch.no_grad():
        model.b_words.copy_(torch.randn(len(VOCABULARY), generator=g))
    return model


TEXTS = [["a red dog", "the blue tree"], ["", "something unheard of"], ["Dog. Dog!", "a dog"]]


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


@pytest.mark.parametrize(
    ("reranker_class", "objective"),
    [(RBMReranker, None), (RBMReranker, "cd"), (ITCReranker, None), (ITMReranker, None)],
)
def test_fit_makes_a_reranker_of_captions(
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
    raises(ValueError, "ITMReranker", "'cd'")(
        lambda: ITMReranker.fit(features, captions, objective="cd")
    )


def test_scores_do_not_depend_on_how_many_at_a_time(
    rbm: JointRBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker, features = RBMReranker(rbm, VOCABULARY), normal(3, 10)
    scores = reranker.score(features, TEXTS)
    monkeypatch.setattr(rerank, "_IMAGES_AT_A_TIME", 2)
    torch.testing.assert_close(reranker.score(features, TEXTS), scores)


@pytest.mark.parametrize(
    ("reranker_class", "model_class"),
    [(RBMReranker, JointRBM), (ITCReranker, TwoTower), (ITMReranker, MatchMLP)],
)
def test_save_and_load(
    reranker_class: type[PairReranker], model_class: type[PairModel], tmp_path: Path
) -> None:
    model = fresh(model_class, drawn_pairs(20))
    reranker = reranker_class(model, VOCABULARY)
    reranker.save_pretrained(tmp_path / "model")
    loaded = reranker_class.from_pretrained(tmp_path / "model")
    assert type(loaded) is reranker_class and loaded.vocabulary == VOCABULARY
    features = normal(3, 10)
    assert torch.equal(loaded.score(features, TEXTS), reranker.score(features, TEXTS))
    others = {RBMReranker, ITCReranker, ITMReranker} - {reranker_class}
    for other in others:
        raises(ValueError, model_class.__name__, other.__name__)(
            lambda other=other: other.from_pretrained(tmp_path / "model")
        )
        raises(TypeError, model_class.__name__)(lambda other=other: other(model, VOCABULARY))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        reranker_class.from_pretrained(tmp_path / "model")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[DEC]", "[SEP]", "[CLS]", *COLOURS, *THINGS, "a", "the"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="[DEC]",
        sep_token="[SEP]", model_max_length=16,
    )  # fmt: skip


def tiny_config(vocabulary: int) -> BlipConfig:
    size = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "initializer_range": 0.5,
    }  # fmt: skip
    return BlipConfig(
        text_config={
            **size, "vocab_size": vocabulary, "encoder_hidden_size": 16, "projection_dim": 8,
            "max_position_embeddings": 16, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**size, "image_size": 32, "patch_size": 16, "projection_dim": 8},
        projection_dim=8,
        image_text_hidden_size=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def captioner(tokenizer: PreTrainedTokenizerFast) -> BlipForConditionalGeneration:
    torch.manual_seed(0)
    return BlipForConditionalGeneration(tiny_config(len(tokenizer))).eval()


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
    output = generate(captioner, do_sample=True, top_k=5, num_return_sequences=3)
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
    config = tiny_config(len(tokenizer))
    config.text_config.hidden_dropout_prob = 0.5
    model = BlipForImageTextRetrieval(config).train()
    reranker = BlipReranker(model, tokenizer, head, batch_size=4)
    pixels = normal(3, 3, 32, 32)
    texts = [["a red dog", "tree", "the"], ["blue ball", "a", "dog dog"], ["red", "a a a a", "the"]]
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
    raises(ValueError, "loss", "'hinge'")(
        lambda: fit_to_quality(rbm, None, None, loss="hinge")  # type: ignore[arg-type]
    )
    raises(ValueError, "temperature", "0")(
        lambda: fit_to_quality(rbm, None, None, temperature=0)  # type: ignore[arg-type]
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
    raises(ValueError, "one length", "1 to 2")(
        lambda: RatedCandidates.encode(normal(2, 3), [["a"], ["a", "b"]], normal(2, 2), VOCABULARY)
    )
    raises(ValueError, "[2, 1, 8]", "[2, 3]")(
        lambda: RatedCandidates.encode(normal(2, 3), [["a"], ["b"]], normal(2, 3), VOCABULARY)
    )
