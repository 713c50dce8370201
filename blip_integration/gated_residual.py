"""A fitted RBM as a captioner needs it: its reconstruction of features, and how much of it counts.

``RBMReconstructor`` maps standardized features [N, D] to their reconstruction. ``GatedResidual``
holds one together with the features' mean and scale, mixes it into a captioner's vision features,
and is kept in one file. Everything here is plain PyTorch; ``fitting`` makes such residuals, and
``modeling`` puts them into a transformers model.
"""

from __future__ import annotations

import json
import math
import os
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rbm_kernels import RBM, gibbs_sample, sample_hidden, sample_visible
from rbm_kernels.files import write_atomically

Mode: TypeAlias = Literal["mean_field", "gibbs"]
ClsToken: TypeAlias = Literal["shared", "apart", "skip"]

MODES = ("mean_field", "gibbs")
CLS_TOKENS = ("shared", "apart", "skip")

# A strength of 1 would be a gate of infinity; this is the largest below it in float32.
_LARGEST_STRENGTH = 1 - 2**-24
_FILE_KIND = "gated_residual"


class RBMReconstructor(nn.Module):
    """The reconstruction of features by a Gaussian-Bernoulli RBM.

    Mean-field is deterministic and differentiable: k times ``z <- W sigmoid(W'(z / s^2) + c) + b``.
    Gibbs sampling returns the states of k sweeps; the gradient stops there. It draws the same
    numbers at every call in evaluation mode, so that an image keeps its captions, and new ones at
    every call in training mode.

    Args:
        rbm: With Gaussian visible units; used as it is, not copied.
        mode: ``"mean_field"`` or ``"gibbs"``.
        k: The number of steps or sweeps, 1 or more.
        seed: The seed of the draws.
        fused: Compute mean fields with ``rbm_kernels.sample_hidden`` and
            ``rbm_kernels.sample_visible``, whose sums are the same bits on every device.

    Attributes:
        half_sweeps: How many half-sweeps were drawn in training mode, int64 []. A buffer, so that
            a training that goes on from a checkpoint goes on with the draws.

    Raises:
        TypeError: ``rbm`` is no ``rbm_kernels.RBM``.
        ValueError: Bernoulli visible units, an unknown mode, or k below 1.

    Example:
        >>> reconstruct = RBMReconstructor(RBM(4, 3, "gaussian"), k=2)
        >>> reconstruct(torch.zeros(5, 4)).shape
        torch.Size([5, 4])
    """

    half_sweeps: Tensor

    def __init__(
        self,
        rbm: RBM,
        mode: Mode = "mean_field",
        k: int = 1,
        *,
        seed: int = 0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(rbm, RBM):
            raise TypeError(
                f"RBMReconstructor: rbm must be a rbm_kernels.RBM, got {type(rbm).__name__}"
            )
        if rbm.visible != "gaussian":
            raise ValueError(
                "RBMReconstructor: rbm must have Gaussian visible units, since vision features "
                f"are real numbers, got {rbm.visible!r}"
            )
        if mode not in MODES:
            raise ValueError(f"RBMReconstructor: mode must be one of {MODES}, got {mode!r}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"RBMReconstructor: k must be an int of 1 or more, got {k!r}")
        self.rbm = rbm
        self.mode: Mode = mode
        self.k = k
        self.seed = seed
        self.fused = fused
        self.register_buffer("half_sweeps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Draw from the start again; the RBM resets itself."""
        nn.init.zeros_(self.half_sweeps)

    @property
    def n_visible(self) -> int:
        return self.rbm.n_visible

    @property
    def n_hidden(self) -> int:
        return self.rbm.n_hidden

    def forward(self, z: Tensor) -> Tensor:
        """Standardized features [N, D] to their reconstruction [N, D], in the RBM's dtype."""
        if self.mode == "gibbs":
            return self._gibbs(z)
        for _ in range(self.k):
            z = self._fused_mean_field(z) if self.fused else self.rbm.reconstruct(z)
        return z

    def _gibbs(self, z: Tensor) -> Tensor:
        rbm = self.rbm
        with torch.no_grad():
            states = gibbs_sample(
                z, rbm.W, rbm.b, rbm.c, self.k, log_var=rbm.log_var,
                seed=(self.seed, int(self.half_sweeps)),
            )  # fmt: skip
        if self.training:
            self.half_sweeps += 2 * self.k
        return states

    def _fused_mean_field(self, z: Tensor) -> Tensor:
        # Not the default, because these operations also draw states, which a mean field has no use
        # for. 2,048 x 768 with 1,000 hidden units on one core of a CPU with AVX-512 (medians of 9):
        # 69 ms plain and 80 ms fused; with the backward pass 208 ms and 227 ms. 256 wide with 512
        # hidden units: 26 and 34 ms, 82 and 102 ms. A Gibbs sweep takes 48 ms and 22 ms.
        rbm, seed = self.rbm, (self.seed, 0)
        _, p = sample_hidden(z, rbm.W, rbm.c, log_var=rbm.log_var, return_probs=True, seed=seed)
        _, mean = sample_visible(p, rbm.W, rbm.b, log_var=rbm.log_var, return_probs=True, seed=seed)
        return mean

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, k={self.k}, seed={self.seed}, fused={self.fused}"


class GatedResidual(nn.Module):
    """``x' = x + strength (reconstruct((x - mean) / scale) scale + mean - x)``.

    The strength is the tanh of a gate, which is what is trained. With a gate of 0 the output is the
    input, to the last bit and in every dtype (the gate of Alayrac et al., "Flamingo", NeurIPS
    2022).

    Args:
        reconstructor: From [N, D] to [N, D], on standardized features: an ``RBMReconstructor``,
            or whatever is compared with one.
        mean: Mean of the features [D]; with ``cls_token="apart"`` [2, D], that of CLS first. None
            stands for 0.
        scale: Their standard deviations, likewise, all positive. None stands for 1.
        strength: The reconstruction's share to start from, from -1 to 1.
        cls_token: What happens to token 0: ``"shared"`` treats it like the others, ``"skip"``
            leaves it alone, ``"apart"`` gives it a reconstructor, statistics and a gate of its own.
        cls_reconstructor: The reconstructor of CLS; given exactly with ``cls_token="apart"``.

    Attributes:
        gate: 0-dim parameter; with ``cls_token="apart"`` [2], that of CLS first.

    Raises:
        TypeError: Statistics that are no floating-point tensors.
        ValueError: A wrong shape or value; the message names it.

    Example:
        >>> residual = GatedResidual(RBMReconstructor(RBM(3, 2, "gaussian")), strength=0.5)
        >>> residual(torch.ones(1, 2, 3)).shape
        torch.Size([1, 2, 3])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        reconstructor: nn.Module,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        strength: float = 0.0,
        cls_token: ClsToken = "shared",
        cls_reconstructor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if cls_token not in CLS_TOKENS:
            raise ValueError(
                f"GatedResidual: cls_token must be one of {CLS_TOKENS}, got {cls_token!r}"
            )
        apart = cls_token == "apart"
        if apart != (cls_reconstructor is not None):
            raise ValueError(
                "GatedResidual: cls_reconstructor must be given exactly with cls_token='apart', "
                f"got {type(cls_reconstructor).__name__} with cls_token={cls_token!r}"
            )
        if mean is None or scale is None:
            width: Any = getattr(reconstructor, "n_visible", 0)
            shape = (2, width) if apart else (width,)
            mean = torch.zeros(shape) if mean is None else mean
            scale = torch.ones(shape) if scale is None else scale
        _check_statistics(mean, scale, cls_token)
        for name, module in (
            ("reconstructor", reconstructor), ("cls_reconstructor", cls_reconstructor),
        ):  # fmt: skip
            width = getattr(module, "n_visible", mean.shape[-1])
            if width != mean.shape[-1]:
                raise ValueError(
                    f"GatedResidual: {name} must have D = {mean.shape[-1]} visible units, "
                    f"as many as the features' mean, got {width}"
                )
        self.reconstructor = reconstructor
        self.cls_reconstructor = cls_reconstructor
        self.cls_token: ClsToken = cls_token
        self.gate = nn.Parameter(torch.zeros((2,) if apart else ()))
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.set_strength(strength)

    @property
    def n_visible(self) -> int:
        """The width D of the features."""
        return self.mean.shape[-1]

    @property
    def strength(self) -> float | tuple[float, float]:
        """The share of the reconstruction; with ``cls_token="apart"`` that of CLS and the other."""
        shares = self.gate.detach().float().tanh()
        if shares.dim() == 0:
            return shares.item()
        of_cls, of_patches = shares.tolist()
        return of_cls, of_patches

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """Set the share of the reconstruction, for all tokens alike.

        Args:
            strength: From -1 to 1; 0 leaves every feature as it is.

        Raises:
            ValueError: Another value.
        """
        if not -1 <= strength <= 1:
            raise ValueError(f"GatedResidual: strength must lie in [-1, 1], got {strength}")
        self.initial_strength = float(strength)
        self.gate.fill_(_gate_of(strength))

    def reset_parameters(self) -> None:
        """Statistics of features that are standardized already, and the strength to start from."""
        nn.init.constant_(self.gate, _gate_of(self.initial_strength))
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Vision features [B, L, D], token 0 being CLS, to adjusted ones of the same dtype."""
        if self._is_shut():
            return x
        if self.cls_token == "shared":
            return _adjust(x, self.reconstructor, self.mean, self.scale, self.gate)
        first, patches = x[:, :1], x[:, 1:]
        if self.cls_token == "skip":
            patches = _adjust(patches, self.reconstructor, self.mean, self.scale, self.gate)
        else:
            assert self.cls_reconstructor is not None
            (mean, patch_mean), (scale, patch_scale) = self.mean, self.scale
            first = _adjust(first, self.cls_reconstructor, mean, scale, self.gate[0])
            patches = _adjust(patches, self.reconstructor, patch_mean, patch_scale, self.gate[1])
        return torch.cat((first, patches), dim=1)

    def _is_shut(self) -> bool:
        """Whether there is nothing to compute: the gate is 0, and needs no gradient either."""
        if torch.is_grad_enabled() and self.gate.requires_grad:
            return False
        # Asking waits for a GPU once per batch, and would break a compiled graph.
        return not torch.compiler.is_compiling() and not bool(self.gate.any())

    def extra_repr(self) -> str:
        return f"cls_token={self.cls_token!r}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file: RBM, statistics, gate and how they are used.

        Args:
            path: The file to write, by custom ending in ``.safetensors``.

        Raises:
            TypeError: The reconstructor is no ``RBMReconstructor``.
        """
        header = {"format": "pt", "kind": _FILE_KIND, **RBMSettings.of(self).to_strings()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        write_atomically(Path(path), lambda file: save_file(tensors, file, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GatedResidual:
        """Read a file of ``save``, or one of ``rbm_kernels.RBM.save``.

        The RBM of such a file is taken to be of features as they are, of mean 0 and scale 1, unless
        ``rbm-caption fit`` of release 0.1 wrote their mean and scale beside it.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no file of an RBM with Gaussian visible units.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = file.metadata() or {}
        except (OSError, SafetensorError):
            header = {}  # RBM.load tells what is wrong with the file.
        if header.get("kind") == _FILE_KIND:
            return _from_file(path, header)
        rbm = RBM.load(path)
        statistics = [
            torch.tensor(json.loads(header[name])) if name in header else None
            for name in ("mean", "scale")
        ]
        return cls(RBMReconstructor(rbm), *statistics).eval()


def _gate_of(strength: float) -> float:
    return math.atanh(max(-_LARGEST_STRENGTH, min(strength, _LARGEST_STRENGTH)))


def _from_file(path: str | os.PathLike[str], header: Mapping[str, str]) -> GatedResidual:
    tensors = load_file(path)
    try:
        residual = RBMSettings.from_strings(header).build(tensors["mean"].shape[-1])
        residual.to(tensors["mean"].dtype).load_state_dict(tensors)
    except (KeyError, RuntimeError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"load: {os.fspath(path)!r} must hold all of a fitted RBM, got {error}"
        ) from error
    return residual.eval()


def _adjust(
    x: Tensor, reconstructor: nn.Module, mean: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    z = (x.reshape(-1, x.shape[-1]).to(mean.dtype) - mean) / scale  # [B * L, D]
    reconstruction = (reconstructor(z) * scale + mean).reshape(x.shape)
    return x + (torch.tanh(gate) * (reconstruction - x)).to(x.dtype)


def _check_statistics(mean: Tensor, scale: Tensor, cls_token: ClsToken) -> None:
    apart = cls_token == "apart"
    expected = "[2, D] with cls_token='apart'" if apart else "[D]"
    for name, value in (("mean", mean), ("scale", scale)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"GatedResidual: {name} must be a floating-point tensor, got {got}")
        if value.dim() != (2 if apart else 1) or (apart and len(value) != 2):
            raise ValueError(f"GatedResidual: {name} must be {expected}, got {list(value.shape)}")
    if mean.shape != scale.shape:
        raise ValueError(
            "GatedResidual: mean and scale must have one shape, "
            f"got {list(mean.shape)} and {list(scale.shape)}"
        )
    if mean.device.type == "meta":  # transformers builds models there, before they have values
        return
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("GatedResidual: mean must be finite, got NaN or infinity")
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise ValueError(
            f"GatedResidual: scale must be positive and finite, got a least of {scale.min().item()}"
        )


@dataclass(frozen=True)
class RBMSettings:
    """All that is needed to rebuild a residual with RBMs, except for its tensors.

    Attributes:
        n_hidden: Hidden units H of the RBM.
        mode: ``"mean_field"`` or ``"gibbs"``.
        k: Mean-field steps or Gibbs sweeps.
        seed: The seed of Gibbs sampling.
        fused: Whether ``RBMReconstructor`` uses the package's fused operations.
        cls_token: What happens to the CLS token: ``"shared"``, ``"apart"`` or ``"skip"``.
        cls_n_hidden: Hidden units of the RBM of CLS with ``cls_token="apart"``; None stands for H.
        strength: What a model starts with if its checkpoint has no gate.

    Raises:
        ValueError: A value out of range.
    """

    n_hidden: int = 1000
    mode: Mode = "mean_field"
    k: int = 1
    seed: int = 0
    fused: bool = False
    cls_token: ClsToken = "shared"
    cls_n_hidden: int | None = None
    strength: float = 0.0

    def __post_init__(self) -> None:
        if self.cls_token not in CLS_TOKENS:
            raise ValueError(
                f"RBMSettings: cls_token must be one of {CLS_TOKENS}, got {self.cls_token!r}"
            )

    @classmethod
    def from_config(cls, rbm: Mapping[str, Any] | None) -> RBMSettings:
        """The settings in a model's config; what it leaves out has its default.

        Raises:
            ValueError: An unknown key.
        """
        settings = dict(rbm or {})
        # Release 0.1 named the kind of reconstructor, cls_token by cls, and the gate before tanh.
        if settings.pop("reconstructor", "rbm") != "rbm":
            raise ValueError(
                "RBMSettings: rbm must describe an RBM, got the reconstructor "
                f"{(rbm or {})['reconstructor']!r}"
            )
        if "cls" in settings:
            settings["cls_token"] = settings.pop("cls")
        if "gate" in settings:
            settings["strength"] = math.tanh(settings.pop("gate"))
        unknown = set(settings) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"RBMSettings: rbm must have keys among {list(cls.__dataclass_fields__)}, "
                f"got {sorted(unknown)}"
            )
        return cls(**settings)

    def to_strings(self) -> dict[str, str]:
        """The settings for a file's header."""
        return {name: repr(value) for name, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, header: Mapping[str, str]) -> RBMSettings:
        """The settings that ``to_strings`` wrote into a file's header."""
        return cls(**{name: literal_eval(header[name]) for name in cls.__dataclass_fields__})

    @classmethod
    def of(cls, residual: GatedResidual) -> RBMSettings:
        """The settings that rebuild a residual.

        Raises:
            TypeError: A reconstructor that is no ``RBMReconstructor``.
            ValueError: RBMs of CLS and of the patches that reconstruct in different ways.
        """
        modules = [residual.reconstructor]
        if residual.cls_reconstructor is not None:
            modules.append(residual.cls_reconstructor)
        ways, sizes = [], []
        for module in modules:
            if not isinstance(module, RBMReconstructor):
                raise TypeError(
                    "GatedResidual: reconstructor must be an RBMReconstructor to be described in "
                    f"a file or a config, got {type(module).__name__}"
                )
            ways.append({name: getattr(module, name) for name in ("mode", "k", "seed", "fused")})
            sizes.append(module.n_hidden)
        if ways[0] != ways[-1]:
            raise ValueError(
                "GatedResidual: the RBMs of CLS and patches must reconstruct in one way, "
                f"got {ways[-1]} and {ways[0]}"
            )
        return cls(
            **ways[0],
            n_hidden=sizes[0],
            cls_token=residual.cls_token,
            cls_n_hidden=sizes[1] if len(sizes) == 2 else None,
            strength=residual.initial_strength,
        )

    def build(self, width: int) -> GatedResidual:
        """A new residual on features of that width, whose tensors are to be loaded or fitted."""
        apart = self.cls_token == "apart"
        return GatedResidual(
            self._reconstructor(width, self.n_hidden),
            strength=self.strength,
            cls_token=self.cls_token,
            cls_reconstructor=(
                self._reconstructor(width, self.cls_n_hidden or self.n_hidden) if apart else None
            ),
        )

    def _reconstructor(self, width: int, n_hidden: int) -> RBMReconstructor:
        rbm = RBM(width, n_hidden, "gaussian")
        return RBMReconstructor(rbm, self.mode, self.k, seed=self.seed, fused=self.fused)
