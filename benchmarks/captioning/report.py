"""Pictures of captions: what each word looked at, learning curves, a page of before and after.

Figures are matplotlib's; ``rbm_kernels.plots.save`` writes them as PNG files. The page is one
HTML file without scripts or anything to load.
"""

from __future__ import annotations

import base64
import difflib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor
from torch.nn import functional

from rbm_kernels import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .lstm.training import History

_INK, _BLUE, _RED, _GRAY = "#1d2330", "#3056c4", "#c2512f", "#8b93a3"
# What is left of the light where a word did not look.
_DIM = 0.22
_JPEG_SIDE, _JPEG_QUALITY = 448, 82
_VEIL_SIDE = 56


def attention_light(
    attention: Tensor, size: tuple[int, int], grid: tuple[int, int] | None = None
) -> Tensor:
    """Attention over a feature map as light on a picture: 1 where a word looked most.

    Args:
        attention: [T, L], at least 0, positions row by row.
        size: (height, width) of the picture.
        grid: (rows, columns) of the feature map; None: it is square.

    Returns:
        float32 [T, height, width] in [0, 1], smooth.

    Raises:
        ValueError: Another rank, or an L that the grid does not have.

    Example:
        >>> import torch
        >>> attention_light(torch.eye(4), (6, 6)).shape
        torch.Size([4, 6, 6])
    """
    if attention.ndim != 2 or attention.shape[1] < 1:
        raise ValueError(f"attention must be [T, L], got {list(attention.shape)}")
    positions = attention.shape[1]
    rows, columns = grid or (math.isqrt(positions),) * 2
    if rows * columns != positions:
        raise ValueError(
            f"attention must be [T, L] with L = rows * columns of its grid, got L = {positions} "
            f"for {rows} x {columns}; name the grid, and leave out a CLS token"
        )
    maps = attention.detach().float().cpu().reshape(-1, 1, rows, columns)
    light = functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    # Means over windows as large as a position round the corners off; bicubic would ring.
    high, wide = size[0] // (2 * rows), size[1] // (2 * columns)
    for window, padding in (((2 * high + 1, 1), (high, 0)), ((1, 2 * wide + 1), (0, wide))):
        light = functional.avg_pool2d(light, window, 1, padding, count_include_pad=False)
    return (light / light.amax((2, 3), keepdim=True).clamp_min(1e-12))[:, 0]


