"""Restricted Boltzmann machines between the encoder and the decoder of BLIP captioners.

- :mod:`.adjust` puts an RBM into a captioner (:func:`apply_rbm_to_blip`), :mod:`.fitting` fits it
  to features (:func:`fit_rbm`), :mod:`.joint` trains both together (:func:`train_joint`).
- :mod:`.rerank` chooses among a captioner's candidates by a joint RBM of image and words.
- :mod:`.captioner` is a BLIP small enough to train on a CPU, :mod:`.attend` the LSTM with soft
  attention that came before it.
- :mod:`.compare` puts all strategies and their controls into one table.

The command line is ``rbm-caption``. Everything needs ``pip install 'rbm-kernels[blip]'``.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CaptionedImages": "data",
    "GatedResidual": "reconstructors",
    "ITCReranker": "rerank",
    "ITMReranker": "rerank",
    "JointRBM": "matching",
    "JointSettings": "joint",
    "LiteBlipForConditionalGeneration": "captioner",
    "RBMBlipConfig": "adjust",
    "RBMBlipForConditionalGeneration": "adjust",
    "RBMBlipVisionModel": "adjust",
    "RBMReconstructor": "reconstructors",
    "RBMReranker": "rerank",
    "TokenStream": "fitting",
    "apply_rbm_to_blip": "adjust",
    "beam_candidates": "candidates",
    "evaluate": "metrics",
    "fit_rbm": "fitting",
    "load_captioner": "recipe",
    "load_captions": "data",
    "remove_rbm_from_blip": "adjust",
    "train_joint": "joint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported at first use: transformers takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
