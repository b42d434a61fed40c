"""Shadow: a small model runs beside the layers, and what it says is put into each of them."""

from graphpeft.methods.shadow.config import ShadowConfig

__all__ = ["ShadowConfig"]
