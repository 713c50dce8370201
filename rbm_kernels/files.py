"""Model files: safetensors with a header that says what they hold, and the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .units import KINDS

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"  # the name that the hub's own tools look for
_DOWNLOAD_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_HEADER_KEYS = ("rbm_kernels_format", "visible", "hidden", "n_visible", "n_hidden")


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write a file that appears whole or not at all: an interruption leaves the earlier file.

    Args:
        path: The file to write; its folder must exist.
        write: Called with the name of a temporary file beside ``path``, which then takes its place.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        # mkstemp makes the file private; these are ordinary files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class SavedModel(NamedTuple):
    """What a model file holds.

    Attributes:
        visible: The kind of visible units, a key of ``rbm_kernels.units.KINDS``.
        n_visible: Number V of visible units.
        n_hidden: Number H of hidden units.
        tensors: The parameters by name, of one float dtype.
    """

    visible: str
    n_visible: int
    n_hidden: int
    tensors: Mapping[str, Tensor]


def write_model(
    path: str | os.PathLike[str], model: SavedModel, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a model as a safetensors file; see ``RBM.save``."""
    header = {
        "format": "pt",
        "rbm_kernels_format": str(FORMAT_VERSION),
        "visible": model.visible,
        "hidden": "bernoulli",
        "n_visible": str(model.n_visible),
        "n_hidden": str(model.n_hidden),
    }
    for name in metadata or {}:
        if name in header:
            raise ValueError(f"save: metadata must not contain {name!r}, which is reserved")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.tensors.items()}
    content = {**header, **(metadata or {})}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=content))


def read_model(path: str | os.PathLike[str]) -> SavedModel:
    """Read and check a model file; see ``RBM.load``."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load: path must be a model file, got {path!r}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"load: {path!r} is not a safetensors file: {error}") from error
    model = SavedModel(*_read_header(path, header), tensors)
    _check_tensors(path, model)
    return model


def _read_header(path: str, header: Mapping[str, str]) -> tuple[str, int, int]:
    """Check a file's metadata and return (kind of visible units, V, H)."""
    if "rbm_kernels_format" not in header:
        raise ValueError(
            f"load: {path!r} is not an RBM file: its metadata must name 'rbm_kernels_format', "
            f"got {sorted(header)}"
        )
    missing = [key for key in _HEADER_KEYS if key not in header]
    if missing:
        raise ValueError(f"load: the metadata of {path!r} must name {missing}, got {dict(header)}")
    try:
        version, n_visible, n_hidden = (
            int(header[key]) for key in ("rbm_kernels_format", "n_visible", "n_hidden")
        )
    except ValueError:
        raise ValueError(
            f"load: the format and sizes in the metadata of {path!r} must be whole numbers, "
            f"got {dict(header)}"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"load: {path!r} must be of format {FORMAT_VERSION}, got {version}; "
            "a newer rbm-kernels may read it"
        )
    if header["visible"] not in KINDS or header["hidden"] != "bernoulli":
        raise ValueError(
            f"load: {path!r} must have visible units of {tuple(KINDS)} and Bernoulli hidden "
            f"units, got {header['visible']!r} and {header['hidden']!r}"
        )
    return header["visible"], n_visible, n_hidden


def _check_tensors(path: str, model: SavedModel) -> None:
    """The tensors must be those of such a model, in shape and dtype."""
    shapes = {"W": [model.n_visible, model.n_hidden], "b": [model.n_visible], "c": [model.n_hidden]}
    shapes |= {name: [model.n_visible] for name in KINDS[model.visible].parameter_names}
    if set(model.tensors) != set(shapes):
        raise ValueError(
            f"load: {path!r} must hold the tensors {sorted(shapes)}, got {sorted(model.tensors)}"
        )
    dtype = model.tensors["W"].dtype
    for name, shape in shapes.items():
        tensor = model.tensors[name]
        if list(tensor.shape) != shape:
            raise ValueError(f"load: {name} in {path!r} must be {shape}, got {list(tensor.shape)}")
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ValueError(
                f"load: the tensors in {path!r} must share one float dtype, "
                f"got W {dtype} and {name} {tensor.dtype}"
            )


class _WithoutHub:
    """Stands in for the hub's mixin, and says at first use what to install."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        raise _hub_is_missing("save_pretrained")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise _hub_is_missing("from_pretrained")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        raise _hub_is_missing("push_to_hub")


def _hub_is_missing(method: str) -> ImportError:
    return ImportError(
        f"RBM.{method}: needs the package huggingface_hub, which is not installed; "
        "install it with `pip install 'rbm-kernels[hub]'`"
    )


if TYPE_CHECKING:
    HubMixin = _WithoutHub  # a class chosen at run time is no base class for a type checker
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as HubMixin
    except ImportError:
        HubMixin = _WithoutHub


def pretrained_file(model_id: str, options: Mapping[str, Any]) -> str:
    """The model file in a local folder, or downloaded from the hub.

    Args:
        model_id: A folder, or the name of a repository on the hub.
        options: What the hub's mixin hands on; the options of a download are taken from it.
    """
    if os.path.isdir(model_id):
        return os.path.join(model_id, WEIGHTS_FILE)
    from huggingface_hub import hf_hub_download

    download = {name: options[name] for name in _DOWNLOAD_OPTIONS if name in options}
    file: str = hf_hub_download(repo_id=model_id, filename=WEIGHTS_FILE, **download)
    return file
