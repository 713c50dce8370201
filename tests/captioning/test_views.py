"""Views and cached features of images, and folders that are whole or not there."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")

from PIL import Image
from support import blip

from benchmarks.captioning import features, lite_blip
from benchmarks.captioning.features import cached_features, cached_vision_model, view_loader
from benchmarks.captioning.files import save_captioner, whole_folder
from blip_integration.modeling import apply_rbm_to_blip, load_captioner
from rbm_kernels import RBM


@pytest.fixture
def pictures(tmp_path):
    file = blip.draw_data(tmp_path / "drawn", train=5, val=0)
    return sorted((file.parent / "images").iterdir())


def test_further_views_are_pieces_of_the_image_and_of_its_mirror_image(tmp_path):
    """Red grows to the right and green downwards, so that a corner's colors tell where it was."""
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
        load = view_loader(processor, view)
        for path in paths:
            pixels = load(path) * std + mean
            assert torch.equal(load(path), view_loader(processor, view)(path))
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

    pixels = torch.stack([view_loader(processor)(path) for path in pictures])
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
    real = lite_blip.LiteEncoder

    def encoder(variant, pretrained=True):
        made.append(pretrained)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return real(variant, pretrained=False)

    monkeypatch.setattr(lite_blip, "LiteEncoder", encoder)
    monkeypatch.setattr(features, "COMPONENT_IMAGES", 2)
    processor = lite_blip.lite_processor(blip.tiny_blip()[1].tokenizer, 0)

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


@pytest.mark.parametrize("adjusted", [False, True])
def test_lite_captioners_survive_a_folder(tmp_path, adjusted):
    pytest.importorskip("efficientnet_lite_pytorch")
    _, processor = blip.tiny_blip()
    config = lite_blip.LiteVisionConfig(variant=0, hidden_size=blip.WIDTH, num_hidden_layers=0)
    vision = lite_blip.LiteVisionModel(config)
    model = lite_blip.lite_blip(vision, processor.tokenizer, layers=1, heads=2).eval()
    if adjusted:
        apply_rbm_to_blip(model, RBM(blip.WIDTH, 3, "gaussian"), strength=0.6)
    save_captioner(model, processor, tmp_path / "model")
    loaded, with_it = load_captioner(tmp_path / "model")
    assert type(loaded) is type(model) and not loaded.training
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    text = "a red circle"
    assert with_it.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