def attention_figure(
    image: Image.Image,
    words: Sequence[str],
    attention: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    columns: int = 6,
) -> Figure:
    """The picture once for each word, lit where the decoder looked as it wrote the word.

    Args:
        image: The picture.
        words: T of them.
        attention: [T, L].
        grid: (rows, columns) of the feature map; None: it is square.
        columns: Tiles in a row; the first tile is the picture itself.

    Returns:
        A figure.

    Raises:
        ValueError: Numbers of words and of maps that differ, or a bad grid.
        ModuleNotFoundError: matplotlib is missing.
    """
    _check_words("attention_figure", words, attention)
    picture = _shrunk(image, _JPEG_SIDE)
    pixels = np.asarray(picture, dtype=np.float32) / 255  # [height, width, 3]
    light = attention_light(attention, pixels.shape[:2], grid).numpy()[..., None]
    lit = [pixels, *(pixels * (_DIM + (1 - _DIM) * light))]
    columns = max(1, min(columns, len(lit)))
    rows = -(-len(lit) // columns)
    height = 1.75 * picture.height / picture.width
    figure = _figure(1.75 * columns, rows * (height + 0.27) + 0.35)
    figure.suptitle(" ".join(words), fontsize=12, color=_INK, parse_math=False, wrap=True)
    tiles = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in tiles:
        axes.set_axis_off()
    for axes, tile, word in zip(tiles, lit, ["", *words], strict=False):
        axes.imshow(tile)
        axes.set_title(word, fontsize=11, color=_INK, pad=3, parse_math=False)
    return figure


def training_curves(history: History) -> Figure:
    """A training run of the attention captioner: loss by update, by epoch, and learning rate."""
    figure = _figure(10.5, 3.2)
    left, middle, right = figure.subplots(1, 3)
    losses = np.array(history.losses)
    left.plot(losses, color=_BLUE, lw=0.5, alpha=0.35)
    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(window) / window, "valid") if len(losses) else losses
    left.plot(np.arange(len(smooth)) + (window - 1) / 2, smooth, color=_BLUE, lw=1.6)
    left.set(title="loss of each update", xlabel="update", ylabel="nats per word")
    epochs = [record["epoch"] for record in history.epochs]
    for key, label, color in (("train_loss", "training", _BLUE), ("val_loss", "held-out", _RED)):
        if all(key in record for record in history.epochs):
            values = [record[key] for record in history.epochs]
            middle.plot(epochs, values, color=color, lw=1.6, marker="o", ms=3, label=label)
    middle.legend(frameon=False, fontsize=9)
    middle.set(title="mean loss of each epoch", xlabel="epoch", ylabel="nats per word")
    rates = [record["learning_rate"] for record in history.epochs]
    right.step(epochs, rates, where="mid", color=_INK, lw=1.6)
    right.set(title="learning rate (StepLR)", xlabel="epoch", yscale="log")
    for axes in (left, middle, right):
        axes.title.set_size(10)
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def difference_chart(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str
) -> Figure:
    """Differences with their intervals, one line each, those whose interval holds 0 in gray.

    Args:
        groups: By the group's name, and then by the line's: value, low end, high end; drawn from
            above in this order.
        label: The label of the axis.
    """
    lines = [line for group in groups.values() for line in group.items()]
    figure = _figure(7.5, 0.9 + 0.26 * (len(lines) + 0.6 * len(groups)))
    axes = figure.subplots()
    place, ticks = 0.0, []
    for group, members in groups.items():
        axes.text(
            0.0, place, f" {group}", transform=axes.get_yaxis_transform(), color=_INK,
            fontsize=9, fontweight="bold", va="center",
        )  # fmt: skip
        place += 0.9
        for value, low, high in members.values():
            color = _GRAY if low <= 0 <= high else _BLUE if value > 0 else _RED
            axes.plot([low, high], [place, place], color=color, lw=1.8)
            axes.plot([value], [place], color=color, marker="o", ms=4.5)
            ticks.append(place)
            place += 1
        place += 0.4
    axes.axvline(0, color=_INK, lw=0.8)
    axes.set_yticks(ticks, [name for name, _ in lines], fontsize=9)
    axes.set_ylim(place - 0.2, -0.8)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.25, lw=0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def drift(before: Tensor, after: Tensor) -> Tensor:
    """How far image features have moved: mean over positions of the cosine of before and after.

    Args:
        before: [B, L, D].
        after: [B, L, D].

    Returns:
        [B] in [-1, 1]; 1 where only lengths have changed.

    Raises:
        ValueError: Shapes that differ, or another rank.
    """
    if before.shape != after.shape or before.ndim != 3:
        raise ValueError(
            f"drift: before and after must both be [B, L, D], got {list(before.shape)} and "
            f"{list(after.shape)}"
        )
    return functional.cosine_similarity(before.float(), after.float(), dim=-1).mean(-1)


@dataclass(frozen=True)
class CaptionedPicture:
    """What ``caption_page`` shows of one picture.

    Attributes:
        name: Its heading.
        image: The picture, of any size.
        before: A caption.
        after: The caption after a change to the captioner; None: there was none.
        references: What people wrote.
        scores: By name, the value for ``before`` and, where there is one, for ``after``.
        attention: [T, L], what each word of the last caption looked at.
        grid: (rows, columns) of the attention; None: it is square.
        drift: Cosine between the image's features before and after, see ``drift``.
    """

    name: str
    image: Image.Image
    before: str
    after: str | None = None
    references: Sequence[str] = ()
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    attention: Tensor | None = None
    grid: tuple[int, int] | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if self.attention is not None:
            _check_words("CaptionedPicture", self.words, self.attention)

    @property
    def words(self) -> list[str]:
        """Those of the last caption."""
        return (self.before if self.after is None else self.after).split()


