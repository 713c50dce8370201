"""What stands behind the gate of an adjustment: an RBM that reconstructs features.

A reconstructor maps standardized features [N, D] to [N, D]; ``GatedResidual`` mixes what it
returns into a captioner's vision features. Everything here is plain PyTorch; the surgery on a
transformers model is in ``modeling``, the fitting in ``fitting``.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from rbm_kernels import RBM, gibbs_sample, sample_hidden, sample_visible

Mode: TypeAlias = Literal["mean_field", "gibbs"]
ClsToken: TypeAlias = Literal["shared", "apart", "skip"]

MODES = ("mean_field", "gibbs")
CLS_TOKENS = ("shared", "apart", "skip")


class RBMReconstructor(nn.Module):
    """The reconstruction of features by a Gaussian-Bernoulli RBM.

    Mean-field is deterministic and differentiable: k times ``z <- W sigmoid(W'(z / s^2) + c) + b``.
    Gibbs sampling returns the states of k sweeps; the gradient stops there. It draws the same
    numbers at every call in evaluation mode, so that an image keeps its captions, and new ones at
    every call in training mode.

    Args:
        rbm: With Gaussian visible units; used as it is, not copied.
        mode: ``"mean_field"`` or ``"gibbs"``.
        k: Steps or sweeps, 1 or more.
        seed: Of the draws.
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
    """``x' = x + tanh(gate) (reconstruct((x - mean) / scale) scale + mean - x)``.

    With a gate of 0 the output is the input, to the last bit and in every dtype (the gate of
    Alayrac et al., "Flamingo", NeurIPS 2022).

    Args:
        reconstructor: From [N, D] to [N, D], on standardized features.
        mean: Mean of the features [D]; with ``cls="apart"`` [2, D], that of CLS first.
        scale: Their standard deviations, likewise, all positive.
        gate: To start from.
        cls: What happens to token 0: ``"shared"`` treats it like the others, ``"skip"`` leaves it
            alone, ``"apart"`` gives it a reconstructor, statistics and a gate of its own.
        cls_reconstructor: That one; given exactly with ``cls="apart"``.

    Attributes:
        gate: 0-dim parameter; with ``cls="apart"`` [2], that of CLS first.

    Raises:
        ValueError: A wrong shape or value; the message names it.

    Example:
        >>> reconstructor = RBMReconstructor(RBM(3, 2, "gaussian"))
        >>> residual = GatedResidual(reconstructor, torch.zeros(3), torch.ones(3), gate=0.5)
        >>> residual(torch.ones(1, 2, 3)).shape
        torch.Size([1, 2, 3])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        reconstructor: nn.Module,
        mean: Tensor,
        scale: Tensor,
        gate: float = 0.0,
        cls: ClsToken = "shared",
        cls_reconstructor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if cls not in CLS_TOKENS:
            raise ValueError(f"GatedResidual: cls must be one of {CLS_TOKENS}, got {cls!r}")
        if (cls == "apart") != (cls_reconstructor is not None):
            raise ValueError(
                "GatedResidual: cls_reconstructor must be given exactly with cls='apart', "
                f"got {type(cls_reconstructor).__name__} with cls={cls!r}"
            )
        if not math.isfinite(gate):
            raise ValueError(f"GatedResidual: gate must be finite, got {gate}")
        _check_statistics(mean, scale, cls)
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
        self.cls: ClsToken = cls
        self.initial_gate = float(gate)
        self.gate = nn.Parameter(torch.full((2,) if cls == "apart" else (), float(gate)))
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def reset_parameters(self) -> None:
        """Statistics of features that are standardized already, and the gate to start from."""
        nn.init.constant_(self.gate, self.initial_gate)
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Vision features [B, L, D], token 0 being CLS, to adjusted ones of the same dtype."""
        if self._is_shut():
            return x
        if self.cls == "shared":
            return _adjust(x, self.reconstructor, self.mean, self.scale, self.gate)
        first, patches = x[:, :1], x[:, 1:]
        if self.cls == "skip":
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
        return f"cls={self.cls!r}"


def _adjust(
    x: Tensor, reconstructor: nn.Module, mean: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    z = (x.reshape(-1, x.shape[-1]).to(mean.dtype) - mean) / scale  # [B * L, D]
    reconstruction = (reconstructor(z) * scale + mean).reshape(x.shape)
    return x + (torch.tanh(gate) * (reconstruction - x)).to(x.dtype)


def _check_statistics(mean: Tensor, scale: Tensor, cls: ClsToken) -> None:
    expected = "[2, D] with cls='apart'" if cls == "apart" else "[D]"
    for name, value in (("mean", mean), ("scale", scale)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"GatedResidual: {name} must be a floating-point tensor, got {got}")
        if value.dim() != (2 if cls == "apart" else 1) or (cls == "apart" and len(value) != 2):
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
