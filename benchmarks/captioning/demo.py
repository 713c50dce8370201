"""The whole system on drawn scenes, offline and in minutes, with every claim checked.

A captioner is trained on some of the scenes and captions others. An RBM is put between its encoder
and decoder, another one re-ranks its beam candidates. What these have to be told, the gate and the
weight, is chosen on one half of the unseen scenes, and all figures are of the other half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip_integration.captions import Candidates, beam_candidates, normalize_caption
from blip_integration.fitting import Schedule, TokenStream, fit_rbm_to_tokens
from blip_integration.gated_residual import GatedResidual
from blip_integration.images import open_image
from blip_integration.joint_rbm import JointRBM, Vocabulary
from blip_integration.modeling import apply_rbm_to_blip
from blip_integration.ranker_training import CaptionBags, PairTraining, fit_contrastive
from blip_integration.rerank import RBMReranker, choose_weight, combined_scores

from .attention_maps import word_attention
from .data import CaptionedImages, load_captions
from .features import FeatureCache, cached_features, cached_vision_model
from .files import save_captioner, whole_folder
from .lite_blip import LiteBlipForConditionalGeneration, lite_blip, lite_processor, word_tokenizer
from .metrics import candidate_ciders, evaluate
from .report import CaptionedPicture, caption_page, drift
from .scenes import CaptionCheck, Scene, accuracy, check_caption, load_scenes, make_scenes
from .settings import CaptionerSettings, DemoSettings
from .train_lite import caption_losses, train_captioner

_STRENGTHS = (0.05, 0.1, 0.2, 0.35, 0.5)  # to choose from
_KINDS = ("object", "color", "size", "position", "relation")
_MAX_LENGTH = 26  # Three objects with sizes and two relations take 19 words and two marks.


@dataclass(frozen=True)
class DemoRow:
    """A line of the table.

    Attributes:
        name: What wrote the captions.
        correct: Share of the captions that say something, and nothing but what is true.
        claims: Share of true claims by kind: "object", "color", "size", "position", "relation",
            and "all" of them together.
        cider: CIDEr, 0 to 10.
    """

    name: str
    correct: float
    claims: dict[str, float]
    cider: float


@dataclass(frozen=True)
class _Trained:
    """A captioner of scenes, with its features of those it was trained on and of others."""

    model: LiteBlipForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    known: CaptionedImages
    known_features: FeatureCache
    others: CaptionedImages
    other_features: FeatureCache

    def n_best(self, features: FeatureCache | Tensor, n: int, progress: bool) -> Candidates:
        return beam_candidates(
            self.model,
            self.tokenizer,
            features,
            beams=n,
            n=n,
            max_length=_MAX_LENGTH,
            progress=progress,
        )


@dataclass(frozen=True)
class _Unseen:
    """Scenes that the captioner was not trained on, with its features and captions of them."""

    images: CaptionedImages
    scenes: list[Scene]
    features: Tensor  # [N, 1 + L, D]
    lists: Candidates

    def part(self, rows: Sequence[int]) -> _Unseen:
        images = CaptionedImages(
            [self.images.ids[i] for i in rows],
            [self.images.paths[i] for i in rows],
            [self.images.captions[i] for i in rows],
        )
        scenes = [self.scenes[i] for i in rows]
        return _Unseen(images, scenes, self.features[list(rows)], self.lists.part(rows))


def run_demo(
    folder: str | os.PathLike[str],
    settings: DemoSettings,
    *,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> list[DemoRow]:
    """Draw, train, fit, caption and check.

    Args:
        folder: A new one, for scenes, captioner, RBM and pages; it appears when all is done.
        settings: See ``DemoSettings``.
        say: Called with a line now and then.
        progress: Show progress bars.

    Returns:
        Rows for the captioner alone, with an RBM inside, and re-ranked by an RBM.

    Raises:
        FileExistsError: The folder exists and is not empty.
        ImportError: A package is missing; the message names it.
    """
    with whole_folder(folder) as root:
        file = make_scenes(
            settings.scenes,
            root / "scenes",
            settings.seed,
            held_out=settings.held_out,
            pixels=settings.pixels,
        )
        trained = _train(file, root, settings, say, progress)
        schedule = Schedule(seed=settings.seed)
        stream = TokenStream(trained.known_features.features)
        fitted = fit_rbm_to_tokens(stream, settings.hidden, schedule, progress=progress)
        fitted.save(root / "rbm.safetensors")
        reranker = _train_reranker(trained, settings)
        say("one RBM fitted to the features, one to features and words")

        drawn = load_scenes(file)
        unseen = _Unseen(
            trained.others,
            [drawn[int(number)] for number in trained.others.ids],
            trained.other_features[:],
            trained.n_best(trained.other_features, settings.beams, progress),
        )
        choosing, reported = (unseen.part(range(i, len(trained.others), 2)) for i in (0, 1))
        weight = choose_weight(
            choosing.lists.scores,
            _rerank_scores(reranker, choosing),
            candidate_ciders(choosing.lists.texts, choosing.images.captions),
        )
        scores = combined_scores(reported.lists.scores, _rerank_scores(reranker, reported), weight)
        reranked = reported.lists.chosen(scores.argmax(1))
        # From here on the captioner has the RBM.
        share = _insert_rbm(trained, fitted, choosing)
        adjusted = trained.n_best(reported.features, settings.beams, progress).best
        say(f"chosen on every other unseen scene: share {share} of the RBM, weight {weight:.2g}")

        with torch.inference_mode():
            states = trained.model.vision_model(reported.features).last_hidden_state
        note = f"an RBM inside, with a share of {share}"
        _write_page(root / "adjusted.html", note, trained, reported, adjusted, states, settings)
        note = f"an RBM chose from {settings.beams} captions"
        _write_page(root / "reranked.html", note, trained, reported, reranked, None, settings)
        return [
            _row("captioner", reported.lists.best, reported),
            _row("with an RBM inside", adjusted, reported),
            _row("re-ranked by an RBM", reranked, reported),
        ]


def _train(
    file: Path, root: Path, settings: DemoSettings, say: Callable[[str], None], progress: bool
) -> _Trained:
    known, others = load_captions(file, "train"), load_captions(file, "val")
    say(f"{len(known):,} scenes to train on, {len(others):,} others")
    tokenizer = word_tokenizer((text for texts in known.captions for text in texts), min_count=1)
    processor = lite_processor(tokenizer, variant=0)
    processor.image_processor.size = {"height": settings.pixels, "width": settings.pixels}
    cache = root / "features"
    vision_model = cached_vision_model(
        known.paths, processor, cache, variant=0, width=settings.width, progress=progress
    )
    features, other_features = (
        cached_features(vision_model, images.paths, processor, cache / name, progress=progress)
        for name, images in (("train", known), ("val", others))
    )
    say(f"features of EfficientNet-Lite0, {features.shape[1]} x {features.shape[2]} a scene")
    model = lite_blip(vision_model, tokenizer, layers=2, dropout=0.0, seed=settings.seed)
    losses: list[float] = []
    train_captioner(
        model,
        tokenizer,
        [features],
        known.captions,
        CaptionerSettings(
            epochs=settings.epochs,
            batch_size=64,
            learning_rate=2e-3,
            ema_decay=0.99,
            seed=settings.seed,
        ),
        on_epoch=lambda _, loss: losses.append(loss),
        progress=progress,
    )
    save_captioner(model, processor, root / "captioner")
    say(f"captioner trained for {settings.epochs} epochs, loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return _Trained(model, tokenizer, known, features, others, other_features)


def table(rows: Sequence[DemoRow]) -> str:
    """The rows as text, shares in per cent."""
    kinds = [kind for kind in _KINDS if any(kind in row.claims for row in rows)]
    heads = ["all true", "claims", *kinds, "CIDEr"]
    lines = [f"{'':<20}" + "".join(f"{head:>10}" for head in heads)]
    for row in rows:
        shares = [row.correct, row.claims["all"], *(row.claims.get(kind) for kind in kinds)]
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        cells.append(f"{100 * row.cider:.1f}")
        lines.append(f"{row.name:<20}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _train_reranker(trained: _Trained, settings: DemoSettings) -> RBMReranker:
    captions = [[_with_pairs(text) for text in texts] for texts in trained.known.captions]
    vocabulary = Vocabulary.from_captions(text for texts in captions for text in texts)
    bags = CaptionBags.encode(_side_by_side(trained.known_features[:]), captions, vocabulary)
    train, held_out = bags.split(seed=settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    rbm = JointRBM(bags.features.shape[1], len(vocabulary), settings.hidden, generator=generator)
    rbm.initialize_from_data(train.features, train.words)
    # All positions side by side are many features for so few scenes.
    training = PairTraining(feature_dropout=0.5, seed=settings.seed)
    fit_contrastive(rbm, train, held_out, training)
    return RBMReranker(rbm.eval(), vocabulary)


def _rerank_scores(reranker: RBMReranker, unseen: _Unseen) -> Tensor:
    texts = [[_with_pairs(text) for text in each] for each in unseen.lists.texts]
    return reranker.score(_side_by_side(unseen.features), texts)


def _side_by_side(features: Tensor) -> Tensor:
    """All positions of a scene [N, L * D]: their mean would not say what is where."""
    return features[:, 1:].flatten(1)


def _with_pairs(caption: str) -> str:
    """A caption with its pairs of neighbors as further words, "red-circle" among them.

    A bag of single words says that there is red and a circle, but not that the circle is red.
    """
    words = normalize_caption(caption).split()
    return " ".join([*words, *(f"{a}-{b}" for a, b in zip(words, words[1:], strict=False))])


def _insert_rbm(trained: _Trained, fitted: GatedResidual, unseen: _Unseen) -> float:
    """Put the RBM into the captioner, with the share under which true captions are likeliest."""
    model = trained.model
    apply_rbm_to_blip(model, fitted)
    residual = model.vision_model.rbm

    @torch.no_grad()
    def loss(share: float) -> float:
        residual.set_strength(share)
        nats, tokens = caption_losses(
            model, trained.tokenizer, unseen.features, unseen.images.captions
        )
        return float(nats.sum() / tokens.sum())

    best = min(_STRENGTHS, key=loss)
    residual.set_strength(best)
    return best


def _row(name: str, captions: Sequence[str], unseen: _Unseen) -> DemoRow:
    checks = [check_caption(*each) for each in zip(unseen.scenes, captions, strict=True)]
    shares = accuracy(checks)
    correct = shares.pop("correct")
    claims = {"all": _true_share(checks), **shares}
    cider = evaluate(captions, unseen.images.captions, meteor=False)["CIDEr"]
    return DemoRow(name, correct, claims, cider)


def _true_share(checks: Sequence[CaptionCheck]) -> float:
    claims = [claim.true for check in checks for claim in check.claims]
    return sum(claims) / max(1, len(claims))


def _write_page(
    path: Path,
    note: str,
    trained: _Trained,
    unseen: _Unseen,
    captions: Sequence[str],
    states: Tensor | None,
    settings: DemoSettings,
) -> None:
    """Scenes with the captioner's captions and with others; ``states``: adjusted features."""
    cosines = None if states is None else drift(unseen.features, states).tolist()
    looked_at = unseen.features if states is None else states
    pictures = []
    for i in range(min(settings.shown, len(captions))):
        before, after = unseen.lists.best[i], captions[i]
        checks = [check_caption(unseen.scenes[i], text) for text in (before, after)]
        pictures.append(
            CaptionedPicture(
                name=f"scene {unseen.images.ids[i]}",
                image=open_image(unseen.images.paths[i]),
                before=before,
                after=after,
                references=unseen.images.captions[i],
                scores={"true claims": [_true_share([check]) for check in checks]},
                attention=word_attention(trained.model, trained.tokenizer, looked_at[i], after),
                drift=None if cosines is None else cosines[i],
            )
        )
    page = caption_page(
        pictures,
        title=f"Drawn scenes, {path.stem}",
        note=f"After: {note}. Claims are what a caption says of objects, colors, sizes, places "
        "and relations.",
        labels=("captioner", path.stem),
    )
    path.write_text(page, encoding="utf-8")
