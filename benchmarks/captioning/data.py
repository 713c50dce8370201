"""Images with captions: COCO's and Karpathy's JSON files, the images themselves, plain words.

Everything is checked at loading, so that nothing fails after minutes of feature extraction.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip_integration.captions import normalize_caption


@dataclass(frozen=True)
class CaptionedImages:
    """Images and what people said of them; entry i of each list belongs to image i.

    Attributes:
        ids: The data set's own identifiers, each once.
        paths: The image files.
        captions: At least one caption for each image, as written (see ``normalize_caption``).
    """

    ids: list[int | str]
    paths: list[Path]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> CaptionedImages:
        """The first ``count`` images (all of them where there are fewer)."""
        return CaptionedImages(self.ids[:count], self.paths[:count], self.captions[:count])


def load_captions(
    path: str | os.PathLike[str],
    split: str | None = None,
    images: str | os.PathLike[str] | None = None,
    *,
    require_images: bool = True,
) -> CaptionedImages:
    """Read a caption file in COCO's format or in Karpathy's (``dataset_flickr8k.json`` and so on).

    COCO's has ``images`` (``id``, ``file_name``, and here also ``split``) and ``annotations``
    (``image_id``, ``caption``; Chen et al. 2015, https://arxiv.org/abs/1504.00325). Karpathy's has
    ``images`` with ``sentences[].raw``, ``split``, ``filename`` and an optional ``filepath``
    (Karpathy and Fei-Fei 2015, https://arxiv.org/abs/1412.2306).

    Args:
        path: The JSON file.
        split: Only the images of this split; "train" takes COCO's "restval" along, as is usual.
            None takes all images.
        images: The folder that the file names are relative to; by default ``images`` beside the
            file where that exists, else the file's own folder.
        require_images: Whether every image file must exist (captions alone serve the metrics).

    Returns:
        The images in the file's order.

    Raises:
        FileNotFoundError: The file, or one of its images, is missing.
        ValueError: The file is in neither format; no such split; an image without captions, an
            empty caption, an identifier that is unknown or comes twice.
    """
    file = Path(path)
    content = _read_json(file)
    records = _require(content, "images", list, str(file))
    entries = _karpathy(records, file) if _is_karpathy(records) else _coco(content, file)
    chosen = [entry for entry in entries if _in_split(entry, split)]
    if not chosen:
        found = Counter(str(entry.split) for entry in entries)
        listed = ", ".join(f"{name} ({count})" for name, count in found.items()) or "no images"
        raise ValueError(f"load_captions: split {split!r} has no images in {file}; got {listed}")
    _check(chosen, file)
    if images is not None:
        folder = Path(images)
    else:
        folder = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    paths = [folder / entry.file_name for entry in chosen]
    if require_images:
        missing = [image for image in paths if not image.is_file()]
        if missing:
            raise FileNotFoundError(
                f"load_captions: {len(missing)} of {len(paths)} images of {file} are missing, the "
                f"first is {missing[0]}; name their folder with images="
            )
    return CaptionedImages([e.id for e in chosen], paths, [e.captions for e in chosen])


@dataclass
class _Entry:
    id: int | str
    file_name: str
    split: str | None
    captions: list[str]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"load_captions: path must be a JSON file, got {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_captions: {file} is no JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"load_captions: {file} must hold an object with images, got a {type(content).__name__}"
        )
    return content


def _require(record: Any, key: str, kind: Any, where: str) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"load_captions: {where} must have {key!r}, got {got}")
    return record[key]


def _is_karpathy(records: list[Any]) -> bool:
    return bool(records) and isinstance(records[0], dict) and "sentences" in records[0]


def _karpathy(records: list[Any], file: Path) -> list[_Entry]:
    entries = []
    for i, record in enumerate(records):
        where = f"{file}: images[{i}]"
        name = _require(record, "filename", str, where)
        key = "cocoid" if "cocoid" in record else "imgid"
        sentences = _require(record, "sentences", list, where)
        entries.append(
            _Entry(
                _require(record, key, (int, str), where),
                os.path.join(record.get("filepath", ""), name),
                record.get("split"),
                [_require(sentence, "raw", str, f"{where} sentence") for sentence in sentences],
            )
        )
    return entries


def _coco(content: dict[str, Any], file: Path) -> list[_Entry]:
    entries: dict[int | str, _Entry] = {}
    for i, record in enumerate(content["images"]):
        where = f"{file}: images[{i}]"
        identifier = _require(record, "id", (int, str), where)
        name = _require(record, "file_name", str, where)
        if identifier in entries:
            raise ValueError(f"load_captions: {where} has the id {identifier!r} a second time")
        entries[identifier] = _Entry(identifier, name, record.get("split"), [])
    for i, annotation in enumerate(_require(content, "annotations", list, str(file))):
        where = f"{file}: annotations[{i}]"
        identifier = _require(annotation, "image_id", (int, str), where)
        if identifier not in entries:
            raise ValueError(
                f"load_captions: {where} has image_id {identifier!r}, which no image has"
            )
        entries[identifier].captions.append(_require(annotation, "caption", str, where))
    return list(entries.values())


def _in_split(entry: _Entry, split: str | None) -> bool:
    return split is None or entry.split == split or (split, entry.split) == ("train", "restval")


def _check(entries: list[_Entry], file: Path) -> None:
    for entry in entries:
        if not entry.captions:
            raise ValueError(f"load_captions: {file}: image {entry.id!r} has no captions")
        for caption in entry.captions:
            if not normalize_caption(caption):
                raise ValueError(
                    f"load_captions: {file}: image {entry.id!r} has a caption without a word: "
                    f"{caption!r}"
                )
    identifier, count = Counter(entry.id for entry in entries).most_common(1)[0]
    if count > 1:
        raise ValueError(f"load_captions: {file} has the id {identifier!r} {count} times")
