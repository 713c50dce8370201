"""Pictures of a model: filters, samples, reconstructions, learning curves.

Every function returns a matplotlib figure; ``save`` writes it as a PNG and closes it. matplotlib is
imported at the first call, and figures use the Agg canvas whatever backend the user has chosen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#222222"
_COLORS = ("#1f5fa8", "#d1603d", "#3a8f5c")


def filters(W: Tensor, image_shape: tuple[int, int], *, count: int = 100) -> Figure:
    """The weights of hidden units as tiles, those of largest norm first.

    Blue pulls a pixel off, red pulls it on, white is zero; every tile has the same scale, so that
    a faint unit looks faint.

    Args:
        W: [V, H].
        image_shape: (height, width), with height * width = V.
        count: Largest number of units to show.

    Returns:
        A figure.

    Raises:
        ValueError: The rows are no images of that shape.
    """
    W = W.detach().float().cpu()
    order = W.norm(dim=0).argsort(descending=True)[:count]
    tiles = W[:, order].T
    # A few extreme weights would wash out all the others.
    limit = float(tiles.abs().flatten().quantile(0.995)) if tiles.numel() < 2**24 else 1.0
    limit = limit or 1.0
    image = _tile(tiles, image_shape, math.nan)
    return _show(
        image, f"{len(order)} of {W.shape[1]} filters", cmap="RdBu_r", vmin=-limit, vmax=limit
    )


def samples(v: Tensor, image_shape: tuple[int, int], *, title: str = "samples") -> Figure:
    """Images as tiles, dark ink on light ground.

    Args:
        v: [N, V] in [0, 1].
        image_shape: (height, width), with height * width = V.
        title: Title of the figure.

    Returns:
        A figure.

    Raises:
        ValueError: The rows are no images of that shape.
    """
    return _show(_tile(v, image_shape, math.nan), title, cmap="Greys", vmin=0, vmax=1)


def reconstructions(
    v: Tensor, reconstruction: Tensor, image_shape: tuple[int, int], *, per_row: int = 16
) -> Figure:
    """Data and their reconstructions, pairs of rows of tiles: data above, reconstruction below.

    Args:
        v: [N, V].
        reconstruction: [N, V], means or states.
        image_shape: (height, width), with height * width = V.
        per_row: Number of tiles in a row.

    Returns:
        A figure.

    Raises:
        ValueError: The rows are no images of that shape.
    """
    rows = []
    for first in range(0, v.shape[0], per_row):
        for x in (v, reconstruction):
            part = x[first : first + per_row].detach().float().cpu()
            blank = part.new_full((per_row - part.shape[0], part.shape[1]), math.nan)
            rows.append(torch.cat([part, blank]))
    image = _tile(torch.cat(rows), image_shape, math.nan, columns=per_row)
    title = "held-out images (upper rows) and their reconstructions"
    return _show(image, title, cmap="Greys", vmin=0, vmax=1)


def curves(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Learning curves by epoch: free energies and their gap, pseudo-likelihood, throughput.

    Args:
        metrics: One mapping an epoch, as ``training.train`` records them.

    Returns:
        A figure of three panels.
    """
    figure = _figure(10.5, 3.2)
    left, middle, right = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in metrics]

    def line(axes: Any, key: str, label: str, color: int) -> None:
        values = [row[key] for row in metrics]
        axes.plot(epochs, values, color=_COLORS[color], lw=1.6, label=label)

    line(left, "free_energy_gap", "held-out minus training", 1)
    left.axhline(0, color=_INK, lw=0.6)
    left.set_title("free-energy gap (overfitting grows it)")
    left.set_ylabel("nats")
    line(middle, "pseudo_likelihood", "held-out", 0)
    middle.set_title("held-out pseudo-log-likelihood")
    middle.set_ylabel("nats per image")
    line(right, "images_per_second", "training", 2)
    right.set_title("images per second")
    right.set_ylim(bottom=0)
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.title.set_size(10)
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG file."""
    figure.savefig(path, dpi=150, facecolor="white")


def require() -> None:
    """Raise ModuleNotFoundError, naming what to install, unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"plots: pictures need matplotlib ({error}): pip install 'rbm-kernels[train]'",
            name=error.name,
        ) from error


def _figure(width: float, height: float) -> Figure:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tile(
    v: Tensor, image_shape: tuple[int, int], gap: float, columns: int | None = None
) -> Tensor:
    """Rows [N, V] as one image, tiles a pixel or two apart; gaps hold ``gap``."""
    height, width = image_shape
    if v.dim() != 2 or v.shape[1] != height * width or v.shape[0] < 1:
        raise ValueError(
            f"plots: rows must be [N, V] = [N, {height * width}] for images of {height}x{width}, "
            f"got {list(v.shape)}"
        )
    n = v.shape[0]
    columns = columns or math.ceil(math.sqrt(n * height / width))
    rows = math.ceil(n / columns)
    pad = max(1, height // 14)
    cells = torch.full((rows * columns, height + pad, width + pad), gap)
    cells[:n, :height, :width] = v.detach().float().cpu().reshape(n, height, width)
    cells = cells.reshape(rows, columns, height + pad, width + pad).transpose(1, 2)
    return cells.reshape(rows * (height + pad), -1)[:-pad, :-pad]


def _show(image: Tensor, title: str, *, cmap: str, vmin: float, vmax: float) -> Figure:
    height, width = image.shape
    size = 7.0
    figure = _figure(size, size * height / width + 0.35)
    axes = figure.subplots()
    from matplotlib import colormaps

    colors = colormaps[cmap].with_extremes(bad="#e4e4e4")
    axes.imshow(image.numpy(), cmap=colors, vmin=vmin, vmax=vmax, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, color=_INK)
    return figure
