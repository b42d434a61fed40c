"""The products B A of a model's trained adapters, as optimizers see them: two factors, the scale, where the ranks are.

W' = W + s · B A                 A: what is applied first;  of experts: W'_e = W_e + s · B_e A_e
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.paths import unwrapped
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.parameter_spec import RankAxis

Axis = tuple[int, int, bool]
"""A `RankAxis` as a plain tuple, which a saved state dict may hold."""


class Product(NamedTuple):
    """The factors at a site.

    Attributes:
        label: The site.
        A: The factor that is applied first.
        B: The other one.
        scale: s.
        axes: Where A and B have the rank.
        is_embedding: Whether A's rows are looked up by indices, so that A starts at zero and B doesn't.
    """

    label: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    axes: tuple[Axis, Axis]
    is_embedding: bool

    @property
    def is_plain(self) -> bool:
        """Whether each block of A goes with a block of B, as their products need it."""
        (_, blocks_of_a, _), (_, blocks_of_b, _) = self.axes
        return blocks_of_a == blocks_of_b


def adapted_model(model: Any) -> nn.Module:
    """Returns the adapted model, which may be compiled as a whole."""
    model = unwrapped(model)
    known_adapters(model)
    return model


def file_keys(model: nn.Module) -> Mapping[int, str]:
    """Returns the last part of the name in files of each parameter of the adapters' rules, by its identity."""
    found: dict[int, str] = {}
    for adapted, tensors in _sites(model):
        for local, tensor in tensors.items():
            found.setdefault(id(tensor), adapted.specs[local].key)
    return found


def products(model: nn.Module, purpose: str) -> list[Product]:
    """Returns the products of which a factor is trained; those that are another site's, too, are that one's alone."""
    found: list[Product] = []
    for adapted, tensors in _sites(model):
        A, B = tensors.get("lora_A"), tensors.get("lora_B")
        of_a, of_b = (adapted.specs[name].rank if name in adapted.specs else None for name in ("lora_A", "lora_B"))
        if of_a is None or of_b is None or adapted.shared or not isinstance(A, nn.Parameter):
            continue
        assert isinstance(B, nn.Parameter)
        is_embedding = adapted.specs["lora_A"].key == "lora_embedding_A"
        axes = of_a.plain, of_b.plain
        product = Product(adapted.site.label, A, B, adapted.constants["lora_scaling"], axes, is_embedding)
        if A.requires_grad or B.requires_grad:
            found.append(product)
    if not found:
        raise AdaptError(
            f"{purpose} is for A and B of LoRA, and the {type(model).__name__} trains none; adapt it with a "
            "LoraConfig, or load the adapter with is_trainable=True"
        )
    return found


def damped_inverse(factor: torch.Tensor, axis: Sequence[Any], damping: float) -> torch.Tensor:
    """Returns (F Fᵀ + damping · I)⁻¹ of each block of a factor with the rank first, in single precision at least."""
    dtype = torch.promote_types(factor.dtype, torch.float32)
    rows = RankAxis(*axis).first(factor).to(dtype).flatten(2)
    identity = torch.eye(rows.shape[1], dtype=dtype, device=rows.device)
    return torch.linalg.pinv(rows @ rows.mT + damping * identity)


def times_rank(matrices: torch.Tensor, tensor: torch.Tensor, axis: Sequence[Any]) -> torch.Tensor:
    """Returns a factor, or its gradient, with its ranks multiplied by a matrix for each block."""
    result = torch.empty_like(tensor)
    first = RankAxis(*axis).first(tensor)
    made = (matrices @ first.to(matrices.dtype).flatten(2)).view(first.shape)
    RankAxis(*axis).first(result).copy_(made)
    return result


def _sites(model: nn.Module) -> Iterator[tuple[AdaptedSite, dict[str, torch.Tensor]]]:
    modules = modules_of(model)
    for adapter in known_adapters(model).by_name.values():
        for adapted in adapter.sites:
            owner = modules[adapted.site.owner]
            yield adapted, {local: tensor_at(owner, adapted.names[local]) for local in adapted.specs}
