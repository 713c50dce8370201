"""Joint training: the terms against their definitions, what moves, and that runs can be resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BlipConfig, BlipForConditionalGeneration

import rbm_kernels as rk
from benchmarks.captioning.lite_blip import word_tokenizer
from blip_integration.gated_residual import GatedResidual, RBMReconstructor
from blip_integration.joint import JointResult, JointSettings, train_joint
from blip_integration.joint_objective import (
    CaptionPairs,
    JointHeads,
    JointObjective,
    collate_captions,
    gated_residual,
    seed_for,
)
from blip_integration.modeling import apply_rbm_to_blip

WIDTH = 16
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
PLACES = {"left": slice(0, 8), "right": slice(8, 16)}
KINDS = [(colour, place) for colour in COLOURS for place in PLACES]


def drawn(n: int, seed: int = 0) -> tuple[Tensor, list[list[str]]]:
    """Images [n, 3, 16, 16] with one half in a colour, and two captions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(n, 3, 16, 16, generator=generator)
    captions = []
    for i in range(n):
        colour, place = KINDS[i % len(KINDS)]
        images[i, :, :, PLACES[place]] += torch.tensor(COLOURS[colour])[:, None, None]
        captions.append([f"{colour} {place}", f"a {colour} square on the {place}"])
    return images, captions


TOKENIZER = word_tokenizer([text for texts in drawn(len(KINDS))[1] for text in texts], min_count=1)


def text_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(TOKENIZER),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "bos_token_id": TOKENIZER.bos_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "sep_token_id": TOKENIZER.sep_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
        **changes,
    }


def tiny_blip(seed: int = 0, **text: Any) -> BlipForConditionalGeneration:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BlipConfig(text_config=text_config(**text), vision_config=vision)
        return BlipForConditionalGeneration(config).eval()


def tiny_rbm(seed: int = 0) -> rk.RBM:
    rbm = rk.RBM(WIDTH, 8, "gaussian")
    with torch.no_grad():
        rbm.W.copy_(0.3 * torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(seed)))
    return rbm


