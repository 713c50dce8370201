"""The historical baseline: an LSTM with soft attention on the features of a captioner's training.

    rbm-caption train captions.json --out small --validation val
    python benchmarks/caption_lstm.py captions.json small-features --out lstm

Word vectors are GloVe's and the optimiser is Adam with StepLR; the features, the images and the
words are those of the BLIP decoder beside which it stands. One half of the held-out images decides
which epoch is kept, the other is scored.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from blip_integration.attend import AttentionCaptioner
from blip_integration.attend_training import AttendSettings, train_attention_captioner
from blip_integration.captioner import word_tokenizer
from blip_integration.data import load_captions
from blip_integration.features import FeatureCache
from blip_integration.metrics import evaluate
from blip_integration.word_vectors import initialise_embedding, read_word_vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="captions in COCO's or in Karpathy's format")
    parser.add_argument("features", type=Path, help="folder with the caches train and val")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and figures")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    arguments = parser.parse_args()

    train, val = (load_captions(arguments.data, split).captions for split in ("train", "val"))
    features = FeatureCache(arguments.features / "train")
    val_features = FeatureCache(arguments.features / "val")
    tokenizer = word_tokenizer(text for texts in train for text in texts)
    vectors = read_word_vectors("glove", tokenizer.get_vocab())
    model = AttentionCaptioner.for_tokenizer(
        tokenizer,
        features.shape[-1],
        embedding_size=len(next(iter(vectors.values()))),
        dropout=arguments.dropout,
    )
    initialise_embedding(model.embedding, tokenizer, vectors)
    history = train_attention_captioner(
        model,
        tokenizer,
        features,
        train,
        AttendSettings(epochs=arguments.epochs),
        val_features=val_features[::2],
        val_captions=val[::2],
        folder=arguments.out,
        resume=arguments.resume,
    )

    said: list[str] = []
    for images in tqdm(val_features[1::2].float().split(50), desc="captions", unit="batch"):
        for hypotheses in model.beam_search(images, beams=arguments.beams, min_length=3):
            said.append(tokenizer.decode(hypotheses[0].tokens))
    scores = evaluate(said, val[1::2])
    updates = (0, *(10**power * digit for power in range(1, 5) for digit in (1, 2, 5)))
    table = history.table([*updates, len(history.losses) - 1])
    for update, epoch, loss in table:
        print(f"update {update:6,}  epoch {epoch:2}  loss {loss:.3f}")
    for epoch in history.epochs:
        print(f"epoch {epoch['epoch']}: {epoch['train_loss']:.3f}, val {epoch['val_loss']:.3f}")
    print({name: round(value, 4) for name, value in scores.items()})
    parameters = sum(p.numel() for p in model.parameters())
    content = {
        "parameters": parameters,
        "words": len(tokenizer),
        "word_vectors": len(vectors),
        "scores": scores,
        "losses": table,
        "epochs": history.epochs,
        "captions": said,
        "torch": torch.__version__,
    }
    (arguments.out / "figures.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
