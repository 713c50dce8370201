"""Pictures of attention, and the page of captions: what is drawn, what is escaped, what is said."""

from __future__ import annotations

import base64
import io
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks.captioning import report, scenes
from benchmarks.captioning.lstm.training import History
from benchmarks.captioning.report import (
    CaptionedPicture,
    attention_figure,
    attention_light,
    caption_page,
    difference_chart,
    drift,
    training_curves,
)
from rbm_kernels import plots

VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Checks that tags are nested as they should be, and keeps what a test asks for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for name, text in self.text if name == tag]


def embedded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def scene(pixels: int = 120) -> Image.Image:
    return scenes.draw_scene(scenes.random_scene(random.Random(3)), pixels)


def one_hot(*positions: int, size: int = 9) -> Tensor:
    return torch.eye(size)[list(positions)]


def test_light_falls_where_the_word_looked():
    light = attention_light(one_hot(0, 5, 7), (30, 60))
    assert light.shape == (3, 30, 60)
    for tile, (row, column) in zip(light, [(0, 0), (1, 2), (2, 1)], strict=True):
        assert tile[row * 10 + 5, column * 20 + 10] > 0.7
        assert divmod(int(tile.argmax()), 60)[0] // 10 == row
        assert divmod(int(tile.argmax()), 60)[1] // 20 == column
        assert tile[(row * 10 + 20) % 30, (column * 20 + 40) % 60] < 0.2
    assert light.min() >= 0 and light.max() <= 1
    # Looking everywhere alike darkens nothing.
    everywhere = attention_light(torch.full((1, 9), 1 / 9), (6, 6))
    torch.testing.assert_close(everywhere, torch.ones(1, 6, 6))


def test_light_follows_a_grid_that_is_not_square():
    light = attention_light(one_hot(4, size=6), (40, 60), grid=(2, 3))[0]
    assert light[30, 30] > 0.85
    assert light[10, 30] < 0.2 and light[30, 10] < 0.2 and light[30, 50] < 0.2
    with pytest.raises(ValueError, match="L = 10 for 3 x 3; name the grid"):
        attention_light(torch.ones(2, 10), (8, 8))
    with pytest.raises(ValueError, match=r"must be \[T, L\], got \[9\]"):
        attention_light(torch.ones(9), (8, 8))


def test_figure_shows_the_picture_and_a_tile_for_each_word(tmp_path):
    pytest.importorskip("matplotlib")
    words = ["a", "$5", "<b>", "circle"]
    image = Image.new("L", (90, 60), 200)
    figure = attention_figure(image, words, one_hot(0, 4, 8, 2), columns=3)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["", *words]
    assert len(figure.axes) == 6
    tiles = [np.asarray(axes.images[0].get_array()) for axes in drawn]
    assert tiles[0].shape == (60, 90, 3) and np.allclose(tiles[0], 200 / 255)
    # Of the picture's light all is left in the middle for the second word, a part in the corners.
    assert tiles[2][30, 45, 0] > 0.75 and tiles[2][0, 0, 0] < 0.25
    assert tiles[3][59, 89, 0] > 0.75 and tiles[3][0, 0, 0] < 0.25
    plots.save(figure, tmp_path / "attention.png")
    saved = np.asarray(Image.open(tmp_path / "attention.png").convert("L"))
    # Grey tiles on white, and not a white sheet.
    assert (saved < 230).mean() > 0.3

    with pytest.raises(ValueError, match=r"T = 4 words, got \[3, 9\]"):
        attention_figure(image, words, one_hot(0, 1, 2))


def test_curves_hold_the_losses_and_the_rates():
    pytest.importorskip("matplotlib")
    epochs = [
        {"epoch": i + 1, "train_loss": 3.0 - i, "val_loss": 3.2 - i, "learning_rate": 0.1**i}
        for i in range(3)
    ]
    history = History([9.9, 5.0, 4.0, 3.0, 2.0, 1.0], epochs)
    left, middle, right = training_curves(history).axes
    assert left.lines[0].get_ydata().tolist() == history.losses
    assert [line.get_label() for line in middle.lines] == ["training", "held-out"]
    assert middle.lines[1].get_ydata() == pytest.approx([3.2, 2.2, 1.2])
    assert right.lines[0].get_ydata() == pytest.approx([1, 0.1, 0.01])
    for record in epochs:
        del record["val_loss"]
    assert len(training_curves(history).axes[1].lines) == 1
    training_curves(History())


