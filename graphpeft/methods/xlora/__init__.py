"""X-LoRA: a classifier weighs LoRA adapters for each token, by what the model without them makes of it."""

from graphpeft.methods.xlora.config import XLoraConfig

__all__ = ["XLoraConfig"]
