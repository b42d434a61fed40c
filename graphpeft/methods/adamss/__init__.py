"""AdaMSS: its config, its rule, the groups of rows, and which of these are trained."""

from graphpeft.methods.adamss.config import AdamssConfig

__all__ = ["AdamssConfig"]
