"""Pictures of captions: what each word looked at, learning curves, a page of before and after.

Figures are matplotlib's; :func:`rbm_kernels.plots.save` writes them as PNG files. The page is one
HTML file without scripts or anything to load.
"""

from __future__ import annotations

import base64
import difflib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from rbm_kernels import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .lstm.training import History

_INK, _BLUE, _RED, _GREY = "#1d2330", "#3056c4", "#c2512f", "#8b93a3"
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
    for key, label, colour in (("train_loss", "training", _BLUE), ("val_loss", "held-out", _RED)):
        if all(key in record for record in history.epochs):
            values = [record[key] for record in history.epochs]
            middle.plot(epochs, values, color=colour, lw=1.6, marker="o", ms=3, label=label)
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
    """Differences with their intervals, one line each, those whose interval holds 0 in grey.

    Args:
        groups: By the group's name, and then by the line's: value, low end, high end; drawn from
            above in this order.
        label: Of the axis.
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
            colour = _GREY if low <= 0 <= high else _BLUE if value > 0 else _RED
            axes.plot([low, high], [place, place], color=colour, lw=1.8)
            axes.plot([value], [place], color=colour, marker="o", ms=4.5)
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
    """What :func:`caption_page` shows of one picture.

    Attributes:
        name: Its heading.
        image: The picture, of any size.
        before: A caption.
        after: The caption after a change to the captioner; None: there was none.
        references: What people wrote.
        scores: Of each score its value for ``before`` and, where there is one, for ``after``.
        attention: [T, L], what each word of the last caption looked at.
        grid: (rows, columns) of the attention; None: it is square.
        drift: Cosine between the image's features before and after, see :func:`drift`.
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
        metrics: Of each metric over all pictures its value before and, where there is one, after.

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
    furthest = max((1 - p.drift for p in pictures if p.drift is not None), default=0.0)
    cards = "\n".join(
        _card(number, picture, labels, furthest) for number, picture in enumerate(pictures)
    )
    most_words = max(len(p.words) if p.attention is not None else 0 for p in pictures)
    note_html = f'\n<p class="note">{escape(note)}</p>' if note else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}{_light_rules(most_words)}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>{note_html}
{_summary(pictures, labels, metrics or {})}
</header>
<main>
{cards}
</main>
</body>
</html>
"""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f4f5f8; --card: #ffffff; --ink: #1b2130; --quiet: #5a6376; --line: #dfe3ea;
  --accent: #3353c9; --chip: #eef1f7; --came: #d7f0df; --came-ink: #0f5a2c;
  --went: #fbe3dc; --went-ink: #8a2f14; --shadow: 0 1px 2px #1b213014, 0 6px 20px #1b21300d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #11141b; --card: #1a1f29; --ink: #e9ecf3; --quiet: #a2acbf; --line: #2c3341;
    --accent: #9db2ff; --chip: #252c39; --came: #173f28; --came-ink: #a9e9c0;
    --went: #4a2419; --went-ink: #ffc4b1; --shadow: none;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); max-width: 84rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { margin: 0; font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2;
  letter-spacing: -0.02em; text-wrap: balance; }
.note { margin: .5rem 0 0; max-width: 65ch; color: var(--quiet); }
.summary { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 2rem; }
.summary > div { flex: 1 1 8.5rem; padding: .8rem 1rem; border: 1px solid var(--line);
  border-radius: .8rem; background: var(--card); }
.summary dt { color: var(--quiet); font-size: .8rem; }
.summary dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.summary small { font-size: .85rem; font-weight: 400; color: var(--quiet); white-space: nowrap; }
main { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
article { overflow: hidden; border: 1px solid var(--line); border-radius: 1rem;
  background: var(--card); box-shadow: var(--shadow); }
.picture { position: relative; border-bottom: 1px solid var(--line); }
.picture img { display: block; width: 100%; height: auto; }
.picture .veil { position: absolute; inset: 0; height: 100%; opacity: 0;
  transition: opacity .18s; }
.body { padding: 1rem 1.15rem 1.2rem; }
h2 { margin: 0 0 .6rem; overflow-wrap: anywhere; color: var(--quiet); font-size: .85rem;
  font-weight: 500; }
h3, legend { padding: 0; margin: 0; color: var(--quiet); font-size: .78rem; font-weight: 500; }
.caption { margin: 0 0 .7rem; font-size: 1.08rem; line-height: 1.4; overflow-wrap: anywhere; }
ins, del { padding: .05em .25em; border-radius: .3em; }
ins { background: var(--came); color: var(--came-ink); text-decoration: none; font-weight: 600; }
del { background: var(--went); color: var(--went-ink); }
.same { padding: .1em .5em; border-radius: 1em; background: var(--chip); font-size: .72rem; }
fieldset { margin: .9rem 0 0; padding: 0; border: 0; }
.words { display: flex; flex-wrap: wrap; gap: .35rem; margin-top: .35rem; }
.words label { position: relative; cursor: pointer; }
.words input { position: absolute; inset: 0; margin: 0; opacity: 0; cursor: inherit; }
.words span { display: block; padding: .15rem .6rem; border: 1px solid transparent;
  border-radius: 1em; background: var(--chip); font-size: .88rem; }
.words label:hover span { border-color: var(--accent); }
.words input:checked + span { background: var(--accent); color: var(--card); }
.words input:focus-visible + span { outline: 2px solid var(--accent); outline-offset: 2px; }
table { width: 100%; margin-top: 1rem; border-collapse: collapse; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem .6rem; border-top: 1px solid var(--line); text-align: right;
  font-weight: 400; }
thead th { border: 0; color: var(--quiet); font-size: .78rem; }
th:first-child { padding-left: 0; text-align: left; }
.drift { margin-top: 1rem; }
.drift p { display: flex; justify-content: space-between; margin: 0 0 .3rem; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
.drift p span { color: var(--quiet); }
.bar { height: .4rem; border-radius: 1em; background: var(--chip); overflow: hidden; }
.bar div { height: 100%; border-radius: inherit; background: var(--accent); }
details { margin-top: 1rem; font-size: .9rem; }
summary { color: var(--accent); cursor: pointer; }
details ul { margin: .4rem 0 0; padding-left: 1.1rem; }
@media (prefers-reduced-motion: reduce) { .veil { transition: none !important; } }
@media print { body { background: none; } article { break-inside: avoid; } }
"""