def features_of(model: BlipForConditionalGeneration, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.vision_model(images).last_hidden_state


def with_rbm(
    model: BlipForConditionalGeneration, images: Tensor, gate: float = 0.3, **options: Any
) -> BlipForConditionalGeneration:
    """The model with an RBM on features standardised by those of some images."""
    features = features_of(model, images)
    statistics = features.mean((0, 1)), features.std((0, 1))
    of_cls = None
    if options.get("cls_token") == "apart":
        parts = features[:, :1], features[:, 1:]
        statistics = (
            torch.stack([part.mean((0, 1)) for part in parts]),
            torch.stack([part.std((0, 1)) for part in parts]),
        )
        of_cls = RBMReconstructor(tiny_rbm(seed=1))
    reconstructor = RBMReconstructor(tiny_rbm(), options.pop("mode", "mean_field"))
    fitted = GatedResidual(reconstructor, *statistics, cls_reconstructor=of_cls, **options)
    return apply_rbm_to_blip(model, fitted, strength=math.tanh(gate))


def captioner(gate: float = 0.3, **text: Any) -> BlipForConditionalGeneration:
    return with_rbm(tiny_blip(**text), drawn(12)[0], gate)


def batch_of(model: BlipForConditionalGeneration, n: int = 6, **options: Any) -> dict[str, Tensor]:
    """One caption of each of n images."""
    images, captions = drawn(n)
    items = [(images[i], captions[i][i % 2], i) for i in range(n)]
    return collate_captions(items, TOKENIZER, model.config.text_config, **options)


def data(n: int = 12, seed: int = 0) -> CaptionPairs:
    return CaptionPairs(*drawn(n, seed))


def run(model: BlipForConditionalGeneration, **changes: Any) -> JointResult:
    """`train_joint` on the drawn images, with settings and keywords in one."""
    keywords = {
        name: changes.pop(name)
        for name in ("heads", "metric", "folder", "resume", "train", "val")
        if name in changes
    }
    settings = JointSettings(**{"batch": 8, "epochs": 2, "projection": 8, **changes})
    pairs = keywords.pop("train", data()), keywords.pop("val", data(6, seed=1))
    return train_joint(model, TOKENIZER, *pairs, settings, progress=False, **keywords)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def rising() -> Any:
    """A metric that is better every time, so that the last epoch's weights are kept."""
    scores = iter(range(1000))
    return lambda _: float(next(scores))


# Captions to tensors.


def test_sequences_have_a_start_and_only_captions_and_ends_are_learnt() -> None:
    config = tiny_blip().config.text_config
    bos, sep, pad = config.bos_token_id, config.sep_token_id, config.pad_token_id
    red, square, a = TOKENIZER.convert_tokens_to_ids(["red", "square", "a"])
    images = torch.zeros(2, 3, 16, 16)
    items = [(images[0], "Red!", 5), (images[1], "a red square", 7)]

    batch = collate_captions(items, TOKENIZER, config)
    assert batch["input_ids"].tolist() == [[bos, red, sep, pad, pad], [bos, a, red, square, sep]]
    assert batch["labels"].tolist() == [[-100, red, sep, -100, -100], [-100, a, red, square, sep]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["image_ids"].tolist() == [5, 7]

    cut = collate_captions(items, TOKENIZER, config, max_tokens=4, prompt="A")
    assert cut["input_ids"].tolist() == [[bos, a, red, sep], [bos, a, a, sep]]
    assert cut["labels"].tolist() == [[-100, -100, red, sep], [-100, -100, a, sep]]


def test_the_tokenizers_own_first_token_makes_no_difference() -> None:
    """BERT's tokenizer begins with [CLS], BLIP with [DEC]: the config decides."""
    config = tiny_blip(bos_token_id=TOKENIZER.convert_tokens_to_ids("red")).config.text_config
    batch = collate_captions([(torch.zeros(1), "green", 0)], TOKENIZER, config)
    green = TOKENIZER.convert_tokens_to_ids("green")
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
        ([("red", 4)], {"max_tokens": 3, "prompt": "a"}, "max_tokens must be 4 or more"),
    ],
)
def test_bad_items_are_named(
    items: list[tuple[str, int]], options: dict[str, Any], message: str
) -> None:
    triples = [(torch.zeros(size), caption, i) for i, (caption, size) in enumerate(items)]
    with pytest.raises(ValueError, match=message):
        collate_captions(triples, TOKENIZER, tiny_blip().config.text_config, **options)


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


def objective_of(
    model: BlipForConditionalGeneration, seed: int = 0, **weights: float
) -> JointObjective:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        heads = JointHeads.for_model(model, 8)
    return JointObjective(model, heads, {"lm": 1.0, **weights}, cd_sweeps=2, seed=seed)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_is_the_captioners_own_loss(smoothing: float) -> None:
    model = captioner(label_smoothing=smoothing).train()
    batch = batch_of(model)
    terms = objective_of(model).train()(**batch)
    ours = {name: batch[name] for name in batch if name != "image_ids"}
    torch.testing.assert_close(terms["lm"], model(**ours).loss)
    # Validation is without smoothing, so that its figures can be compared.
    log_p = model(**ours).logits.log_softmax(-1)[:, :-1]
    targets = batch["labels"][:, 1:]
    picked = log_p.gather(2, targets.clamp_min(0)[..., None])[..., 0][targets != -100]
    torch.testing.assert_close(objective_of(model).eval()(**batch)["lm"], -picked.mean())


def test_itc_compares_cls_with_the_mean_of_word_embeddings() -> None:
    model = captioner()
    batch = batch_of(model)
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


def match_log_probabilities(objective: JointObjective, batch: dict[str, Tensor]) -> Tensor:
    """Of "unfit" and "fit" for image i and text j [B, B, 2], pair by pair and without pads."""
    decoder = objective.model.text_decoder.bert
    rows = []
    for features in features_of(objective.model, batch["pixel_values"]):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            states = decoder(
                ids[None, : int(mask.sum())], encoder_hidden_states=features[None], is_decoder=True
            ).last_hidden_state
            rows.append(objective.heads.match(states[0, -1]).log_softmax(-1))
    size = len(batch["input_ids"])
    return torch.stack(rows).view(size, size, 2)


