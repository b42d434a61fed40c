"""Block-diagonal LoRA (BD-LoRA): A or B has blocks on its diagonal alone, which devices can hold apart.

    y' = y + s · dropout(x) Aᵀ Bᵀ        A = diag(A₁, …, Aₙ), Aᵢ (r/n, in/n), or B = diag(B₁, …, Bₙ), Bᵢ (out/n, r/n)

Files have the blocks one below the other, so that A is of shape (r, in/n), or B (out, r/n). Source: Wang et al.,
"Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving", arXiv 2510.23346; the same
numbers as PEFT's ``BdLoraLinearVariant`` in ``tuners/lora/variants.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.methods.lora.factors import draw, rank_of
from graphpeft.methods.lora.init.initialisation import RANDOM
from graphpeft.methods.lora.linear import LoraLinear
from graphpeft.rules.options import Size, check_options
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.products import Factor, Product
from graphpeft.sites.site import Site


@dataclass
class BdLoraConfig:
    """The options of BD-LoRA; the names, defaults and meanings are PEFT's.

    Source: Wang et al., "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving",
    arXiv 2510.23346.

    Attributes:
        target_modules_bd_a: Texts that the paths of layers have in them whose A is block-diagonal.
        target_modules_bd_b: The same for B.
        nblocks: The number of blocks, which divides the rank and the layers' sizes.
        match_strict: Whether a layer of neither kind is refused; if False, it has plain LoRA.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> blocks = BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)
        >>> config = LoraConfig(r=4, target_modules=["0"], use_bdlora=blocks)
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)[0].default.lora_A.shape
        torch.Size([4, 4])
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Size = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"target_modules_bd_a and target_modules_bd_b both name {min(both)!r}; leave it in one")


@dataclass(frozen=True, kw_only=True)
class LoraBlocks(LoraLinear):
    """The branch of a linear layer with blocks in one of its factors.

    Attributes:
        blocks: Their number.
        factors: The factors that have them, by the config; just one can.
        rank: The rank. Adapters of other ranks have other blocks, so that one graph can't stack them row by row.
    """

    blocks: int
    rank: int
    factors: tuple[str, ...]

    @property
    def factor(self) -> str:
        """The factor that has the blocks."""
        return self.factors[0]

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses what LoRA refuses, and sizes into which the blocks don't go."""
        reason = super().check(site, config)
        if reason is not None:
            return reason
        if len(self.factors) != 1:
            found = "both of" if self.factors else "neither of"
            return (
                f"{found} target_modules_bd_a and target_modules_bd_b of use_bdlora have a text that is in its name; "
                f"let one name it{'' if self.factors else ', or set match_strict=False, for plain LoRA there'}"
            )
        if self.flipped:
            return "it is a Conv1D, and use_bdlora is for nn.Linear, as in PEFT"
        if config.init_lora_weights not in RANDOM:
            return f"init_lora_weights={config.init_lora_weights!r} gives whole factors, and use_bdlora has blocks"
        if self.has_bias and self.factor == "lora_B":
            return "lora_bias=True isn't for a B of blocks, as in PEFT"
        side, size = ("outputs", site.shape[0]) if self.factor == "lora_B" else ("inputs", site.shape[1])
        for what, number in ((f"its {size} {side}", size), (f"the rank {self.rank}", self.rank)):
            if number % self.blocks:
                return f"use_bdlora has nblocks={self.blocks}, which doesn't divide {what}"
        return None

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, one of them as its blocks; no product of whole factors, they have no axis of the rank."""
        whole = super().parameters(site, config)
        specs = {name: spec._replace(rank=None) for name, spec in whole.items()}
        rows, columns = specs[self.factor].shape
        return {**specs, self.factor: specs[self.factor]._replace(shape=(rows, columns // self.blocks))}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws whole factors as LoRA does, and then the blocks of A; those of B are zero in any case."""
        shapes = {name: spec.shape for name, spec in super().parameters(site, config).items()}
        whole = {name: torch.empty(shapes[name], dtype=tensor.dtype) for name, tensor in parameters.items()}
        draw(whole, config.init_lora_weights, self.rank)
        for name, tensor in parameters.items():
            if name != self.factor:
                tensor.copy_(whole[name])
        if self.factor == "lora_B":
            parameters["lora_B"].zero_()
        else:
            # in the layer's dtype, as in PEFT
            drawn = torch.empty(parameters["lora_A"].shape, dtype=site.dtype)
            parameters["lora_A"].copy_(nn.init.kaiming_uniform_(drawn))

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns B A, one of them as a factor of blocks."""
        if self.factor == "lora_A":
            return Product((lora_B, _Blocks(lora_A, self.blocks)))
        return Product((_Blocks(lora_B, self.blocks), lora_A))


@dataclass(frozen=True)
class _Blocks(Factor):
    """A matrix with blocks on its diagonal.

    Attributes:
        blocks: The blocks, one below the other.
        count: Their number.
    """

    blocks: Any
    count: int

    def applied(self, h: Any) -> Any:
        """Returns the products with the blocks."""
        parted, blocks = h.unflatten(-1, (self.count, -1)), self.blocks.unflatten(0, (self.count, -1))
        return torch.einsum("...bi,boi->...bo", parted, blocks).flatten(-2)

    def matrix(self) -> Any:
        """Returns the matrix with zeros around the blocks."""
        return _diagonal(self.blocks, self.count)


def _diagonal(blocks: Any, count: int) -> Any:
    """Returns the matrix with blocks on its diagonal that are given one below the other, (…, rows, columns / count)."""
    parted = blocks.unflatten(-2, (count, -1))
    # (…, row in its block, column in its block, block, block)
    spread = torch.diag_embed(parted.movedim(-3, -1))
    return spread.movedim((-2, -1), (-4, -2)).flatten(-2).flatten(-3, -2)


def of_blocks(lora: LoraLinear, site: Site, config: Any) -> LoraLinear:
    """Returns the rule of BD-LoRA at a layer, or LoRA's if the layer has neither kind of blocks and may so."""
    options: BdLoraConfig = config.use_bdlora
    named = {"lora_A": options.target_modules_bd_a, "lora_B": options.target_modules_bd_b}
    factors = tuple(name for name, texts in named.items() if any(text in site.name for text in texts or ()))
    if not factors and not options.match_strict:
        return lora
    of_lora = {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)}
    return LoraBlocks(**of_lora, blocks=options.nblocks, factors=factors, rank=rank_of(site, config))
