"""An RBM between the vision model and the text decoder of a BLIP captioner.

``apply_rbm_to_blip`` puts one into a model that the user holds, in place, and
``remove_rbm_from_blip`` takes it out again. Such a model is a
``RBMBlipForConditionalGeneration``: ``forward``, ``generate``, saving, loading, the Auto
classes and the ``image-text-to-text`` pipeline are those of transformers. All that a checkpoint has
more than a stock one are the tensors ``vision_model.rbm.*``, so that either loads into the other's
class.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipVisionModel,
    PreTrainedModel,
)
from transformers import initialization as init

from rbm_kernels import RBM

from .gated_residual import CLS_TOKENS, ClsToken, GatedResidual, Mode, RBMReconstructor

__all__ = [
    "GatedResidual",
    "RBMBlipConfig",
    "RBMBlipForConditionalGeneration",
    "RBMBlipVisionModel",
    "RBMReconstructor",
    "RBMSettings",
    "apply_rbm_to_blip",
    "remove_rbm_from_blip",
    "with_rbm",
]

_NEW_MODULES = (GatedResidual, RBMReconstructor, RBM)


@dataclass(frozen=True)
class RBMSettings:
    """What a config says of its RBM: all that is needed to rebuild it, save the tensors.

    Attributes:
        n_hidden: Hidden units H.
        mode: "mean_field" or "gibbs".
        k: Mean-field steps or Gibbs sweeps.
        seed: Of Gibbs sampling.
        fused: See ``RBMReconstructor``.
        cls: What happens to the CLS token: "shared", "apart" or "skip".
        cls_n_hidden: Hidden units of the reconstructor of CLS with ``cls="apart"``; None: H.
        gate: That a model starts with if its checkpoint has none.
    """

    n_hidden: int = 1000
    mode: Mode = "mean_field"
    k: int = 1
    seed: int = 0
    fused: bool = False
    cls: ClsToken = "shared"
    cls_n_hidden: int | None = None
    gate: float = 0.0

    def __post_init__(self) -> None:
        if self.cls not in CLS_TOKENS:
            raise ValueError(f"RBMSettings: cls must be one of {CLS_TOKENS}, got {self.cls!r}")

    @classmethod
    def from_config(cls, rbm: Mapping[str, Any] | None) -> RBMSettings:
        """The settings in a config's ``rbm``; what it leaves out has its default."""
        settings = dict(rbm or {})
        # Models saved by release 0.1 name the kind of reconstructor, of which there was one.
        if settings.pop("reconstructor", "rbm") != "rbm":
            raise ValueError(
                "RBMSettings: rbm must describe an RBM, got the reconstructor "
                f"{(rbm or {})['reconstructor']!r}"
            )
        unknown = set(settings) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"RBMSettings: rbm must have keys among {list(cls.__dataclass_fields__)}, "
                f"got {sorted(unknown)}"
            )
        return cls(**settings)

    @classmethod
    def of(cls, residual: GatedResidual) -> RBMSettings:
        """The settings that rebuild a residual."""
        modules: list[Any] = [residual.reconstructor]
        if residual.cls_reconstructor is not None:
            modules.append(residual.cls_reconstructor)
        described = [_describe(module) for module in modules]
        if described[0] != described[-1]:
            raise ValueError(
                "apply_rbm_to_blip: the RBMs of CLS and patches must reconstruct in one way, "
                f"got {described[-1]} and {described[0]}"
            )
        return cls(
            **described[0],
            n_hidden=modules[0].n_hidden,
            cls=residual.cls,
            cls_n_hidden=modules[1].n_hidden if len(modules) == 2 else None,
            gate=residual.initial_gate,
        )

    def build(self, width: int) -> GatedResidual:
        """A new residual on features of that width, whose tensors are to be loaded or fitted."""
        shape = (2, width) if self.cls == "apart" else (width,)
        of_cls = None
        if self.cls == "apart":
            of_cls = self._reconstructor(width, self.cls_n_hidden or self.n_hidden)
        return GatedResidual(
            self._reconstructor(width, self.n_hidden),
            torch.zeros(shape), torch.ones(shape), self.gate, self.cls, of_cls,
        )  # fmt: skip

    def _reconstructor(self, width: int, n_hidden: int) -> RBMReconstructor:
        rbm = RBM(width, n_hidden, "gaussian")
        return RBMReconstructor(rbm, self.mode, self.k, seed=self.seed, fused=self.fused)


def _describe(module: nn.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("mode", "k", "seed", "fused")}


class _ConfigWithRBM:
    """A config whose ``rbm`` is a dict of ``RBMSettings``; None stands for the defaults."""

    rbm: Mapping[str, Any] | None = None