def test_itm_reads_the_state_at_the_captions_end() -> None:
    model = captioner()
    batch = batch_of(model, 2)  # with two pairs each has one negative
    objective = objective_of(model, itm=1.0)
    log_p = match_log_probabilities(objective, batch)
    fit = log_p[0, 0, 1] + log_p[1, 1, 1]
    unfit = 2 * (log_p[0, 1, 0] + log_p[1, 0, 0])
    torch.testing.assert_close(objective(**batch)["itm"], -(fit + unfit) / 6)


def test_captions_of_one_image_are_no_negatives_of_each_other() -> None:
    model = captioner()
    images, captions = drawn(2)
    items = [(images[0], captions[0][0], 8), (images[0], captions[0][1], 8)]
    objective = objective_of(model, itc=1.0, itm=1.0)
    alone = collate_captions(items, TOKENIZER, model.config.text_config)
    assert set(objective(**alone)) == {"lm"}

    items.append((images[1], captions[1][0], 9))
    batch = collate_captions(items, TOKENIZER, model.config.text_config)
    log_p = match_log_probabilities(objective, batch)
    # Only the last image has a choice between two wrong texts.
    fit = log_p[[0, 1, 2], [0, 1, 2], 1].sum()
    wrong_texts, wrong_images = log_p[:2, 2, 0].sum(), log_p[[2, 2, 0], [0, 1, 2], 0].sum()
    certain = fit + wrong_texts + wrong_images
    possible = {-(certain + log_p[2, j, 0]).item() / 9 for j in range(2)}
    seen = {objective(**batch, draw=draw)["itm"].item() for draw in range(12)}
    assert sorted(seen) == pytest.approx(sorted(possible))


@pytest.mark.parametrize("cls", ["shared", "skip", "apart"])
def test_cd_is_that_of_the_rbm_on_the_tokens_it_is_given(cls: str) -> None:
    model = with_rbm(tiny_blip(), drawn(12)[0], cls_token=cls)
    batch = batch_of(model)
    residual = gated_residual(model)
    given: dict[int, Tensor] = {}

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        given[id(module)] = inputs[0].detach()

    parts = [p for p in (residual.reconstructor, residual.cls_reconstructor) if p is not None]
    for part in parts:
        part.register_forward_hook(keep)
    objective = objective_of(model, cd=1.0).train()
    terms = objective(**batch, update=3, first_image=5)
    terms["cd"].backward()
    tokens = {"shared": [5], "skip": [4], "apart": [4, 1]}[cls]
    for i, part in enumerate(parts):
        z = given[id(part)]
        assert len(z) == 6 * tokens[i]
        seed = (seed_for(0, "chains", i), 2 * 2 * 3)
        step = part.rbm.cd_step(z, 2, seed=seed, chain_offset=5 * tokens[i])
        torch.testing.assert_close(part.rbm.W.grad, step.grad_W * tokens[i] / 5)
        torch.testing.assert_close(part.rbm.log_var.grad, step.grad_log_var * tokens[i] / 5)
    others = [p for n, p in objective.named_parameters() if ".rbm.W" not in n]
    assert residual.gate.grad is None and all(p.grad is None for p in others if p.dim() > 1), (
        "CD must train nothing but the RBM"
    )


def test_the_lm_gradient_of_gate_and_rbm_is_the_derivative() -> None:
    """Central differences in float64, through the mean field."""
    model = captioner().double()
    batch = batch_of(model)
    batch["pixel_values"] = batch["pixel_values"].double()
    objective = objective_of(model).double().eval()
    residual = gated_residual(model)
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
    model = captioner(gate=0.0)
    residual = gated_residual(model)
    objective = objective_of(model, cd=1.0).train()
    terms = objective(**batch_of(model))
    terms["lm"].backward(retain_graph=True)
    assert residual.gate.grad != 0
    assert not residual.reconstructor.rbm.W.grad.any()
    terms["cd"].backward()
    assert residual.reconstructor.rbm.W.grad.any()


# Training.


