"""The joint objective: captions to tensors, and each term against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from support.joint import captioner, captioner_with_rbm, drawn, features_of, tiny_captioner
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase

from blip_integration.modeling import rbm_of
from blip_integration.objective import (
    CaptionCollator,
    CaptionPairs,
    JointHeads,
    JointObjective,
)


def batch_of(
    model: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, n: int = 6
) -> dict[str, Tensor]:
    """One caption of each of n images."""
    images, captions = drawn(n)
    items = [(images[i], captions[i][i % 2], i) for i in range(n)]
    return CaptionCollator(tokenizer, model.config.text_config)(items)


def objective_of(
    model: BlipForConditionalGeneration, seed: int = 0, **weights: float
) -> JointObjective:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        heads = JointHeads.for_model(model, 8)
    return JointObjective(model, heads, {"lm": 1.0, **weights}, k=2, seed=seed)


# Captions to tensors.


def test_sequences_have_a_start_and_only_captions_and_ends_are_learned() -> None:
    model, tokenizer = tiny_captioner()
    config = model.config.text_config
    bos, sep, pad = config.bos_token_id, config.sep_token_id, config.pad_token_id
    red, circle, a = tokenizer.convert_tokens_to_ids(["red", "circle", "a"])
    images = torch.zeros(2, 3, 16, 16)
    items = [(images[0], "Red!", 5), (images[1], "a red circle", 7)]

    batch = CaptionCollator(tokenizer, config)(items)
    assert batch["input_ids"].tolist() == [[bos, red, sep, pad, pad], [bos, a, red, circle, sep]]
    assert batch["labels"].tolist() == [[-100, red, sep, -100, -100], [-100, a, red, circle, sep]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["image_ids"].tolist() == [5, 7]

    cut = CaptionCollator(tokenizer, config, max_length=4, prompt="A")(items)
    assert cut["input_ids"].tolist() == [[bos, a, red, sep], [bos, a, a, sep]]
    assert cut["labels"].tolist() == [[-100, -100, red, sep], [-100, -100, a, sep]]


def test_the_tokenizers_own_first_token_makes_no_difference() -> None:
    """BERT's tokenizer begins with [CLS], BLIP with [DEC]: the config decides."""
    model, tokenizer = tiny_captioner()
    config = model.config.text_config
    config.bos_token_id, green = tokenizer.convert_tokens_to_ids(["red", "green"])
    batch = CaptionCollator(tokenizer, config)([(torch.zeros(1), "green", 0)])
    assert batch["input_ids"].tolist() == [[config.bos_token_id, green, config.sep_token_id]]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([("red", 4), ("?!", 4)], {}, "every caption must have a word, got '\\?!' for image 1"),
        (
            [("red", 4), ("blue", 5)],
            {},
            "images must be of one shape, got \\[\\(4,\\), \\(5,\\)\\]",
        ),
        ([("red", 4)], {"max_length": 3, "prompt": "a"}, "max_length must be 4 or more"),
    ],
)
def test_bad_items_are_named(
    items: list[tuple[str, int]], options: dict[str, Any], message: str
) -> None:
    model, tokenizer = tiny_captioner()
    triples = [(torch.zeros(size), caption, i) for i, (caption, size) in enumerate(items)]
    with pytest.raises(ValueError, match=message):
        CaptionCollator(tokenizer, model.config.text_config, **options)(triples)


def test_pairs_are_read_as_they_are_needed() -> None:
    class Cache:
        asked: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            self.asked.append(index)
            return torch.full((3, 4), float(index))

    pairs = CaptionPairs(Cache(), [["a dog", "dogs"], ["a cat"]])
    assert len(pairs) == 3 and Cache.asked == []
    features, caption, image = pairs[2]
    assert features.tolist() == [[1.0] * 4] * 3 and (caption, image) == ("a cat", 1)
    with pytest.raises(ValueError, match="a list for each of 2 images, got 1"):
        CaptionPairs(Cache(), [["a dog"]])
    with pytest.raises(ValueError, match="one caption or more, got none"):
        CaptionPairs(Cache(), [[], []])


