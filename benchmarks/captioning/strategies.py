"""The strategies of the comparison and their controls, in three groups.

==================== ==========================================================================
``rerank``           choosing among the captioner's own candidates
``adapter``          changing the features between the captioner's encoder and decoder
``finetune``         learning from captions through the decoder
==================== ==========================================================================

Each group is a function from a study to its results, which yields one after another.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, EarlyStoppingCallback, PrinterCallback

from blip_integration import fitting
from blip_integration.captions import Candidates
from blip_integration.gated_residual import GatedResidual, RBMReconstructor
from blip_integration.modeling import rbm_of
from blip_integration.objective import CaptionPairs
from blip_integration.ranker_training import CaptionBags, PairTraining
from blip_integration.rerank import PairReranker, RBMReranker
from blip_integration.trainer import RBMBlipTrainer, RBMBlipTrainingArguments

from .controls import (
    apply_to_blip,
    fit_denoising_autoencoder,
    fit_linear_adapter,
    fit_pca,
    fit_random_rbm,
    fit_shrink_to_mean,
)
from .features import FeatureCache
from .lite_blip import LiteVisionModel
from .metrics import candidate_ciders
from .rankers import ITCReranker, ITMReranker, RatedCandidates, fit_to_quality
from .study import (
    ORACLE,
    RANDOM_CHOICE,
    TOP_1,
    Strategy,
    StrategyResult,
    Study,
    adapted,
    cached_result,
    captions_of,
    image_losses,
    mean_loss,
    n_best,
    reranked,
)

# The one whose captions are shown: named beforehand, lest the images that are reported choose it.
SHOWN = Strategy("rerank", "RBM PMI (fitted to CIDEr)")


def fits(study: Study, seed: int) -> dict[str, Callable[[], GatedResidual]]:
    """What stands between encoder and decoder, each fitted to as many rows in as many updates.

    The RBM, the denoising autoencoder and the linear adapter have as many weights. Those that no
    seed changes are there for the first seed alone.
    """
    hidden = study.settings.hidden
    # Made at first use, and once: results that are kept need neither.
    stream = _once(lambda: fitting.TokenStream(study.train))
    schedule = fitting.Schedule(seed=seed)
    rbm = _once(lambda: fitting.fit_rbm_to_tokens(stream(), hidden, schedule))

    def gibbs() -> GatedResidual:
        sampler: Any = copy.deepcopy(rbm())
        sampler.reconstructor = RBMReconstructor(sampler.reconstructor.rbm, "gibbs", seed=seed)
        return sampler.eval()

    found: dict[str, Callable[[], GatedResidual]] = {
        "random RBM": lambda: fit_random_rbm(stream(), rbm().reconstructor.rbm, seed=seed),
        "linear adapter": lambda: fit_linear_adapter(stream(), hidden // 2, schedule),
        "denoising autoencoder": lambda: fit_denoising_autoencoder(stream(), hidden, schedule),
        "RBM": rbm,
        "RBM, sigma learned": lambda: fitting.fit_rbm_to_tokens(
            stream(), hidden, schedule, learn_sigma=True
        ),
        "RBM, Gibbs": gibbs,
    }
    if seed == 0:
        found |= {
            "shrink to mean": lambda: fit_shrink_to_mean(stream()),
            "PCA": lambda: fit_pca(stream(), study.settings.components),
        }
    return found


def adapter_results(study: Study) -> Iterator[StrategyResult]:
    """The strategies that change the features between encoder and decoder."""
    for seed in range(study.settings.seeds):
        fitted = fits(study, seed)
        fitted["RBM, CLS apart"] = partial(fit_cls_apart, study, seed)
        for name, fit in fitted.items():
            strategy = Strategy("adapter", name)
            yield cached_result(
                study, strategy, seed, partial(_adapter, study, strategy, seed, fit)
            )


def fit_cls_apart(study: Study, seed: int) -> GatedResidual:
    """An RBM of the first token and one of the others."""
    schedule = fitting.Schedule(seed=seed)
    cls, patches = (
        fitting.fit_rbm_to_tokens(
            fitting.TokenStream(study.train, tokens), study.settings.hidden, schedule
        )
        for tokens in ("cls", "patches")
    )
    return fitting.residual_of(patches, cls)


def _adapter(
    study: Study, strategy: Strategy, seed: int, fit: Callable[[], GatedResidual]
) -> StrategyResult:
    residual = fit().eval()
    parameters = sum(p.numel() for key, p in residual.named_parameters() if key != "gate")

    def residual_at(strength: float) -> nn.Module:
        residual.set_strength(strength)
        return residual

    return adapted(study, strategy, seed, residual_at, parameters, study.settings.strengths)


def finetune_results(study: Study) -> Iterator[StrategyResult]:
    """The strategies that learn from captions through the decoder, all for as long.

    The strengths start at 0.1 and are learned. Which epoch is kept is decided by the loss of
    training images that no update of this training sees, though the captioner has; how much of the
    learned strength is used, by one half of the held-out images for the other.
    """
    if not isinstance(study.model.vision_model, LiteVisionModel):
        return  # cached features do not pass through other vision models
    lm = {"itc_weight": 0.0, "itm_weight": 0.0, "cd_weight": 0.0}
    every = {"itc_weight": 0.1, "itm_weight": 0.1, "cd_weight": 0.01}
    terms: dict[str, tuple[str | None, dict[str, Any]]] = {
        "decoder fine-tuned": (None, {**lm, "freeze": "vision"}),
        "linear adapter, LM": ("linear adapter", lm),
        "denoising autoencoder, LM": ("denoising autoencoder", lm),
        "RBM, LM": ("RBM", lm),
        "RBM, LM + CD": ("RBM", {**lm, "cd_weight": 0.01}),
        "RBM, LM + ITC + ITM + CD": ("RBM", every),
        "RBM and decoder, LM + CD": ("RBM", {**lm, "cd_weight": 0.01, "freeze": "vision"}),
    }
    for seed in range(study.settings.seeds):
        fitted = fits(study, seed)
        for name, (adapter, options) in terms.items():
            strategy = Strategy("finetune", name)
            fit = None if adapter is None else fitted[adapter]
            make = partial(_finetune, study, strategy, seed, fit, options)
            yield cached_result(study, strategy, seed, make)


def _finetune(
    study: Study,
    strategy: Strategy,
    seed: int,
    fit: Callable[[], GatedResidual] | None,
    options: dict[str, Any],
) -> StrategyResult:
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
    best_epoch = _train(study, model, learned, deciding, seed, options)
    residual = rbm_of(model.eval())
    changed = replace(study, model=model)
    found: dict[str, Any] = {"best_epoch": best_epoch}
    if residual is None:
        everyone = torch.arange(len(study.val))
        loss = mean_loss(image_losses(changed))
        return StrategyResult(strategy, seed, captions_of(changed, None, everyone), loss, found)
    found["learned_strength"] = learned_strength = residual.gate.tanh().item()

    def residual_at(part: float) -> nn.Module:
        residual.set_strength(part * learned_strength)
        return residual

    parts = study.settings.learned_parts
    chosen = adapted(changed, strategy, seed, residual_at, parameters, parts)
    chosen.settings |= found
    return chosen


def _train(
    study: Study,
    model: BlipForConditionalGeneration,
    learned: CaptionPairs,
    deciding: CaptionPairs,
    seed: int,
    options: dict[str, Any],
) -> int:
    """Train a captioner in place; returns the epoch whose weights it keeps."""
    epochs = study.settings.joint_epochs
    with tempfile.TemporaryDirectory() as folder:
        args = RBMBlipTrainingArguments(
            folder, per_device_train_batch_size=128, per_device_eval_batch_size=128, seed=seed,
            num_train_epochs=epochs, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = RBMBlipTrainer(
            model, args, train_dataset=learned, eval_dataset=deciding, tokenizer=study.tokenizer,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    updates = trainer.state.max_steps // epochs
    return (trainer.state.best_global_step or 0) // updates


def pair_features(cache: FeatureCache) -> Tensor:
    """What re-rankers know of the images: the pooled token, [N, D] float32."""
    return torch.cat([batch[:, 0] for batch in cache.batches(256)])


def rerank_results(study: Study) -> Iterator[StrategyResult]:
    """The strategies that choose among the captioner's own candidates.

    All re-rankers are models of pairs of an image and a caption, with about as many weights.
    """
    settings = study.settings
    lists = n_best(study, study.val, "val")
    rated = min(settings.rated_images, len(study.train))
    train_lists = n_best(study, study.train[:rated], "train")
    quality = candidate_ciders(train_lists.texts, study.train_captions[:rated])
    features = pair_features(study.train)
    val_features = pair_features(study.val)

    def fitted(kind: type[PairReranker], seed: int, objective: str | None = None) -> Any:
        return kind.fit(
            features, study.train_captions, n_words=settings.words, n_hidden=settings.pair_hidden,
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

    def chosen(strategy: Strategy, seed: int, make: Callable[[], PairReranker]) -> StrategyResult:
        ranker = make()
        parameters = sum(p.numel() for p in ranker.model.parameters())
        scores = ranker.score(val_features, lists.texts)
        return reranked(study, strategy, seed, lists, scores, parameters)

    own_quality = candidate_ciders(lists.texts, study.val_captions)

    def top_1() -> StrategyResult:
        return StrategyResult(TOP_1, 0, lists.best, mean_loss(image_losses(study)))

    def oracle() -> StrategyResult:
        return StrategyResult(ORACLE, 0, lists.chosen(own_quality.argmax(1)))

    yield cached_result(study, TOP_1, 0, top_1)
    yield cached_result(study, ORACLE, 0, oracle)
    for seed in range(settings.seeds):
        yield cached_result(study, RANDOM_CHOICE, seed, partial(_random_choice, lists, seed))
        results = {}
        for name, make in rankers(seed).items():
            strategy = Strategy("rerank", name)
            results[name] = cached_result(
                study, strategy, seed, partial(chosen, strategy, seed, make)
            )
            yield results[name]
        together = {
            "RBM and ITC": ("RBM PMI (contrastive)", "ITC"),
            "RBM free energy and PMI": ("RBM free energy (CD)", "RBM PMI (fitted to CIDEr)"),
            "RBM free energy and ITC": ("RBM free energy (CD)", "ITC (fitted to CIDEr)"),
        }
        for name, parts in together.items():
            strategy, both = Strategy("rerank", name), [results[part] for part in parts]
            yield cached_result(
                study, strategy, seed, partial(_together, study, strategy, seed, lists, both)
            )


def _random_choice(lists: Candidates, seed: int) -> StrategyResult:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(lists.scores.shape[1], (len(lists.ids),), generator=generator)
    return StrategyResult(RANDOM_CHOICE, seed, lists.chosen(chosen))


def _together(
    study: Study,
    strategy: Strategy,
    seed: int,
    lists: Candidates,
    results: Sequence[StrategyResult],
) -> StrategyResult:
    """Several re-rankers' scores, each over its standard deviation within lists, added up."""
    scores = torch.stack([torch.tensor(result.scores) for result in results])  # [results, N, n]
    deviations = scores - scores.mean(2, keepdim=True)
    std = deviations.square().mean((1, 2), keepdim=True).sqrt()
    parameters = sum(result.parameters for result in results)
    return reranked(study, strategy, seed, lists, (scores / std).sum(0), parameters)


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """The same result at every call, made at the first."""
    return lru_cache(maxsize=1)(make)


GROUPS: dict[str, Callable[[Study], Iterator[StrategyResult]]] = {
    "rerank": rerank_results,
    "adapter": adapter_results,
    "finetune": finetune_results,
}
