"""The LSTM with soft attention on the features, images and words of a captioner's training.

Word vectors are GloVe's and the optimizer is Adam with StepLR, as in the model's time; the BLIP
decoder beside which it stands has the same features, images and words.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rbm_kernels import plots

from ..data import load_captions
from ..features import FeatureCache
from ..lite_blip import word_tokenizer
from ..metrics import evaluate
from ..report import training_curves
from ..settings import LSTMSettings
from .show_attend_tell import AttentionCaptioner, write_captions
from .training import train_attention_captioner
from .word_vectors import initialize_embedding, read_word_vectors


def train_and_score(
    data: Path,
    caches: Path,
    out: Path,
    settings: LSTMSettings,
    *,
    dropout: float,
    beams: int,
    vectors: str,
    resume: bool,
) -> None:
    """Train, caption and score; one half of the held-out images decides which epoch is kept.

    Args:
        data: Captions in COCO's or in Karpathy's format.
        caches: Folder with the feature caches train and val.
        out: Folder of the model, of figures.json and of curves.png.
        epochs: Passes over all captions.
        dropout: In the decoder, 0 to 1.
        beams: Width of the beam search.
        resume: Go on with the run in ``out``.
    """
    train, val = (load_captions(data, split).captions for split in ("train", "val"))
    features = FeatureCache(caches / "train")
    val_features = FeatureCache(caches / "val")
    tokenizer = word_tokenizer(text for texts in train for text in texts)
    known = read_word_vectors(vectors, tokenizer.get_vocab())
    model = AttentionCaptioner.for_tokenizer(
        tokenizer,
        features.shape[-1],
        embedding_size=len(next(iter(known.values()))),
        dropout=dropout,
    )
    initialize_embedding(model.embedding, tokenizer, known)
    history = train_attention_captioner(
        model,
        tokenizer,
        features,
        train,
        settings,
        val_features=val_features[::2],
        val_captions=val[::2],
        folder=out,
        resume=resume,
    )

    reported = val_features[1::2]
    captions = write_captions(model, tokenizer, reported, beams=beams, min_length=3)
    said = [caption.text for caption in captions]
    scores = evaluate(said, val[1::2])
    updates = (0, *(10**power * digit for power in range(1, 5) for digit in (1, 2, 5)))
    table = history.table([*updates, len(history.losses) - 1])
    for update, epoch, loss in table:
        print(f"update {update:6,}  epoch {epoch:2}  loss {loss:.3f}")
    for record in history.epochs:
        print(f"epoch {record['epoch']}: {record['train_loss']:.3f}, val {record['val_loss']:.3f}")
    print({name: round(value, 4) for name, value in scores.items()})
    plots.save(training_curves(history), out / "curves.png")
    parameters = sum(p.numel() for p in model.parameters())
    content = {
        "parameters": parameters,
        "words": len(tokenizer),
        "word_vectors": len(known),
        "scores": scores,
        "losses": table,
        "epochs": history.epochs,
        "captions": said,
        "torch": torch.__version__,
    }
    (out / "figures.json").write_text(json.dumps(content, indent=1) + "\n")
