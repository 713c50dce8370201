"""Checkpoints: one file that holds everything a run needs to go on bit for bit."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbm_kernels.files import write_atomically
from rbm_kernels.inputs import as_rows
from rbm_kernels.rbm import RBM
from rbm_kernels.settings import Settings

from .negative_phase import NEGATIVE_PHASES
from .run import Run, make_optimizer

FORMAT = 2

# What stands in a checkpoint as it stands in the run.
_PLAIN = ("seed", "order", "epoch", "batch", "sums", "training_seconds", "elapsed", "history")


def save_checkpoint(path: Path, run: Run, data: Tensor) -> None:
    """Write everything a run needs to go on bit for bit into one file, whole or not at all.

    Args:
        path: The file to write.
        run: The run.
        data: [N, V], what the run was started with; the file identifies it and does not hold it.
    """
    content = {
        "format": FORMAT,
        "settings": asdict(run.settings),
        "data": _fingerprint(as_rows("save_checkpoint", "data", data)),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "negative_phase": run.negative_phase.state_dict(),
        "generator": run.generator.get_state(),
        **{name: getattr(run, name) for name in _PLAIN},
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, data: Tensor, **changes: Any) -> Run:
    """The run saved in ``path``, ready to go on with ``train``.

    Args:
        path: A file written by ``save_checkpoint``, of this format or of format 1.
        data: [N, V], what the run was started with.
        **changes: Settings to change, such as more epochs. The learning rate then follows the
            longer run's schedule.

    Returns:
        The run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint of this package, the data are others, or a changed
            setting is out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: checkpoint must be an existing file, got {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"resume: {path} is no checkpoint that can be read ({error})") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found == 1:
        content = _from_format_1(content)
    elif found != FORMAT:
        raise ValueError(f"resume: {path} must be a checkpoint of format {FORMAT}, got {found}")
    data = as_rows("resume", "data", data)
    if content["data"] != _fingerprint(data):
        raise ValueError(
            f"resume: {path} was trained on other data: rows, values and split must be the same "
            f"({content['data']['shape']}, got {list(data.shape)})"
        )
    settings = Settings(**{**content["settings"], **changes})
    model = RBM(data.shape[1], settings.n_hidden)
    model.load_state_dict(content["model"])
    optimizer = make_optimizer(model, settings)
    optimizer.load_state_dict(content["optimizer"])
    generator = torch.Generator()
    # A phase starts from random states, which those of the checkpoint then replace.
    negative_phase = NEGATIVE_PHASES[settings.negative_phase].start(model, settings, generator)
    negative_phase.load_state_dict(content["negative_phase"])
    generator.set_state(content["generator"])
    return Run(
        settings=settings,
        model=model,
        optimizer=optimizer,
        negative_phase=negative_phase,
        generator=generator,
        **{name: content[name] for name in _PLAIN},
    )


def _from_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of format 1 under this format's names."""
    settings = dict(content["settings"])
    settings["n_hidden"] = settings.pop("hidden")
    settings["batch_size"] = settings.pop("batch")
    n_chains = settings.pop("chains")
    if n_chains:
        settings["n_chains"] = n_chains
    else:
        settings["negative_phase"] = "cd"
    return {**content, "settings": settings, "negative_phase": {"chains": content["chains"]}}


def _fingerprint(data: Tensor) -> dict[str, Any]:
    """Shape, dtype and checksum, by which other data are told apart."""
    values = data.contiguous()
    return {
        "shape": list(data.shape),
        "dtype": str(data.dtype),
        "crc32": zlib.crc32(values.view(torch.uint8).numpy().tobytes()),
    }
