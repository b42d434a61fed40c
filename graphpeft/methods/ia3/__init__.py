"""(IA)³: its config, its rules, and its default targets."""

from graphpeft.methods.ia3.config import IA3Config

__all__ = ["IA3Config"]
