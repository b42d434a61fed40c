"""Rewrites of any model by example: a pattern and a replacement as functions, in place, and undone as a whole."""

from graphpeft.rewrites.match import Match
from graphpeft.rewrites.pattern import RewriteError, either, layer
from graphpeft.rewrites.replacing import held
from graphpeft.rewrites.report import Matched, NearMiss, RewriteReport, Rewritten
from graphpeft.rewrites.rewrite import Rewrite, undo_rewrites

__all__ = [
    "Match",
    "Matched",
    "NearMiss",
    "Rewrite",
    "RewriteError",
    "RewriteReport",
    "Rewritten",
    "either",
    "held",
    "layer",
    "undo_rewrites",
]