# The terms.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_is_the_captioners_own_loss(smoothing: float) -> None:
    model, tokenizer = captioner()
    model.text_decoder.label_smoothing = smoothing
    model.train()
    batch = batch_of(model, tokenizer)
    terms = objective_of(model).train()(**batch)
    ours = {name: batch[name] for name in batch if name != "image_ids"}
    torch.testing.assert_close(terms["lm"], model(**ours).loss)
    # Validation is without smoothing, so that its figures can be compared.
    log_p = model(**ours).logits.log_softmax(-1)[:, :-1]
    targets = batch["labels"][:, 1:]
    picked = log_p.gather(2, targets.clamp_min(0)[..., None])[..., 0][targets != -100]
    torch.testing.assert_close(objective_of(model).eval()(**batch)["lm"], -picked.mean())


def test_itc_compares_cls_with_the_mean_of_word_embeddings() -> None:
    model, tokenizer = captioner()
    batch = batch_of(model, tokenizer)
    objective = objective_of(model, itc=1.0)
    heads = objective.heads
    image = heads.image(features_of(model, batch["pixel_values"])[:, 0])
    words = model.get_input_embeddings()(batch["input_ids"])
    means = [words[i, batch["labels"][i] != -100].mean(0) for i in range(6)]
    text = heads.text(torch.stack(means))
    cosines = torch.cosine_similarity(image[:, None], text[None], dim=-1)
    right = torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(cosines / 0.07, right) + cross_entropy(cosines.T / 0.07, right)
    torch.testing.assert_close(objective(**batch)["itc"], expected / 2)


def test_the_temperature_stays_in_blips_range() -> None:
    model, tokenizer = captioner()
    objective = objective_of(model, itc=1.0)
    with torch.no_grad():
        objective.heads.log_temperature.fill_(5.0)
    objective(**batch_of(model, tokenizer))
    assert objective.heads.log_temperature.exp().item() == pytest.approx(0.5)


def match_log_probabilities(objective: JointObjective, batch: dict[str, Tensor]) -> Tensor:
    """Of "unfit" and "fit" for image i and text j [B, B, 2], pair by pair and without pads."""
    decoder = objective.captioner.text_decoder.bert
    rows = []
    for features in features_of(objective.captioner, batch["pixel_values"]):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            states = decoder(
                ids[None, : int(mask.sum())], encoder_hidden_states=features[None], is_decoder=True
            ).last_hidden_state
            rows.append(objective.heads.match(states[0, -1]).log_softmax(-1))
    size = len(batch["input_ids"])
    return torch.stack(rows).view(size, size, 2)


def test_itm_reads_the_state_at_the_captions_end() -> None:
    model, tokenizer = captioner()
    batch = batch_of(model, tokenizer, 2)  # with two pairs each has one negative
    objective = objective_of(model, itm=1.0)
    log_p = match_log_probabilities(objective, batch)
    fit = log_p[0, 0, 1] + log_p[1, 1, 1]
    unfit = 2 * (log_p[0, 1, 0] + log_p[1, 0, 0])
    torch.testing.assert_close(objective(**batch)["itm"], -(fit + unfit) / 6)


def test_captions_of_one_image_are_no_negatives_of_each_other() -> None:
    model, tokenizer = captioner()
    images, captions = drawn(2)
    items = [(images[0], captions[0][0], 8), (images[0], captions[0][1], 8)]
    objective = objective_of(model, itc=1.0, itm=1.0)
    collate = CaptionCollator(tokenizer, model.config.text_config)
    assert set(objective(**collate(items))) == {"lm"}

    items.append((images[1], captions[1][0], 9))
    batch = collate(items)
    log_p = match_log_probabilities(objective, batch)
    # Only the last image has a choice between two wrong texts.
    fit = log_p[[0, 1, 2], [0, 1, 2], 1].sum()
    wrong_texts, wrong_images = log_p[:2, 2, 0].sum(), log_p[[2, 2, 0], [0, 1, 2], 0].sum()
    certain = fit + wrong_texts + wrong_images
    possible = {-(certain + log_p[2, j, 0]).item() / 9 for j in range(2)}
    generator = torch.Generator().manual_seed(0)
    seen = {objective(**batch, generator=generator)["itm"].item() for _ in range(12)}
    assert sorted(seen) == pytest.approx(sorted(possible))


