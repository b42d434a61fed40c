"""OFT: its config and its rules."""

from graphpeft.methods.oft.config import OFTConfig

__all__ = ["OFTConfig"]
