"""A joint RBM over the features of an image and the words of a caption.

It says how well a caption fits an image, which ``rerank`` lets choose among candidates, and
infers one side from the other: words from images (``infer_words``) and images from words
(``infer_image``), by clamping the side that is given (Srivastava and Salakhutdinov,
"Multimodal learning with deep Boltzmann machines", JMLR 15, 2014).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

import rbm_kernels as rk

from .captions import normalize_caption
from .similarity import cosine, euclidean, jaccard, kl_bernoulli, overlap

# Words that say nothing of what is in a picture. Prepositions of place that do (over, behind,
# through) are not among them.
# fmt: off
FUNCTION_WORDS = frozenset([
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "and", "or", "but",
    "while", "as", "if", "so", "than", "then", "of", "in", "on", "at", "to", "with", "by", "for",
    "from", "into", "onto", "upon", "about", "is", "are", "was", "were", "be", "been", "being",
    "am", "has", "have", "had", "having", "does", "do", "did", "can", "will", "would", "it", "its",
    "he", "his", "him", "she", "her", "hers", "they", "their", "them", "theirs", "we", "our", "us",
    "you", "your", "i", "my", "me", "who", "whom", "whose", "which", "what", "where", "when",
    "there", "here", "'s", "s", "t",
])
# fmt: on

# Elements of one [rows, M, H] block of pairs, 64 MiB in float32: larger ones are cut by rows.
_PAIR_BLOCK = 2**24


@dataclass(frozen=True)
class Vocabulary:
    """The words of a bag of words; a caption's other words are left out.

    Attributes:
        words: T different words, as ``data.normalize_caption`` writes them.

    Example:
        >>> vocabulary = Vocabulary.from_captions(["A dog runs", "a black dog"], size=2)
        >>> vocabulary.words
        ('dog', 'black')
        >>> vocabulary.encode(["The dog and the cat.", "a cat"])
        tensor([[ True, False],
                [False, False]])
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words or len(set(self.words)) != len(self.words):
            raise ValueError(
                "Vocabulary: words must be one word or more, each once, "
                f"got {len(self.words)} of which {len(set(self.words))} differ"
            )

    @classmethod
    def from_captions(cls, captions: Iterable[str], size: int = 1000) -> Vocabulary:
        """The most frequent words of captions that are no function words.

        Args:
            captions: Any text; it is normalized here.
            size: T at most; equally frequent words are taken in alphabetical order.

        Raises:
            ValueError: A size below 1, or captions without a content word.
        """
        if size < 1:
            raise ValueError(f"Vocabulary: size must be at least 1, got {size}")
        counts = Counter(
            word
            for caption in captions
            for word in normalize_caption(caption).split()
            if word not in FUNCTION_WORDS
        )
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(frequent[:size]))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """The place of each word."""
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Which words each text has, bool [N, T]."""
        pairs = [
            (row, self.index[word])
            for row, text in enumerate(texts)
            for word in normalize_caption(text).split()
            if word in self.index
        ]
        bags = torch.zeros(len(texts), len(self), dtype=torch.bool)
        if pairs:
            rows, columns = zip(*pairs, strict=True)
            bags[list(rows), list(columns)] = True
        return bags


class PairModel(nn.Module, ABC):
    """What models of images with captions share: sizes, standardization, and how pairs are formed.

    Args:
        n_features: The length D of an image's feature vector.
        n_words: The size T of the vocabulary.
        n_hidden: The number H of hidden units.
        init_std: The standard deviation of the initial weights.
        generator: Draws the initial weights; None takes torch's default generator.

    Attributes:
        mean: The mean [D] of the image features, which is subtracted first.
        scale: The scale [D] by which they are divided next.

    Raises:
        ValueError: A size below 1.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        n_features: int,
        n_words: int,
        n_hidden: int,
        *,
        init_std: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"n_features": n_features, "n_words": n_words, "n_hidden": n_hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be 1 or more, got {size}")
        self.n_features, self.n_words, self.n_hidden = n_features, n_words, n_hidden
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.W_image = nn.Parameter(
            init_std * torch.randn(n_features, n_hidden, generator=generator)
        )
        self.W_words = nn.Parameter(init_std * torch.randn(n_words, n_hidden, generator=generator))

    @torch.no_grad()
    def initialize_from_data(
        self, features: Tensor, words: Tensor, *, whiten: bool = False
    ) -> None:
        """Set what follows from the training data alone: here mean and scale of the features.

        Args:
            features: [N, D] of the training images, N of 2 or more.
            words: [M, T] of their captions.
            whiten: True: each feature gets variance 1. False: all are divided by one number, after
                which their mean variance is 1, so that principal components of little variance,
                which are mostly noise, stay small.

        Raises:
            ValueError: A wrong shape, or values that are not finite.
        """
        self._check(features, words)
        if features.shape[0] < 2 or words.shape[0] < 1:
            raise ValueError(
                "initialize_from_data: needs 2 images and 1 caption or more, "
                f"got {features.shape[0]} and {words.shape[0]}"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError("initialize_from_data: features must be finite, got NaN or infinity")
        variance, mean = torch.var_mean(features.float(), dim=0)
        spread = variance.sqrt() if whiten else variance.mean().sqrt().expand_as(variance)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > 1e-6 * (1 + mean.abs()), spread, 1.0))

    def standardize(self, features: Tensor) -> Tensor:
        """Features [N, D] of any float dtype, less their mean and over their scale."""
        return (features.to(self.mean.dtype) - self.mean) / self.scale

    @abstractmethod
    def image_part(self, features: Tensor) -> Tensor:
        """What an image adds to the hidden units' input: features [N, D] to [N, H]."""

    @abstractmethod
    def word_part(self, words: Tensor) -> Tensor:
        """What a caption adds to the hidden units' input: words [..., T] to [..., H]."""

    @abstractmethod
    def combine(self, image: Tensor, words: Tensor) -> Tensor:
        """Scores [...] from the two parts [..., H]; the more the better they fit."""

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Scores of every image with every caption.

        Memory is bounded: pairs are taken in blocks of rows, which the backward pass computes anew.

        Args:
            features: [N, D], not standardized.
            words: [M, T], bool.

        Returns:
            [N, M].

        Raises:
            ValueError: A wrong shape.
        """
        self._check(features, words)
        return _all_pairs(self.combine, self.image_part(features), self.word_part(words))

    def candidate_scores(self, features: Tensor, words: Tensor) -> Tensor:
        """Scores [N, n] of each image [N, D] with its own candidates, words [N, n, T].

        Raises:
            ValueError: A wrong shape.
        """
        if words.dim() != 3 or words.shape[0] != features.shape[0]:
            raise ValueError(
                f"candidate_scores: words must be [N, n, T] with N = {features.shape[0]}, "
                f"got {list(words.shape)}"
            )
        self._check(features, words)
        return self.combine(self.image_part(features)[:, None], self.word_part(words))

    def _check(self, features: Tensor | None, words: Tensor | None) -> None:
        name = type(self).__name__
        if features is not None and (features.dim() != 2 or features.shape[1] != self.n_features):
            raise ValueError(
                f"{name}: features must be [N, D] = [N, {self.n_features}], "
                f"got {list(features.shape)}"
            )
        if words is not None and (words.dim() < 2 or words.shape[-1] != self.n_words):
            raise ValueError(
                f"{name}: words must be [M, T] = [M, {self.n_words}], got {list(words.shape)}"
            )


def _all_pairs(combine: Callable[[Tensor, Tensor], Tensor], image: Tensor, words: Tensor) -> Tensor:
    """combine(image[i], words[j]) for all i and j, [N, M], in blocks of bounded size."""
    rows = max(1, _PAIR_BLOCK // max(1, words.numel()))
    if rows >= image.shape[0]:
        return combine(image[:, None], words[None])
    blocks = [
        checkpoint(combine, block[:, None], words[None], use_reentrant=False)
        for block in image.split(rows)
    ]
    return torch.cat(blocks)


class JointRBM(PairModel):
    """A restricted Boltzmann machine over an image's features and a caption's words.

    Gaussian visible units v (standardized features), Bernoulli visible units t (words that the
    caption has; the others are off) and binary hidden units h, which all see both:

        E(v, t, h) = sum_i (v_i - b_i)^2 / (2 s_i^2) - b_t't - (v/s^2)'W_v h - t'W_t h - c'h

    after the multi-modal Boltzmann machines of Ngiam et al. (ICML 2011) and of Srivastava and
    Salakhutdinov (JMLR 15, 2014), with one hidden layer. Free energies, samples and gradients are
    those of ``rbm_kernels``.

    The score of a pair is the pointwise mutual information of free energies,

        PMI(v, t) = -F(v, t) + F(v) + F(t) - F()

    where a modality that is not named is left out together with its weights, so that the free
    energy is that of the RBM over the rest. All visible biases cancel, and with a = (v/s^2)'W_v and
    g = t'W_t what is left is ``sum_j [softplus(c + a + g) - softplus(c + a) - softplus(c + g)
    + softplus(c)]_j``: what image and caption gain from being together. It is the exact log odds
    ratio log p(v, t) p(0, 0) / (p(v, 0) p(0, t)), and 0 for a caption without known words. (Log
    p(v, t) / (p(v) p(t)) would need marginals that have no closed form.)

    Why subtract: -F(v, t) alone prefers frequent words and a common length whatever the image;
    F(v) and F() are the same for all captions of an image. Choosing by log p(t | v) - lambda
    log p(t) is the maximum mutual information of Li et al. (NAACL 2016). The critic that minimizes
    InfoNCE both ways is log p(v, t) / (p(v) p(t)) up to a constant (van den Oord et al.,
    arXiv:1807.03748, section 2.3), so ``ranker_training.fit_contrastive`` makes of this score
    an estimate of it.

    Args:
        n_features: The number D of image features.
        n_words: The number T of words.
        n_hidden: The number H of hidden units.
        init_std: The standard deviation of the initial weights.
        generator: The generator that draws them.

    Attributes:
        W_image: W_v [D, H].
        W_words: W_t [T, H].
        b_image: Visible bias [D] of the standardized features.
        b_words: Visible bias [T] of the words.
        c: Hidden bias [H].
        log_var: log s^2 [D] of the standardized features.

    Example:
        >>> model = JointRBM(n_features=4, n_words=3, n_hidden=2)
        >>> model(torch.randn(5, 4), torch.ones(6, 3, dtype=torch.bool)).shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        n_features: int,
        n_words: int,
        n_hidden: int,
        *,
        init_std: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(n_features, n_words, n_hidden, init_std=init_std, generator=generator)
        self.b_image = nn.Parameter(torch.zeros(n_features))
        self.b_words = nn.Parameter(torch.zeros(n_words))
        self.c = nn.Parameter(torch.zeros(n_hidden))
        self.log_var = nn.Parameter(torch.zeros(n_features))

    @torch.no_grad()
    def initialize_from_data(
        self, features: Tensor, words: Tensor, *, whiten: bool = False
    ) -> None:
        """Standardization, and word biases of independent words (Hinton 2010, section 8.1)."""
        super().initialize_from_data(features, words, whiten=whiten)
        on = words.sum(0, dtype=self.b_words.dtype)
        self.b_words.copy_(torch.log((on + 0.5) / (words.shape[0] - on + 0.5)))

    def image_part(self, features: Tensor) -> Tensor:
        return (self.standardize(features) * torch.exp(-self.log_var)) @ self.W_image

    def word_part(self, words: Tensor) -> Tensor:
        return words.to(self.W_words.dtype) @ self.W_words

    def combine(self, image: Tensor, words: Tensor) -> Tensor:
        together = softplus(self.c + image + words).sum(-1)
        apart = softplus(self.c + image).sum(-1) + softplus(self.c + words).sum(-1)
        return together - apart + softplus(self.c).sum()

    def free_energy(self, features: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        """F of images with their captions, or of the RBM over one modality alone.

        Args:
            features: [N, D], or None to leave images out.
            words: [N, T] of 0 and 1, or None to leave captions out.

        Returns:
            [N] in nats, as a density of the standardized features.

        Raises:
            ValueError: Both are None, a wrong shape, or different N.
        """
        energy = -softplus(self._hidden_input(features, words)).sum(-1)
        if features is not None:
            z = self.standardize(features)
            energy = energy + 0.5 * ((z - self.b_image).square() * torch.exp(-self.log_var)).sum(-1)
        if words is not None:
            energy = energy - words.to(self.b_words.dtype) @ self.b_words
        return energy

    @torch.no_grad()
    def sample_hidden(self, z: Tensor, words: Tensor, *, seed: int | Tensor) -> Tensor:
        """States of the hidden units [N, H] given standardized features and words [N, T]."""
        # As a Gaussian unit of variance 1 a word adds to the hidden units' input what it should.
        visible = torch.cat([z, words.to(z.dtype)], 1)
        W = torch.cat([self.W_image, self.W_words])
        log_var = torch.cat([self.log_var, torch.zeros_like(self.b_words)])
        h = rk.sample_hidden(visible, W, self.c, log_var=log_var, seed=seed)
        return h

    @torch.no_grad()
    def gibbs(
        self,
        features: Tensor,
        words: Tensor,
        k: int = 1,
        *,
        clamp: str | None = None,
        seed: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor]:
        """k sweeps of block Gibbs sampling: all hidden units, then both sides given them.

        Args:
            features: Start [N, D], not standardized.
            words: Start [N, T].
            k: Sweeps, 1 or more.
            clamp: "image" or "words" holds that side still, which samples the other one's
                conditional distribution; None samples both.
            seed: An int, or an int64[2] tensor (seed, offset) that is advanced.

        Returns:
            features [N, D] and words bool [N, T] after k sweeps.

        Raises:
            ValueError: A wrong shape, k below 1, or an unknown clamp.
        """
        self._check_rows(features, words)
        if k < 1:
            raise ValueError(f"gibbs: k must be 1 or more, got {k}")
        if clamp not in (None, "image", "words"):
            raise ValueError(f"gibbs: clamp must be None, 'image' or 'words', got {clamp!r}")
        z, t = self.standardize(features), words
        # One stream of random numbers over all draws: a shared offset would share the numbers. The
        # caller's tensor is advanced when all is drawn, so that an error leaves it as it was.
        draws = seed.clone() if isinstance(seed, Tensor) else self._stream(seed)
        for _ in range(k):
            h = self.sample_hidden(z, t, seed=draws)
            if clamp != "image":
                z = self._sample_image(h, draws)
            if clamp != "words":
                t = self._sample_words(h, draws)
        if isinstance(seed, Tensor):
            seed.copy_(draws)
        held = features if clamp == "image" else z * self.scale + self.mean
        return held, t.to(torch.bool)

    def cd_loss(
        self,
        features: Tensor,
        words: Tensor,
        k: int = 1,
        *,
        chains: tuple[Tensor, Tensor] | None = None,
        seed: int | Tensor = 0,
    ) -> Tensor:
        """mean F(data) - mean F(chains), whose backward is the contrastive divergence gradient.

        Hinton (2002); with persistent chains Tieleman (2008).

        Args:
            features: [N, D], not standardized.
            words: [N, T].
            k: Sweeps, 1 or more.
            chains: Persistent (features [C, D], words bool [C, T]), advanced in place; None starts
                from the data.
            seed: The seed of the draws, as for ``gibbs``.

        Returns:
            0-dim tensor. It is no measure of learning.

        Raises:
            ValueError: A wrong shape, k below 1, values that are not finite, or chains that cannot
                be written. Nothing has been written then.
        """
        for chain in chains or ():
            if chain.requires_grad or (
                chain.is_inference() and not torch.is_inference_mode_enabled()
            ):
                raise ValueError(
                    "cd_loss: chains are advanced in place, and must not require grad nor come "
                    "from torch.inference_mode(): pass clones of them"
                )
        data = self.free_energy(features, words).mean()
        start = (features, words) if chains is None else chains
        state = self.gibbs(*start, k, seed=seed)
        model = self.free_energy(*state).mean()
        if chains is not None:
            for chain, advanced in zip(chains, state, strict=True):
                chain.copy_(advanced)
        return data - model

    def hidden(self, features: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        """p(h = 1 | what is given) [N, H]; a modality that is None is left out of the model."""
        return torch.sigmoid(self._hidden_input(features, words))

    def _hidden_input(self, features: Tensor | None, words: Tensor | None) -> Tensor:
        """The log-odds [N, H] of the hidden units given what is there of image and caption."""
        self._check_rows(features, words)
        x: Tensor = self.c
        if features is not None:
            x = x + self.image_part(features)
        if words is not None:
            x = x + self.word_part(words)
        return x

    def _sample_image(self, h: Tensor, seed: Tensor) -> Tensor:
        z = rk.sample_visible(h, self.W_image, self.b_image, log_var=self.log_var, seed=seed)
        return z

    def _sample_words(self, h: Tensor, seed: Tensor) -> Tensor:
        t = rk.sample_visible(h, self.W_words, self.b_words, seed=seed)
        return t

    def _stream(self, seed: int) -> Tensor:
        return torch.tensor([seed, 0], device=self.c.device)

    def _check_rows(self, features: Tensor | None, words: Tensor | None) -> None:
        if features is None and words is None:
            raise ValueError("JointRBM: features, words or both must be given, got neither")
        self._check(features, words)
        if features is not None and words is not None and len(features) != len(words):
            raise ValueError(
                "JointRBM: features and words must have as many rows, "
                f"got {len(features)} and {len(words)}"
            )


METHODS = ("mean_field", "gibbs")


@torch.no_grad()
def infer_words(
    model: JointRBM,
    features: Tensor,
    *,
    method: str = "mean_field",
    sweeps: int = 50,
    burn_in: int = 10,
    seed: int = 0,
) -> Tensor:
    """The probability of each word given an image.

    Args:
        model: The joint RBM.
        features: [N, D], not standardized.
        method: "mean_field" iterates E[h] and E[t] to a fixed point; "gibbs" clamps the image,
            samples, and averages p(t | h) over the sweeps, which is slower and exact in the limit.
        sweeps: Iterations, or Gibbs sweeps averaged over.
        burn_in: Gibbs sweeps before those.
        seed: The seed of the Gibbs sampling.

    Returns:
        [N, T] in [0, 1].

    Raises:
        ValueError: A wrong shape, an unknown method, sweeps below 1 or burn_in below 0.
    """
    _check(method, sweeps, burn_in)
    image = model.image_part(features)
    if method == "mean_field":
        h = model.hidden(features)
        for _ in range(sweeps):
            t = torch.sigmoid(model.b_words + h @ model.W_words.T)
            h = torch.sigmoid(model.c + image + t @ model.W_words)
        return t
    z = model.standardize(features)
    draws = torch.tensor([seed, 0], device=z.device)
    t = z.new_zeros(len(z), model.n_words)
    total = torch.zeros_like(t)
    for sweep in range(burn_in + sweeps):
        h = model.sample_hidden(z, t, seed=draws)
        t, p = rk.sample_visible(h, model.W_words, model.b_words, return_probs=True, seed=draws)
        if sweep >= burn_in:
            total += p
    return total / sweeps


@torch.no_grad()
def infer_image(
    model: JointRBM,
    words: Tensor,
    *,
    method: str = "mean_field",
    sweeps: int = 50,
    burn_in: int = 10,
    seed: int = 0,
) -> Tensor:
    """The mean of the image features given a caption's words.

    Args:
        words: [N, T].

    The other arguments and errors are those of ``infer_words``.

    Returns:
        [N, D], in the units of the features that the model was trained on.
    """
    _check(method, sweeps, burn_in)
    if method == "mean_field":
        text, precision = model.word_part(words), torch.exp(-model.log_var)
        h = model.hidden(words=words)
        for _ in range(sweeps):
            z = model.b_image + h @ model.W_image.T
            h = torch.sigmoid(model.c + (z * precision) @ model.W_image + text)
        return z * model.scale + model.mean
    draws = torch.tensor([seed, 0], device=words.device)
    z = model.b_image.expand(len(words), -1)
    total = torch.zeros_like(z)
    for sweep in range(burn_in + sweeps):
        h = model.sample_hidden(z, words, seed=draws)
        z, mean = rk.sample_visible(
            h, model.W_image, model.b_image, log_var=model.log_var, return_probs=True, seed=draws
        )
        if sweep >= burn_in:
            total += mean
    return total / sweeps * model.scale + model.mean


@torch.no_grad()
def hidden_similarities(model: JointRBM, features: Tensor, words: Tensor) -> dict[str, Tensor]:
    """How alike the hidden units of an image and of a caption are, each given alone.

    p(h | v) and p(h | t) are products over the hidden units, so their Kullback-Leibler divergence
    is the sum of the units'. The Jensen-Shannon divergence of products has no closed form; given is
    the mean of the units' divergences, which lies in [0, ln 2].

    Args:
        model: The joint RBM.
        features: [N, D], not standardized.
        words: [N, T] of a caption for each image.

    Returns:
        Each [N]: "kl" (image from caption, in nats), "jensen_shannon"; "cosine" and "euclidean"
        (1 / (1 + distance)) of the probabilities; "jaccard" and "overlap" of the sets of units that
        are likelier on than off.

    Raises:
        ValueError: A wrong shape, or different N.
    """
    if len(features) != len(words):
        raise ValueError(
            "hidden_similarities: features and words must have as many rows, "
            f"got {len(features)} and {len(words)}"
        )
    p, q = model.hidden(features), model.hidden(words=words)
    middle = (p + q) / 2
    on = p > 0.5, q > 0.5
    return {
        "kl": kl_bernoulli(p, q),
        "jensen_shannon": (kl_bernoulli(p, middle) + kl_bernoulli(q, middle)) / 2 / p.shape[1],
        "cosine": cosine(p, q),
        "euclidean": euclidean(p, q),
        "jaccard": jaccard(*on),
        "overlap": overlap(*on),
    }


def _check(method: str, sweeps: int, burn_in: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if sweeps < 1 or burn_in < 0:
        raise ValueError(
            f"sweeps must be 1 or more and burn_in 0 or more, got {sweeps} and {burn_in}"
        )