def test_a_chart_of_differences():
    pytest.importorskip("matplotlib")
    groups = {
        "one": {"better": (2.0, 1.0, 3.0), "unsettled": (0.5, -0.5, 1.5)},
        "two": {"worse $x$": (-2.0, -3.0, -1.0)},
    }
    figure = difference_chart(groups, "points")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "better", "unsettled", "worse $x$",
    ]  # fmt: skip
    assert [text.get_text().strip() for text in axes.texts] == ["one", "two"]
    places = axes.get_yticks()
    bars, points = axes.lines[:-1:2], axes.lines[1:-1:2]
    lines = [line for group in groups.values() for line in group.values()]
    colors = set()
    for place, bar, point, (value, low, high) in zip(places, bars, points, lines, strict=True):
        assert [*bar.get_xdata(), *bar.get_ydata()] == [low, high, place, place]
        assert [*point.get_xdata(), *point.get_ydata()] == [value, place]
        assert bar.get_color() == point.get_color()
        colors.add(bar.get_color())
    assert len(colors) == 3
    bottom, top = axes.get_ylim()
    assert bottom > max(places) and top < min(places)  # from above
    figure.canvas.draw()
    assert len(difference_chart({"one": {}}, "points").axes) == 1


def test_drift_is_the_mean_cosine_over_positions():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(3, 5, 8, generator=generator)
    after = torch.stack([3 * before[0], -before[1], torch.randn(5, 8, generator=generator)])
    expected = [
        np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
        for a, b in zip(before.double().numpy(), after.double().numpy(), strict=True)
    ]
    assert drift(before, after).tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[:2] == pytest.approx([1, -1])
    assert drift(before.half(), before.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="before and after must both be"):
        drift(before, after[:2])


NASTY = "\"><script>alert('1')</script>&amp;"


def nasty_page() -> str:
    picture = CaptionedPicture(
        NASTY, scene(), f"a {NASTY} dog", f"one {NASTY} cat", [NASTY], {NASTY: (1.0, math.nan)},
        one_hot(0, 4, 8), None, 0.5,
    )  # fmt: skip
    return caption_page(
        [picture, picture], title=NASTY, note=NASTY, labels=(NASTY, NASTY + "2"),
        metrics={NASTY: (1.0, 2.0)},
    )  # fmt: skip


def test_everything_given_is_escaped_and_nothing_is_loaded():
    page = Page(nasty_page())
    assert not page.all("script")
    assert {name for name, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "dl",
        "div", "dt", "dd", "small", "main", "article", "img", "ins", "del", "span", "fieldset",
        "legend", "label", "input", "table", "thead", "tbody", "tr", "th", "td", "details",
        "summary", "ul", "li",
    }  # fmt: skip
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(image["alt"] in ("", NASTY) for image in page.all("img"))
    for tag in ("title", "h1", "h2", "li"):
        assert page.texts(tag)[0] == NASTY
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    styles = " ".join(page.texts("style"))
    assert "url(" not in styles and "@import" not in styles
    assert "prefers-color-scheme: dark" in styles


def test_words_that_came_and_went_are_marked():
    def marks(before: str, after: str) -> tuple[list[str], list[str], list[str]]:
        page = Page(caption_page([CaptionedPicture("x", scene(), before, after)]))
        return page.texts("del"), page.texts("ins"), page.texts("span")

    assert marks("a dog on grass", "a brown dog on sand") == (["grass"], ["brown", "sand"], [])
    assert marks("a dog", "a dog here") == ([], ["here"], [])
    assert marks("a  dog", "a dog") == ([], [], ["unchanged"])
    page = Page(caption_page([CaptionedPicture("x", scene(), "only one")]))
    assert page.texts("p") == ["only one"] and not page.texts("h3")


