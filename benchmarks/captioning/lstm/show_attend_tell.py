"""Show, attend and tell: a frozen CNN, soft attention and an LSTM that write captions.

The historical baseline (Xu et al., "Show, Attend and Tell: Neural image caption generation with
visual attention", ICML 2015; soft attention) with which BLIP is compared. The decoder reads feature
maps [B, L, C]: those of ``ResNetEncoder``, of
``LiteEncoder``, or cached ones
(``FeatureCache``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetModel

from rbm_kernels.training import write_atomically

from ..features import FeatureCache
from ..lite_blip import LITE_MEAN, LITE_STD, LiteEncoder

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

RESNET_IMAGE_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_FORMAT = 1

# How a picture becomes the [3, S, S] that an encoder reads.
Prepare = Callable[["Image"], Tensor]


class ResNetEncoder(nn.Module):
    """A ResNet up to its last feature map, frozen, batch normalization included.

    He et al., "Deep residual learning for image recognition" (CVPR 2016). Freezing keeps what the
    filters learned on ImageNet from being overfitted to a small set of captions, and saves the
    gradients of 25 M parameters.

    Args:
        resnet: E.g. ``ResNetModel.from_pretrained("microsoft/resnet-50")``.
    """

    def __init__(self, resnet: ResNetModel) -> None:
        super().__init__()
        self.resnet = resnet
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> ResNetEncoder:
        """Stays in evaluation mode: training mode would move the batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Feature maps of images.

        Args:
            pixel_values: [B, 3, S, S], normalized by the mean and deviation of ImageNet.

        Returns:
            [B, L, C], L positions row by row (for ResNet-50 at 224 pixels: 49 of 2048 channels).
        """
        maps = self.resnet(pixel_values).last_hidden_state  # [B, C, h, w]
        return maps.flatten(2).transpose(1, 2)


def open_encoder(name: str) -> tuple[nn.Module, Prepare]:
    """A frozen encoder by name, and the function that makes its input from a picture.

    Args:
        name: ``"lite0"``, ``"lite1"``, ``"lite2"``, or what ``ResNetModel.from_pretrained`` takes:
            a folder with a ResNet's weights, or the name of one on a hub.

    Returns:
        The encoder, [B, 3, S, S] -> [B, L, C], and a function from an RGB picture to [3, S, S]. The
        picture is squeezed into a square, not cropped, so that the attention covers all of it.

    Raises:
        ImportError: The package of a Lite encoder is missing.
        OSError: No ResNet of that name.

    Example:
        >>> from PIL import Image
        >>> encoder, prepare = open_encoder("lite0")
        >>> prepare(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """
    if name in ("lite0", "lite1", "lite2"):
        lite = LiteEncoder(int(name[-1]))
        mean, std = (LITE_MEAN,) * 3, (LITE_STD,) * 3
        return lite, partial(_picture_tensor, size=lite.image_size, mean=mean, std=std)
    encoder = ResNetEncoder(ResNetModel.from_pretrained(name))
    size, mean, std = RESNET_IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD
    return encoder, partial(_picture_tensor, size=size, mean=mean, std=std)


def _picture_tensor(image: Image, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    square = image.convert("RGB").resize((size, size))
    pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


class SoftAttention(nn.Module):
    """Weights over the positions of a feature map, and their weighted sum.

    Xu et al. 2015, equations 4 and 5 and section 4.2, f_att being a perceptron::

        e_i = v' tanh(W [a_i; h] + b) + c,  alpha = softmax(e),  z = sum_i alpha_i a_i

    Args:
        feature_size: C.
        hidden_size: H of the LSTM.
        attention_size: A.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.project = nn.Linear(feature_size + hidden_size, attention_size)
        self.score = nn.Linear(attention_size, 1)

    def project_features(self, features: Tensor) -> Tensor:
        """The part of ``project`` that is the same for every word: [B, L, C] -> [B, L, A]."""
        weight = self.project.weight[:, : self.feature_size]
        return functional.linear(features, weight, self.project.bias)

    def forward(self, features: Tensor, projected: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The context z [B, C] and the weights alpha [B, L].

        Args:
            features: [B, L, C].
            projected: [B, L, A], ``project_features(features)``.
            hidden: [B, H], the LSTM's state before the word.
        """
        weight = self.project.weight[:, self.feature_size :]
        query = functional.linear(hidden, weight)  # [B, A]
        scores = self.score(torch.tanh(projected + query[:, None])).squeeze(-1)  # [B, L]
        alpha = scores.softmax(-1)
        return torch.einsum("bl,blc->bc", alpha, features), alpha


class DecoderState(NamedTuple):
    """What the decoder carries from word to word.

    Attributes:
        features: [B, L, C].
        projected: [B, L, A].
        hidden: [B, H].
        cell: [B, H].
    """

    features: Tensor
    projected: Tensor
    hidden: Tensor
    cell: Tensor

    def rows(self, index: Tensor) -> DecoderState:
        """The state of some rows, in that order."""
        return DecoderState(*(part[index] for part in self))


class Hypothesis(NamedTuple):
    """One generated caption.

    Attributes:
        tokens: Ids of its words, T of them, without the end of the sentence.
        score: Log-probability, the end of the sentence included, over its length to the power of
            ``length_penalty``.
        attention: [T, L], for each word where the decoder looked; rows sum to 1.
    """

    tokens: list[int]
    score: float
    attention: Tensor


class AttentionCaptioner(nn.Module):
    """An LSTM that looks at a feature map through ``SoftAttention`` and writes a caption.

    At every word the LSTM reads the word's embedding and the context, [x; z]. It starts from the
    mean of the feature map, h_0 = tanh(W_h mean + b_h) and likewise c_0 (Xu et al. 2015, section
    3.1.2). The next word's logits are linear in the hidden state.

    Args:
        vocabulary_size: V.
        feature_size: C, channels of the feature maps.
        pad_token_id: Fills the ends of short captions; the loss ignores it.
        bos_token_id: Starts a caption.
        eos_token_id: Ends it.
        unk_token_id: Stands for unknown words; never generated. None: there is none.
        embedding_size: E, that of the word vectors.
        hidden_size: H.
        attention_size: A.
        dropout: Share of the hidden state's units that are dropped before the logits, in training.
        encoder: Name of the encoder for ``open_encoder``; kept with the model.

    Raises:
        ValueError: A size below 1, token ids out of range or not distinct, or a bad dropout.

    Example:
        >>> model = AttentionCaptioner(20, 8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        >>> features = torch.zeros(2, 9, 8)
        >>> logits, attention = model(features, torch.tensor([[1, 5, 6], [1, 7, 0]]))
        >>> logits.shape, attention.shape
        (torch.Size([2, 3, 20]), torch.Size([2, 3, 9]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        feature_size: int,
        *,
        pad_token_id: int,
        bos_token_id: int,
        eos_token_id: int,
        unk_token_id: int | None = None,
        embedding_size: int = 300,
        hidden_size: int = 512,
        attention_size: int = 256,
        dropout: float = 0.0,
        encoder: str = "",
    ) -> None:
        super().__init__()
        sizes = {
            "vocabulary_size": vocabulary_size,
            "feature_size": feature_size,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "attention_size": attention_size,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"AttentionCaptioner: {name} must be an int of 1 or more, got {size!r}"
                )
        special = [pad_token_id, bos_token_id, eos_token_id]
        if unk_token_id is not None:
            special.append(unk_token_id)
        if len(set(special)) < len(special) or not all(0 <= i < vocabulary_size for i in special):
            raise ValueError(
                "AttentionCaptioner: the token ids of pad, bos, eos and unk must differ and lie in "
                f"0..{vocabulary_size - 1}, got {special}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"AttentionCaptioner: dropout must lie in [0, 1), got {dropout}")
        self.config: dict[str, Any] = {
            **sizes,
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "unk_token_id": unk_token_id,
            "dropout": dropout,
            "encoder": encoder,
        }
        self.pad_token_id, self.bos_token_id, self.eos_token_id = special[:3]
        self.never_generated = [token for token in special if token != eos_token_id]
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.attention = SoftAttention(feature_size, hidden_size, attention_size)
        self.start_hidden = nn.Linear(feature_size, hidden_size)
        self.start_cell = nn.Linear(feature_size, hidden_size)
        self.lstm = nn.LSTMCell(embedding_size + feature_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, vocabulary_size)

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        feature_size: int,
        *,
        seed: int = 0,
        **options: Any,
    ) -> AttentionCaptioner:
        """A new model with a tokenizer's words.

        Args:
            tokenizer: A tokenizer of whole words with pad, bos and eos tokens, such as
                ``word_tokenizer`` makes.
            feature_size: C, channels of the feature maps.
            seed: Seed of the initial weights.
            **options: Other keywords of the class.
        """
        for kind in ("pad", "bos", "eos"):
            if getattr(tokenizer, f"{kind}_token_id") is None:
                raise ValueError(f"for_tokenizer: tokenizer must have a {kind} token, got none")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(
                len(tokenizer),
                feature_size,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                unk_token_id=tokenizer.unk_token_id,
                **options,
            )

    def start(self, features: Tensor) -> DecoderState:
        """The state before the first word.

        Args:
            features: [B, L, C].

        Raises:
            ValueError: Another rank or number of channels.
        """
        expected = self.attention.feature_size
        if features.ndim != 3 or features.shape[-1] != expected or 0 in features.shape:
            raise ValueError(
                f"AttentionCaptioner: features must be [B, L, C] = [B, L, {expected}], "
                f"got {list(features.shape)}"
            )
        mean = features.mean(1)
        return DecoderState(
            features,
            self.attention.project_features(features),
            torch.tanh(self.start_hidden(mean)),
            torch.tanh(self.start_cell(mean)),
        )

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[DecoderState, Tensor]:
        """Read one word [B] of each caption.

        Returns:
            The state after it, and the attention [B, L].
        """
        context, alpha = self.attention(state.features, state.projected, state.hidden)
        read = torch.cat([self.embedding(tokens), context], dim=-1)  # [B, E + C]
        hidden, cell = self.lstm(read, (state.hidden, state.cell))
        return state._replace(hidden=hidden, cell=cell), alpha

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next words where the words so far are given (teacher forcing).

        Args:
            features: [B, L, C].
            tokens: Int64 [B, T], from the bos token on.

        Returns:
            Logits [B, T, V] of the words after each, and the attention [B, T, L].
        """
        state = self.start(features)
        hidden, attention = [], []
        for word in tokens.unbind(1):
            state, alpha = self.step(word, state)
            hidden.append(state.hidden)
            attention.append(alpha)
        return self.output(self.dropout(torch.stack(hidden, 1))), torch.stack(attention, 1)

    def loss(self, features: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of captions in nats per word, pads left out.

        Args:
            features: [B, L, C].
            tokens: Int64 [B, 1 + T]: bos, words, eos, pads.
            reduction: ``"mean"`` or ``"sum"`` over the words of all captions.
        """
        logits, _ = self(features, tokens[:, :-1])
        return functional.cross_entropy(
            logits.flatten(0, 1),
            tokens[:, 1:].flatten(),
            ignore_index=self.pad_token_id,
            reduction=reduction,
        )

    @torch.no_grad()
    def beam_search(
        self,
        features: Tensor,
        *,
        beams: int = 3,
        n_best: int = 1,
        max_length: int = 20,
        min_length: int = 1,
        length_penalty: float = 1.0,
    ) -> list[list[Hypothesis]]:
        """The best captions that a beam search finds.

        Captions that have ended keep their place in the beam; they and those that go on are ranked
        by their scores so far.

        Args:
            features: [B, L, C].
            beams: K, captions that are kept for each image at every word.
            n_best: How many of them are returned, 1 to K.
            max_length: At most this many tokens, the end of the sentence included.
            min_length: At least this many words.
            length_penalty: Scores are divided by the length to this power; above 0 it makes for
                longer captions.

        Returns:
            For each image its captions, the best first.

        Raises:
            ValueError: An argument out of range.
        """
        if not 1 <= n_best <= beams:
            raise ValueError(f"beam_search: n_best must lie in 1..beams = 1..{beams}, got {n_best}")
        _check_lengths(max_length, min_length)
        images = len(features)
        image = torch.arange(images, device=features.device)
        first = image[:, None] * beams  # [B, 1], rows of the images' first beams.
        state = self.start(features).rows(image.repeat_interleave(beams))
        tokens = first.new_full((images, beams, 1), self.bos_token_id)
        attention = features.new_zeros(images, beams, 0, features.shape[1])
        # All beams start alike: only the first counts, or they would stay alike.
        total = features.new_full((images, beams), -math.inf)
        total[:, 0] = 0
        length = torch.zeros_like(total)
        for position in range(max_length):
            ended = (tokens == self.eos_token_id).any(-1)  # [B, K]
            if bool(ended.all()):
                break
            state, alpha = self.step(tokens[..., -1].flatten(), state)
            log_p = self._log_probabilities(state, position >= min_length)
            log_p = log_p.view(images, beams, -1)  # [B, K, V]
            log_p[ended] = -math.inf
            log_p[ended, self.pad_token_id] = 0
            length = length + ~ended
            extended = total[..., None] + log_p
            ranked = (extended / length[..., None] ** length_penalty).flatten(1)
            chosen = ranked.topk(beams).indices  # [B, K]
            parent, word = chosen // log_p.shape[-1], chosen % log_p.shape[-1]
            rows = (first + parent).flatten()
            state = state.rows(rows)
            total, length = extended.flatten(1).gather(1, chosen), length.gather(1, parent)
            attention = torch.cat([attention, alpha.view(images, beams, 1, -1)], 2)
            attention = attention.flatten(0, 1)[rows].view_as(attention)
            tokens = tokens.flatten(0, 1)[rows].view_as(tokens)
            tokens = torch.cat([tokens, word[..., None]], -1)
        scores = total / length**length_penalty
        return [
            [
                self._hypothesis(*parts)
                for parts in zip(words[:, 1:], of_image, maps, strict=True)
                if parts[1] > -math.inf
            ][:n_best]
            for words, of_image, maps in zip(tokens, scores, attention, strict=True)
        ]

    def _log_probabilities(self, state: DecoderState, may_end: bool) -> Tensor:
        """log p of the next words [B, V]; minus infinity for what must not be generated."""
        log_p = self.output(state.hidden).log_softmax(-1)
        log_p[:, self.never_generated] = -math.inf
        if not may_end:
            log_p[:, self.eos_token_id] = -math.inf
        return log_p

    def _hypothesis(self, tokens: Tensor, score: Tensor, attention: Tensor) -> Hypothesis:
        """Of the tokens [T'] after bos, those before the end and the pads, with their attention."""
        words = [t for t in tokens.tolist() if t not in (self.eos_token_id, self.pad_token_id)]
        return Hypothesis(words, score.item(), attention[: len(words)].clone())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json``, each whole or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        config = {"architectures": [type(self).__name__], "format": _FORMAT, **self.config}
        write_atomically(target / "model.safetensors", lambda file: save_file(tensors, file))
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(target / "config.json", lambda file: Path(file).write_text(text))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> AttentionCaptioner:
        """Read what ``save_pretrained`` wrote, with the dtype it had.

        Raises:
            FileNotFoundError: No such folder, or a file of it is missing.
            ValueError: The folder holds something else.
        """
        source = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (source / name).is_file():
                raise FileNotFoundError(f"from_pretrained: folder must hold {name}, got {source}")
        config = json.loads((source / "config.json").read_text())
        if config.pop("architectures", None) != [cls.__name__] or config.pop("format") != _FORMAT:
            raise ValueError(
                f"from_pretrained: folder must hold an {cls.__name__} of format {_FORMAT}, "
                f"got {source / 'config.json'} of something else"
            )
        try:
            tensors = load_file(source / "model.safetensors")
            model = cls(**config).to(next(iter(tensors.values())).dtype)
            model.load_state_dict(tensors)
        except (SafetensorError, StopIteration, TypeError, RuntimeError) as error:
            raise ValueError(f"from_pretrained: {source} is damaged ({error})") from error
        return model


def _check_lengths(max_length: int, min_length: int) -> None:
    if not 0 <= min_length < max_length:
        raise ValueError(
            f"min_length must lie in 0..max_length - 1 = 0..{max_length - 1}, got {min_length}"
        )


@dataclass(frozen=True)
class AttendedCaption:
    """A caption and what each of its words looked at.

    Attributes:
        words: T words.
        score: See ``Hypothesis``.
        attention: [T, L].
    """

    words: list[str]
    score: float
    attention: Tensor

    @property
    def text(self) -> str:
        return " ".join(self.words)


def write_captions(
    model: AttentionCaptioner,
    tokenizer: PreTrainedTokenizerBase,
    features: Tensor | FeatureCache,
    *,
    beams: int = 3,
    max_length: int = 20,
    min_length: int = 1,
    batch_size: int = 32,
) -> list[AttendedCaption]:
    """The best caption of every image.

    Args:
        model: The model, in either mode: dropout plays no part here.
        tokenizer: The one the model was made for, of whole words.
        features: [N, L, C], a tensor or a cache.
        beams: 1 is greedy.
        max_length: At most this many tokens, the end of the sentence included.
        min_length: At least this many words.
        batch_size: Images at a time.

    Returns:
        N captions.

    Raises:
        ValueError: An argument out of range.
    """
    if beams < 1:
        raise ValueError(f"write_captions: beams must be 1 or more, got {beams}")
    lengths = {"max_length": max_length, "min_length": min_length}
    weight = model.output.weight
    found: list[Hypothesis] = []
    for first in range(0, len(features), batch_size):
        maps = features[first : first + batch_size].to(weight.device, weight.dtype)
        found += [best for (best,) in model.beam_search(maps, beams=beams, **lengths)]
    return [
        AttendedCaption(tokenizer.convert_ids_to_tokens(tokens), score, attention)
        for tokens, score, attention in found
    ]