class _VisionWithRBM:
    """A vision model behind which a residual stands: what every adjusted vision class inherits."""

    rbm: GatedResidual

    def __init__(self, config: Any, rbm: GatedResidual) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.rbm = rbm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock class, with ``last_hidden_state`` adjusted.

        ``pooler_output``, ``hidden_states`` and ``attentions`` are those of the stock class.
        """
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        adjusted: Tensor = self.rbm(output[0])
        if isinstance(output, tuple):
            return (adjusted, *output[1:])
        output.last_hidden_state = adjusted
        return output

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers builds a model on the meta device, and calls this for what a checkpoint
        # lacks: without it these tensors would be whatever the memory held.
        if isinstance(module, _NEW_MODULES):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                with init.guard_torch_init_functions():  # what was loaded is left alone
                    reset()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class _CaptionerWithRBM:
    """A captioner whose vision model has an RBM: what every adjusted captioner inherits."""

    config: Any
    vision_model: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        settings = RBMSettings.from_config(config.rbm)
        config.rbm = asdict(settings)
        _insert(self.vision_model, settings.build(config.vision_config.hidden_size))
        self.post_init()  # type: ignore[attr-defined]

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the stock class, which however writes BOS into the caller's ``input_ids``."""
        if isinstance(input_ids, Tensor):
            input_ids = input_ids.clone()
        return super().generate(pixel_values, input_ids, *args, **kwargs)  # type: ignore[misc]


class RBMBlipConfig(_ConfigWithRBM, BlipConfig):
    """A ``BlipConfig`` with ``rbm``, a dict of ``RBMSettings``."""

    model_type = "rbm_blip"


class RBMBlipVisionModel(_VisionWithRBM, BlipVisionModel):
    """A ``BlipVisionModel`` whose ``last_hidden_state`` an RBM adjusts.

    Args:
        config: A ``BlipVisionConfig``.
        rbm: What adjusts it.
    """


class RBMBlipForConditionalGeneration(_CaptionerWithRBM, BlipForConditionalGeneration):
    """A ``BlipForConditionalGeneration`` with an RBM behind its vision model.

    ``from_pretrained`` takes a folder or hub name of ours, or one of stock BLIP: then the RBM is
    new and its gate shut, so the captions are those of stock BLIP. ``rbm=`` says which RBM::

        model = RBMBlipForConditionalGeneration.from_pretrained(
            "Salesforce/blip-image-captioning-base", rbm={"n_hidden": 500, "cls": "skip"}
        )
        model.vision_model.rbm  # the GatedResidual
    """

    config_class = RBMBlipConfig


AutoConfig.register(RBMBlipConfig.model_type, RBMBlipConfig, exist_ok=True)
AutoModelForImageTextToText.register(RBMBlipConfig, RBMBlipForConditionalGeneration, exist_ok=True)


def with_rbm(
    captioner: type[BlipForConditionalGeneration],
) -> type[BlipForConditionalGeneration]:
    """The class of captioners like these that have an RBM, known to the Auto classes.

    That of BLIP itself is ``RBMBlipForConditionalGeneration``. For a class derived from
    BLIP's it is made on first use, under its name with "RBM" before it, and a ``model_type`` with
    "rbm_" before it.

    Args:
        captioner: A subclass of ``BlipForConditionalGeneration``.

    Raises:
        TypeError: Anything else.
    """
    if not (isinstance(captioner, type) and issubclass(captioner, BlipForConditionalGeneration)):
        raise TypeError(
            "with_rbm: captioner must be a class derived from BlipForConditionalGeneration, "
            f"got {captioner!r}"
        )
    if issubclass(captioner, _CaptionerWithRBM):
        return captioner
    stock = captioner.config_class
    config = _sibling(_ConfigWithRBM, stock, model_type=f"rbm_{stock.model_type}")
    adjusted = _sibling(_CaptionerWithRBM, captioner, config_class=config)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, adjusted, exist_ok=True)
    return adjusted


def _sibling(mixin: type, stock: type, **attributes: Any) -> Any:
    """The subclass of both, which exists already or is made now."""
    known: type
    for known in mixin.__subclasses__():
        if known.__bases__ == (mixin, stock):
            return known
    attributes |= {"__module__": stock.__module__, "__doc__": f"{stock.__name__} with an RBM."}
    return type(f"RBM{stock.__name__}", (mixin, stock), attributes)


def _stock(adjusted: type) -> Any:
    """The class that ``_sibling`` started from."""
    mixins = (_ConfigWithRBM, _VisionWithRBM, _CaptionerWithRBM)
    return next(base.__bases__[1] for base in adjusted.__mro__ if base.__bases__[0] in mixins)


def _reconstructor(
    name: str, given: object, width: int, mode: Mode, k: int, seed: int, fused: bool
) -> RBMReconstructor:
    """A copy of what the user gave, as a reconstructor of features of that width."""
    if isinstance(given, RBM):
        given = RBMReconstructor(given, mode, k, seed=seed, fused=fused)
    if not isinstance(given, RBMReconstructor):
        raise TypeError(
            f"apply_rbm_to_blip: {name} must be a rbm_kernels.RBM or an RBMReconstructor, "
            f"got {type(given).__name__}"
        )
    if given.n_visible != width:
        raise ValueError(
            f"apply_rbm_to_blip: {name} must have D = {width} visible units, as many as the "
            f"vision features are wide, got {given.n_visible}"
        )
    return copy.deepcopy(given)


