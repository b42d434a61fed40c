"""What can go wrong in an export."""

from __future__ import annotations


class ExportError(ValueError):
    """A model that can't be exported, or not so; no file was written or changed, and the model is as it was."""
