"""AdaLoRA: its config, its rules, and its budget of ranks."""

from graphpeft.methods.adalora.config import AdaLoraConfig

__all__ = ["AdaLoraConfig"]
