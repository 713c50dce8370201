"""How good captions are: BLEU, ROUGE-L, CIDEr, METEOR, SPICE, and how varied they are.

The metrics are those of COCO's evaluation server (Chen et al. 2015,
https://arxiv.org/abs/1504.00325), through `pycocoevalcap`. METEOR, SPICE and the Penn Treebank
tokeniser are Java programs: each runs as one process that has ended when the function returns.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from blip_integration.captions import normalize_caption

Ngram = tuple[str, ...]

# CIDEr-D's own constants (Vedantam et al. 2015): n-grams up to 4, a length penalty of this spread.
_CIDER_N = 4
_CIDER_SIGMA = 6.0

_SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references each n-gram occurs; see :func:`document_frequencies`.

    Attributes:
        counts: images for each n-gram of 1 to 4 words.
        images: how many there are in all.
    """

    counts: Mapping[Ngram, int]
    images: int


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval; see :func:`paired_bootstrap`."""

    mean: float
    low: float
    high: float


def java_available() -> bool:
    """Whether `java` is on the PATH: METEOR, SPICE and the tokeniser "ptb" need it."""
    return shutil.which("java") is not None


def evaluate(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokeniser: str = "plain",
    meteor: bool | None = None,
    spice: bool = False,
) -> dict[str, float]:
    """Score a whole set of captions, one for each image.

    Args:
        candidates: a caption for each image; it may be empty.
        references: what people wrote of each image, at least one each.
        tokeniser: "plain" (:func:`blip_integration.captions.normalize_caption`) or "ptb", the Penn
            Treebank's that published figures use; it needs Java. On Flickr8k's captions they differ
            in 4 of 5,000.
        meteor: None computes it where there is Java; True demands it.
        spice: needs Java and two files that pycocoevalcap does not ship; never downloaded here.

    Returns:
        "BLEU-1" to "BLEU-4", "ROUGE-L", "METEOR" and "SPICE" in [0, 1], "CIDEr" (CIDEr-D, document
        frequencies from these references) in [0, 10], "distinct-1" and "distinct-2" in [0, 1], and
        "length" in words. Papers print 100 times all but the last three.

    Raises:
        ValueError: lengths that differ, no images, an image without references, a reference without
            words, an unknown tokeniser.
        ModuleNotFoundError: pycocoevalcap is missing.
        RuntimeError: Java is missing or fails.
        FileNotFoundError: SPICE's files are missing.
    """
    _check("evaluate", candidates, references)
    if tokeniser not in ("plain", "ptb"):
        raise ValueError(f"evaluate: tokeniser must be 'plain' or 'ptb', got {tokeniser!r}")
    if meteor is None:
        meteor = java_available()
    if meteor or spice or tokeniser == "ptb":
        _require_java()
    if spice:
        _require_spice_files()
    bleu, rouge = _module("bleu.bleu"), _module("rouge.rouge")
    tokenise = _plain if tokeniser == "plain" else _penn_treebank
    said, wanted = _tokenised(tokenise, candidates, references)

    ours = {i: [text] for i, text in enumerate(said)}
    theirs = dict(enumerate(wanted))
    orders, _ = bleu.Bleu(4).compute_score(theirs, ours, verbose=0)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(orders, start=1)}
    scores["ROUGE-L"] = float(rouge.Rouge().compute_score(theirs, ours)[0])
    cider = _module("cider.cider").Cider()
    scores["CIDEr"] = float(cider.compute_score(theirs, ours)[0])
    if meteor:
        scores["METEOR"] = _meteor(said, wanted)
    if spice:
        scores["SPICE"] = float(_module("spice.spice").Spice().compute_score(theirs, ours)[0])
    words = [text.split() for text in said]
    scores["distinct-1"] = _distinct(words, 1)
    scores["distinct-2"] = _distinct(words, 2)
    scores["length"] = sum(map(len, words)) / len(words)
    return scores


def document_frequencies(references: Sequence[Sequence[str]]) -> DocumentFrequencies:
    """Count, for each n-gram of 1 to 4 words, the images whose references have it.

    Give those of a whole data set to :func:`cider_scores` to score a part of it, or several
    captions for each image.

    Raises:
        ValueError: no references.
    """
    if not references:
        raise ValueError("document_frequencies: references must be of at least 1 image, got none")
    counts: Counter[Ngram] = Counter()
    for captions in references:
        texts = map(normalize_caption, captions)
        counts.update(set(chain.from_iterable(map(_ngram_counts, texts))))
    return DocumentFrequencies(counts, len(references))


def cider_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> Tensor:
    """CIDEr-D of each candidate (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, section 5).

    Captions are normalised first. Unlike pycocoevalcap's, which it equals to rounding, this takes
    document frequencies, and prepares repeated references once: for n-best lists repeat each
    image's references n times and give the frequencies of the images.

    Args:
        candidates: N captions; an empty one scores 0.
        references: N lists of at least one reference.
        frequencies: None counts them in these references, each entry as an image of its own. A
            mean over the scores is then the CIDEr of :func:`evaluate`.

    Returns:
        [N] float64, in [0, 10].

    Raises:
        ValueError: as :func:`evaluate`.
    """
    _check("cider_scores", candidates, references)
    if frequencies is None:
        frequencies = document_frequencies(references)
    prepared: dict[tuple[str, ...], list[_TfIdf]] = {}
    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        key = tuple(captions)
        if key not in prepared:
            prepared[key] = [_tf_idf(normalize_caption(text), frequencies) for text in key]
        vector = _tf_idf(normalize_caption(candidate), frequencies)
        similarities = [_cider_similarity(vector, reference) for reference in prepared[key]]
        scores.append(10.0 * sum(similarities) / len(similarities))
    return torch.tensor(scores, dtype=torch.float64)


def paired_bootstrap(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """The mean of a - b over images, with a percentile interval from resampled images.

    Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation.

    Args:
        a: [N] scores of the images by one system, such as :func:`cider_scores`.
        b: [N] scores of the same images by another.
        n: resamples.
        seed: the same seed gives the same interval.
        level: of the interval, in (0, 1).

    Returns:
        Mean, lower and upper end, in the scores' unit.

    Raises:
        ValueError: lengths that differ, no scores, scores that are not finite, n or level out of
            range.

    Example:
        >>> paired_bootstrap([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
        Difference(mean=2.0, low=2.0, high=2.0)
    """
    first = torch.as_tensor(a, dtype=torch.float64).cpu()
    second = torch.as_tensor(b, dtype=torch.float64).cpu()
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(
            f"paired_bootstrap: a and b must both be [N] with N at least 1, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    difference = first - second
    if not bool(difference.isfinite().all()):
        raise ValueError("paired_bootstrap: a and b must be finite, got NaN or infinite scores")
    if n < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"paired_bootstrap: n must be at least 1 and level lie in (0, 1), got {n} and {level}"
        )
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            difference[
                torch.randint(len(difference), (len(difference),), generator=generator)
            ].mean()
            for _ in range(n)
        ]
    )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return Difference(difference.mean().item(), low, high)


def distinct(captions: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of a set of captions; 0 where there are none.

    Li et al. 2016, https://arxiv.org/abs/1510.03055.

    Example:
        >>> distinct(["a dog", "a dog runs"], 1)
        0.6
    """
    return _distinct([normalize_caption(caption).split() for caption in captions], n)


def _distinct(words: Sequence[Sequence[str]], n: int) -> float:
    ngrams = Counter(chain.from_iterable(_ngrams(text, n) for text in words))
    return len(ngrams) / max(1, ngrams.total())


def _ngrams(words: Sequence[str], n: int) -> Iterator[Ngram]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _ngram_counts(text: str) -> Counter[Ngram]:
    words = text.split()
    return Counter(chain.from_iterable(_ngrams(words, n) for n in range(1, _CIDER_N + 1)))


@dataclass(frozen=True)
class _TfIdf:
    """Weighted n-grams of one caption, by their length n, and the norms of the weights."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    words: int


def _tf_idf(text: str, frequencies: DocumentFrequencies) -> _TfIdf:
    weights: list[dict[Ngram, float]] = [{} for _ in range(_CIDER_N)]
    images = math.log(frequencies.images)
    for ngram, count in _ngram_counts(text).items():
        # An n-gram that no reference has counts as one that a single image has.
        rarity = images - math.log(max(1, frequencies.counts.get(ngram, 0)))
        weights[len(ngram) - 1][ngram] = count * rarity
    norms = [math.sqrt(sum(value * value for value in order.values())) for order in weights]
    return _TfIdf(weights, norms, len(text.split()))


def _cider_similarity(candidate: _TfIdf, reference: _TfIdf) -> float:
    """The mean over n of the clipped cosine similarities, with the Gaussian length penalty."""
    penalty = math.exp(-((candidate.words - reference.words) ** 2) / (2 * _CIDER_SIGMA**2))
    cosines = 0.0
    for order in range(_CIDER_N):
        norm = candidate.norms[order] * reference.norms[order]
        if norm > 0:
            theirs = reference.weights[order]
            ours = candidate.weights[order].items()
            product = sum(min(w, theirs[g]) * theirs[g] for g, w in ours if g in theirs)
            cosines += product / norm
    return penalty * cosines / _CIDER_N


def _check(name: str, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(candidates, str) or len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{name}: candidates and references must be lists of the same length, at least 1, got "
            f"{len(candidates)} and {len(references)}"
        )
    for i, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise ValueError(
                f"{name}: references[{i}] must be a list of at least one caption, got {captions!r}"
            )
        for caption in captions:
            if not normalize_caption(caption):
                raise ValueError(f"{name}: references[{i}] has a caption without a word")


def _module(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"evaluate: the metrics need pycocoevalcap ({error}): "
            "pip install 'rbm-kernels[captioning]'",
            name=error.name,
        ) from error


def _folder(name: str) -> Path:
    return Path(str(_module(name).__file__)).parent


def _require_java() -> None:
    if not java_available():
        raise RuntimeError(
            "evaluate: METEOR, SPICE and tokeniser='ptb' need Java 8 or newer, but there is no "
            "java on the PATH; leave them out (meteor=False, tokeniser='plain') or install it"
        )


def _require_spice_files() -> None:
    folder = _folder("spice.spice") / "lib"
    missing = [name for name in _SPICE_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"evaluate: SPICE needs {' and '.join(missing)} in {folder}; they are in "
            f"http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
        )


def _plain(captions: list[str]) -> list[str]:
    return [normalize_caption(caption) for caption in captions]


def _tokenised(
    tokenise: Callable[[list[str]], list[str]],
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
) -> tuple[list[str], list[list[str]]]:
    """All captions in one call, for a tokeniser that is slow to start."""
    texts = tokenise([*candidates, *chain.from_iterable(references)])
    rest = iter(texts[len(candidates) :])
    return texts[: len(candidates)], [[next(rest) for _ in captions] for captions in references]


def _penn_treebank(captions: list[str]) -> list[str]:
    """As pycocoevalcap's PTBTokenizer, but without its files inside the installed package."""
    tokenizer = _module("tokenizer.ptbtokenizer")
    jar = _folder("tokenizer.ptbtokenizer") / tokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    finished = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    tokens = finished.stdout.decode().splitlines()
    if finished.returncode or len(tokens) != len(captions):
        raise RuntimeError(
            f"evaluate: the Penn Treebank tokeniser gave {len(tokens)} lines for {len(captions)} "
            f"captions: {finished.stderr.decode(errors='replace').strip()}"
        )
    punctuation = set(tokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in tokens]


def _meteor(candidates: list[str], references: list[list[str]]) -> float:
    """METEOR 1.5 of the whole set (Denkowski and Lavie 2014), by its `-stdio` protocol.

    pycocoevalcap's own wrapper has no way to end its process, and waits for ever on a lock that it
    holds itself where the process fails.
    """
    jar = _folder("meteor.meteor") / _module("meteor.meteor").METEOR_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        with subprocess.Popen(
            command,
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        ) as process:
            questions, answers = process.stdin, process.stdout
            assert questions is not None and answers is not None
            statistics = []
            for said, wanted in zip(candidates, references, strict=True):
                texts = [text.replace("|||", " ") for text in (*wanted, said)]
                print("SCORE", *texts, sep=" ||| ", file=questions, flush=True)
                statistics.append(answers.readline().strip())
            # One line for each caption, then one for the whole set.
            scores = process.communicate(" ||| ".join(["EVAL", *statistics]) + "\n")[0].split()
        if len(scores) != len(candidates) + 1:
            raise ValueError(f"{len(scores)} scores for {len(candidates)} captions")
        return float(scores[-1])
    except (BrokenPipeError, ValueError) as error:
        raise RuntimeError(f"evaluate: METEOR's Java process failed ({error})") from error


def candidate_ciders(
    texts: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> Tensor:
    """CIDEr of every candidate, [N, n] float64.

    A caption's CIDEr depends on the references alone and not on the other images' captions, so the
    mean over one candidate of each image is the corpus CIDEr of that choice; the mean of each row's
    largest is the oracle's.

    Args:
        texts: N lists of n candidates.
        references: N lists of true captions.
        frequencies: Document frequencies; None counts them in these references.

    Raises:
        ValueError: Lists of different lengths, or what :func:`.metrics.cider_scores` raises.
    """
    lengths = {len(each) for each in texts}
    if len(texts) != len(references) or len(lengths) != 1:
        raise ValueError(
            f"candidate_ciders: texts must be {len(references)} lists of one length, "
            f"got {len(texts)} of lengths {sorted(lengths)}"
        )
    n = lengths.pop()
    if frequencies is None:
        frequencies = document_frequencies(references)
    flat = [text for each in texts for text in each]
    repeated = [own for own in references for _ in range(n)]
    return cider_scores(flat, repeated, frequencies).view(len(texts), n)