def _light_rules(most_words: int) -> str:
    """Show the veil of the word that is chosen, or of the one under the pointer."""
    rules = []
    for number in range(1, most_words + 1):
        # The first label is the whole picture, and has no veil.
        chosen = f"article:has(.words label:nth-child({number + 1}) input:checked)"
        pointed = f"article:has(.words label:nth-child({number + 1}):hover)"
        veil = f".veil:nth-of-type({number + 1})"
        rules.append(f"{chosen}:not(:has(.words label:hover)) {veil}, {pointed} {veil}")
    return ", ".join(rules) + " { opacity: 1; }\n" if rules else ""


def _summary(
    pictures: Sequence[CaptionedPicture],
    labels: tuple[str, str],
    metrics: Mapping[str, Sequence[float]],
) -> str:
    tiles = [("pictures", f"{len(pictures)}")]
    changed = [p.after.split() != p.before.split() for p in pictures if p.after is not None]
    if changed:
        tiles.append(("captions changed", f"{sum(changed)} <small>of {len(changed)}</small>"))
    drifts = [p.drift for p in pictures if p.drift is not None]
    if drifts:
        tiles.append(("mean cosine", f"{sum(drifts) / len(drifts):.4f}"))
    for name, values in metrics.items():
        value = _number(values[-1])
        if len(values) > 1:
            value += f" <small>{escape(labels[0])} {_number(values[0])}</small>"
        tiles.append((escape(name), value))
    items = "".join(f"\n<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return f'<dl class="summary">{items}\n</dl>'


def _card(number: int, picture: CaptionedPicture, labels: tuple[str, str], furthest: float) -> str:
    image = _shrunk(picture.image, _JPEG_SIDE)
    veils = words = ""
    if picture.attention is not None:
        veils = "".join(_veil_tags(picture.attention, picture.grid, image.size))
        words = _word_choice(number, picture.words)
    heading = f"picture-{number}"
    return f"""<article aria-labelledby="{heading}">
<div class="picture"><img src="{_jpeg(image)}" width="{image.width}" height="{image.height}" \
alt="{escape(picture.name)}">{veils}</div>
<div class="body">
<h2 id="{heading}">{escape(picture.name)}</h2>
{_captions(picture, labels)}{words}{_scores(picture, labels)}{_drift(picture, furthest)}\
{_references(picture)}</div>
</article>"""


def _captions(picture: CaptionedPicture, labels: tuple[str, str]) -> str:
    before = picture.before.split()
    if picture.after is None:
        return f'<p class="caption">{escape(" ".join(before))}</p>\n'
    after = picture.after.split()
    if before == after:
        same = f'{escape(labels[0])} and {escape(labels[1])} <span class="same">unchanged</span>'
        return f'<h3>{same}</h3>\n<p class="caption">{escape(" ".join(after))}</p>\n'
    went, came = _marked(before, after)
    return (
        f'<h3>{escape(labels[0])}</h3>\n<p class="caption">{went}</p>\n'
        f'<h3>{escape(labels[1])}</h3>\n<p class="caption">{came}</p>\n'
    )


def _marked(before: list[str], after: list[str]) -> tuple[str, str]:
    """Both captions, with <del> around the words that went and <ins> around those that came."""
    went, came = [], []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        old, new = escape(" ".join(before[i:i_end])), escape(" ".join(after[j:j_end]))
        if old:
            went.append(old if kind == "equal" else f"<del>{old}</del>")
        if new:
            came.append(new if kind == "equal" else f"<ins>{new}</ins>")
    return " ".join(went), " ".join(came)


def _word_choice(number: int, words: Sequence[str]) -> str:
    choices = [
        f'<label><input type="radio" name="word-{number}"{checked}><span>{word}</span></label>'
        for word, checked in [
            ("whole picture", " checked"),
            *((escape(word), "") for word in words),
        ]
    ]
    return (
        "<fieldset>\n<legend>where each word looked</legend>\n"
        f'<div class="words">{"".join(choices)}</div>\n</fieldset>\n'
    )


def _scores(picture: CaptionedPicture, labels: tuple[str, str]) -> str:
    if not picture.scores:
        return ""
    widest = max(len(values) for values in picture.scores.values())
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels[:widest])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{_number(value)}</td>" for value in values)
        + "</tr>\n"
        for name, values in picture.scores.items()
    )
    head = f'<thead><tr><th scope="col">score</th>{heads}</tr></thead>\n' if widest > 1 else ""
    return f"<table>\n{head}<tbody>\n{rows}</tbody>\n</table>\n"