@pytest.mark.parametrize("cls", ["shared", "skip", "apart"])
def test_cd_is_that_of_the_rbm_on_the_tokens_it_is_given(cls: str) -> None:
    model, tokenizer = tiny_captioner()
    captioner_with_rbm(model, drawn(12)[0], cls_token=cls)
    batch = batch_of(model, tokenizer)
    residual = rbm_of(model)
    given: dict[int, Tensor] = {}

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        given[id(module)] = inputs[0].detach()

    parts = [p for p in (residual.reconstructor, residual.cls_reconstructor) if p is not None]
    for part in parts:
        part.register_forward_hook(keep)
    objective = objective_of(model, seed=11, cd=1.0).train()
    terms = objective(**batch, update=3, first_pair=5)
    terms["cd"].backward()
    length = features_of(model, batch["pixel_values"]).shape[1]
    tokens = {"shared": [length], "skip": [length - 1], "apart": [length - 1, 1]}[cls]
    for i, part in enumerate(parts):
        z = given[id(part)]
        assert len(z) == 6 * tokens[i]
        seed = (11 + i, 2 * 2 * 3)
        step = part.rbm.cd_step(z, 2, seed=seed, chain_offset=5 * tokens[i])
        torch.testing.assert_close(part.rbm.W.grad, step.grad_W * tokens[i] / length)
        torch.testing.assert_close(part.rbm.log_var.grad, step.grad_log_var * tokens[i] / length)
    others = [p for n, p in objective.named_parameters() if ".rbm.W" not in n]
    assert residual.gate.grad is None and all(p.grad is None for p in others if p.dim() > 1), (
        "CD must train nothing but the RBM"
    )


def test_the_lm_gradient_of_gate_and_rbm_is_the_derivative() -> None:
    """Central differences in float64, through the mean field."""
    model, tokenizer = captioner()
    model.double()
    batch = batch_of(model, tokenizer)
    batch["pixel_values"] = batch["pixel_values"].double()
    objective = objective_of(model).double().eval()
    residual = rbm_of(model)
    objective(**batch)["lm"].backward()
    rbm = residual.reconstructor.rbm
    generator = torch.Generator().manual_seed(0)
    for parameter in (residual.gate, rbm.W, rbm.c, rbm.b, rbm.log_var):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(objective(**batch)["lm"].item())
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-4
        assert slope != 0
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_a_shut_gate_learns_from_lm_and_its_rbm_from_cd_only() -> None:
    model, tokenizer = captioner(strength=0.0)
    residual = rbm_of(model)
    objective = objective_of(model, cd=1.0).train()
    terms = objective(**batch_of(model, tokenizer))
    terms["lm"].backward(retain_graph=True)
    assert residual.gate.grad != 0
    assert not residual.reconstructor.rbm.W.grad.any()
    terms["cd"].backward()
    assert residual.reconstructor.rbm.W.grad.any()


def test_bad_captioners_and_features_are_named() -> None:
    model, tokenizer = tiny_captioner()
    with pytest.raises(ValueError, match="cd must be 0 for a model without an RBM.*got 0.5"):
        objective_of(model, cd=0.5)
    with pytest.raises(TypeError, match="must be a BlipForConditionalGeneration, got Linear"):
        JointObjective(torch.nn.Linear(2, 2), JointHeads(2, 2), {})  # type: ignore[arg-type]
    batch = batch_of(model, tokenizer)
    batch["pixel_values"][3] = math.nan
    with pytest.raises(FloatingPointError, match=r"vision features must be finite.*images \[3\]"):
        objective_of(model)(**batch)