def test_each_word_has_a_veil_that_is_open_where_it_looked():
    words = "a red star"
    attention = one_hot(0, 5, 7)
    picture = CaptionedPicture("x", scene(), "a star", words, attention=attention)
    plain = CaptionedPicture("y", scene(), "a star", "a longer caption than the others here")
    source = caption_page([picture, plain, picture])
    page = Page(source)
    veils = [embedded(image["src"]) for image in page.all("img") if image.get("class") == "veil"]
    assert len(veils) == 6
    for veil, (row, column) in zip(veils, [(0, 0), (1, 2), (2, 1)] * 2, strict=True):
        assert veil.mode == "LA" and max(veil.size) <= 64
        black, opaque = np.asarray(veil).transpose(2, 0, 1)
        assert not black.any()
        height, width = opaque.shape
        open_y, open_x = divmod(int(opaque.argmin()), width)
        assert (open_y * 3 // height, open_x * 3 // width) == (row, column)
        assert opaque.min() < 30 and opaque.max() > 180
    # A group of choices for each picture, the whole picture chosen at first.
    inputs = page.all("input")
    assert [i["name"] for i in inputs] == ["word-0"] * 4 + ["word-2"] * 4
    assert ["checked" in i for i in inputs] == [True, False, False, False] * 2
    assert page.texts("span")[:4] == ["whole picture", "a", "red", "star"]
    # Word k is label k + 1 behind the whole picture, and its veil is image k + 1 of the frame.
    rules = re.findall(r"nth-child\((\d+)\) input:checked\).*? \.veil:nth-of-type\((\d+)\)", source)
    assert rules == [("2", "2"), ("3", "3"), ("4", "4")]

    with pytest.raises(ValueError, match=r"CaptionedPicture: .* T = 3 words, got \[2, 9\]"):
        CaptionedPicture("x", scene(), "a star", words, attention=attention[:2])


def test_pictures_are_embedded_as_moderate_jpegs():
    noise = np.random.default_rng(0).integers(0, 255, (900, 1500, 4), dtype=np.uint8)
    big, small = Image.fromarray(noise, "RGBA"), Image.new("1", (40, 30), 1)
    before = big.copy()
    page = Page(caption_page([CaptionedPicture(n, i, "a") for n, i in (("b", big), ("s", small))]))
    first, second = page.all("img")
    assert embedded(first["src"]).format == "JPEG" and len(first["src"] or "") < 300_000
    assert embedded(first["src"]).size == (448, 269) and first["width"] == "448"
    assert embedded(second["src"]).size == (40, 30) and second["height"] == "30"
    assert big.size == before.size and big.tobytes() == before.tobytes()


def test_scores_metrics_and_drift_are_told():
    picture = CaptionedPicture(
        "x", scene(), "a dog", "a cat", ["a cat sits"],
        {"CIDEr": (0.52, 1.0), "NLL": (math.inf, 21.0)}, drift=0.96,
    )  # fmt: skip
    same = CaptionedPicture("y", scene(), "a dog", "a dog", drift=1.0)
    source = caption_page(
        [picture, same], labels=("old", "new"), metrics={"CIDEr": (52.3, 54.54), "images": (7,)}
    )
    page = Page(source)
    assert page.texts("td") == ["0.520", "1.00", "–", "21.0"]
    assert page.texts("th") == ["score", "old", "new", "CIDEr", "NLL"]
    assert page.texts("dt") == ["pictures", "captions changed", "mean cosine", "CIDEr", "images"]
    assert page.texts("dd") == ["2", "1", "0.9800", "54.5", "7"]
    assert page.texts("small") == ["of 2", "old 52.3"]
    assert [text for text in page.texts("p") if text[0].isdigit()] == ["0.9600", "1.0000"]
    assert re.findall(r'style="width: ([\d.]+)%"', source) == ["100.0", "0.0"]
    assert page.texts("li") == ["a cat sits"]
    single = CaptionedPicture("x", scene(), "a dog", scores={"log-probability": (-1.5,)})
    page = Page(caption_page([single]))
    assert page.texts("th") == ["log-probability"] and page.texts("td") == ["-1.50"]
    assert page.texts("dt") == ["pictures"]
    with pytest.raises(ValueError, match="pictures must hold one or more"):
        caption_page([])


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's contrast ratio of two colors, 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    template = Path(report.__file__).with_name("page.html").read_text()
    block = re.findall(r":root \{(.*?)\}", template, re.DOTALL)[scheme]
    color = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    pairs = [
        ("ink", "ground"), ("quiet", "ground"), ("ink", "card"), ("quiet", "card"),
        ("accent", "card"), ("ink", "chip"), ("quiet", "chip"), ("came-ink", "came"),
        ("went-ink", "went"),
    ]  # fmt: skip
    for text, ground in pairs:
        assert contrast(color[text], color[ground]) >= 4.5, (text, ground)
