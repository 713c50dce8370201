"""How good captions are: BLEU, ROUGE-L, CIDEr, METEOR, SPICE, and how varied they are.

The metrics are those of COCO's evaluation server (Chen et al. 2015,
https://arxiv.org/abs/1504.00325), through ``pycocoevalcap``. METEOR, SPICE and the Penn Treebank
tokenizer are Java programs: each runs as one process that has ended when the function returns.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from blip_integration.captions import normalize_caption

_SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval; see ``paired_bootstrap``."""

    mean: float
    low: float
    high: float


def java_available() -> bool:
    """Whether ``java`` is on the PATH: METEOR, SPICE and the tokenizer "ptb" need it."""
    return shutil.which("java") is not None


def evaluate(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = "plain",
    meteor: bool | None = None,
    spice: bool = False,
) -> dict[str, float]:
    """Score a whole set of captions, one for each image.

    Args:
        candidates: A caption for each image; it may be empty.
        references: What people wrote of each image, at least one each.
        tokenizer: "plain" (``blip_integration.captions.normalize_caption``) or "ptb", the Penn
            Treebank's that published figures use; it needs Java. On Flickr8k's captions they differ
            in 4 of 5,000.
        meteor: None computes it where there is Java; True demands it.
        spice: Needs Java and two files that pycocoevalcap does not ship; never downloaded here.

    Returns:
        "BLEU-1" to "BLEU-4", "ROUGE-L", "METEOR" and "SPICE" in [0, 1], "CIDEr" (CIDEr-D, document
        frequencies from these references) in [0, 10], "distinct-1" and "distinct-2" in [0, 1], and
        "length" in words. Papers print 100 times all but the last three.

    Raises:
        ValueError: Lengths that differ, no images, an image without references, a reference without
            words, an unknown tokenizer.
        ModuleNotFoundError: pycocoevalcap is missing.
        RuntimeError: Java is missing or fails.
        FileNotFoundError: SPICE's files are missing.
    """
    _check("evaluate", candidates, references)
    if tokenizer not in ("plain", "ptb"):
        raise ValueError(f"evaluate: tokenizer must be 'plain' or 'ptb', got {tokenizer!r}")
    if meteor is None:
        meteor = java_available()
    if meteor or spice or tokenizer == "ptb":
        _require_java()
    if spice:
        _require_spice_files()
    bleu, rouge = _module("bleu.bleu"), _module("rouge.rouge")
    tokenize = _plain if tokenizer == "plain" else _penn_treebank
    said, wanted = _tokenized(tokenize, candidates, references)

    numbered = _numbered(said, wanted)
    orders, _ = bleu.Bleu(4).compute_score(*numbered, verbose=0)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(orders, start=1)}
    scores["ROUGE-L"] = float(rouge.Rouge().compute_score(*numbered)[0])
    scores["CIDEr"] = float(_module("cider.cider").Cider().compute_score(*numbered)[0])
    if meteor:
        scores["METEOR"] = _meteor(said, wanted)
    if spice:
        scores["SPICE"] = float(_module("spice.spice").Spice().compute_score(*numbered)[0])
    words = [text.split() for text in said]
    scores["distinct-1"] = _distinct(words, 1)
    scores["distinct-2"] = _distinct(words, 2)
    scores["length"] = sum(map(len, words)) / len(words)
    return scores


def cider_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """CIDEr-D of each candidate (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, section 5).

    The document frequencies are those of these references, so a candidate's score depends on the
    references of all images and on no other candidate. The mean is the CIDEr of ``evaluate``.

    Args:
        candidates: N captions; an empty one scores 0.
        references: N lists of at least one reference.

    Returns:
        [N] float64, in [0, 10].

    Raises:
        ValueError: As ``evaluate``.
        ModuleNotFoundError: pycocoevalcap is missing.
    """
    _check("cider_scores", candidates, references)
    said, wanted = _tokenized(_plain, candidates, references)
    scores = _module("cider.cider").Cider().compute_score(*_numbered(said, wanted))[1]
    return torch.from_numpy(scores)


def candidate_ciders(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Tensor:
    """CIDEr of every candidate, [N, n] float64.

    As a caption's CIDEr depends on the references alone, the mean over one candidate of each image
    is the corpus CIDEr of that choice, and the mean of each row's largest is the oracle's.

    Args:
        texts: N lists of n candidates.
        references: N lists of true captions.

    Raises:
        ValueError: Lists of different lengths, or what ``cider_scores`` raises.
    """
    lengths = {len(each) for each in texts}
    if len(texts) != len(references) or len(lengths) != 1:
        raise ValueError(
            f"candidate_ciders: texts must be {len(references)} lists of one length, "
            f"got {len(texts)} of lengths {sorted(lengths)}"
        )
    return torch.stack([cider_scores(column, references) for column in zip(*texts, strict=True)], 1)


def paired_bootstrap(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """The mean of a - b over images, with a percentile interval from resampled images.

    Koehn 2004, "Statistical significance tests for machine translation evaluation". Percentiles,
    not BCa, which has no interval where all differences are equal.

    Args:
        a: [N] scores of the images by one system, such as ``cider_scores``; N is at least 2.
        b: [N] scores of the same images by another.
        n: Number of resamples.
        seed: The same seed gives the same interval.
        level: The level of the interval, in (0, 1).

    Returns:
        Mean, lower and upper end, in the scores' unit.

    Raises:
        ValueError: Lengths that differ, fewer than two scores, scores that are not finite, n or
            level out of range.

    Example:
        >>> paired_bootstrap([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
        Difference(mean=2.0, low=2.0, high=2.0)
    """
    from scipy import stats

    first, second = (np.asarray(scores, dtype=np.float64) for scores in (a, b))
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"paired_bootstrap: a and b must both be [N] with N at least 2, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    difference = first - second
    if not np.isfinite(difference).all():
        raise ValueError("paired_bootstrap: a and b must be finite, got NaN or infinite scores")
    if n < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"paired_bootstrap: n must be at least 1 and level lie in (0, 1), got {n} and {level}"
        )
    low, high = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=n,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(difference.mean().item(), low.item(), high.item())


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


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


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
            "evaluate: METEOR, SPICE and tokenizer='ptb' need Java 8 or newer, but there is no "
            "java on the PATH; leave them out (meteor=False, tokenizer='plain') or install it"
        )


def _require_spice_files() -> None:
    folder = _folder("spice.spice") / "lib"
    missing = [name for name in _SPICE_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"evaluate: SPICE needs {' and '.join(missing)} in {folder}; they are in "
            f"http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
        )


def _numbered(
    said: Sequence[str], wanted: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and candidates by the image's number, as pycocoevalcap takes them."""
    return {i: [*texts] for i, texts in enumerate(wanted)}, {i: [t] for i, t in enumerate(said)}


def _plain(captions: list[str]) -> list[str]:
    return [normalize_caption(caption) for caption in captions]


def _tokenized(
    tokenize: Callable[[list[str]], list[str]],
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
) -> tuple[list[str], list[list[str]]]:
    """All captions in one call, for a tokenizer that is slow to start."""
    texts = tokenize([*candidates, *chain.from_iterable(references)])
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
            f"evaluate: the Penn Treebank tokenizer gave {len(tokens)} lines for {len(captions)} "
            f"captions: {finished.stderr.decode(errors='replace').strip()}"
        )
    punctuation = set(tokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in tokens]


def _meteor(candidates: list[str], references: list[list[str]]) -> float:
    """METEOR 1.5 of the whole set (Denkowski and Lavie 2014), by its ``-stdio`` protocol.

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
