"""The restricted Boltzmann machine as a ``torch.nn.Module``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from . import textbook
from .files import WEIGHTS_FILE, HubMixin, SavedModel, pretrained_file, read_model, write_model
from .inputs import as_rows
from .ops._checks import states
from .ops.cd import cd_loss, cd_step
from .ops.free_energy import free_energy
from .ops.gibbs import gibbs_sample
from .ops.sample import sample_hidden, sample_visible
from .seeds import Seed, advance, later, resolve
from .units import KINDS, Units

if TYPE_CHECKING:
    from typing_extensions import Self

    from .ops.cd import CDStep


class RBM(
    nn.Module,
    HubMixin,
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
    - Spins, -1 or 1: the energy of Bernoulli units.

    A new model has ``W ~ N(0, 0.01^2)`` and zeros elsewhere; ``initialize_from_data`` sets the
    visible units to the data's own statistics, which saves the first epochs.

    The methods take the keywords of the functions of the same names: ``seed``, ``generator``,
    ``chain_offset``, ``backend`` and ``precision``.

    ``cd_loss`` is a loss like any other. ``DistributedDataParallel`` synchronises what its
    ``forward`` computes, so give it a small module whose ``forward(v)`` returns
    ``rbm.cd_loss(v)``, and give each rank its own ``chain_offset``.

    Args:
        n_visible: Number V of visible units, at least 1.
        n_hidden: Number H of hidden units, at least 1.
        visible: ``"bernoulli"``, ``"gaussian"`` or ``"spin"``.
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
        if visible not in KINDS:
            raise ValueError(f"RBM: visible must be one of {tuple(KINDS)}, got {visible!r}")
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
        for kind in KINDS.values():
            for name in kind.parameter_names:
                own = name in KINDS[visible].parameter_names
                self.register_parameter(name, empty(n_visible) if own else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``W ~ N(0, 0.01^2)`` and set the biases and log-variances to zero."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.01) if name == "W" else nn.init.zeros_(parameter)

    @property
    def units(self) -> Units:
        """The visible units: what depends on their kind."""
        kind = KINDS[self.visible]
        return kind(*(getattr(self, name) for name in kind.parameter_names))

    @property
    def _kind(self) -> dict[str, Any]:
        """The keywords by which a function knows the visible units."""
        return {"log_var": self.log_var, "visible": self.visible}

    @torch.no_grad()
    def initialize_from_data(self, v: Tensor) -> Self:
        """Set the visible biases (and log-variances) to those of independent units fitted to data.

        Bernoulli: ``b = log((n1 + 1/2) / (n0 + 1/2))`` with ``n1`` and ``n0`` the sums of ``v`` and
        of ``1 - v``, finite for units that never change (Hinton 2010, section 8.1).
        Gaussian: mean and log-variance; a unit of zero variance is given variance 1.
        Spin: half the log-odds of 1, smoothed likewise.

        Args:
            v: Data [N, V], N of 1 or more: a tensor on any device, a NumPy array, a table or
                lists (see ``rbm_kernels.inputs``). In [0, 1] for Bernoulli units, finite for
                Gaussian ones, -1 or 1 for spins.

        Returns:
            The model itself.

        Raises:
            TypeError: Data of another kind.
            ValueError: A wrong shape, no rows, NaN, or values out of range.
        """
        v = as_rows("initialize_from_data", "v", v, self.n_visible)
        if v.shape[0] < 1:
            raise ValueError("initialize_from_data: v must have 1 or more rows, got 0")
        if v.is_floating_point() and not bool(torch.isfinite(v).all()):
            raise ValueError("initialize_from_data: v must be finite, got NaN or infinity")
        wide = torch.promote_types(self.b.dtype, torch.float32)
        b, units = KINDS[self.visible].fit("initialize_from_data", v, wide)
        self.b.copy_(b)
        for name, value in units.parameters():
            getattr(self, name).copy_(value)
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

        See ``initialize_from_data`` for what is computed and raised.
        """
        v = as_rows("from_data", "v", v)
        model = cls(v.shape[1], n_hidden, visible, device=device, dtype=dtype)
        return model.initialize_from_data(v)

    def forward(self, v: Tensor) -> Tensor:
        """The probabilities p(h = 1 | v) [B, H] of data [B, V]: plain, differentiable PyTorch.

        Unlike the operations it does not look at the values of v, which may be anything.
        """
        v = states("forward", "v", v, self.n_visible, "V", self.W)
        return textbook.hidden_mean(v.to(self.W.dtype), self.W, self.c, self.units)

    def reconstruct(self, v: Tensor, *, sampled: bool = False, **draw: Any) -> Tensor:
        """Data passed to the hidden layer and back.

        Args:
            v: Data [B, V].
            sampled: False: the mean-field reconstruction E[v | h = p(h|v)], differentiable.
                True: states drawn from p(v|h) with h drawn from p(h|v), i.e. one Gibbs sweep.
            **draw: Keywords of ``rbm_kernels.gibbs_sample``, when ``sampled``.

        Returns:
            Means or states [B, V] in the dtype of W.
        """
        if sampled:
            return self.sample(chains=v, k=1, **draw)
        if draw:
            raise TypeError(
                f"reconstruct: {sorted(draw)} have a meaning only with sampled=True, got False"
            )
        return textbook.visible_mean(self(v), self.W, self.b, self.units)

    def free_energy(self, v: Tensor, **options: Any) -> Tensor:
        """Free energies F(v) [B] of data [B, V]; see ``rbm_kernels.free_energy``."""
        return free_energy(v, self.W, self.b, self.c, **self._kind, **options)

    def cd_loss(
        self, v: Tensor, k: int = 1, *, chains: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The scalar mean F(v) - mean F(v_k), whose backward is the CD-k gradient.

        Args:
            v: Data [B, V].
            k: Gibbs sweeps, 1 or more.
            chains: Persistent chains [N, V], advanced in place (PCD); None starts from ``v``.
            **options: Keywords of ``rbm_kernels.cd_loss``.

        Returns:
            A 0-dim tensor. It is no measure of learning: watch the log-likelihood.
        """
        return cd_loss(v, self.W, self.b, self.c, k, chains=chains, **self._kind, **options)

    def cd_step(
        self, v: Tensor, k: int = 1, *, chains: Tensor | None = None, **options: Any
    ) -> CDStep:
        """Gradients and advanced chains without autograd; see ``rbm_kernels.cd_step``."""
        with torch.no_grad():
            return cd_step(v, self.W, self.b, self.c, k, chains=chains, **self._kind, **options)

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
            seed: As in ``rbm_kernels.gibbs_sample``. New chains use one half-sweep more.
            **options: Other keywords of ``rbm_kernels.gibbs_sample``: ``beta``, ``clamp``,
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
            # A seed tensor is advanced when all is drawn, so that an error leaves it as it was.
            own = seed
            if isinstance(seed, Tensor):
                own = resolve("sample", seed, options.get("generator"), self.W.device).clone()
            first = sample_visible(off, self.W, self.b, **self._kind, seed=own, **start)
            own = later(own, 1)
            drawn = gibbs_sample(
                first, self.W, self.b, self.c, k, **self._kind, seed=own, **options
            )
            advance(seed, 2 * k + 1)
            return drawn
        chains = states("sample", "chains", chains, self.n_visible, "V", self.W)
        return gibbs_sample(chains, self.W, self.b, self.c, k, **self._kind, seed=seed, **options)

    @overload
    def sample_hidden(
        self, v: Tensor, *, return_probs: Literal[False] = False, **options: Any
    ) -> Tensor: ...

    @overload
    def sample_hidden(
        self, v: Tensor, *, return_probs: Literal[True], **options: Any
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def sample_hidden(self, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """States of the hidden units [B, H] given v; see ``rbm_kernels.sample_hidden``."""
        return sample_hidden(v, self.W, self.c, **self._kind, **options)

    @overload
    def sample_visible(
        self, h: Tensor, *, return_probs: Literal[False] = False, **options: Any
    ) -> Tensor: ...

    @overload
    def sample_visible(
        self, h: Tensor, *, return_probs: Literal[True], **options: Any
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def sample_visible(self, h: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """States of the visible units [B, V] given h; see ``rbm_kernels.sample_visible``."""
        return sample_visible(h, self.W, self.b, **self._kind, **options)

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
        tensors = dict(self.named_parameters())
        saved = SavedModel(self.visible, self.n_visible, self.n_hidden, tensors)
        write_model(path, saved, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """Read a model written by ``save``, with the dtype it was saved in.

        Args:
            path: The file.
            device: Where to put the parameters.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not a safetensors file, not one of an RBM, of a newer format, or with
                tensors that are missing, unknown, or of the wrong shape or dtype.
        """
        saved = read_model(path)
        with torch.device("meta"):  # no weights are drawn only to be overwritten
            dtype = saved.tensors["W"].dtype
            model = cls(saved.n_visible, saved.n_hidden, saved.visible, dtype=dtype)
        model = model.to_empty(device=device)
        model.load_state_dict(saved.tensors)
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """The hub's hook: our own file, so that its header carries the unit types."""
        self.save(Path(save_directory) / WEIGHTS_FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        """The hub's hook: reads a folder or downloads the file, whose header decides."""
        device = options.get("device") or options.get("map_location", "cpu")
        model = cls.load(pretrained_file(model_id, options), device=device)
        dtype = options.get("dtype")
        return model if dtype is None else model.to(dtype)
