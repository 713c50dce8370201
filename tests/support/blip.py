"""Tiny captioners with random weights and a data set of drawn pictures, for the tests of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

WIDTH, SIDE = 16, 32
COLORS = ("red", "green", "blue")
CAPTIONS = [f"a {color} circle on {ground}" for color in COLORS for ground in ("white", "grey")]


def draw_data(folder: Path, train: int = 6, val: int = 3) -> Path:
    """Pictures and a COCO caption file with the splits train and val."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(train + val):
        color, ground = COLORS[i % 3], ("white", "grey")[i % 2]
        picture = Image.new("RGB", (48, 40), ground)
        ImageDraw.Draw(picture).ellipse((8 + i, 8, 24 + i, 24), fill=color)
        name = f"{i}.png"
        picture.save(folder / "images" / name)
        split = "train" if i < train else "val"
        images.append({"id": i, "file_name": name, "split": split})
        for text in (f"A {color} circle on {ground}.", f"a circle is {color}"):
            annotations.append({"id": len(annotations), "image_id": i, "caption": text})
    file = folder / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The words of ``CAPTIONS``, with BERT's marks and BLIP's ``[DEC]`` before each sequence."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[DEC]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[DEC] $A [SEP]", special_tokens=[("[DEC]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="[DEC]",
        eos_token="[SEP]", sep_token="[SEP]", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_config(
    kind: type[BlipConfig] = BlipConfig, *, initializer_range: float = 0.5, **more: Any
) -> BlipConfig:
    """BLIP of two small layers a side, with pictures of 32 x 32 in 16 patches."""
    tokenizer = tiny_tokenizer()
    layers = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH // 2,
        "initializer_range": initializer_range,
    }
    text = {
        **layers,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": WIDTH,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**layers, "image_size": SIDE, "patch_size": SIDE // 4}
    sizes = {"projection_dim": WIDTH // 2, "image_text_hidden_size": WIDTH // 2}
    return kind(text_config=text, vision_config=vision, **sizes, **more)


def tiny_blip(
    seed: int = 0, initializer_range: float = 0.5
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """A stock captioner of ``tiny_config`` with random weights, and its processor."""
    config = tiny_config(initializer_range=initializer_range)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config).eval()
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return model, BlipProcessor(images, tiny_tokenizer())


def readme_folder(folder: Path) -> None:
    """What the READMEs' examples find in the current folder: a captioner, and photos of its kind.

    The captioner is the tiny one under the name of the real one: a folder of a name goes before the
    hub's model of that name.
    """
    for part in tiny_blip():
        part.save_pretrained(folder / "Salesforce" / "blip-image-captioning-base")
    (folder / "photos").mkdir()
    for i in range(12):
        noise = Image.effect_noise((40, 40), 50).convert("RGB")
        noise.save(folder / "photos" / f"{i}.jpg")
