"""Captioned images: both file formats, plain words, and a clear error for each kind of bad file."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

from blip_integration import data

COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "split": "train"},
        {"id": 3, "file_name": "b.png", "split": "val"},
        {"id": 5, "file_name": "c.png", "split": "restval"},
    ],
    "annotations": [
        {"id": 0, "image_id": 3, "caption": "A dog."},
        {"id": 1, "image_id": 7, "caption": "A cat ."},
        {"id": 2, "image_id": 3, "caption": "One dog"},
        {"id": 3, "image_id": 5, "caption": "Snow"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": "a.png",
            "filepath": "train2014",
            "split": "restval",
            "imgid": 0,
            "cocoid": 42,
            "sentences": [{"raw": "A cat .", "tokens": ["a", "cat"]}, {"raw": "Cat!"}],
        },
        {"filename": "b.png", "split": "test", "imgid": 1, "sentences": [{"raw": "A dog."}]},
    ],
}


def write(folder: Path, content: object) -> Path:
    file = folder / "captions.json"
    file.write_text(json.dumps(content))
    return file


def picture(path: Path, mode: str = "RGB", colour: object = "red", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), colour).save(path, **options)
    return path


def test_coco(tmp_path):
    file = write(tmp_path, COCO)
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    loaded = data.load_captions(file)
    assert loaded.ids == [7, 3, 5]
    assert loaded.paths == [tmp_path / "images" / f"{name}.png" for name in "abc"]
    assert loaded.captions == [["A cat ."], ["A dog.", "One dog"], ["Snow"]]
    assert len(loaded) == 3 and loaded.first(9) == loaded
    assert loaded.first(1) == data.CaptionedImages([7], loaded.paths[:1], [["A cat ."]])


def test_splits(tmp_path):
    file = write(tmp_path, COCO)
    ids = {
        split: data.load_captions(file, split, require_images=False).ids
        for split in (None, "train", "val", "restval")
    }
    assert ids == {None: [7, 3, 5], "train": [7, 5], "val": [3], "restval": [5]}
    with pytest.raises(ValueError, match=r"split 'test' has no images.*train \(1\), val \(1\)"):
        data.load_captions(file, "test", require_images=False)


def test_karpathy(tmp_path):
    file = write(tmp_path, KARPATHY)
    loaded = data.load_captions(file, images="/photos", require_images=False)
    assert loaded.ids == [42, 1]
    assert loaded.paths == [Path("/photos/train2014/a.png"), Path("/photos/b.png")]
    assert loaded.captions == [["A cat .", "Cat!"], ["A dog."]]
    assert data.load_captions(file, "train", require_images=False).ids == [42]


def test_where_images_are(tmp_path):
    file = write(tmp_path, COCO)
    beside = data.load_captions(file, require_images=False)
    assert beside.paths[0] == tmp_path / "a.png"
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images .* first is .*b.png.*images="):
        data.load_captions(file)
    assert data.load_captions(file, require_images=False).paths[0] == tmp_path / "images" / "a.png"
    other = tmp_path / "elsewhere"
    for name in "abc":
        picture(other / f"{name}.png")
    assert data.load_captions(file, images=other).paths[1] == other / "b.png"


def changed(content: dict, path: str, value: object) -> dict:
    """A deep copy with one entry, such as "images.0.id", replaced (None removes it)."""
    copy = json.loads(json.dumps(content))
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
    inner = copy
    for step in steps:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold an object with images, got a list"),
        ({"annotations": []}, "must have 'images', got ['annotations']"),
        ({"images": []}, "must have 'annotations'"),
        ({"images": [], "annotations": []}, "got no images"),
        (changed(COCO, "images.1.file_name", None), "images[1] must have 'file_name'"),
        (changed(COCO, "images.1.id", 7), "images[1] has the id 7 a second time"),
        (changed(COCO, "images.1", "b.png"), "images[1] must have 'id', got str"),
        (changed(COCO, "annotations.2.image_id", 99), "annotations[2] has image_id 99, which no"),
        (changed(COCO, "annotations.2.caption", 5), "annotations[2] must have 'caption'"),
        (
            changed(COCO, "annotations.2.caption", " ."),
            "image 3 has a caption without a word: ' .'",
        ),
        (changed(COCO, "annotations.1", None), "image 7 has no captions"),
        (changed(KARPATHY, "images.1.filename", None), "images[1] must have 'filename'"),
        (changed(KARPATHY, "images.1.imgid", 42), "has the id 42 2 times"),
        (changed(KARPATHY, "images.0.sentences.1.raw", None), "images[0] sentence must have 'raw'"),
        (changed(KARPATHY, "images.1.sentences", []), "image 1 has no captions"),
    ],
)
def test_bad_caption_files(tmp_path, content, message):
    with pytest.raises(ValueError, match="load_captions: .*" + re.escape(message)):
        data.load_captions(write(tmp_path, content), require_images=False)


def test_no_caption_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a JSON file, got .*none.json"):
        data.load_captions(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{'images': ")
    with pytest.raises(ValueError, match="is no JSON file"):
        data.load_captions(tmp_path / "text.json")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A black dog , running .", "a black dog running"),
        ("A man's dog; the dogs' ball", "a man 's dog the dogs ball"),
        ("A man\N{RIGHT SINGLE QUOTATION MARK}s T-shirt -- black-and-white!", None),
        ("two-\nlegged  _bird_ (#2)", "two legged bird 2"),
        ("Café at 5", "café at 5"),
        ("it's 'small'", "it 's small"),
        ("...", ""),
    ],
)
def test_normalise_caption(caption, words):
    words = "a man 's t-shirt black-and-white" if words is None else words
    assert data.normalise_caption(caption) == words
    assert data.normalise_caption(words) == words


def test_open_image(tmp_path):
    image = data.open_image(picture(tmp_path / "red.png"))
    assert image.mode == "RGB" and image.size == (6, 4) and image.getpixel((0, 0)) == (255, 0, 0)
    for mode, colour, seen in [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("I;16", 0x40FF, (0x40, 0x40, 0x40)),
    ]:
        path = picture(tmp_path / f"{mode.replace(';', '')}.png", mode, colour)
        assert data.open_image(path).getpixel((3, 2)) == seen, mode
    assert data.open_image(picture(tmp_path / "k.jpg", "CMYK", (0, 0, 0, 0))).mode == "RGB"


def test_transparent_palette(tmp_path):
    path = picture(tmp_path / "p.png", "P", 0, transparency=0)
    assert data.open_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_orientation(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = 255  # The left half is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown a quarter turn clockwise: its left is up.
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = data.open_image(tmp_path / "turned.png")
    assert image.size == (4, 6)
    assert image.getpixel((1, 0)) == (255, 255, 255) and image.getpixel((1, 5)) == (0, 0, 0)


def test_missing_images(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="open_image: path must be an image file"):
            data.open_image(path)


def test_damaged_images(tmp_path):
    path = tmp_path / "image.png"
    path.touch()
    with pytest.raises(ValueError, match=r"image.png is empty \(0 bytes\)"):
        data.open_image(path)
    path.write_bytes(b"no image at all")
    with pytest.raises(ValueError, match="in no image format"):
        data.open_image(path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("noise.png", "noise.jpg", "noise.gif"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            data.open_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [400, 15_000, 40_000])
def test_huge_images(tmp_path, monkeypatch, side):
    """A small file that says it has many pixels; 400 x 400 is too much with a lower limit."""
    if side == 400:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "huge.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    )
    with pytest.raises(ValueError, match=rf"huge.png is too large .*{Image.MAX_IMAGE_PIXELS} pix"):
        data.open_image(path)


def test_huge_images_by_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert data.open_image(picture(tmp_path / "any.png")).size == (6, 4)
