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
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    BlipVisionModel,
    PreTrainedModel,
)
from transformers import initialization as init

from rbm_kernels import RBM

from .gated_residual import GatedResidual, RBMReconstructor, RBMSettings

_NEW_MODULES = (GatedResidual, RBMReconstructor, RBM)


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
    # Models of release 0.1 do not hold this counter of Gibbs draws; it starts at 0.
    _keys_to_ignore_on_load_missing = (r"half_sweeps$",)

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
            "Salesforce/blip-image-captioning-base", rbm={"n_hidden": 500, "cls_token": "skip"}
        )
        rbm_of(model)  # the GatedResidual
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
    fitted: GatedResidual | RBM,
    strength: float | None = None,
) -> BlipForConditionalGeneration:
    """Put an RBM between a captioner's vision model and its text decoder, in place.

    The model becomes one of ``with_rbm``'s class. What was fitted is copied, to the model's device
    and dtype; ``rbm_of(model)`` is that copy.

    Args:
        model: BLIP, or a model of a class derived from it.
        fitted: What ``fit_rbm`` returned, ``GatedResidual.load`` read or ``remove_rbm_from_blip``
            took out; or an RBM with Gaussian visible units, fitted to features as they are. It has
            as many visible units as the vision features are wide (D).
        strength: The share of the reconstruction in the features, from -1 to 1; 0 leaves every
            output as it was. None keeps that of ``fitted``, which is 0 where it is new.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is no BLIP captioner, or ``fitted`` neither of these.
        ValueError: An RBM of the wrong width or without Gaussian visible units, a strength out of
            range, a model that has an RBM already or whose vision model's forward is patched.
            Nothing has been changed then.
    """
    if not isinstance(model, BlipForConditionalGeneration):
        raise TypeError(
            "apply_rbm_to_blip: model must be a BlipForConditionalGeneration, "
            f"got {type(model).__name__}"
        )
    if isinstance(model, _CaptionerWithRBM):
        raise ValueError(
            "apply_rbm_to_blip: model has an RBM already; take it out with remove_rbm_from_blip"
        )
    vision, width = model.vision_model, model.config.vision_config.hidden_size
    if "forward" in vars(vision):
        raise ValueError(
            "apply_rbm_to_blip: model.vision_model.forward must be that of its class, got one set "
            "on the instance (by a device map or a patch): apply the RBM first"
        )
    if not isinstance(fitted, (GatedResidual, RBM)):
        raise TypeError(
            "apply_rbm_to_blip: fitted must be a GatedResidual of fit_rbm or a rbm_kernels.RBM, "
            f"got {type(fitted).__name__}"
        )
    if fitted.n_visible != width:
        raise ValueError(
            f"apply_rbm_to_blip: fitted must have D = {width} visible units, as many as the "
            f"vision features are wide, got {fitted.n_visible}"
        )
    if isinstance(fitted, RBM):
        fitted = GatedResidual(RBMReconstructor(fitted))
    residual = copy.deepcopy(fitted)
    if strength is not None:
        residual.set_strength(strength)
    settings = RBMSettings.of(residual)
    adjusted = with_rbm(type(model))
    _insert(vision, residual.to(model.device, model.dtype).train(vision.training))
    _turn_into(model, adjusted)
    # A copy, because other models may hold the same config; its parts stay those of the model's.
    model.config = copy.copy(model.config)
    model.config.__class__ = adjusted.config_class
    model.config.rbm = asdict(settings)
    return model


def rbm_of(model: nn.Module) -> GatedResidual | None:
    """What stands between a captioner's vision model and its decoder; None where nothing does.

    Example:
        >>> rbm_of(nn.Linear(2, 2)) is None
        True
    """
    residual = getattr(getattr(model, "vision_model", None), "rbm", None)
    return residual if isinstance(residual, GatedResidual) else None


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


def load_captioner(
    name: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """A captioner and its processor: stock BLIP, or one with an RBM.

    Args:
        name: A folder, or a name on a model hub ("Salesforce/blip-image-captioning-base").
        device: Where the model goes.

    Raises:
        FileNotFoundError: A folder without a model.
        ValueError: It holds no BLIP captioner, or one of a class that was not imported.
        OSError: Neither a folder nor a name that the hub answers to.
    """
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"load_captioner: name must be a folder with config.json or a hub's name, got {name}"
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"load_captioner: name must be a folder or a hub's name, got {name}: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"load_captioner: the class of {name} must have been imported (that of the study's "
            f"models is, by `python -m benchmarks.captioning caption`), got {error}"
        ) from error
    if not isinstance(config, BlipConfig):
        raise ValueError(
            f"load_captioner: {name} must hold a BLIP model, got one of type {config.model_type!r}"
        )
    model, loading = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"load_captioner: {name} must hold all weights of a BLIP captioner, got none for "
            f"{sorted(loading['missing_keys'])[0]} and {len(loading['missing_keys']) - 1} more"
        )
    return model.to(device).eval(), AutoProcessor.from_pretrained(name)
