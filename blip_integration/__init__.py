"""Restricted Boltzmann machines between the encoder and the decoder of BLIP captioners.

``fit_rbm`` fits an RBM to the features of a captioner's images, ``apply_rbm_to_blip`` puts it into
the captioner, an ``RBMBlipTrainer`` trains both together, and an ``RBMReranker`` lets a joint RBM
of images and words choose among a captioner's candidates. The command line is ``rbm-caption``.
Everything needs ``pip install 'rbm-kernels[blip]'``.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "BlipReranker": "rerank",
    "Candidates": "captions",
    "CaptionPairs": "objective",
    "GatedResidual": "gated_residual",
    "ImageFiles": "images",
    "JointRBM": "joint_rbm",
    "RBMBlipConfig": "modeling",
    "RBMBlipForConditionalGeneration": "modeling",
    "RBMBlipVisionModel": "modeling",
    "RBMBlipTrainer": "trainer",
    "RBMBlipTrainingArguments": "trainer",
    "RBMReconstructor": "gated_residual",
    "RBMReranker": "rerank",
    "TokenStream": "fitting",
    "Vocabulary": "joint_rbm",
    "apply_rbm_to_blip": "modeling",
    "beam_candidates": "captions",
    "choose_weight": "rerank",
    "fit_rbm": "fitting",
    "fit_rbm_to_tokens": "fitting",
    "image_states": "images",
    "infer_image": "joint_rbm",
    "infer_words": "joint_rbm",
    "load_captioner": "modeling",
    "open_image": "images",
    "rbm_of": "modeling",
    "remove_rbm_from_blip": "modeling",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported at first use: transformers takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
