"""The restricted Boltzmann machine as a ``torch.nn.Module``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .ops.cd import cd_loss, cd_step
from .ops.free_energy import free_energy
from .ops.gibbs import gibbs_sample
from .ops.sample import sample_hidden, sample_visible
from .seeds import Seed

if TYPE_CHECKING:
    from typing_extensions import Self

    from .ops.cd import CDStep

try:
    from huggingface_hub import PyTorchModelHubMixin as _HubMixin
except ImportError:

    class _HubMixin:  # type: ignore[no-redef]
        """Stands in for the mixin, and says at first use what to install."""

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            raise _hub_is_missing("save_pretrained")

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            raise _hub_is_missing("from_pretrained")

        def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
            raise _hub_is_missing("push_to_hub")


FORMAT_VERSION = 1
_VISIBLE_KINDS = ("bernoulli", "gaussian")
_METADATA_KEYS = ("rbm_kernels_format", "visible", "hidden", "n_visible", "n_hidden")
_WEIGHTS_FILE = "model.safetensors"


def _hub_is_missing(method: str) -> ImportError:
    return ImportError(
        f"RBM.{method}: needs the package huggingface_hub, which is not installed; "
        "install it with `pip install 'rbm-kernels[hub]'`"
    )


def _later(seed: Seed | None, half_sweeps: int) -> Seed | None:
    """The seed from which draws go on after some half-sweeps (a tensor advances by itself)."""
    if isinstance(seed, tuple):
        return (seed[0], seed[1] + half_sweeps)
    if isinstance(seed, int):
        return (seed, half_sweeps)
    return seed


class RBM(
    nn.Module,
    _HubMixin,
    library_name="rbm-kernels",
    license="apache-2.0",
    tags=["rbm", "energy-based-model"],
):
    """A restricted Boltzmann machine with binary hidden units.

    Energies (Smolensky 1986; Hinton, "A practical guide to training restricted Boltzmann
    machines", 2010):

    - Bernoulli visible units: ``E(v, h) = -v'Wh - b'v - c'h``.
    - Gaussian visible units: ``E(v, h) = sum_i (v_i - b_i)^2 / (2 s_i^2) - (v/s^2)'Wh - c'h``
      with ``log_var = log s^2`` learned.

    A new model has ``W ~ N(0, 0.01^2)`` and zeros elsewhere; :meth:`initialize_from_data` sets the
    visible units to the data's own statistics, which saves the first epochs.

    The methods take the keywords of the functions of the same names: ``seed``, ``generator``,
    ``chain_offset``, ``backend`` and ``precision``.

    ``cd_loss`` is a loss like any other. ``DistributedDataParallel`` synchronises what its
    ``forward`` computes, so give it a small module whose ``forward(v)`` returns
    ``rbm.cd_loss(v)``, and give each rank its own ``chain_offset``.

    Args:
        n_visible: Number V of visible units, at least 1.
        n_hidden: Number H of hidden units, at least 1.
        visible: ``"bernoulli"`` or ``"gaussian"``.
        device: Device of the parameters.
        dtype: Float dtype of the parameters.

    Attributes:
        W: Weights [V, H].
        b: Visible bias [V].
        c: Hidden bias [H].
        log_var: Log-variance [V] of Gaussian visible units, otherwise None.

    Raises:
        ValueError: A size below 1, or an unknown kind of visible unit.
        TypeError: A dtype that is not a float.

    Example:
        >>> import torch
        >>> rbm = RBM(6, 4)
        >>> v = torch.randint(0, 2, (8, 6)).float()
        >>> rbm(v).shape
        torch.Size([8, 4])
        >>> rbm.cd_loss(v, seed=0).backward()
        >>> rbm.W.grad.shape
        torch.Size([6, 4])
    """

    W: nn.Parameter
    b: nn.Parameter
    c: nn.Parameter
    log_var: nn.Parameter | None

    def __init__(
        self,
        n_visible: int,
        n_hidden: int,
        visible: str = "bernoulli",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n_visible", n_visible), ("n_hidden", n_hidden)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"RBM: {name} must be an int of 1 or more, got {size!r}")
        if visible not in _VISIBLE_KINDS:
            raise ValueError(f"RBM: visible must be one of {_VISIBLE_KINDS}, got {visible!r}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"RBM: dtype must be a float dtype, got {dtype}")
        self.n_visible = n_visible
        self.n_hidden = n_hidden
        self.visible = visible
        # What the hub writes into config.json: without this, device= would end up there too.
        self._hub_mixin_config = {
            "n_visible": n_visible,
            "n_hidden": n_hidden,
            "visible": visible,
        }

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.W = empty(n_visible, n_hidden)
        self.b = empty(n_visible)
        self.c = empty(n_hidden)
        self.register_parameter("log_var", empty(n_visible) if visible == "gaussian" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``W ~ N(0, 0.01^2)`` and set the biases and log-variances to zero."""
        nn.init.normal_(self.W, std=0.01)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)
        if self.log_var is not None:
            nn.init.zeros_(self.log_var)

    @torch.no_grad()
    def initialize_from_data(self, v: Tensor) -> Self:
        """Set the visible biases (and log-variances) to those of independent units fitted to data.

        Bernoulli: ``b = log((n1 + 1/2) / (n0 + 1/2))`` with ``n1`` and ``n0`` the sums of ``v`` and
        of ``1 - v``, finite for units that never change (Hinton 2010, section 8.1).
        Gaussian: mean and log-variance; a unit of zero variance is given variance 1.

        Args:
            v: Data [N, V], N of 1 or more, on any device: bool, uint8 or any float dtype. In
                [0, 1] for Bernoulli units, finite for Gaussian ones.

        Returns:
            The model itself.

        Raises:
            ValueError: A wrong shape, no rows, NaN, or values out of range.
        """
        if v.ndim != 2 or v.shape[1] != self.n_visible:
            raise ValueError(
                f"initialize_from_data: v must be [N, V] = [N, {self.n_visible}], "
                f"got {list(v.shape)}"
            )
        count = v.shape[0]
        if count < 1:
            raise ValueError("initialize_from_data: v must have 1 or more rows, got 0")
        if v.is_floating_point() and not bool(torch.isfinite(v).all()):
            raise ValueError("initialize_from_data: v must be finite, got NaN or infinity")
        wide = torch.promote_types(self.b.dtype, torch.float32)
        if self.log_var is None:
            if v.dtype != torch.bool and (bool((v < 0).any()) or bool((v > 1).any())):
                raise ValueError(
                    "initialize_from_data: v must lie in [0, 1] for Bernoulli units, "
                    f"got values from {v.min().item():g} to {v.max().item():g}"
                )
            on = v.sum(0, dtype=wide)
            self.b.copy_(torch.log((on + 0.5) / (count - on + 0.5)))
        else:
            data = v.to(wide)
            variance, mean = torch.var_mean(data, dim=0, correction=0)
            # Rounding can leave a constant unit a variance of the order of (eps * mean)^2.
            constant = variance <= (4 * torch.finfo(wide).eps * mean).square()
            self.b.copy_(mean)
            self.log_var.copy_(torch.where(constant, 1.0, variance).log())
        return self

    @classmethod
    def from_data(
        cls,
        v: Tensor,
        n_hidden: int,
        visible: str = "bernoulli",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new model whose visible units start from the statistics of the data ``v`` [N, V].

        See :meth:`initialize_from_data` for what is computed and raised.
        """
        if v.ndim != 2:
            raise ValueError(f"from_data: v must be [N, V], got {list(v.shape)}")
        model = cls(v.shape[1], n_hidden, visible, device=device, dtype=dtype)
        return model.initialize_from_data(v)

    def forward(self, v: Tensor) -> Tensor:
        """The probabilities p(h = 1 | v) [B, H] of data [B, V]: plain, differentiable PyTorch."""
        v = v.to(self.W.dtype)
        if self.log_var is not None:
            v = v * torch.exp(-self.log_var)
        return torch.sigmoid(v @ self.W + self.c)

    def reconstruct(self, v: Tensor, *, sampled: bool = False, **draw: Any) -> Tensor:
        """Data passed to the hidden layer and back.

        Args:
            v: Data [B, V].
            sampled: False: the mean-field reconstruction E[v | h = p(h|v)], differentiable.
                True: states drawn from p(v|h) with h drawn from p(h|v), i.e. one Gibbs sweep.
            **draw: Keywords of :func:`rbm_kernels.gibbs_sample`, when ``sampled``.

        Returns:
            Means or states [B, V] in the dtype of W.
        """
        if sampled:
            return self.sample(chains=v, k=1, **draw)
        if draw:
            raise TypeError(
                f"reconstruct: {sorted(draw)} have a meaning only with sampled=True, got False"
            )
        mean = self(v) @ self.W.t() + self.b
        return mean if self.log_var is not None else torch.sigmoid(mean)

    def free_energy(self, v: Tensor, **options: Any) -> Tensor:
        """Free energies F(v) [B] of data [B, V]; see :func:`rbm_kernels.free_energy`."""
        return free_energy(v, self.W, self.b, self.c, log_var=self.log_var, **options)

    def cd_loss(
        self, v: Tensor, k: int = 1, *, chains: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The scalar mean F(v) - mean F(v_k), whose backward is the CD-k gradient.

        Args:
            v: Data [B, V].
            k: Gibbs sweeps, 1 or more.
            chains: Persistent chains [N, V], advanced in place (PCD); None starts from ``v``.
            **options: Keywords of :func:`rbm_kernels.cd_loss`.

        Returns:
            A 0-dim tensor. It is no measure of learning: watch the log-likelihood.
        """
        return cd_loss(v, self.W, self.b, self.c, k, chains=chains, log_var=self.log_var, **options)

    def cd_step(
        self, v: Tensor, k: int = 1, *, chains: Tensor | None = None, **options: Any
    ) -> CDStep:
        """Gradients and advanced chains without autograd; see :func:`rbm_kernels.cd_step`."""
        with torch.no_grad():
            return cd_step(
                v, self.W, self.b, self.c, k, chains=chains, log_var=self.log_var, **options
            )

    @torch.no_grad()
    def sample(
        self,
        n: int | None = None,
        k: int = 1000,
        *,
        chains: Tensor | None = None,
        seed: Seed | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw states by k sweeps of block Gibbs sampling.

        Args:
            n: Number of chains to start from the visible biases alone (h = 0), or None with
                ``chains``.
            k: Sweeps, 1 or more.
            chains: States [N, V] from which to go on, or None with ``n``.
            seed: As in :func:`rbm_kernels.gibbs_sample`. New chains use one half-sweep more.
            **options: Other keywords of :func:`rbm_kernels.gibbs_sample`: ``beta``, ``clamp``,
                ``out_dtype``, ``generator``, ``chain_offset``, ``backend``, ``precision``.

        Returns:
            States [n or N, V] in the dtype of W, or ``out_dtype``.

        Raises:
            ValueError: Neither or both of ``n`` and ``chains``; n or k below 1.
        """
        if (n is None) == (chains is None):
            raise ValueError("sample: one of n and chains must be given, got both or neither")
        if chains is None:
            if n is None or n < 1:
                raise ValueError(f"sample: n must be 1 or more, got {n}")
            start = {
                name: options[name]
                for name in ("generator", "chain_offset", "backend", "precision")
                if name in options
            }
            off = self.W.new_zeros(n, self.n_hidden)
            drawn = sample_visible(off, self.W, self.b, log_var=self.log_var, seed=seed, **start)
            assert isinstance(drawn, Tensor)
            chains, seed = drawn, _later(seed, 1)
        return gibbs_sample(
            chains, self.W, self.b, self.c, k, log_var=self.log_var, seed=seed, **options
        )

    @torch.no_grad()
    def sample_hidden(self, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """States of the hidden units [B, H] given v; see :func:`rbm_kernels.sample_hidden`."""
        return sample_hidden(v, self.W, self.c, log_var=self.log_var, **options)

    @torch.no_grad()
    def sample_visible(self, h: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """States of the visible units [B, V] given h; see :func:`rbm_kernels.sample_visible`."""
        return sample_visible(h, self.W, self.b, log_var=self.log_var, **options)

    def extra_repr(self) -> str:
        return f"n_visible={self.n_visible}, n_hidden={self.n_hidden}, visible={self.visible!r}"

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the parameters and unit types to a safetensors file.

        The file appears whole or not at all: an interrupted save leaves the earlier file.

        Args:
            path: File to write, by custom ending in ``.safetensors``.
            metadata: More strings for the file's header.

        Raises:
            ValueError: ``metadata`` uses a name that the format keeps for itself.
        """
        header = {
            "format": "pt",
            "rbm_kernels_format": str(FORMAT_VERSION),
            "visible": self.visible,
            "hidden": "bernoulli",
            "n_visible": str(self.n_visible),
            "n_hidden": str(self.n_hidden),
        }
        for name in metadata or {}:
            if name in header:
                raise ValueError(f"save: metadata must not contain {name!r}, which is reserved")
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.named_parameters()}
        target = Path(path)
        handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(tensors, scratch, metadata={**header, **(metadata or {})})
            # mkstemp makes the file private; a model is as readable as any new file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(scratch, 0o666 & ~umask)
            os.replace(scratch, target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """Read a model written by :meth:`save`, with the dtype it was saved in.

        Args:
            path: The file.
            device: Where to put the parameters.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not a safetensors file, not one of an RBM, of a newer format, or with
                tensors that are missing, unknown, or of the wrong shape or dtype.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"load: path must be a model file, got {path!r}")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"load: {path!r} is not a safetensors file: {error}") from error
        visible, n_visible, n_hidden = _read_header(path, header)
        shapes = {"W": [n_visible, n_hidden], "b": [n_visible], "c": [n_hidden]}
        if visible == "gaussian":
            shapes["log_var"] = [n_visible]
        if set(tensors) != set(shapes):
            raise ValueError(
                f"load: {path!r} must hold the tensors {sorted(shapes)}, got {sorted(tensors)}"
            )
        dtype = tensors["W"].dtype
        for name, shape in shapes.items():
            tensor = tensors[name]
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"load: {name} in {path!r} must be {shape}, got {list(tensor.shape)}"
                )
            if tensor.dtype != dtype or not dtype.is_floating_point:
                raise ValueError(
                    f"load: the tensors in {path!r} must share one float dtype, "
                    f"got W {dtype} and {name} {tensor.dtype}"
                )
        with torch.device("meta"):  # no weights are drawn only to be overwritten
            model = cls(n_visible, n_hidden, visible, dtype=dtype)
        model = model.to_empty(device=device)
        model.load_state_dict(tensors)
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """The hub's hook: our own file, so that its header carries the unit types."""
        self.save(Path(save_directory) / _WEIGHTS_FILE)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: torch.device | str = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        """The hub's hook: reads a folder or downloads the file, whose header decides."""
        if os.path.isdir(model_id):
            file = os.path.join(model_id, _WEIGHTS_FILE)
        else:
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(
                repo_id=model_id,
                filename=_WEIGHTS_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        model = cls.load(file, device=model_kwargs.get("device") or map_location)
        dtype = model_kwargs.get("dtype")
        return model if dtype is None else model.to(dtype)


def _read_header(path: str, header: Mapping[str, str]) -> tuple[str, int, int]:
    """Check a file's metadata and return (kind of visible units, V, H)."""
    if "rbm_kernels_format" not in header:
        raise ValueError(
            f"load: {path!r} is not an RBM file: its metadata must name 'rbm_kernels_format', "
            f"got {sorted(header)}"
        )
    missing = [key for key in _METADATA_KEYS if key not in header]
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
    if header["visible"] not in _VISIBLE_KINDS or header["hidden"] != "bernoulli":
        raise ValueError(
            f"load: {path!r} must have visible units of {_VISIBLE_KINDS} and Bernoulli hidden "
            f"units, got {header['visible']!r} and {header['hidden']!r}"
        )
    return header["visible"], n_visible, n_hidden