def _insert(vision: Any, residual: GatedResidual) -> None:
    _turn_into(vision, _sibling(_VisionWithRBM, type(vision)))
    vision.rbm = residual


def _turn_into(model: Any, kind: Any) -> None:
    """Make a model one of another class that computes with the same modules."""
    # A module's class decides its forward: a change of class is in place, is undone as easily, and
    # leaves the names of all tensors as they were. But a constructor must have run once for every
    # class: there transformers notes which outputs it can record.
    PreTrainedModel.__init__(kind.__new__(kind), copy.copy(model.config))
    model.__class__ = kind


def apply_rbm_to_blip(
    model: BlipForConditionalGeneration,
    rbm: RBM | RBMReconstructor,
    mean: Tensor,
    scale: Tensor,
    *,
    gate: float = 0.0,
    cls: ClsToken = "shared",
    cls_rbm: RBM | RBMReconstructor | None = None,
    mode: Mode = "mean_field",
    k: int = 1,
    seed: int = 0,
    fused: bool = False,
) -> BlipForConditionalGeneration:
    """Put an RBM between a captioner's vision model and its text decoder, in place.

    The model becomes one of ``with_rbm``'s class. The RBM is copied, to the model's device and
    dtype; ``model.vision_model.rbm`` is the ``GatedResidual`` with it.

    Args:
        model: BLIP, or a model of a class derived from it.
        rbm: With Gaussian visible units, as many as the vision features are wide (D), fitted on
            standardized features; or an ``RBMReconstructor`` with one.
        mean: Mean of the features [D], that of CLS and that of patches [2, D] if ``cls="apart"``.
        scale: Their standard deviations, likewise.
        gate: The reconstruction's share is tanh(gate); 0 leaves every output as it was.
        cls: ``"shared"`` treats the CLS token like the patches, ``"skip"`` leaves it alone,
            ``"apart"`` gives it ``cls_rbm`` and a gate of its own.
        cls_rbm: The RBM of CLS.
        mode: ``"mean_field"`` or ``"gibbs"``, for an ``rbm_kernels.RBM``.
        k: Mean-field steps or Gibbs sweeps.
        seed: Of Gibbs sampling.
        fused: See ``RBMReconstructor``.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no BLIP captioner, or ``rbm`` neither of these.
        ValueError: An RBM of the wrong width or with Bernoulli visible units, a model that has an
            RBM already or whose vision model's forward is patched, or a wrong shape or value.
            Nothing has been changed then.
    """
    if not isinstance(model, BlipForConditionalGeneration):
        raise TypeError(
            "apply_rbm_to_blip: model must be a BlipForConditionalGeneration, "
            f"got {type(model).__name__}"
        )
    if isinstance(model, _CaptionerWithRBM):
        raise ValueError(
            "apply_rbm_to_blip: model has an RBM already; take it out with remove_rbm_from_blip, "
            "or set model.vision_model.rbm"
        )
    vision, width = model.vision_model, model.config.vision_config.hidden_size
    if "forward" in vars(vision):
        raise ValueError(
            "apply_rbm_to_blip: model.vision_model.forward must be that of its class, got one set "
            "on the instance (by a device map or a patch): apply the RBM first"
        )
    options: Any = (width, mode, k, seed, fused)
    reconstructor = _reconstructor("rbm", rbm, *options)
    of_cls = None if cls_rbm is None else _reconstructor("cls_rbm", cls_rbm, *options)
    residual = GatedResidual(reconstructor, mean, scale, gate, cls, of_cls)
    settings = RBMSettings.of(residual)
    adjusted = with_rbm(type(model))
    _insert(vision, residual.to(model.device, model.dtype).train(vision.training))
    _turn_into(model, adjusted)
    # A copy, because other models may hold the same config; its parts stay those of the model's.
    model.config = copy.copy(model.config)
    model.config.__class__ = adjusted.config_class
    model.config.rbm = asdict(settings)
    return model


def remove_rbm_from_blip(model: BlipForConditionalGeneration) -> GatedResidual:
    """Take the RBM out of a captioner again, in place; the model is of its stock class then.

    Args:
        model: From ``apply_rbm_to_blip`` or ``RBMBlipForConditionalGeneration``.

    Returns:
        What stood between vision model and decoder, with its gate and RBM.

    Raises:
        ValueError: The model has no RBM.
    """
    if not isinstance(model, _CaptionerWithRBM):
        raise ValueError(
            f"remove_rbm_from_blip: model must have an RBM, got a {type(model).__name__} without"
        )
    vision = model.vision_model
    residual: GatedResidual = vision.rbm
    del vision.rbm
    vision.__class__ = _stock(type(vision))
    model.__class__ = _stock(type(model))
    model.config = copy.copy(model.config)
    del model.config.rbm
    model.config.__class__ = _stock(type(model.config))
    return residual
