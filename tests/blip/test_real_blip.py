"""What people do with a BLIP that they have: on a tiny one, and on the real one if it is at hand.

``RBM_BLIP_MODEL`` names the real one, a folder or a hub's name:

    RBM_BLIP_MODEL=Salesforce/blip-image-captioning-base pytest tests/test_blip_real.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")

from support import blip
from transformers import AutoModelForImageTextToText, BlipForConditionalGeneration

from blip_integration import cli
from blip_integration.captions import beam_candidates
from blip_integration.fitting import Schedule, fit_rbm
from blip_integration.images import ImageFiles
from blip_integration.modeling import (
    apply_rbm_to_blip,
    load_captioner,
    rbm_of,
    remove_rbm_from_blip,
)

PROMPT = "a picture of"


@pytest.fixture(scope="module", params=["tiny", "real"])
def name(request, tmp_path_factory):
    """A folder of a BLIP captioner, or a hub's name."""
    if request.param == "tiny":
        folder = tmp_path_factory.mktemp("blip") / "model"
        for part in blip.tiny_blip():
            part.save_pretrained(folder)
        return str(folder)
    if "RBM_BLIP_MODEL" not in os.environ:
        pytest.skip("RBM_BLIP_MODEL names no BLIP captioner")
    return os.environ["RBM_BLIP_MODEL"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    file = blip.draw_data(tmp_path_factory.mktemp("drawn"), train=4, val=0)
    return sorted((file.parent / "images").iterdir())


def test_an_rbm_goes_in_and_out(name, images, tmp_path):
    model, processor = load_captioner(name)
    pixels = ImageFiles(processor, images)[:]
    with torch.inference_mode():
        states = model.vision_model(pixels).last_hidden_state
    stock = [beam_candidates(model, processor.tokenizer, pixels, beams=b, n=b) for b in (1, 3)]

    fitted = fit_rbm(model, pixels, 32, Schedule(epochs=1))
    apply_rbm_to_blip(model, fitted, strength=0.0)
    for lists in stock:
        beams = lists.scores.shape[1]
        now = beam_candidates(model, processor.tokenizer, pixels, beams=beams, n=beams)
        assert now.texts == lists.texts and torch.equal(now.scores, lists.scores)

    with torch.no_grad():
        rbm_of(model).set_strength(0.3)
        adjusted = model.vision_model(pixels).last_hidden_state
    assert not torch.equal(adjusted, states) and adjusted.isfinite().all()
    model.save_pretrained(tmp_path / "ours")
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    with torch.inference_mode():
        assert torch.equal(ours.vision_model(pixels).last_hidden_state, adjusted)
    _, loading = BlipForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert all(key.startswith("vision_model.rbm.") for key in loading["unexpected_keys"])

    remove_rbm_from_blip(model)
    with torch.inference_mode():
        assert torch.equal(model.vision_model(pixels).last_hidden_state, states)


def test_the_command_goes_on_from_a_prompt(name, images, capsys):
    model, processor = load_captioner(name)
    pixels = ImageFiles(processor, images)[:]
    inputs = processor(text=[PROMPT] * len(images), return_tensors="pt")
    whole = model.generate(
        pixels, **inputs, num_beams=3, min_length=5, max_length=20, do_sample=False
    )
    said = processor.batch_decode(whole, skip_special_tokens=True)
    start = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    command = ["caption", *map(str, images), "--model", name, "--prompt", PROMPT]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [text.removeprefix(start).strip() for text in said]
    assert lines == [f"{path}: {text}" for path, text in zip(images, expected, strict=True)]
