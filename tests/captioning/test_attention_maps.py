"""Where a decoder looked: the cross-attention of each word, token by token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from support import blip
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.captioning.attention_maps import word_attention
from benchmarks.captioning.lite_blip import word_tokenizer

STATES = torch.randn(17, blip.WIDTH, generator=torch.Generator().manual_seed(0))


def by_hand(model, ids: list[int]) -> torch.Tensor:
    """Cross-attention [tokens, 17] of the last layer from its queries and keys."""
    kept = {}
    attention = model.text_decoder.bert.encoder.layer[-1].crossattention.self
    hook = attention.query.register_forward_hook(lambda module, x, y: kept.update(q=y))
    with torch.inference_mode():
        model.text_decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=STATES[None])
        hook.remove()
        q = kept["q"].view(len(ids), 2, -1).transpose(0, 1).double()  # [heads, tokens, d]
        k = attention.key(STATES).view(17, 2, -1).transpose(0, 1).double()
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)


def test_a_word_has_the_attention_that_predicted_it():
    model, processor = blip.tiny_blip()
    caption = "a red  circle"
    ids = processor.tokenizer(caption).input_ids
    maps = word_attention(model, processor.tokenizer, STATES, caption)
    assert maps.shape == (3, 16)
    # The first word was predicted from the start token, the second from the first.
    wanted = by_hand(model, ids)[:3, 1:].float()
    torch.testing.assert_close(maps, wanted, atol=1e-5, rtol=1e-4)
    assert (maps.std(dim=1) > 1e-3).all()


def test_a_word_of_several_tokens_has_their_mean():
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[DEC]": 4}
    vocabulary |= {text: 5 + i for i, text in enumerate(("re", "##d", "dog", "-", "b"))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    model, _ = blip.tiny_blip()
    model.config.text_config.bos_token_id = 4
    caption = "b-b red dog"
    assert tokenizer(caption).input_ids == [2, 9, 8, 9, 5, 6, 7, 3]
    # generate() starts with [DEC], not with [CLS].
    of_token = by_hand(model, [4, 9, 8, 9, 5, 6, 7, 3])[:, 1:].float()
    wanted = torch.stack([of_token[0:3].mean(0), of_token[3:5].mean(0), of_token[5]])
    maps = word_attention(model, tokenizer, STATES, caption)
    torch.testing.assert_close(maps, wanted, atol=1e-5, rtol=1e-4)


def test_words_without_tokens_looked_nowhere():
    model, _ = blip.tiny_blip()
    tokenizer = word_tokenizer(blip.CAPTIONS, min_count=1)  # It leaves out what is no word.
    maps = word_attention(model, tokenizer, STATES, "red ! circle")
    assert maps[1].abs().max() == 0 and (maps[[0, 2]].sum(1) > 0.1).all()


def test_a_caption_without_words():
    model, processor = blip.tiny_blip()
    with pytest.raises(ValueError, match="caption must have a word or more, got '  '"):
        word_attention(model, processor.tokenizer, STATES, "  ")
