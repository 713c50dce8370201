"""The small captioner: BLIP's contract, its tokenizer, its training, and n-best lists of it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image
from support import blip
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from benchmarks.captioning.features import extract
from benchmarks.captioning.lite_blip import (
    LiteBlipConfig,
    LiteBlipForConditionalGeneration,
    LiteVisionConfig,
    LiteVisionModel,
    lite_blip,
    lite_processor,
    lite_vision_model,
    word_tokenizer,
)
from benchmarks.captioning.settings import CaptionerSettings
from benchmarks.captioning.train_lite import (
    caption_labels,
    caption_losses,
    train_captioner,
)
from blip_integration.captions import Candidates, beam_candidates, normalize_caption
from blip_integration.modeling import apply_rbm_to_blip, remove_rbm_from_blip
from rbm_kernels import RBM

pytest.importorskip("efficientnet_lite_pytorch")

WIDTH, POSITIONS = 32, 5
# The first feature of an image says which of these is true of it.
SAYINGS = [
    "a red circle left of a square",
    "two dogs run over green grass",
    "the man's t-shirt is blue",
    "nobody stands in the empty street at night",
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features_saying(rows: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """[N, 1 + L, D]: noise, and one of a few directions that the row's number names."""
    x = 0.3 * gaussian(len(rows), POSITIONS, WIDTH, seed=seed)
    return x + 2 * torch.eye(WIDTH)[rows][:, None]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(SAYINGS, min_count=1)


@pytest.fixture(scope="module")
def vision():
    """The vision model with random weights: no package of weights is needed."""
    config = LiteVisionConfig(variant=0, hidden_size=WIDTH, num_hidden_layers=0, image_size=224)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LiteVisionModel(config).eval()
        model.embeddings.mean.copy_(gaussian(1280) / 10)
        model.embeddings.components.copy_(gaussian(1280, WIDTH) / 10)
    return model


@pytest.fixture
def model(vision, tokenizer):
    return lite_blip(vision, tokenizer, layers=1, heads=2, dropout=0.0, seed=3).eval()


def cache_of(x: torch.Tensor, folder):
    return extract(lambda rows: rows, lambda name: x[int(name)], [str(i) for i in range(len(x))],
                   folder, progress=False)  # fmt: skip


@pytest.fixture(scope="module")
def trained(vision, tokenizer, tmp_path_factory):
    rows = torch.arange(40) % len(SAYINGS)
    folder = tmp_path_factory.mktemp("features")
    caches = [cache_of(features_saying(rows, seed), folder / str(seed)) for seed in (1, 2)]
    untrained = lite_blip(vision, tokenizer, layers=1, heads=2, dropout=0.0)
    history: list[tuple[int, float]] = []
    captions = [[SAYINGS[i]] for i in rows]
    settings = CaptionerSettings(epochs=30, batch_size=8, learning_rate=5e-3, ema_decay=0.9)
    result = train_captioner(
        untrained,
        tokenizer,
        caches,
        captions,
        settings,
        on_epoch=lambda *each: history.append(each),
        progress=False,
    )
    assert result is untrained
    return result, history


def test_the_vision_model_projects_the_map_behind_its_mean(vision, monkeypatch):
    maps = gaussian(2, 6, 1280, seed=1)
    monkeypatch.setattr(vision.embeddings.encoder, "forward", lambda x: maps)
    states = vision(gaussian(2, 3, 64, 96)).last_hidden_state
    mean, components = (getattr(vision.embeddings, name) for name in ("mean", "components"))
    tokens = (maps.double() - mean.double()) @ components.double()
    expected = torch.cat([tokens.mean(1, keepdim=True), tokens], 1).float()
    assert states.shape == (2, 1 + 6, WIDTH)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_features_pass_the_vision_model_as_they_are(vision):
    x = gaussian(2, 7, WIDTH)
    assert torch.equal(vision(x).last_hidden_state, x)


def test_the_encoder_stays_frozen(model):
    model.train()
    encoder = model.vision_model.embeddings.encoder
    assert model.text_decoder.training and not encoder.training
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in model.vision_model.parameters())


