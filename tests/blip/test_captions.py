"""The normal form of captions."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
from blip_integration.captions import normalize_caption


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A black dog , running .", "a black dog running"),
        ("A man's dog; the dogs' ball", "a man 's dog the dogs ball"),
        ("A man\N{RIGHT SINGLE QUOTATION MARK}s T-shirt -- black-and-white!", None),
        ("two-\nlegged  _bird_ (#2)", "two legged bird 2"),
        ("Café at 5", "café at 5"),
        ("it's 'small'", "it 's small"),
        ("...", ""),
    ],
)
def test_normalize_caption(caption, words):
    words = "a man 's t-shirt black-and-white" if words is None else words
    assert normalize_caption(caption) == words
    assert normalize_caption(words) == words
