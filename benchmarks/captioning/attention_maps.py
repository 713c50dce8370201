"""Where in the image a BLIP decoder looked as it wrote each word."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, PreTrainedTokenizerBase


@torch.inference_mode()
def word_attention(
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    states: Tensor,
    caption: str,
) -> Tensor:
    """Cross-attention of the last layer, averaged over its heads, as each word was predicted.

    A word of several tokens has the mean of theirs. Attention is where the decoder took features
    from; it need not be why it chose the word (Jain and Wallace, NAACL 2019).

    Args:
        model: A captioner.
        tokenizer: Its tokenizer, a fast one.
        states: Vision features of one image [1 + L, D], token 0 being CLS.
        caption: T words, separated by spaces.

    Returns:
        [T, L] float32, rows that sum to at most 1: what went to CLS is left out.

    Raises:
        ValueError: A caption without words.
    """
    if not caption.split():
        raise ValueError(f"word_attention: caption must have a word or more, got {caption!r}")
    encoded = tokenizer(caption, return_offsets_mapping=True, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    # BERT's tokenizer writes [CLS] where BLIP's decoder starts with a token of its own.
    ids[:, 0] = model.config.text_config.bos_token_id
    attention = model.text_decoder(
        input_ids=ids,
        encoder_hidden_states=states[None].to(model.device, model.dtype),
        output_attentions=True,
    ).cross_attentions[-1]  # [1, heads, tokens, 1 + L]
    of_token = attention[0].mean(0).float().cpu()[:, 1:]
    maps: list[list[Tensor]] = [[] for _ in caption.split()]
    for token, (start, end) in enumerate(encoded["offset_mapping"][0].tolist()):
        if end > start:  # The marks of start and end stand for no text.
            word = len(caption[: start + 1].split()) - 1
            # A token is predicted where the one before it is read.
            maps[word].append(of_token[token - 1])
    unseen = torch.zeros(of_token.shape[1])
    return torch.stack([torch.stack(each).mean(0) if each else unseen for each in maps])
