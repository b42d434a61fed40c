"""What can go wrong in an export."""

from __future__ import annotations


class ExportError(ValueError):
    """A model that can't be exported, or not so; no file was written or changed, and the model is as it was."""


def in_short(error: BaseException) -> str:
    """Returns the class of an error and the first line of what it says; PyTorch's and onnxruntime's say pages."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
