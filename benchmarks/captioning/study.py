"""The comparison: every strategy and every control on the same captioner, features and images.

What is chosen by looking at captions (a gate, the weight of a re-ranker) is chosen on one half of
the held-out images and used on the other, both ways round, so that every figure is of images that
chose nothing. Intervals come from resampling images (:func:`.metrics.paired_bootstrap`).

Each run of a strategy is kept in a file, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blip_integration import fitting
from blip_integration.captioner import open_image
from blip_integration.captions import Candidates, beam_candidates
from blip_integration.gated_residual import GatedResidual, RBMReconstructor
from blip_integration.modeling import rbm_of
from blip_integration.objective import CaptionPairs
from blip_integration.ranker_training import CaptionBags, PairTraining
from blip_integration.rerank import PairReranker, RBMReranker, choose_weight, combined_scores
from blip_integration.trainer import RBMBlipTrainer, RBMBlipTrainingArguments

from .attention_maps import word_attention
from .controls import (
    apply_to_blip,
    fit_denoising_autoencoder,
    fit_linear_adapter,
    fit_pca,
    fit_random_rbm,
    fit_shrink_to_mean,
)
from .features import FeatureCache, digest, fingerprint
from .lite_blip import LiteVisionModel
from .metrics import candidate_ciders, cider_scores, evaluate, paired_bootstrap
from .rankers import ITCReranker, ITMReranker, RatedCandidates, fit_to_quality
from .report import CaptionedPicture, caption_page
from .train_lite import caption_losses

GATES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # values of tanh(gate)
LEARNED_SHARES = (0.0, 0.25, 0.5, 1.0)  # of a value of tanh(gate) that was learned


@dataclass
class Study:
    """What all strategies share.

    Attributes:
        model: The captioner.
        tokenizer: Its tokenizer.
        train: Features of the training images.
        train_captions: What people wrote of each.
        val: Features of the held-out images.
        val_captions: What people wrote of each.
        folder: Where runs are kept.
        seeds: Of everything that is trained or drawn.
        beams: Of the beam search, and length of the n-best lists.
        length_penalty: Of the beam search.
        loss_captions: How many captions of each image the losses that choose a gate are taken over.
        rated_images: Training images whose candidates show a re-ranker what CIDEr likes.
        joint_epochs: Passes over one caption of each training image, for what learns through the
            decoder.
    """

    model: BlipForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    train: FeatureCache
    train_captions: list[list[str]]
    val: FeatureCache
    val_captions: list[list[str]]
    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    beams: int = 5
    length_penalty: float = 1.0
    loss_captions: int = 5
    rated_images: int = 2000
    joint_epochs: int = 2

    def halves(self) -> tuple[Tensor, Tensor]:
        """The rows of the held-out images' two halves: every other image."""
        rows = torch.arange(len(self.val))
        return rows[::2], rows[1::2]

    def decoding(self) -> dict[str, Any]:
        """Keywords of :func:`blip_integration.captions.beam_candidates`."""
        return {"beams": self.beams, "length_penalty": self.length_penalty}

    def claim_folder(self) -> None:
        """Note in the folder what its runs depend on, seeds apart.

        Raises:
            ValueError: The folder has runs of another study.
        """
        own = {
            "model": fingerprint(self.model),
            "train": digest(self.train.ids, self.train_captions),
            "val": digest(self.val.ids, self.val_captions),
            **{name: getattr(self, name) for name in _KEPT_SETTINGS},
        }
        path = self.folder / "study.json"
        kept = json.loads(path.read_text()) if path.is_file() else own
        for name, value in own.items():
            if kept.get(name) != value:
                raise ValueError(
                    f"Study: folder must be new, or of a study with the same {name}: "
                    f"{self.folder} has runs with {kept.get(name)!r}, got {value!r}"
                )
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(own, indent=1) + "\n")


_KEPT_SETTINGS = ("beams", "length_penalty", "loss_captions", "rated_images", "joint_epochs")