def test_the_vision_model_of_some_images(untrained_encoder):
    """Tokens of the very images are centered and of mean variance 1."""
    batches = [gaussian(4, 3, 64, 64, seed=seed) for seed in (1, 2)]
    model = lite_vision_model(iter(batches), variant=0, width=8)
    assert model.config.variant == 0 and model.config.hidden_size == 8 and not model.training
    with torch.inference_mode():
        tokens = torch.cat([model(x).last_hidden_state[:, 1:] for x in batches]).reshape(-1, 8)
    assert tokens.mean(0).abs().max() < 1e-3
    assert tokens.var(0, correction=0).mean() == pytest.approx(1.0, abs=1e-3)


def test_the_tokenizer_knows_the_words_of_normalize_caption(tokenizer):
    words = sorted({word for text in SAYINGS for word in normalize_caption(text).split()})
    assert sorted(tokenizer.get_vocab()) == sorted(["[PAD]", "[UNK]", "[DEC]", "[SEP]", *words])
    for text in (
        "The man\u2019s T-shirt, is BLUE!",
        "a red circle left of a square .",
        " \n ",
        "\u00c9t\u00e9",
    ):
        ids = tokenizer(text).input_ids
        known = [w if w in words else "[UNK]" for w in normalize_caption(text).split()]
        assert tokenizer.convert_ids_to_tokens(ids) == ["[DEC]", *known, "[SEP]"]
    decoded = tokenizer.decode(tokenizer(SAYINGS[2]).input_ids, skip_special_tokens=True)
    assert decoded == "the man 's t-shirt is blue"


def test_rare_words_become_unknown():
    tokenizer = word_tokenizer(["a dog", "a cat", "A dog."], min_count=2)
    assert set(tokenizer.get_vocab()) == {"[PAD]", "[UNK]", "[DEC]", "[SEP]", "a", "dog"}
    with pytest.raises(ValueError, match="occurs 4 times or more .* got 3 different words"):
        word_tokenizer(["a dog", "a cat", "A dog."], min_count=4)


def test_the_processor_scales_pixels_as_the_network_expects(tokenizer):
    processor = lite_processor(tokenizer, variant=1)
    image = Image.new("RGB", (50, 30), (0, 127, 255))
    x = processor(images=image, return_tensors="pt")["pixel_values"]
    assert x.shape == (1, 3, 240, 240)
    expected = torch.tensor([-127 / 128, 0.0, 1.0])
    torch.testing.assert_close(x[0, :, 100, 7], expected, atol=1e-6, rtol=0)


def test_labels_have_no_pads(tokenizer):
    ids, mask, labels = caption_labels(tokenizer, ["two dogs", "two dogs run"])
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["[DEC]", "two", "dogs", "[SEP]", "[PAD]"]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert torch.equal(labels, torch.where(mask == 1, ids, -100))
    assert caption_labels(tokenizer, ["two dogs run over green grass"], 4)[0].shape == (1, 4)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator(vision, tokenizer):
    before = torch.get_rng_state()
    a, b, c = (lite_blip(vision, tokenizer, layers=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    parts = [model.text_decoder.state_dict() for model in (a, b, c)]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    assert any(not torch.equal(parts[0][name], parts[2][name]) for name in parts[0])
    assert a.vision_model is vision
    assert a.text_decoder.label_smoothing == 0.1 and isinstance(a, BlipForConditionalGeneration)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}])
def test_cached_features_generate_what_images_do(model, options):
    images = gaussian(2, 3, 64, 64)
    with torch.inference_mode():
        features = model.vision_model(images).last_hidden_state
    of_images = model.generate(images, max_length=8, **options)
    assert torch.equal(model.generate(features, max_length=8, **options), of_images)


