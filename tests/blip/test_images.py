"""Image files as a captioner needs them, and a clear error for each kind of bad file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
from PIL import Image

from blip_integration.images import open_image


def picture(path: Path, mode: str = "RGB", color: object = "red", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), color).save(path, **options)
    return path


def test_open_image(tmp_path):
    image = open_image(picture(tmp_path / "red.png"))
    assert image.mode == "RGB" and image.size == (6, 4) and image.getpixel((0, 0)) == (255, 0, 0)
    for mode, color, seen in [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("I;16", 0x40FF, (0x40, 0x40, 0x40)),
    ]:
        path = picture(tmp_path / f"{mode.replace(';', '')}.png", mode, color)
        assert open_image(path).getpixel((3, 2)) == seen, mode
    assert open_image(picture(tmp_path / "k.jpg", "CMYK", (0, 0, 0, 0))).mode == "RGB"


def test_transparent_palette(tmp_path):
    path = picture(tmp_path / "p.png", "P", 0, transparency=0)
    assert open_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_orientation(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = 255  # The left half is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown a quarter turn clockwise: its left is up.
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (4, 6)
    assert image.getpixel((1, 0)) == (255, 255, 255) and image.getpixel((1, 5)) == (0, 0, 0)


def test_missing_images(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="open_image: path must be an image file"):
            open_image(path)


def test_damaged_images(tmp_path):
    path = tmp_path / "image.png"
    path.touch()
    with pytest.raises(ValueError, match=r"image.png is empty \(0 bytes\)"):
        open_image(path)
    path.write_bytes(b"no image at all")
    with pytest.raises(ValueError, match="in no image format"):
        open_image(path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("noise.png", "noise.jpg", "noise.gif"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            open_image(tmp_path / name)


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
        open_image(path)


def test_huge_images_by_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(picture(tmp_path / "any.png")).size == (6, 4)
