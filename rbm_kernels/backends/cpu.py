"""The C++ kernels."""


def unavailable_reason() -> str | None:
    return "not built"