def test_all_terms_go_down_and_every_update_is_logged(tmp_path: Path) -> None:
    model = captioner(gate=0.0)
    result = run(
        model, folder=tmp_path, freeze="none", epochs=6, patience=None, itc=0.5, itm=0.5,
        cd=0.01, blip_learning_rate=2e-2, head_learning_rate=2e-2, rbm_learning_rate=1e-2,
        val=data(), batch=6,
    )  # fmt: skip
    first, last = result.history[0], result.history[-1]
    assert [record["epoch"] for record in result.history] == list(range(7))
    for term in ("lm", "itc", "itm", "loss"):
        assert last[term] < 0.8 * first[term], term
    assert "cd" not in last
    assert not result.stopped_early

    log = log_of(tmp_path)
    updates = [record for record in log if "validation" not in record]
    assert [record["update"] for record in updates] == list(range(1, 6 * 4 + 1))
    assert {"epoch", "lm", "itc", "itm", "cd", "loss", "gate", "gradient_norm"} < set(updates[0])
    weighted = (("lm", 1.0), ("itc", 0.5), ("itm", 0.5), ("cd", 0.01))
    for record in updates:
        assert record["loss"] == pytest.approx(sum(w * record[term] for term, w in weighted))
    assert updates[0]["gate"] == 0.0 and updates[-1]["gate"] != 0.0
    assert [r for r in log if "validation" in r] == [
        {**record, "validation": True} for record in result.history
    ]


def test_the_rbm_becomes_a_better_model_of_the_features() -> None:
    """CD's value is no measure; the reconstruction error of what it was not shown is one."""
    model = captioner(gate=0.0)
    residual = gated_residual(model)

    def error() -> float:
        z = (features_of(model, drawn(6, seed=1)[0]) - residual.mean) / residual.scale
        return (residual.reconstructor(z.flatten(0, 1)) - z.flatten(0, 1)).square().mean().item()

    before = error()
    last: list[float] = []
    metric = lambda _: last.append(error()) or -last[-1]  # noqa: E731
    run(model, itc=0, itm=0, cd=1.0, gate_learning_rate=0, rbm_learning_rate=3e-2, epochs=6,
        metric=metric)  # fmt: skip
    assert residual.gate == 0.0
    assert error() == min(last) < 0.9 * before


FROZEN = {"all": ("vision_model.", "text_decoder."), "vision": ("vision_model.",), "none": ()}


@pytest.mark.parametrize("freeze", FROZEN)
def test_what_is_frozen_does_not_move(freeze: str) -> None:
    model = captioner(hidden_dropout_prob=0.1)
    model.text_decoder.cls.predictions.transform.dense.bias.requires_grad_(False)
    model.text_decoder.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = state(model)
    run(model, freeze=freeze, metric=rising(), epochs=1)
    changed = moved(before, state(model))
    learnt = {name for name in changed if name.startswith("vision_model.rbm.")}
    assert {"vision_model.rbm.gate", "vision_model.rbm.reconstructor.rbm.W"} <= learnt
    assert not any(name.startswith(FROZEN[freeze]) for name in changed - learnt)
    for part in ("vision_model.", "text_decoder."):
        if part not in FROZEN[freeze]:
            assert any(name.startswith(part) for name in changed - learnt), part
    assert "text_decoder.cls.predictions.transform.dense.bias" not in changed
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.text_decoder.training and not model.vision_model.training


def test_what_is_frozen_has_no_dropout(tmp_path: Path) -> None:
    losses = {}
    for freeze in ("all", "vision"):
        for dropout in (0.0, 0.5):
            folder = tmp_path / f"{freeze}{dropout}"
            run(captioner(hidden_dropout_prob=dropout), folder=folder, freeze=freeze, epochs=1)
            losses[freeze, dropout] = [record["lm"] for record in log_of(folder)]
    assert losses["all", 0.5] == losses["all", 0.0]
    assert losses["vision", 0.5] != losses["vision", 0.0]


