"""Errors that a call must raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def raises(kind: type[Exception], *words: str) -> Callable[[Callable[[], object]], None]:
    """A check that a call raises exactly this family of error with all words in its message."""

    def check(call: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        for word in words:
            assert word in message, f"{word!r} is missing in: {message}"

    return check
