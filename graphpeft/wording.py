"""How errors show what others have written, which may have any size."""

from __future__ import annotations

import reprlib


def shortened(text: str, most: int = 200) -> str:
    """Returns a text for an error: its beginning and its end, if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


class _Short(reprlib.Repr):
    """Representations like Python's own, but of bounded size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlevel = 4


shown = _Short().repr
"""Returns a value as ``repr`` does, cut where it is long or deep."""
