"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import BlipForConditionalGeneration, BlipProcessor


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when all went well, and goes if not.

    Raises:
        FileExistsError: ``target`` exists and is no empty folder.
    """
    final = Path(target)
    require_new_folder(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp makes it the owner's alone.
        yield unfinished
        # On POSIX an empty folder of that name gives way.
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def require_new_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds something.

    Raises:
        FileExistsError: It exists and is no empty folder.
    """
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"the folder to write must be new or empty, got {folder}")


def save_captioner(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    folder: str | os.PathLike[str],
) -> None:
    """Write a model and its processor into one new folder, as Hugging Face's Auto classes read it.

    Raises:
        FileExistsError: The folder exists and is not empty.
    """
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
