"""FRoD: its config, its rule, and what the layers of a category share."""

from graphpeft.methods.frod.config import FrodConfig

__all__ = ["FrodConfig"]
