"""Cached features, folders of captioners and files of RBMs."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image, ImageOps
from support import blip
from transformers import (
    BlipForImageTextRetrieval,
    BlipTextConfig,
)

from blip_integration import captioner, features, recipe
from blip_integration.adjust import apply_rbm_to_blip
from blip_integration.data import open_image
from blip_integration.fitting import Schedule, TokenStream, fit_rbm
from blip_integration.recipe import (
    cached_features,
    cached_vision_model,
    image_loader,
    load_captioner,
    load_fitted_rbm,
    save_captioner,
    save_fitted_rbm,
    whole_folder,
)
from rbm_kernels import RBM


@pytest.fixture
def pictures(tmp_path):
    file = blip.draw_data(tmp_path / "drawn", train=5, val=0)
    return sorted((file.parent / "images").iterdir())


def test_images_are_loaded_as_the_processor_makes_them(pictures):
    _, processor = blip.tiny_blip()
    for view in (0, 1):
        got = image_loader(processor, view)(pictures[0])
        image = open_image(pictures[0])
        image = ImageOps.mirror(image) if view else image
        wanted = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(got, wanted)


def test_further_views_are_pieces_of_the_image_and_of_its_mirror_image(tmp_path):
    """Red grows to the right and green downwards, so that a corner's colours tell where it was."""
    _, processor = blip.tiny_blip()
    side = 200
    ramp = Image.linear_gradient("L").resize((side, side))  # grows downwards
    picture = Image.merge("RGB", (ramp.rotate(90), ramp, Image.new("L", (side, side))))
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path in paths:
        picture.save(path)
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name))[:, None, None]
        for name in ("image_mean", "image_std")
    )
    spans = []
    for view in (2, 3):
        load = image_loader(processor, view)
        for path in paths:
            pixels = load(path) * std + mean
            assert torch.equal(load(path), image_loader(processor, view)(path))
            across, down = pixels[0].mean(0), pixels[1].mean(1)
            rises = across[-1] - across[0]
            assert (rises > 0) == (view == 2)
            spans.append([rises.abs().item(), (down[-1] - down[0]).item()])
            assert pixels.min() >= -0.01 and pixels[:2].max() <= 1.01
    spans = torch.tensor(spans)
    # The resized piece's first and last pixels are means over some of its own.
    assert spans.min() > 0.65 and spans.max() <= 1 and spans.std(0).min() > 0.03
    assert len(spans.unique(dim=0)) > 30  # each image, and each view, its own piece


