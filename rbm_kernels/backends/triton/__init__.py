"""The room of the Triton kernels."""

from __future__ import annotations


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    return "this release has no Triton kernels yet"
