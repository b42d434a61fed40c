"""Shows values in errors, cut to a bounded size."""

from __future__ import annotations

import reprlib


def shortened(text: str, most: int = 200) -> str:
    """Returns a string for an error; of a long one, its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


class _Short(reprlib.Repr):
    """Representations like Python's own, but of bounded size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlevel = 4


shown = _Short().repr
"""Returns a value as ``repr`` does, cut if it is long or deeply nested."""
