"""``rbm-kernels sample``: draw from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._common import MODEL, HelpFormatter, add_backend

if TYPE_CHECKING:
    from torch import Tensor

    from rbm_kernels.rbm import RBM


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``rbm-kernels``."""
    parser = commands.add_parser(
        "sample",
        help="draw from a trained model",
        description=(
            "Draw states by block Gibbs sampling, from independent pixels or from rows of --data. "
            "With --clamp, a part of those images is held and the rest is sampled."
        ),
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=sample)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help=f"a {MODEL} file, or the folder that holds one")
    add("-n", type=int, default=100, help="number of samples")
    add("-k", type=int, default=1000, help="number of Gibbs sweeps")
    add(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="file to write, a .png picture or an .npy array",
    )
    add("--seed", type=int, default=0, help="seed of the chains")
    add("--data", help="data set from whose rows the chains start, as for train")
    add(
        "--clamp",
        choices=("top", "bottom", "left", "right"),
        help="half of the images of --data that is held",
    )
    add(
        "--means",
        action="store_true",
        help="write p(v = 1 | h) of the last sweep instead of states",
    )
    add("--shape", help="shape of the images as HEIGHTxWIDTH, where the model does not know it")
    add_backend(parser)


def sample(arguments: argparse.Namespace) -> int:
    """Draw samples, and write them as a picture or an array."""
    import torch

    from rbm_kernels import plots
    from rbm_kernels.rbm import RBM

    path = arguments.model / MODEL if arguments.model.is_dir() else arguments.model
    picture = arguments.out.suffix == ".png"
    if not picture and arguments.out.suffix != ".npy":
        raise ValueError(f"sample: out must end in .png or .npy, got {arguments.out}")
    for name in ("n", "k"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"sample: {name} must be at least 1, got {getattr(arguments, name)}")
    if picture:
        plots.require()
    model = RBM.load(path)
    image_shape = _image_shape(arguments.shape, path, model.n_visible)
    if image_shape is None and (picture or arguments.clamp):
        raise ValueError("sample: the model does not know its images' shape: give --shape")
    options: Any = {
        "seed": torch.tensor([arguments.seed, 0]),
        "backend": arguments.backend,
        "precision": arguments.precision,
    }
    chains, clamp = _start(arguments, model, image_shape, options)
    if arguments.means or picture:
        v = last_means(model, chains, arguments.k, clamp=clamp, **options)
    else:
        v = model.sample(chains=chains, k=arguments.k, clamp=clamp, **options)
    if picture:
        assert image_shape is not None
        title = f"{arguments.n} samples after {arguments.k} sweeps"
        if clamp is not None:
            title += f", {arguments.clamp} half given"
        plots.save(plots.samples(v, image_shape, title=title), arguments.out)
    else:
        import numpy as np

        states = not arguments.means and model.units.fits_bytes
        np.save(arguments.out, v.to(torch.uint8 if states else torch.float32).numpy())
    print(f"written: {arguments.out}")
    return 0


def _start(
    arguments: argparse.Namespace,
    model: RBM,
    image_shape: tuple[int, int] | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The states [N, V] from which the chains start, and the mask [V] of what is held, or None."""
    import torch

    from rbm_kernels import data

    if arguments.data is None:
        if arguments.clamp:
            raise ValueError("sample: clamp needs data whose half is held: give --data")
        off = model.W.detach().new_zeros(arguments.n, model.n_hidden)
        return model.sample_visible(off, **options), None
    values = data.load(arguments.data).values
    if values.shape[1] != model.n_visible:
        raise ValueError(
            f"sample: data must have V = {model.n_visible} units as the model, got "
            f"{values.shape[1]}"
        )
    # Spread over the file, whose rows may be sorted by class.
    rows = torch.linspace(0, values.shape[0] - 1, arguments.n).long()
    chains = values[rows].to(model.W.dtype)
    if not arguments.clamp:
        return chains, None
    assert image_shape is not None
    clamp = _half(arguments.clamp, image_shape)
    # What is not held starts from noise: nothing of the answer leaks.
    noise = torch.rand(chains.shape, generator=torch.Generator().manual_seed(arguments.seed))
    return torch.where(clamp, chains, (noise < 0.5).to(chains.dtype)), clamp


def _image_shape(given: str | None, model_path: Path, n_visible: int) -> tuple[int, int] | None:
    """(height, width) from --shape, or else from the model file's header, or None."""
    from safetensors import safe_open

    if given is None:
        with safe_open(model_path, framework="pt") as file:
            given = (file.metadata() or {}).get("image_shape")
        if given is None:
            return None
    try:
        height, width = (int(side) for side in given.split("x"))
    except ValueError:
        raise ValueError(f"sample: shape must be HEIGHTxWIDTH, got {given!r}") from None
    if height < 1 or width < 1 or height * width != n_visible:
        raise ValueError(
            f"sample: shape must have height * width = V = {n_visible}, got {height}x{width}"
        )
    return height, width


def _half(side: str, image_shape: tuple[int, int]) -> Tensor:
    """A mask [V] of half of the pixels."""
    import torch

    height, width = image_shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    {
        "top": mask[: height // 2],
        "bottom": mask[height // 2 :],
        "left": mask[:, : width // 2],
        "right": mask[:, width // 2 :],
    }[side].fill_(True)
    return mask.flatten()


def last_means(
    model: RBM,
    chains: Tensor,
    k: int,
    *,
    clamp: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """E[v | h] in the last of k sweeps: smoother to look at than states of 0 and 1.

    Args:
        model: The RBM.
        chains: [N, V], the states from which the sweeps start.
        k: Number of sweeps, at least 1.
        clamp: [V], True for the units that are held, or None.
        **options: ``seed``, a tensor, ``backend`` and ``precision``, as for the operations.

    Returns:
        [N, V] means, and the states of the units that are held.
    """
    import torch

    if k > 1:
        chains = model.sample(chains=chains, k=k - 1, clamp=clamp, **options)
    h = model.sample_hidden(chains, **options)
    _, means = model.sample_visible(h, return_probs=True, **options)
    return means if clamp is None else torch.where(clamp, chains.to(means.dtype), means)