@dataclass
class Run:
    """One strategy with one seed.

    Attributes:
        name: Of the strategy.
        seed: Of this run.
        captions: One for each held-out image.
        loss: Mean negative log-likelihood of the true captions, nats a token; None where the
            strategy leaves it as it is.
        settings: What was chosen, for each half of the images.
        parameters: How many it adds.
        scores: [N][n], a re-ranker's, of the captioner's candidates.
        seconds: It took.
    """

    name: str
    seed: int
    captions: list[str]
    loss: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    scores: list[list[float]] | None = None
    seconds: float = 0.0


def remembered(study: Study, name: str, seed: int, make: Callable[[], Run]) -> Run:
    """The run kept in the study's folder, made where there is none."""
    path = study.folder / "runs" / f"{_file_stem(name)}.{seed}.json"
    if path.is_file():
        return Run(**json.loads(path.read_text()))
    started = time.monotonic()
    run = make()
    run.seconds = time.monotonic() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(run)))
    return run


def _file_stem(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


class CachedVision(nn.Module):
    """Stands in for a vision model: features [B, L, D] pass, adjusted or as they are."""

    def __init__(self, adjust: nn.Module | None = None) -> None:
        super().__init__()
        self.adjust = adjust

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        states = pixel_values if self.adjust is None else self.adjust(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


@contextmanager
def decoding(model: BlipForConditionalGeneration, adjust: nn.Module | None = None) -> Iterator[Any]:
    """The captioner with cached features in place of images, for as long as the block runs."""
    vision = model.vision_model
    model.vision_model = CachedVision(adjust).to(model.device).eval()
    try:
        yield model
    finally:
        model.vision_model = vision


def image_losses(study: Study, adjust: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Sums of nats and tokens [N] of the held-out images' true captions."""
    captions = [texts[: study.loss_captions] for texts in study.val_captions]
    with decoding(study.model, adjust) as model:
        return caption_losses(model, study.tokenizer, study.val, captions)


def mean_loss(losses: tuple[Tensor, Tensor], rows: Tensor | None = None) -> float:
    """Nats a token over some images."""
    nats, tokens = losses if rows is None else (losses[0][rows], losses[1][rows])
    return (nats.sum() / tokens.sum()).item()


def n_best(study: Study, features: FeatureCache | Tensor, name: str) -> Candidates:
    """The captioner's own n-best lists, kept in the study's folder."""
    path = study.folder / f"{name}-beam{study.beams}.json"
    if not path.is_file():
        with decoding(study.model) as model:
            lists = beam_candidates(
                model, study.tokenizer, features, n=study.beams, **study.decoding()
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        lists.save(path)
    return Candidates.load(path)


def captions_of(study: Study, adjust: nn.Module | None, rows: Tensor) -> list[str]:
    """Captions of some held-out images by the adjusted captioner."""
    with decoding(study.model, adjust) as model:
        return beam_candidates(
            model, study.tokenizer, study.val[rows], progress=False, **study.decoding()
        ).best


def adjusted(
    study: Study,
    name: str,
    seed: int,
    residual_at: Callable[[float], nn.Module],
    parameters: int,
    gates: Sequence[float] = GATES,
) -> Run:
    """Captions through a gated residual whose gate each half of the images chose for the other.

    Args:
        study: What all strategies share.
        name: Of the strategy.
        seed: Of this run.
        residual_at: The module [B, L, D] -> [B, L, D] at a value of tanh(gate).
        parameters: How many it has.
        gates: To choose from, by the loss of the true captions.
    """
    losses = {gate: image_losses(study, residual_at(gate)) for gate in gates}
    halves = study.halves()
    captions = [""] * len(study.val)
    chosen = []
    nats = tokens = 0.0
    for own, other in (halves, halves[::-1]):
        gate = min(gates, key=lambda g: mean_loss(losses[g], other))
        chosen.append(gate)
        nats += losses[gate][0][own].sum().item()
        tokens += losses[gate][1][own].sum().item()
        texts = captions_of(study, residual_at(gate), own)
        for row, text in zip(own.tolist(), texts, strict=True):
            captions[row] = text
    by_gate = {str(gate): mean_loss(loss) for gate, loss in losses.items()}
    settings = {"gates": chosen, "loss_by_gate": by_gate}
    return Run(name, seed, captions, nats / tokens, settings, parameters)


def reranked(
    study: Study, name: str, seed: int, lists: Candidates, extra: Tensor, parameters: int
) -> Run:
    """The captions chosen from n-best lists, each half with the weight that the other chose.

    Args:
        study: What all strategies share.
        name: Of the strategy.
        seed: Of this run.
        lists: Of the held-out images.
        extra: [N, n], a re-ranker's scores of them.
        parameters: How many it has.
    """
    quality = candidate_ciders(lists.texts, study.val_captions)
    halves = study.halves()
    chosen = torch.zeros(len(study.val), dtype=torch.int64)
    weights = []
    for own, other in (halves, halves[::-1]):
        weight = choose_weight(lists.scores[other], extra[other], quality[other])
        weights.append(weight)
        chosen[own] = combined_scores(lists.scores[own], extra[own], weight).argmax(1)
    settings = {"weights": weights}
    return Run(name, seed, lists.chosen(chosen), None, settings, parameters, extra.tolist())


@dataclass(frozen=True)
class Row:
    """A line of the table: a strategy's runs together.

    Attributes:
        name: Of the strategy.
        runs: How many.
        metrics: Means over the runs, as :func:`.metrics.evaluate` gives them, with ``loss``.
        spread: Standard deviation of CIDEr over the runs (nan of one run).
        difference: Mean CIDEr (in points, 100 times CIDEr) over that of the reference strategy,
            with its 95% interval over images; None for the reference itself.
        settings: Of the first run.
        parameters: How many the strategy adds.
        seconds: Mean of the runs.
    """

    name: str
    runs: int
    metrics: dict[str, float]
    spread: float
    difference: tuple[float, float, float] | None
    settings: dict[str, Any]
    parameters: int
    seconds: float


def row(study: Study, runs: Sequence[Run], reference: Sequence[Run] | None) -> Row:
    """Summarise the runs of a strategy, beside those of a reference."""
    scored = [evaluate(run.captions, study.val_captions, meteor=False) for run in runs]
    # METEOR starts a Java program; once for each strategy does.
    scored[0] = evaluate(runs[0].captions, study.val_captions)
    metrics = {
        name: sum(s[name] for s in scored if name in s) / sum(name in s for s in scored)
        for name in scored[0]
    }
    losses = [run.loss for run in runs if run.loss is not None]
    if losses:
        metrics["loss"] = sum(losses) / len(losses)
    ciders = torch.tensor([s["CIDEr"] for s in scored])
    difference = None
    if reference is not None:
        own, other = per_image(study, runs), per_image(study, reference)
        found = paired_bootstrap(own, other)
        difference = (100 * found.mean, 100 * found.low, 100 * found.high)
    return Row(
        name=runs[0].name,
        runs=len(runs),
        metrics=metrics,
        spread=ciders.std().item() if len(runs) > 1 else math.nan,
        difference=difference,
        settings=runs[0].settings,
        parameters=runs[0].parameters,
        seconds=sum(run.seconds for run in runs) / len(runs),
    )


def per_image(study: Study, runs: Sequence[Run]) -> Tensor:
    """CIDEr of each held-out image [N], the mean over the runs."""
    scores = [cider_scores(run.captions, study.val_captions) for run in runs]
    return torch.stack(scores).mean(0)


# Adjustments: what fits a reconstructor to the features of the training images.
HIDDEN = 512
COMPONENTS = 128


def adjustments(study: Study, seed: int) -> dict[str, Callable[[], GatedResidual]]:
    """What goes behind the gate, each fitted to as many rows in as many updates, by name.

    The RBM, the denoising autoencoder and the linear adapter have as many weights. Those that no
    seed changes are there for the first seed alone.
    """
    # Made at first use, and once: runs that are kept need neither.
    stream = _once(lambda: fitting.TokenStream(study.train))
    schedule = fitting.Schedule(seed=seed)
    rbm = _once(lambda: fitting.fit_rbm_to_tokens(stream(), HIDDEN, schedule))

    def gibbs() -> GatedResidual:
        sampler: Any = copy.deepcopy(rbm())
        sampler.reconstructor = RBMReconstructor(sampler.reconstructor.rbm, "gibbs", seed=seed)
        return sampler.eval()

    ways: dict[str, Callable[[], GatedResidual]] = {
        "random RBM": lambda: fit_random_rbm(stream(), rbm().reconstructor.rbm, seed=seed),
        "linear adapter": lambda: fit_linear_adapter(stream(), HIDDEN // 2, schedule),
        "denoising autoencoder": lambda: fit_denoising_autoencoder(stream(), HIDDEN, schedule),
        "RBM": rbm,
        "RBM, sigma learned": lambda: fitting.fit_rbm_to_tokens(
            stream(), HIDDEN, schedule, learn_sigma=True
        ),
        "RBM, Gibbs": gibbs,
    }
    if seed == study.seeds[0]:
        ways |= {
            "shrink to mean": lambda: fit_shrink_to_mean(stream()),
            "PCA": lambda: fit_pca(stream(), COMPONENTS),
        }
    return ways


def adjustment_runs(study: Study) -> Iterator[Run]:
    """The strategies that change the features, one run after another."""
    for seed in study.seeds:
        ways = adjustments(study, seed)
        ways["RBM, CLS apart"] = partial(_apart, study, seed)
        for name, way in ways.items():
            title = f"adjust: {name}"
            yield remembered(study, title, seed, partial(_adjustment, study, title, seed, way))


def _apart(study: Study, seed: int) -> GatedResidual:
    """An RBM of the first token and one of the others."""
    schedule = fitting.Schedule(seed=seed)
    cls, patches = (
        fitting.fit_rbm_to_tokens(fitting.TokenStream(study.train, tokens), HIDDEN, schedule)
        for tokens in ("cls", "patches")
    )
    return fitting.residual_of(patches, cls)


def _adjustment(study: Study, name: str, seed: int, way: Callable[[], GatedResidual]) -> Run:
    residual = way().eval()
    parameters = sum(p.numel() for key, p in residual.named_parameters() if key != "gate")

    def residual_at(value: float) -> nn.Module:
        with torch.no_grad():
            residual.set_strength(value)
        return residual

    return adjusted(study, name, seed, residual_at, parameters)


def joint_runs(study: Study) -> Iterator[Run]:
    """The strategies that learn from captions, through the decoder, as long as each other.

    The gates start at a share of 0.1 and are learned. Which epoch is kept is decided by the loss of
    training images that no update of this training sees, though the captioner has; how much of the
    learned gate is used, by one half of the held-out images for the other.
    """
    if not isinstance(study.model.vision_model, LiteVisionModel):
        return  # cached features do not pass through other vision models
    lm = {"itc_weight": 0.0, "itm_weight": 0.0, "cd_weight": 0.0}
    every = {"itc_weight": 0.1, "itm_weight": 0.1, "cd_weight": 0.01}
    for seed in study.seeds:
        fits = adjustments(study, seed)
        ways: dict[str, tuple[str | None, dict[str, Any]]] = {
            "decoder fine-tuned": (None, {**lm, "freeze": "vision"}),
            "linear adapter, LM": ("linear adapter", lm),
            "denoising autoencoder, LM": ("denoising autoencoder", lm),
            "RBM, LM": ("RBM", lm),
            "RBM, LM + CD": ("RBM", {**lm, "cd_weight": 0.01}),
            "RBM, LM + ITC + ITM + CD": ("RBM", every),
            "RBM and decoder, LM + CD": ("RBM", {**lm, "cd_weight": 0.01, "freeze": "vision"}),
        }
        for name, (behind, terms) in ways.items():
            title = f"train: {name}"
            fit = None if behind is None else fits[behind]
            yield remembered(study, title, seed, partial(_joint, study, title, seed, fit, terms))


def _joint(
    study: Study,
    title: str,
    seed: int,
    fit: Callable[[], GatedResidual] | None,
    terms: dict[str, Any],
) -> Run:
    model = copy.deepcopy(study.model)
    parameters = 0
    if fit is not None:
        fitted = fit()
        apply_to_blip(model, fitted, strength=0.1)
        parameters = sum(p.numel() for p in fitted.reconstructor.parameters())
    # One caption of each image, another one with each seed; every tenth image decides.
    captions = [[texts[seed % len(texts)]] for texts in study.train_captions]
    rows = torch.arange(len(captions))
    learned, deciding = (
        CaptionPairs(study.train[part], [captions[i] for i in part.tolist()])
        for part in (rows[rows % 10 != 0], rows[rows % 10 == 0])
    )
    best_epoch = _train(study, model, learned, deciding, seed, terms)
    residual = rbm_of(model.eval())
    changed = replace(study, model=model)
    found: dict[str, Any] = {"best_epoch": best_epoch}
    if residual is None:
        everyone = torch.arange(len(study.val))
        loss = mean_loss(image_losses(changed))
        return Run(title, seed, captions_of(changed, None, everyone), loss, found)
    found["gate"] = residual.gate.tanh().item()

    def residual_at(share: float) -> nn.Module:
        with torch.no_grad():
            residual.set_strength(share * found["gate"])
        return residual

    run = adjusted(changed, title, seed, residual_at, parameters, LEARNED_SHARES)
    run.settings |= found
    return run


def _train(
    study: Study,
    model: BlipForConditionalGeneration,
    learned: CaptionPairs,
    deciding: CaptionPairs,
    seed: int,
    terms: dict[str, Any],
) -> int:
    """Train a captioner in place; returns the epoch whose weights it keeps."""
    with tempfile.TemporaryDirectory() as folder:
        args = RBMBlipTrainingArguments(
            folder, per_device_train_batch_size=128, per_device_eval_batch_size=128, seed=seed,
            num_train_epochs=study.joint_epochs, disable_tqdm=True, **terms,
        )  # fmt: skip
        trainer = RBMBlipTrainer(
            model, args, train_dataset=learned, eval_dataset=deciding, tokenizer=study.tokenizer,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    updates = trainer.state.max_steps // study.joint_epochs
    return (trainer.state.best_global_step or 0) // updates


# Re-rankers: models of pairs of an image and a caption, each with about as many weights.
WORDS = 1000
PAIR_HIDDEN = 256


def pair_features(cache: FeatureCache) -> Tensor:
    """What re-rankers know of the images: the pooled token, [N, D] float32."""
    return torch.cat([batch[:, 0] for batch in cache.batches(256)])


def reranking_runs(study: Study) -> Iterator[Run]:
    """The strategies that choose among the captioner's own candidates, one run after another."""
    lists = n_best(study, study.val, "val")
    rated = min(study.rated_images, len(study.train))
    train_lists = n_best(study, study.train[:rated], "train")
    quality = candidate_ciders(train_lists.texts, study.train_captions[:rated])
    features = pair_features(study.train)
    val_features = pair_features(study.val)

    def fitted(kind: type[PairReranker], seed: int, objective: str | None = None) -> Any:
        return kind.fit(
            features, study.train_captions, n_words=WORDS, n_hidden=PAIR_HIDDEN,
            objective=objective, training=PairTraining(seed=seed),
        )  # fmt: skip

    def to_quality(ranker: PairReranker, seed: int) -> PairReranker:
        ranker, words = copy.deepcopy(ranker), ranker.vocabulary
        order = torch.randperm(rated, generator=torch.Generator().manual_seed(seed))
        own_lists, held_out_lists = (
            RatedCandidates.encode(
                features[rows], [train_lists.texts[i] for i in rows.tolist()], quality[rows], words
            )
            for rows in (order[rated // 10 :], order[: rated // 10])
        )
        bags, _ = CaptionBags.encode(features, study.train_captions, words).split(0.1, seed)
        training = PairTraining(seed=seed)
        fit_to_quality(ranker.model, own_lists, held_out_lists, training, pairs=bags)
        return ranker

    def rankers(seed: int) -> dict[str, Callable[[], PairReranker]]:
        cd = _once(lambda: fitted(RBMReranker, seed, "cd"))
        contrastive = _once(lambda: fitted(RBMReranker, seed))
        itc = _once(lambda: fitted(ITCReranker, seed))
        return {
            "RBM free energy (CD)": lambda: RBMReranker(cd().model, cd().vocabulary, "joint"),
            "RBM PMI (CD)": cd,
            "RBM PMI (contrastive)": contrastive,
            "RBM PMI (fitted to CIDEr)": lambda: to_quality(contrastive(), seed),
            "ITC": itc,
            "ITC (fitted to CIDEr)": lambda: to_quality(itc(), seed),
            "ITM": lambda: fitted(ITMReranker, seed),
        }

    def run(title: str, seed: int, make: Callable[[], PairReranker]) -> Run:
        ranker = make()
        parameters = sum(p.numel() for p in ranker.model.parameters())
        scores = ranker.score(val_features, lists.texts)
        return reranked(study, title, seed, lists, scores, parameters)

    own_quality = candidate_ciders(lists.texts, study.val_captions)

    def first() -> Run:
        return Run("top-1", 0, lists.best, mean_loss(image_losses(study)))

    yield remembered(study, "top-1", 0, first)
    best = own_quality.argmax(1)
    yield remembered(study, "oracle", 0, lambda: Run("oracle", 0, lists.chosen(best)))
    for seed in study.seeds:
        yield remembered(study, "random choice", seed, partial(_random_choice, lists, seed))
        runs = {}
        for name, make in rankers(seed).items():
            title = f"rerank: {name}"
            runs[name] = remembered(study, title, seed, partial(run, title, seed, make))
            yield runs[name]
        together = {
            "RBM and ITC": ("RBM PMI (contrastive)", "ITC"),
            "RBM free energy and PMI": ("RBM free energy (CD)", "RBM PMI (fitted to CIDEr)"),
            "RBM free energy and ITC": ("RBM free energy (CD)", "ITC (fitted to CIDEr)"),
        }
        for name, parts in together.items():
            title, both = f"rerank: {name}", [runs[part] for part in parts]
            yield remembered(
                study, title, seed, partial(_together, study, title, seed, lists, both)
            )


def _random_choice(lists: Candidates, seed: int) -> Run:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(lists.scores.shape[1], (len(lists.ids),), generator=generator)
    return Run("random choice", seed, lists.chosen(chosen))


def _together(study: Study, title: str, seed: int, lists: Candidates, runs: Sequence[Run]) -> Run:
    """Several re-rankers' scores, each over its spread within lists, added up."""
    scores = torch.stack([torch.tensor(run.scores) for run in runs])  # [runs, N, n]
    spread = (scores - scores.mean(2, keepdim=True)).square().mean((1, 2), keepdim=True).sqrt()
    parameters = sum(run.parameters for run in runs)
    return reranked(study, title, seed, lists, (scores / spread).sum(0), parameters)


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """The same result at every call, made at the first."""
    return lru_cache(maxsize=1)(make)


GROUPS = {"re-evaluate": reranking_runs, "adjust": adjustment_runs, "train": joint_runs}


def compare(
    study: Study,
    groups: Sequence[str] = tuple(GROUPS),
    on_run: Callable[[Run], None] | None = None,
) -> dict[str, list[Row]]:
    """Run all strategies and summarise them.

    Args:
        study: What they share.
        groups: Which of :data:`GROUPS`; "re-evaluate" is run in any case, as all others are set
            beside the captioner's own first choice.
        on_run: Called after each run.

    Returns:
        Rows by group, each group in the order of CIDEr.

    Raises:
        ValueError: An unknown group; a folder that has runs of another study.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"compare: groups must be among {tuple(GROUPS)}, got {unknown}")
    study.claim_folder()
    table: dict[str, list[Row]] = {}
    reference: list[Run] = []
    for group, source in GROUPS.items():
        if group != "re-evaluate" and group not in groups:
            continue
        by_name: dict[str, list[Run]] = {}
        for run in source(study):
            by_name.setdefault(run.name, []).append(run)
            if on_run is not None:
                on_run(run)
        reference = reference or by_name["top-1"]
        rows = [
            row(study, runs, None if runs is reference else reference) for runs in by_name.values()
        ]
        table[group] = sorted(rows, key=lambda each: -each.metrics["CIDEr"])
    return table


def differences(
    study: Study, pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, str, float, float, float]]:
    """CIDEr points of one strategy over another, with 95% intervals, from the runs that are kept.

    Args:
        study: Whose :func:`compare` has run.
        pairs: Names (strategy, other strategy).
    """
    found = []
    for name, other in pairs:
        own, theirs = (per_image(study, _kept(study, each)) for each in (name, other))
        difference = paired_bootstrap(own, theirs)
        found.append(
            (name, other, 100 * difference.mean, 100 * difference.low, 100 * difference.high)
        )
    return found


def _kept(study: Study, name: str) -> list[Run]:
    paths = sorted((study.folder / "runs").glob(f"{_file_stem(name)}.*.json"))
    if not paths:
        raise ValueError(f"differences: name must be a strategy that has run, got {name!r}")
    return [Run(**json.loads(path.read_text())) for path in paths]


def markdown(table: dict[str, list[Row]]) -> str:
    """The table as people read it: CIDEr, BLEU, METEOR and ROUGE-L times 100."""
    lines = [
        "| strategy | runs | CIDEr | against top-1 (95%) | BLEU-1 | BLEU-4 | METEOR | ROUGE-L "
        "| distinct-1, -2 | length | loss | parameters |",
        "| --- " + "| ---: " * 11 + "|",
    ]
    for rows in table.values():
        for each in rows:
            m = each.metrics
            spread = "" if math.isnan(each.spread) else f" ± {100 * each.spread:.1f}"
            gain = ""
            if each.difference is not None:
                mean, low, high = each.difference
                gain = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
            cells = [
                each.name,
                str(each.runs),
                f"{100 * m['CIDEr']:.1f}{spread}",
                gain,
                *(
                    f"{100 * m[name]:.1f}" if name in m else ""
                    for name in ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-L")
                ),
                f"{m['distinct-1']:.3f}, {m['distinct-2']:.3f}",
                f"{m['length']:.1f}",
                f"{m['loss']:.3f}" if "loss" in m else "",
                f"{each.parameters:,}" if each.parameters else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def changes_page(study: Study, name: str, images: Sequence[Path], count: int = 12) -> str:
    """An HTML page of the captions that a strategy made better and worse, the most first.

    Args:
        study: Whose :func:`compare` has run.
        name: Of the strategy; its first run is shown beside the captioner's own captions, and with
            what each word looked at where the strategy re-ranks, so that the features are as they
            were.
        images: Files of the held-out images.
        count: Of each kind.
    """
    own, first = _kept(study, name)[0], _kept(study, "top-1")[0]
    before, after = (cider_scores(run.captions, study.val_captions) for run in (first, own))
    order = (after - before).argsort(descending=True).tolist()
    changed = [i for i in order if own.captions[i] != first.captions[i]]
    shown = changed if len(changed) <= 2 * count else changed[:count] + changed[-count:]

    def attention(image: int, caption: str) -> Tensor | None:
        if not (name.startswith("rerank: ") and caption.split()):
            return None
        return word_attention(study.model, study.tokenizer, study.val[[image]][0], caption)

    pictures = [
        CaptionedPicture(
            images[i].name,
            open_image(images[i]),
            first.captions[i],
            own.captions[i],
            references=study.val_captions[i],
            attention=attention(i, own.captions[i]),
            scores={"CIDEr": (100 * before[i].item(), 100 * after[i].item())},
        )
        for i in shown
    ]
    scored = [evaluate(r.captions, study.val_captions, meteor=False) for r in (first, own)]
    metrics = {name: (value, scored[1][name]) for name, value in scored[0].items()}
    note = (
        f"{len(changed)} of {len(images)} captions changed; the {len(shown)} shown are those that "
        "gained most and those that lost most."
    )
    return caption_page(
        pictures, title=name, note=note, labels=("top-1", "chosen"), metrics=metrics
    )