def _drift(picture: CaptionedPicture, furthest: float) -> str:
    if picture.drift is None:
        return ""
    share = (1 - picture.drift) / furthest if furthest > 0 else 0.0
    return (
        '<div class="drift">\n'
        f"<p><span>features, cosine before to after</span>{picture.drift:.4f}</p>\n"
        f'<div class="bar" aria-hidden="true"><div style="width: {100 * share:.1f}%"></div></div>\n'
        "</div>\n"
    )


def _references(picture: CaptionedPicture) -> str:
    if not picture.references:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in picture.references)
    return f"<details>\n<summary>what people wrote</summary>\n<ul>{items}</ul>\n</details>\n"


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:#.3g}".rstrip(".") if math.isfinite(value) else "–"


def _veil_tags(attention: Tensor, grid: tuple[int, int] | None, size: tuple[int, int]) -> list[str]:
    """For each word a small black picture that is opaque where the word did not look."""
    shrink = _VEIL_SIDE / max(size)
    width, height = (max(1, round(side * shrink)) for side in size)
    dark = (1 - _DIM) * (1 - attention_light(attention, (height, width), grid))
    tags = []
    for mask in (255 * dark).round().byte().numpy():
        veil = Image.merge("LA", (Image.new("L", (width, height)), Image.fromarray(mask)))
        tags.append(f'<img class="veil" src="{_data_uri(veil, "PNG", optimize=True)}" alt="">')
    return tags


def _jpeg(image: Image.Image) -> str:
    return _data_uri(image, "JPEG", quality=_JPEG_QUALITY, optimize=True)


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