def test_features_are_those_of_the_vision_model_and_are_kept(pictures, tmp_path, monkeypatch):
    model, processor = blip.tiny_blip()
    folder = tmp_path / "cache"

    def compute(view=0):
        return cached_features(
            model.vision_model, pictures, processor, folder, view=view, progress=False
        )

    pixels = torch.stack([image_loader(processor)(path) for path in pictures])
    with torch.inference_mode():
        states = model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(compute()[:], states, atol=2e-3, rtol=2e-3)  # float16

    calls = []
    forward = type(model.vision_model).forward
    monkeypatch.setattr(
        type(model.vision_model), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    assert len(compute()) == 5 and not calls
    compute(view=1)
    assert len(calls) == 1
    compute()
    assert len(calls) == 2
    Image.new("RGB", (9, 9)).save(pictures[2])
    compute()
    assert len(calls) == 3
    stamp = pictures[2].stat()
    os.utime(pictures[2], ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    compute()
    assert len(calls) == 4
    with torch.no_grad():
        model.vision_model.post_layernorm.bias[0] += 1
    compute()
    assert len(calls) == 5


def test_a_vision_model_is_kept_for_the_same_images(pictures, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    made = []

    def encoder(variant, pretrained=True):
        made.append(pretrained)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return features.LiteEncoder(variant, pretrained=False)

    monkeypatch.setattr(captioner, "LiteEncoder", encoder)
    monkeypatch.setattr(recipe, "COMPONENT_IMAGES", 2)
    processor = captioner.lite_processor(blip.tiny_blip()[1].tokenizer, 0)

    def model(images, width=4):
        return cached_vision_model(
            images, processor, tmp_path / "cache", variant=0, width=width, progress=False
        )

    first = model(pictures)
    made.clear()
    again = model(pictures)
    assert True not in made  # The weights came from the folder.
    wanted, got = first.state_dict(), again.state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert not again.training
    # Two images of five are chosen: the first and the third. The second changes nothing.
    Image.new("RGB", (9, 9)).save(pictures[1])
    model(pictures)
    assert True not in made
    Image.new("RGB", (9, 9)).save(pictures[2])
    model(pictures)
    assert made.count(True) == 1
    model(pictures, width=5)
    assert made.count(True) == 2
    # Nothing of the unfinished remains.
    assert all(path.name.startswith("vision-") for path in (tmp_path / "cache").iterdir())


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as unfinished:
        (unfinished / "half").write_text("1")
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []
    with whole_folder(target) as unfinished:
        (unfinished / "file").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert target.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777
    with pytest.raises(FileExistsError, match="must be new or empty"), whole_folder(target):
        raise AssertionError("never entered")
    assert [path.name for path in target.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as unfinished:
        (unfinished / "file").write_text("1")
    assert (tmp_path / "empty" / "file").is_file()


@pytest.mark.parametrize("kind", ["stock", "lite", "adjusted", "adjusted lite"])
def test_captioners_survive_a_folder(tmp_path, kind):
    model, processor = blip.tiny_blip()
    width = blip.WIDTH
    if "lite" in kind:
        pytest.importorskip("efficientnet_lite_pytorch")
        config = captioner.LiteVisionConfig(variant=0, hidden_size=width, num_hidden_layers=0)
        vision = captioner.LiteVisionModel(config)
        model = captioner.lite_blip(vision, processor.tokenizer, layers=1, heads=2).eval()
    if "adjusted" in kind:
        apply_rbm_to_blip(
            model, RBM(width, 3, "gaussian"), torch.ones(width), torch.ones(width), gate=0.7
        )
    save_captioner(model, processor, tmp_path / "model")
    loaded, with_it = load_captioner(tmp_path / "model")
    assert type(loaded) is type(model) and not loaded.training
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    text = "a red circle"
    assert with_it.tokenizer(text).input_ids == processor.tokenizer(text).input_ids


def test_what_is_no_captioner(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must be a folder with config\.json"):
        load_captioner(tmp_path / "empty")
    BlipTextConfig(vocab_size=9).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="must hold a BLIP model, got one of type 'blip_text"):
        load_captioner(tmp_path / "text")


def test_blip_for_retrieval_has_no_decoder(tmp_path):
    """It has the same config class, but weights of its own."""
    model, processor = blip.tiny_blip()
    retrieval = BlipForImageTextRetrieval(model.config)
    save_captioner(retrieval, processor, tmp_path / "retrieval")
    with pytest.raises(ValueError, match=r"all weights of a BLIP captioner, got none for text_dec"):
        load_captioner(tmp_path / "retrieval")


def test_a_fitted_rbm_survives_a_file(tmp_path):
    x = 3 + 2 * torch.randn(30, 5, 4, generator=torch.Generator().manual_seed(0))
    fitted = fit_rbm(TokenStream(x), 3, Schedule(epochs=1))
    save_fitted_rbm(fitted, tmp_path / "rbm.safetensors")
    rbm, mean, scale = load_fitted_rbm(tmp_path / "rbm.safetensors")
    assert torch.equal(mean, fitted.mean) and torch.equal(scale, fitted.scale)
    wanted, got = fitted.reconstructor.rbm.state_dict(), rbm.state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_an_rbm_without_statistics_is_of_features_as_they_are(tmp_path):
    RBM(4, 3, "gaussian").save(tmp_path / "rbm.safetensors")
    _, mean, scale = load_fitted_rbm(tmp_path / "rbm.safetensors")
    assert torch.equal(mean, torch.zeros(4)) and torch.equal(scale, torch.ones(4))
    with pytest.raises(FileNotFoundError, match="must be a model file"):
        load_fitted_rbm(tmp_path / "none.safetensors")
