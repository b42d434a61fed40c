"""Pictures: the modules of a model, their graphs before and after adapting, as one HTML file or in a notebook."""

from __future__ import annotations

from graphpeft.showing.picture_file import Shown, show

__all__ = ["Shown", "show"]