def caption_page(
    pictures: Sequence[CaptionedPicture],
    *,
    title: str = "Captions",
    note: str = "",
    labels: tuple[str, str] = ("before", "after"),
    metrics: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """An HTML page of pictures with their captions, scores, attention and drift.

    The page is one file without scripts: pictures are embedded as JPEG, everything given is
    escaped, and a content security policy keeps it from loading anything. Words that came or went
    are marked. Choosing a word, by mouse or keyboard, lights what it looked at.

    Args:
        pictures: What to show, in this order.
        title: Heading of the page.
        note: A sentence below it.
        labels: What the captions before and after are called.
        metrics: By name, the value over all pictures before and, where there is one, after.

    Returns:
        The page; write it as UTF-8.

    Raises:
        ValueError: No pictures.

    Example:
        >>> picture = CaptionedPicture("park", Image.new("RGB", (64, 48)), "a dog", "a brown dog")
        >>> caption_page([picture]).count("<ins>brown</ins>")
        1
    """
    if not pictures:
        raise ValueError("caption_page: pictures must hold one or more, got none")
    shown = [p.after.split() != p.before.split() for p in pictures if p.after is not None]
    drifts = [p.drift for p in pictures if p.drift is not None]
    furthest = max((1 - drift for drift in drifts), default=0.0)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["number"] = _number
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title,
        note=note,
        labels=labels,
        metrics=metrics or {},
        compared=len(shown),
        changed=sum(shown),
        drift=sum(drifts) / len(drifts) if drifts else None,
        most_words=max(len(p.words) if p.attention is not None else 0 for p in pictures),
        cards=[_card(picture, furthest) for picture in pictures],
    )


def _card(picture: CaptionedPicture, furthest: float) -> dict[str, Any]:
    """What the page needs of a picture beside the picture itself."""
    image = _shrunk(picture.image, _JPEG_SIDE)
    veils = []
    if picture.attention is not None:
        veils = _veils(picture.attention, picture.grid, image.size)
    drift = 0.0 if picture.drift is None or furthest <= 0 else (1 - picture.drift) / furthest
    went, came = _marked(picture.before.split(), (picture.after or "").split())
    return {
        "picture": picture,
        "image": _data_uri(image, "JPEG", quality=_JPEG_QUALITY, optimize=True),
        "width": image.width,
        "height": image.height,
        "veils": veils,
        "went": went,
        "came": came,
        "drift_percent": 100 * drift,
    }


def _marked(
    before: list[str], after: list[str]
) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both captions in parts, each with whether its words are in this caption alone."""
    went, came = [], []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if i < i_end:
            went.append((kind != "equal", " ".join(before[i:i_end])))
        if j < j_end:
            came.append((kind != "equal", " ".join(after[j:j_end])))
    return went, came


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:#.3g}".rstrip(".") if math.isfinite(value) else "–"


def _veils(attention: Tensor, grid: tuple[int, int] | None, size: tuple[int, int]) -> list[str]:
    """For each word a small black picture that is opaque where the word did not look."""
    shrink = _VEIL_SIDE / max(size)
    width, height = (max(1, round(side * shrink)) for side in size)
    dark = (1 - _DIM) * (1 - attention_light(attention, (height, width), grid))
    veils = []
    for mask in (255 * dark).round().byte().numpy():
        veil = Image.merge("LA", (Image.new("L", (width, height)), Image.fromarray(mask)))
        veils.append(_data_uri(veil, "PNG", optimize=True))
    return veils


def _data_uri(image: Image.Image, kind: str, **options: int | bool) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """A copy in RGB, at most ``side`` pixels high and wide."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _check_words(where: str, words: Sequence[str], attention: Tensor) -> None:
    if attention.ndim != 2 or len(attention) != len(words):
        raise ValueError(
            f"{where}: attention must be [T, L] with T = {len(words)} words, "
            f"got {list(attention.shape)}"
        )


def _figure(width: float, height: float) -> Figure:
    plots.require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
