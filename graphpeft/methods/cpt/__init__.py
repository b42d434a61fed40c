"""Context-aware prompt tuning: its config, the tokens of a context, and their labels."""

from graphpeft.methods.cpt.config import CPTConfig

__all__ = ["CPTConfig"]
