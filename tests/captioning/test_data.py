"""Captioned images: both file formats, plain words, and a clear error for each kind of bad file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("PIL")
from PIL import Image

from benchmarks.captioning import data

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


def picture(path: Path, mode: str = "RGB", color: object = "red", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), color).save(path, **options)
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
