"""Choosing among a captioner's candidates by how well they fit the image.

A reranker scores candidates with a joint RBM of ``joint_rbm`` (trained by
``ranker_training``), or with BLIP's own image-text matching, and adds that to the captioner's
scores:

    reranker = RBMReranker.fit(train_features, train_captions)
    weight = choose_weight(selection.scores, reranker.score(features, selection.texts), quality)
    captions = candidates.chosen(reranker.rerank(candidates, image_features, weight))
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BlipForImageTextRetrieval, PreTrainedTokenizerBase

from .captions import Candidates, generated_candidates
from .joint_rbm import JointRBM, PairModel, Vocabulary
from .ranker_training import CaptionBags, PairTraining, encode_lists, fit_cd, fit_contrastive

if TYPE_CHECKING:
    from typing_extensions import Self


# Bounds the memory of bags of words, however many images there are.
_IMAGES_AT_A_TIME = 1024
# Multiples of the weight that gives both scores the same spread within a list.
_RELATIVE_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Reranker(ABC):
    """Scores candidate captions by their image and chooses by ``combined_scores``."""

    @abstractmethod
    def score(self, image_features: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """How well captions fit their images.

        Args:
            image_features: The features [N, D] of N images, or what the subclass says.
            texts: N lists of n captions.

        Returns:
            [N, n] float32, the higher the better.

        Raises:
            ValueError: Lists of different lengths, or as many lists as there are not images.
        """

    def rerank(
        self,
        candidates: Candidates,
        image_features: Tensor,
        weight: float,
        *,
        standardize: bool = False,
    ) -> Tensor:
        """The number of the best candidate of each image, int64 [N].

        Args:
            candidates: N lists of n captions with the captioner's scores.
            image_features: The images' features, as for ``score``.
            weight: The weight of this reranker's score; 0 keeps the captioner's choice.
            standardize: Whether each list's scores are standardized first; see ``combined_scores``.
        """
        extra = self.score(image_features, candidates.texts)
        return combined_scores(candidates.scores, extra, weight, standardize=standardize).argmax(1)

    def rerank_generated(
        self,
        output: Any,
        tokenizer: PreTrainedTokenizerBase,
        image_features: Tensor,
        weight: float,
        *,
        standardize: bool = False,
    ) -> list[str]:
        """The best caption of each image from what ``generate`` returned.

        Args:
            output: The result of ``generate`` by beam search or sampling, with
                ``return_dict_in_generate=True``, ``output_scores=True`` and
                ``num_return_sequences`` above 1.
            tokenizer: The captioner's tokenizer, which decodes the output.
            image_features: The N images' features, as for ``score``.
            weight: The weight of this reranker's score.
            standardize: Whether each list's scores are standardized first.

        Returns:
            The N captions.

        Raises:
            ValueError: The output has no scores, or not as many sequences for each image.
        """
        candidates = generated_candidates(output, tokenizer, len(image_features))
        return candidates.chosen(
            self.rerank(candidates, image_features, weight, standardize=standardize)
        )


class PairReranker(Reranker, ModelHubMixin, library_name="rbm-kernels"):
    """A reranker by a model of ``joint_rbm``'s kind.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are those of huggingface_hub's
    mixin: a folder or a repository with config.json and model.safetensors.

    Args:
        model: The trained model.
        vocabulary: The words that it knows, in its order.

    Raises:
        TypeError: A model of another class.
        ValueError: A vocabulary of another size than the model's.
    """

    model_class: ClassVar[type[PairModel]]
    objectives: ClassVar[Mapping[str, Callable[..., list[float]]]] = {
        "contrastive": fit_contrastive
    }

    def __init__(self, model: PairModel, vocabulary: Vocabulary) -> None:
        name = type(self).__name__
        if not isinstance(model, self.model_class):
            raise TypeError(
                f"{name}: model must be a {self.model_class.__name__}, got {type(model).__name__}"
            )
        if len(vocabulary) != model.n_words:
            raise ValueError(
                f"{name}: vocabulary must have the model's {model.n_words} words, "
                f"got {len(vocabulary)}"
            )
        self.model = model
        self.vocabulary = vocabulary

    @torch.no_grad()
    def score(self, image_features: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """Scores [N, n] of image features [N, D], pooled, with N lists of n captions."""
        _list_length(type(self).__name__, texts, len(image_features))
        device = self.model.mean.device
        scores = []
        for first in range(0, len(texts), _IMAGES_AT_A_TIME):
            rows = slice(first, first + _IMAGES_AT_A_TIME)
            words = encode_lists(texts[rows], self.vocabulary).to(device)
            scores.append(self._scores(image_features[rows].to(device), words).float().cpu())
        return torch.cat(scores)

    def _scores(self, features: Tensor, words: Tensor) -> Tensor:
        return self.model.candidate_scores(features, words)

    @classmethod
    def fit(
        cls,
        features: Tensor,
        captions: Sequence[Sequence[str]],
        *,
        n_words: int = 1000,
        n_hidden: int = 256,
        held_out: float = 0.1,
        objective: str | None = None,
        training: PairTraining | None = None,
        **options: Any,
    ) -> Self:
        """Train a new model on images with captions, and make a reranker of it.

        Args:
            features: The pooled features [N, D] of the training images.
            captions: One or more captions of each of them.
            n_words: The largest size of the vocabulary.
            n_hidden: The number of hidden units.
            held_out: The share of the images that decide when to stop.
            objective: A key of the class's ``objectives``; the first one by default.
            training: See ``PairTraining``; its seed also draws the initial
                weights and the held-out images.
            **options: Further keywords of the class, such as ``energy``.

        Raises:
            ValueError: An unknown objective, or bad arguments.
        """
        objective = objective or next(iter(cls.objectives))
        if objective not in cls.objectives:
            raise ValueError(
                f"{cls.__name__}: objective must be one of {[*cls.objectives]}, got {objective!r}"
            )
        training = training or PairTraining()
        vocabulary = Vocabulary.from_captions((text for own in captions for text in own), n_words)
        bags = CaptionBags.encode(features, captions, vocabulary)
        train, rest = bags.split(held_out, training.seed)
        generator = torch.Generator().manual_seed(training.seed)
        model = cls.model_class(features.shape[1], len(vocabulary), n_hidden, generator=generator)
        model.initialize_from_data(train.features, train.words)
        reranker = cls(model, vocabulary, **options)
        cls.objectives[objective](model, train, rest, training)
        return reranker

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}
        save_file(tensors, save_directory / "model.safetensors", metadata={"format": "pt"})
        config = {
            "kind": type(self.model).__name__,
            "n_features": self.model.n_features,
            "n_hidden": self.model.n_hidden,
            "words": self.vocabulary.words,
        }
        text = json.dumps(config, ensure_ascii=False, indent=1)
        (save_directory / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
        model: Any = None,  # config.json of release 0.1 has this name for the kind
        **options: Any,
    ) -> Self:
        name = "model.safetensors"
        weights = Path(model_id) / name
        if not Path(model_id).is_dir():
            weights = Path(
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        if config is None or not weights.is_file():
            missing = "config.json" if config is None else name
            raise FileNotFoundError(f"{cls.__name__}: {model_id} must hold {missing}")
        kind = config.get("kind", config.get("model"))
        if kind != cls.model_class.__name__:
            raise ValueError(
                f"{cls.__name__}: {model_id} must hold a {cls.model_class.__name__}, got {kind}"
            )
        vocabulary = Vocabulary(tuple(config["words"]))
        restored = cls.model_class(config["n_features"], len(vocabulary), config["n_hidden"])
        restored.load_state_dict(load_file(weights))
        return cls(restored, vocabulary, **options)


class RBMReranker(PairReranker):
    """Re-ranking by the free energy of a joint RBM.

    Args:
        model: A trained ``JointRBM``.
        vocabulary: The words that it knows.
        energy: "pmi": the score of ``JointRBM``. "joint": -F(v, t), which prefers
            frequent words whatever the image; it shows what subtracting the prior is good for.

    Raises:
        ValueError: An unknown energy.
    """

    model_class = JointRBM
    objectives: ClassVar = {"contrastive": fit_contrastive, "cd": fit_cd}

    def __init__(self, model: JointRBM, vocabulary: Vocabulary, energy: str = "pmi") -> None:
        super().__init__(model, vocabulary)
        if energy not in ("pmi", "joint"):
            raise ValueError(f"RBMReranker: energy must be 'pmi' or 'joint', got {energy!r}")
        self.energy = energy

    def _scores(self, features: Tensor, words: Tensor) -> Tensor:
        if self.energy == "pmi":
            return super()._scores(features, words)
        assert isinstance(self.model, JointRBM)
        n = words.shape[1]
        energies = self.model.free_energy(features.repeat_interleave(n, 0), words.flatten(0, 1))
        return -energies.view(-1, n)


class BlipReranker(Reranker):
    """Re-ranking by a BLIP retrieval model, such as Salesforce/blip-itm-base-coco.

    Args:
        model: A ``transformers.BlipForImageTextRetrieval``; it is put into evaluation mode.
        tokenizer: The model's tokenizer.
        head: "itm": the log-odds of a match by cross-attention. "itc": the cosine.
        batch_size: The number of captions that are scored at a time.

    Raises:
        ValueError: An unknown head, or a batch size below 1.
    """

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        tokenizer: PreTrainedTokenizerBase,
        head: str = "itm",
        batch_size: int = 64,
    ) -> None:
        if head not in ("itm", "itc"):
            raise ValueError(f"BlipReranker: head must be 'itm' or 'itc', got {head!r}")
        if batch_size < 1:
            raise ValueError(f"BlipReranker: batch_size must be 1 or more, got {batch_size}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.head = head
        self.batch_size = batch_size

    @torch.no_grad()
    def score(self, image_features: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """Scores [N, n] of image embeddings [N, L, D] with N lists of n captions.

        The embeddings are the model's own ``vision_model(pixel_values).last_hidden_state``, so each
        image is encoded once for all of its candidates (the model's ``forward`` encodes it anew).
        """
        n = _list_length("BlipReranker", texts, len(image_features))
        captions = [text for each in texts for text in each]
        images = torch.arange(len(texts)).repeat_interleave(n)
        scores = [
            self._batch(image_features[rows], [captions[first + i] for i in range(len(rows))])
            for first, rows in zip(
                range(0, len(captions), self.batch_size), images.split(self.batch_size), strict=True
            )
        ]
        return torch.cat(scores).view(len(texts), n)

    def _batch(self, embeddings: Tensor, captions: list[str]) -> Tensor:
        device = self.model.device
        embeddings = embeddings.to(device, self.model.dtype)
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        text = {
            "input_ids": tokens["input_ids"].to(device),
            "attention_mask": tokens["attention_mask"].to(device),
        }
        if self.head == "itc":
            hidden = self.model.text_encoder(**text).last_hidden_state[:, 0]
            text_vectors = torch.nn.functional.normalize(self.model.text_proj(hidden), dim=-1)
            image_vectors = torch.nn.functional.normalize(
                self.model.vision_proj(embeddings[:, 0]), dim=-1
            )
            return (text_vectors * image_vectors).sum(-1).float().cpu()
        hidden = self.model.text_encoder(
            **text,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=torch.ones(
                embeddings.shape[:2], dtype=torch.long, device=device
            ),
        ).last_hidden_state[:, 0]
        no_match, match = self.model.itm_head(hidden).float().unbind(-1)
        return (match - no_match).cpu()


def combined_scores(
    captioner: Tensor, extra: Tensor, weight: float, *, standardize: bool = False
) -> Tensor:
    """captioner + weight * extra, what re-ranking takes the largest of.

    Args:
        captioner: [N, n], length-normalized log-probabilities.
        extra: [N, n], a reranker's scores.
        weight: Finite.
        standardize: False: ``extra`` as it is. A PMI is a log-probability ratio, so that a
            difference counts alike for all images, and an image whose candidates all fit alike
            is left to the captioner. True: every list's extra scores at mean 0 and variance 1
            (0 where all are equal), which makes weights of different rerankers comparable.

    Returns:
        [N, n].

    Raises:
        ValueError: Different shapes, or a weight that is not finite.
    """
    if captioner.shape != extra.shape or captioner.dim() != 2:
        raise ValueError(
            "combined_scores: captioner and extra must be [N, n] both, "
            f"got {list(captioner.shape)} and {list(extra.shape)}"
        )
    if not abs(weight) < float("inf"):
        raise ValueError(f"combined_scores: weight must be finite, got {weight}")
    if weight == 0:
        return captioner  # also where a list's extra scores are infinite
    return captioner + weight * (_standardized(extra) if standardize else extra)


def _standardized(extra: Tensor) -> Tensor:
    """Each list at mean 0 and variance 1, or at 0 where all its scores are equal."""
    spread, mean = torch.std_mean(extra, dim=1, keepdim=True, correction=0)
    flat = spread <= 1e-6 * (1 + mean.abs())
    return torch.where(flat, 0.0, (extra - mean) / torch.where(flat, 1.0, spread))


def weight_grid(captioner: Tensor, extra: Tensor) -> list[float]:
    """Weights to try: 0, and 1/20 to 10 times the ratio of both scores' spread within lists."""
    spreads = [(s - s.mean(1, keepdim=True)).square().mean().sqrt() for s in (captioner, extra)]
    ratio = (spreads[0] / spreads[1].clamp_min(torch.finfo(torch.float32).tiny)).item()
    return [relative * ratio for relative in _RELATIVE_WEIGHTS]


def choose_weight(
    captioner: Tensor,
    extra: Tensor,
    quality: Tensor,
    weights: Sequence[float] | None = None,
    *,
    standardize: bool = False,
) -> float:
    """The weight under which the chosen candidates have the highest mean quality.

    Choose it on images that the result is not reported on.

    Args:
        captioner: [N, n].
        extra: [N, n], what a reranker's ``score`` gave.
        quality: [N, n], as of ``candidate_ciders``: the mean is then the corpus CIDEr.
        weights: To choose from; by default ``weight_grid``.
        standardize: As for ``combined_scores``.

    Returns:
        One of the weights; the smallest of several that are equally good.

    Raises:
        ValueError: Different shapes, or no weights.
    """
    if quality.shape != captioner.shape:
        raise ValueError(
            f"choose_weight: quality must be [N, n] = {list(captioner.shape)}, "
            f"got {list(quality.shape)}"
        )
    if weights is None:
        weights = weight_grid(captioner, _standardized(extra) if standardize else extra)
    if not weights:
        raise ValueError("choose_weight: weights must hold one or more, got none")

    def mean_quality(weight: float) -> float:
        chosen = combined_scores(captioner, extra, weight, standardize=standardize).argmax(1)
        return quality.double().gather(1, chosen[:, None]).mean().item()

    return max(sorted(weights, key=abs), key=mean_quality)


def _list_length(name: str, texts: Sequence[Sequence[str]], n_images: int) -> int:
    """n of N lists of n texts, after checking that they are N and of one length."""
    lengths = {len(each) for each in texts}
    if len(texts) != n_images or len(lengths) != 1:
        raise ValueError(
            f"{name}: texts must be {n_images} lists of one length, "
            f"got {len(texts)} of lengths {sorted(lengths)}"
        )
    return lengths.pop()
