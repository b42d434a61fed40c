"""Optimizers for the factors of LoRA, with PEFT's names."""

from graphpeft.optimizers.lorafa import create_lorafa_optimizer
from graphpeft.optimizers.loraplus import create_loraplus_optimizer
from graphpeft.optimizers.riemannian import create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