def test_it_is_saved_and_loaded_by_the_auto_classes(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    lite_processor(tokenizer, 0).save_pretrained(tmp_path)
    loaded, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(loaded) is LiteBlipForConditionalGeneration
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(loaded.config) is LiteBlipConfig and loaded.config.vision_config.variant == 0
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    x = gaussian(2, POSITIONS, WIDTH)
    assert torch.equal(loaded.generate(x, max_length=9), model.generate(x, max_length=9))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is BlipProcessor
    assert type(processor.image_processor) is BlipImageProcessorPil
    assert processor.tokenizer(SAYINGS[2]).input_ids == tokenizer(SAYINGS[2]).input_ids


def test_generate_never_says_unknown(model, tokenizer, tmp_path):
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[tokenizer.unk_token_id] = 100.0
    x = gaussian(2, POSITIONS, WIDTH)
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForImageTextToText.from_pretrained(tmp_path)):
        for beams in (1, 3):
            sequences = each.generate(x, max_length=6, num_beams=beams)
            assert tokenizer.unk_token_id not in sequences


def test_training_learns_what_the_features_say(trained, tokenizer):
    model, history = trained
    assert [epoch for epoch, _ in history] == list(range(1, 31))
    assert history[0][1] > 2.0 and history[-1][1] < 1.0
    assert not model.training
    unseen = features_saying(torch.tensor([3, 1, 0, 2]), seed=9)
    best = beam_candidates(model, tokenizer, unseen, progress=False).best
    assert best == [normalize_caption(SAYINGS[i]) for i in (3, 1, 0, 2)]


