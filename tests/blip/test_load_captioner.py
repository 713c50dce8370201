"""Cached features, folders of captioners and files of RBMs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from support import blip
from transformers import (
    BlipForImageTextRetrieval,
    BlipTextConfig,
)

from blip_integration.images import ImageFiles, open_image
from blip_integration.modeling import apply_rbm_to_blip, load_captioner
from rbm_kernels import RBM


@pytest.fixture
def pictures(tmp_path):
    file = blip.draw_data(tmp_path / "drawn", train=5, val=0)
    return sorted((file.parent / "images").iterdir())


def test_images_are_loaded_as_the_processor_makes_them(pictures):
    _, processor = blip.tiny_blip()
    wanted = processor(images=open_image(pictures[0]), return_tensors="pt")["pixel_values"][0]
    files = ImageFiles(processor, pictures)
    assert len(files) == 5 and files.ids == [str(path) for path in pictures]
    assert torch.equal(files[0], wanted)
    assert torch.equal(files[3:], torch.stack([files[3], files[4]]))
    with pytest.raises(IndexError):
        files[5]


@pytest.mark.parametrize("adjusted", [False, True])
def test_captioners_survive_a_folder(tmp_path, adjusted):
    model, processor = blip.tiny_blip()
    if adjusted:
        apply_rbm_to_blip(model, RBM(blip.WIDTH, 3, "gaussian"), strength=0.6)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, with_it = load_captioner(tmp_path)
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
    retrieval.save_pretrained(tmp_path / "retrieval")
    processor.save_pretrained(tmp_path / "retrieval")
    with pytest.raises(ValueError, match=r"all weights of a BLIP captioner, got none for text_dec"):
        load_captioner(tmp_path / "retrieval")