def test_learning_rates_rise_and_fall_and_each_part_has_its_own(tmp_path: Path) -> None:
    run(
        captioner(), folder=tmp_path, freeze="vision", epochs=3, warmup=0.25, patience=None,
        rbm_learning_rate=1e-3, gate_learning_rate=2e-3, blip_learning_rate=3e-3,
        head_learning_rate=4e-3,
    )  # fmt: skip
    updates = [record for record in log_of(tmp_path) if "validation" not in record]
    assert len(updates) == 9  # 24 captions in batches of 8
    for i, record in enumerate(updates):
        share = i / 2 if i < 2 else (1 + math.cos(math.pi * (i - 2) / 7)) / 2
        rates = {"rbm": 1e-3, "gate": 2e-3, "blip": 3e-3, "heads": 4e-3}
        expected = {part: rate * share for part, rate in rates.items()}
        assert record["learning_rates"] == pytest.approx(expected)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Far below AdamW's epsilon a gradient hardly moves anything."""
    model = captioner()
    before = state(model)
    run(model, folder=tmp_path, clip=1e-12, weight_decay=0.0, metric=rising(), epochs=1)
    updates = [record for record in log_of(tmp_path) if "validation" not in record]
    assert all(record["gradient_norm"] > 1e-3 for record in updates)  # what it was before
    for name, tensor in model.state_dict().items():
        assert (tensor - before[name]).abs().max() < 1e-5, name


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Though captions differ in length, and the chains of CD are drawn at random."""
    logs, models = [], []
    for batch, accumulate in ((8, 1), (2, 4), (3, 3)):
        model = captioner()
        size = 9 if batch == 3 else 8
        changes = {"batch": batch, "accumulate": accumulate} if accumulate > 1 else {"batch": size}
        folder = tmp_path / f"{batch}"
        run(model, folder=folder, freeze="vision", itc=0, itm=0, metric=rising(), warmup=0,
            blip_learning_rate=1e-3, epochs=1, **changes)  # fmt: skip
        logs.append([r for r in log_of(folder) if "validation" not in r])
        models.append(model)
    assert len(logs[0]) == len(logs[1]) == len(logs[2]) == 3
    for whole, parts in zip(*logs[:2], strict=True):
        for name in ("lm", "cd", "loss", "gradient_norm", "gate"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-3), name
    # 24 pairs in windows of 9: the last one is short, and still an update.
    assert logs[2][-1]["lm"] > 0
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=1e-3, atol=2e-4)


class Interrupted(Exception):
    pass


class Interrupting(Dataset):
    """Pairs that can be read so many times."""

    def __init__(self, pairs: CaptionPairs, reads: int) -> None:
        self.pairs, self.reads = pairs, reads

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, str, int]:
        self.reads -= 1
        if self.reads < 0:
            raise Interrupted
        return self.pairs[index]


RESUMABLE: dict[str, Any] = {
    "freeze": "none", "epochs": 2, "batch": 4, "accumulate": 2, "checkpoint_every": 2,
    "blip_learning_rate": 1e-3,
}  # fmt: skip


def with_dropout() -> BlipForConditionalGeneration:
    return captioner(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[BlipForConditionalGeneration, JointResult, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    model = with_dropout()
    return model, run(model, folder=folder, **RESUMABLE), log_of(folder)


@pytest.mark.parametrize("reads", [4, 20, 41])
def test_a_resumed_run_is_the_same_to_the_last_bit(
    reads: int, uninterrupted: Any, tmp_path: Path
) -> None:
    """Interrupted in the first update, in the first epoch, and an update after a checkpoint."""
    whole, expected, log = uninterrupted
    with pytest.raises(Interrupted):
        run(with_dropout(), folder=tmp_path, train=Interrupting(data(), reads), **RESUMABLE)
    torch.manual_seed(reads)  # the caller's random numbers have no part in it
    resumed = with_dropout()
    result = run(resumed, folder=tmp_path, resume=True, **RESUMABLE)

    assert moved(state(whole), state(resumed)) == set()
    assert moved(state(expected.heads), state(result.heads)) == set()
    assert result.history == expected.history
    assert log_of(tmp_path) == log


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    model, again = captioner(), captioner()
    history = run(model, folder=tmp_path, epochs=1).history
    assert run(again, folder=tmp_path, epochs=1, resume=True).history == history
    assert moved(state(model), state(again)) == set()


def test_the_best_weights_outlive_an_interruption(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"freeze": "none", "blip_learning_rate": 5.0, "warmup": 0}
    with pytest.raises(Interrupted):
        run(captioner(), folder=tmp_path, train=Interrupting(data(), 30), **settings)
    model = captioner()
    before = state(model)
    assert run(model, folder=tmp_path, resume=True, **settings).best_epoch == 0
    assert moved(before, state(model)) == set()


def test_sampling_residuals_resume_their_draws(tmp_path: Path) -> None:
    def fresh() -> BlipForConditionalGeneration:
        return with_rbm(tiny_blip(), drawn(12)[0], mode="gibbs")

    settings: dict[str, Any] = {"itc": 0, "itm": 0, "checkpoint_every": 1}
    whole = fresh()
    run(whole, folder=tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        run(fresh(), folder=tmp_path / "a", train=Interrupting(data(), 36), **settings)
    resumed = fresh()
    run(resumed, folder=tmp_path / "a", resume=True, **settings)
    assert moved(state(whole), state(resumed)) == set()
    assert log_of(tmp_path / "a") == log_of(tmp_path / "whole")


def test_a_run_leaves_the_callers_random_numbers_alone() -> None:
    model = captioner(hidden_dropout_prob=0.2)
    before = torch.get_rng_state()
    run(model, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_stops_early_and_keeps_the_best_weights() -> None:
    model, seen = captioner(), []
    scores = [0.1, 0.2, 0.5, 0.4, 0.5, 0.9]

    def metric(judged: BlipForConditionalGeneration) -> float:
        assert judged is model and not judged.training
        seen.append(state(judged))
        return scores[len(seen) - 1]

    result = run(model, epochs=6, patience=2, metric=metric, freeze="none")
    assert result.stopped_early and result.best_epoch == 2
    assert [record["metric"] for record in result.history] == scores[:5]
    assert moved(seen[2], state(model)) == set()
    assert moved(seen[2], seen[4]) != set()


def test_training_that_helps_nothing_gives_back_the_model_untouched() -> None:
    model = captioner()
    before = state(model)
    result = run(model, freeze="none", blip_learning_rate=5.0, warmup=0, epochs=5, patience=1)
    assert result.best_epoch == 0 and result.stopped_early and len(result.history) == 2
    assert result.history[1]["lm"] > result.history[0]["lm"]
    assert moved(before, state(model)) == set()


def test_the_whole_validation_loss_can_be_monitored() -> None:
    settings: dict[str, Any] = {
        "freeze": "all", "rbm_learning_rate": 0, "gate_learning_rate": 0, "itc": 1.0,
        "head_learning_rate": 1e-2, "epochs": 2, "itm": 0, "val": data(),
    }  # fmt: skip
    assert run(captioner(), monitor="lm", **settings).best_epoch == 0  # heads do not change it
    assert run(captioner(), monitor="loss", **settings).best_epoch == 2


def test_bf16_mixed_precision_stays_close_and_leaves_weights_in_float32() -> None:
    model, mixed = captioner(), captioner()
    settings: dict[str, Any] = {"freeze": "vision", "blip_learning_rate": 1e-3, "metric": rising()}
    expected = run(model, **settings)
    result = run(mixed, mixed_precision="bf16", **settings)
    for exact, rounded in zip(expected.history, result.history, strict=True):
        for term in ("lm", "itc", "itm"):
            assert rounded[term] == pytest.approx(exact[term], rel=0.05)
            assert rounded[term] != exact[term]
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs on a GPU")
def test_fp16_needs_a_gpu_and_the_next_run_may_choose_anew() -> None:
    model = captioner()
    before = state(model)
    with pytest.raises(ValueError, match="must be 'no' or 'bf16' on a CPU, got 'fp16'"):
        run(model, mixed_precision="fp16")
    assert moved(before, state(model)) == set()
    run(model, epochs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_trains_on_a_gpu() -> None:
    result = run(captioner().cuda(), mixed_precision="fp16", freeze="vision", metric=rising())
    assert all(math.isfinite(record["loss"]) for record in result.history)


def test_cached_features_of_a_lite_captioner() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    from benchmarks.captioning.lite_blip import LiteVisionConfig, LiteVisionModel, lite_blip

    vision = LiteVisionModel(LiteVisionConfig(variant=0, hidden_size=WIDTH, num_hidden_layers=0))
    model = lite_blip(vision.eval(), TOKENIZER, layers=1, heads=2, dropout=0.0)
    features = features_of(tiny_blip(), drawn(12)[0])  # [12, 5, D]
    with_rbm(model, features)
    pairs = CaptionPairs(features.half().numpy(), drawn(12)[1])
    before = state(model)
    result = run(model, train=pairs, val=pairs, freeze="none", blip_learning_rate=1e-2, epochs=4)
    assert result.history[-1]["lm"] < result.history[0]["lm"]
    changed = moved(before, state(model))
    assert {name.split(".")[1] for name in changed if name.startswith("vision")} == {"rbm"}


def test_a_captioner_without_rbm_is_trained_by_the_same_steps() -> None:
    """The control of a decoder that is fine-tuned as long."""
    model = tiny_blip()
    result = run(model, cd=0, freeze="vision", blip_learning_rate=1e-2, val=data(), epochs=3)
    assert result.history[-1]["lm"] < result.history[0]["lm"]


def test_data_may_be_loaded_by_workers() -> None:
    alone, helped = captioner(), captioner()
    run(alone, epochs=1, metric=rising())
    run(helped, epochs=1, workers=1, metric=rising())
    assert moved(state(alone), state(helped)) == set()


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "encoder"}, "freeze must be one of .*, got 'encoder'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of .*, got 'fp8'"),
        ({"monitor": "cider"}, "monitor must be one of .*, got 'cider'"),
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"accumulate": 1.5}, "accumulate must be an int >= 1, got 1.5"),
        ({"patience": 0}, "patience must be an int >= 1, got 0"),
        ({"workers": -1}, "workers must be an int >= 0, got -1"),
        ({"cd": -0.1}, "cd must be finite and >= 0, got -0.1"),
        ({"itc": math.nan}, "itc must be finite and >= 0, got nan"),
        ({"rbm_learning_rate": math.inf}, "rbm_learning_rate must be finite and >= 0, got inf"),
        ({"clip": 0.0}, "clip must be positive or None, got 0.0"),
        ({"warmup": 1.5}, "warmup must lie in \\[0, 1\\], got 1.5"),
        ({"batch": 1}, "batch must be 2 or more where itc or itm is on.*got 1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"JointSettings: {message}"):
        JointSettings(**changes)
    assert JointSettings(batch=1, itc=0, itm=0).weights == {"lm": 1.0, "cd": 0.01}


def test_bad_models_and_data_are_named(tmp_path: Path) -> None:
    plain = tiny_blip()
    with pytest.raises(ValueError, match="cd must be 0 for a model without an RBM.*got 0.01"):
        run(plain)
    with pytest.raises(ValueError, match="something to train with freeze='all'"):
        run(plain, cd=0, itc=0, itm=0)
    with pytest.raises(TypeError, match="must be a BlipForConditionalGeneration, got Linear"):
        run(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate must be float32 to be trained, got torch.bfloat16"):
        run(captioner().to(torch.bfloat16))
    for name in ("train", "val"):
        with pytest.raises(ValueError, match=f"{name} must hold one pair or more, got none"):
            run(captioner(), **{name: []})
    assert all(p.requires_grad for p in plain.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_neither_overwritten_nor_gone_on_from_by_another_run(tmp_path: Path) -> None:
    run(captioner(), folder=tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match=r"no checkpoint.pt if resume is False"):
        run(captioner(), folder=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="cd must be 0.01, got 0.5"):
        run(captioner(), folder=tmp_path, epochs=1, cd=0.5, resume=True)
    with pytest.raises(ValueError, match=r"pairs of train and val must be \[24, 12\], got \[12, "):
        run(captioner(), folder=tmp_path, epochs=1, resume=True, train=data(6))
    with pytest.raises(ValueError, match="what is to be best must be 'lm', got 'metric'"):
        run(captioner(), folder=tmp_path, epochs=1, resume=True, metric=rising())
    (tmp_path / "checkpoint.pt").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="is no checkpoint to resume"):
        run(captioner(), folder=tmp_path, epochs=1, resume=True)


def test_what_is_not_finite_stops_before_it_is_learnt() -> None:
    images, captions = drawn(12)
    images[3] = math.nan
    model = captioner()
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"vision features must be finite.*images \[3"):
        run(model, train=CaptionPairs(images, captions), batch=24)
    with pytest.raises(FloatingPointError, match="validation's metric must be finite, got nan"):
        run(model, metric=lambda _: math.nan)
    assert moved(before, state(model)) == set()
    with pytest.raises(FloatingPointError, match="losses and gradients must be finite.*update 2"):
        run(model, cd=0, freeze="vision", blip_learning_rate=1e30, clip=None, warmup=0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