def test_training_is_reproducible_and_leaves_the_global_generator(vision, tokenizer, tmp_path):
    rows = torch.arange(12) % 4
    caches = [cache_of(features_saying(rows, seed), tmp_path / str(seed)) for seed in (1, 2)]
    captions = [[SAYINGS[i], SAYINGS[0]] for i in rows]
    results = []
    for seed in (5, 5, 6):
        model = lite_blip(vision, tokenizer, layers=1, heads=2, dropout=0.2)
        before = torch.get_rng_state()
        settings = CaptionerSettings(epochs=2, batch_size=5, seed=seed)
        train_captioner(model, tokenizer, caches, captions, settings, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(torch.cat([p.flatten() for p in model.text_decoder.parameters()]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_both_versions_of_an_image_are_shown(vision, tokenizer, tmp_path, monkeypatch):
    caches = [cache_of(torch.full((4, POSITIONS, WIDTH), i), tmp_path / str(i)) for i in (0.0, 1.0)]
    model = lite_blip(vision, tokenizer, layers=1, heads=2)
    seen = set()
    forward = model.text_decoder.forward

    def watched(**inputs):
        seen.add(inputs["encoder_hidden_states"].mean().item())
        return forward(**inputs)

    monkeypatch.setattr(model.text_decoder, "forward", watched)
    settings = CaptionerSettings(epochs=8, batch_size=4)
    captions = [[text] for text in SAYINGS]
    train_captioner(model, tokenizer, caches, captions, settings, progress=False)
    assert seen == {0.0, 1.0}


def test_training_wants_captions_for_each_image(model, tokenizer, tmp_path):
    cache = cache_of(features_saying(torch.tensor([0, 1])), tmp_path)
    with pytest.raises(ValueError, match="a list for each of 2 images, got 1"):
        train_captioner(model, tokenizer, [cache], [["two dogs"]], CaptionerSettings())


def test_losses_are_those_of_the_tokens_one_by_one(model, tokenizer):
    x = features_saying(torch.tensor([0, 1, 2]))
    captions = [["two dogs run", "a square"], ["blue"], ["the man is blue at night", "red", "a"]]
    nats, tokens = caption_losses(model, tokenizer, x, captions, batch_size=2)
    assert nats.dtype == tokens.dtype == torch.float64
    for i, texts in enumerate(captions):
        total = 0.0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.inference_mode():
                logits = model.text_decoder(
                    input_ids=ids, encoder_hidden_states=x[i : i + 1]
                ).logits
            log_probabilities = logits[0, :-1].double().log_softmax(-1)
            total -= log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        assert nats[i].item() == pytest.approx(total, rel=1e-5)
    assert tokens.tolist() == [3 + 1 + 2 + 1, 2, 6 + 1 + 2 + 2]
    assert model.text_decoder.label_smoothing == 0.1


def test_losses_of_a_cache_are_those_of_its_features(model, tokenizer, tmp_path):
    x = features_saying(torch.tensor([0, 1, 2])).half().float()
    captions = [["two dogs"], ["blue", "red"], ["a"]]
    of_tensor = caption_losses(model, tokenizer, x, captions)
    of_cache = caption_losses(model, tokenizer, cache_of(x, tmp_path), captions)
    assert all(torch.equal(a, b) for a, b in zip(of_tensor, of_cache, strict=True))


def sequence_score(model, tokenizer, x: torch.Tensor, text: str) -> float:
    """Mean log-probability of a caption's tokens, the end among them."""
    nats, tokens = caption_losses(model, tokenizer, x[None], [[text]])
    return -(nats / tokens).item()


@pytest.mark.parametrize("beams", [1, 3])
def test_scores_are_mean_log_probabilities(trained, tokenizer, beams):
    """Of captions short of the longest: one that is cut has no end token to score."""
    model, _ = trained
    x = features_saying(torch.arange(4), seed=4)
    lists = beam_candidates(model, tokenizer, x, beams=beams, n=beams, batch_size=3, min_length=2,
                            progress=False)  # fmt: skip
    assert lists.ids == ["0", "1", "2", "3"] and lists.scores.shape == (4, beams)
    assert (lists.scores.diff(dim=1) <= 0).all()
    for i, texts in enumerate(lists.texts):
        assert len(set(texts)) == beams
        for text, score in zip(texts, lists.scores[i].tolist(), strict=True):
            expected = sequence_score(model, tokenizer, x[i], text)
            # generate() forbids [UNK], so its log-probabilities are a little larger.
            assert score == pytest.approx(expected, abs=2e-2), text


def test_greedy_scores_of_captions_of_different_lengths(trained, tokenizer):
    model, _ = trained
    x = features_saying(torch.tensor([0, 1, 2, 3]), seed=4)
    together = beam_candidates(model, tokenizer, x, beams=1, progress=False)
    assert len({len(text.split()) for text in together.best}) > 1
    for i in range(4):
        alone = beam_candidates(model, tokenizer, x[i : i + 1], beams=1, progress=False)
        assert alone.texts == [together.texts[i]]
        assert alone.scores.item() == pytest.approx(together.scores[i].item(), abs=1e-5)


def test_lengths_of_candidates(trained, tokenizer):
    model, _ = trained
    x = features_saying(torch.arange(4), seed=4)
    for low, high in ((5, 20), (9, 12), (3, 4)):
        lists = beam_candidates(
            model, tokenizer, x, min_length=low, max_length=high, progress=False
        )
        for text in lists.best:
            # With the start and, where it has ended, the end.
            assert low <= len(text.split()) + 2 and len(text.split()) + 1 <= high


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_go_on_from_a_prompt(trained, tokenizer, beams):
    model, _ = trained
    x = features_saying(torch.arange(4), seed=4)
    ids = tokenizer(["two dogs"] * 4, return_tensors="pt")["input_ids"]
    whole = model.generate(
        x, input_ids=ids, num_beams=beams, min_length=5, max_length=20, do_sample=False
    )
    said = tokenizer.batch_decode(whole, skip_special_tokens=True)
    assert all(text.startswith("two dogs ") for text in said)
    lists = beam_candidates(model, tokenizer, x, beams=beams, prompt="two dogs", progress=False)
    assert lists.best == [text.removeprefix("two dogs ") for text in said]
    for i, text in enumerate(lists.best):
        # Two words of the prompt are given, and count neither in the sum nor in the length.
        tokens = tokenizer(f"two dogs {text}", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model.text_decoder(
                input_ids=tokens, encoder_hidden_states=model.vision_model(x[[i]])[0]
            ).logits
        log_p = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[2:]
        # generate() forbids [UNK], so its log-probabilities are a little larger.
        assert lists.scores[i, 0].item() == pytest.approx(log_p.mean().item(), abs=2e-2), text


def test_the_length_penalty_decides_how_long_captions_are(trained, tokenizer, recwarn):
    model, _ = trained
    x = features_saying(torch.arange(4), seed=4)

    def words(beams: int, penalty: float) -> int:
        lists = beam_candidates(
            model, tokenizer, x, beams=beams, length_penalty=penalty, min_length=2, progress=False
        )
        return sum(len(text.split()) for text in lists.best)

    assert words(3, -9.0) < words(3, 9.0)
    assert words(1, -9.0) == words(1, 9.0)
    assert not [each for each in recwarn if "length_penalty" in str(each.message)]


def test_a_prompt_must_leave_room(model, tokenizer):
    with pytest.raises(ValueError, match=r"max_length must be above the 3 tokens .* got 3"):
        beam_candidates(
            model, tokenizer, gaussian(1, POSITIONS, WIDTH), prompt="a dog", max_length=3
        )


def test_candidates_of_a_cache_have_its_names(trained, tokenizer, tmp_path):
    model, _ = trained
    x = features_saying(torch.arange(3)).half().float()
    cache = extract(lambda rows: rows, lambda name: x[ord(name) - ord("a")], list("abc"),
                    tmp_path, progress=False)  # fmt: skip
    lists = beam_candidates(model, tokenizer, cache, beams=2, n=2, progress=False)
    of_tensor = beam_candidates(model, tokenizer, x, list("abc"), beams=2, n=2, progress=False)
    assert lists.ids == ["a", "b", "c"] and lists.texts == of_tensor.texts
    assert torch.equal(lists.scores, of_tensor.scores)


@pytest.mark.parametrize("n", [0, 4])
def test_more_candidates_than_beams(model, tokenizer, n):
    with pytest.raises(ValueError, match=rf"n must lie in 1..beams = 1..3, got {n}"):
        beam_candidates(model, tokenizer, gaussian(1, POSITIONS, WIDTH), beams=3, n=n)


LISTS = Candidates(
    ["x", "y", "z"],
    [["a", "b"], ["c", "d"], ["e", "f"]],
    torch.tensor([[-0.1, -0.7], [-1 / 3, -math.pi], [-1.5, -2.0]]),
)


def test_candidates_survive_a_file(tmp_path):
    LISTS.save(tmp_path / "lists.json")
    loaded = Candidates.load(tmp_path / "lists.json")
    assert loaded.ids == LISTS.ids and loaded.texts == LISTS.texts
    assert torch.equal(loaded.scores, LISTS.scores)


def test_parts_and_choices():
    assert LISTS.best == ["a", "c", "e"]
    assert LISTS.chosen(torch.tensor([1, 0, 1])) == ["b", "c", "f"]
    part = LISTS.part([2, 0])
    assert part.ids == ["z", "x"] and part.texts == [["e", "f"], ["a", "b"]]
    assert torch.equal(part.scores, LISTS.scores[[2, 0]])


@pytest.mark.parametrize(
    ("ids", "texts", "scores", "message"),
    [
        (["x"], [["a"], ["b"]], torch.zeros(2, 1), "as many images, got 1, 2 and"),
        (["x"], [["a"]], torch.zeros(2, 1), "as many images, got 1, 1 and"),
        (["x", "y"], [["a"], ["b", "c"]], torch.zeros(2, 1), "1 captions for each image"),
    ],
)
def test_candidates_that_do_not_fit(ids, texts, scores, message):
    with pytest.raises(ValueError, match=message):
        Candidates(ids, texts, scores)


def test_an_rbm_behind_its_features(tmp_path):
    text = blip.tiny_blip()[0].config.text_config.to_dict()
    model = LiteBlipForConditionalGeneration(
        LiteBlipConfig(
            text_config=text,
            vision_config={
                "hidden_size": blip.WIDTH, "num_hidden_layers": 0, "variant": 0, "image_size": 224
            },
        )
    ).eval()  # fmt: skip
    features = torch.randn(2, 5, blip.WIDTH, generator=torch.Generator().manual_seed(4))
    apply_rbm_to_blip(model, RBM(blip.WIDTH, 3, "gaussian"), strength=0.75)
    expected = model.vision_model.rbm(features)
    assert torch.equal(model.vision_model(features).last_hidden_state, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, LiteBlipForConditionalGeneration)
    assert torch.equal(loaded.vision_model(features).last_hidden_state, expected)
    remove_rbm_from_blip(model)
    assert torch.equal(model.vision_model(features).last_hidden_state, features)
