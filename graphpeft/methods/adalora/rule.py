"""AdaLoRA at a weight, and at an operation that multiplies by one.

W' = W + s · B (E ⊙ A)                     W of any layout, also each matrix of a stack, or a kernel
y' = y + s · dropout(x) (E ⊙ A)ᵀ Bᵀ        y = x Wᵀ + b, or the call of a quantised layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec
from graphpeft.rules.products import Product


@dataclass(frozen=True, kw_only=True)
class AdaLora(ProductRule):
    """The change of a matrix, of each matrix in a stack, or of a kernel."""

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    needs_matrix: ClassVar[bool] = True
    adapts_calls: ClassVar[bool] = True
    zeros_change_nothing: ClassVar[bool] = True

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, E and B, with as many ranks as the config's `rank_pattern` leaves."""
        rank, (stack, rows, columns) = len(config.places_at(site.label)), matrices_of(site)
        shapes = {"lora_A": (rank, columns), "lora_E": (rank, 1), "lora_B": (rows, rank)}
        return {name: ParameterSpec((*stack, *shape), key=name) for name, shape in shapes.items()}

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s; the small number in it is PEFT's."""
        return {"scale": (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B, and sets E to zero; all three are drawn where the config says so."""
        for tensor in parameters.values():
            tensor.normal_()
        torch.randn(1)  # PEFT draws a number for the rank, too
        if config.init_lora_weights:
            parameters["lora_E"].zero_()
            parameters["lora_A"].normal_(std=0.02)
            parameters["lora_B"].normal_(std=0.02)

    def product(self, lora_A: Any, lora_E: Any, lora_B: Any, scale: Any) -> Product:
        """Returns s B (E ⊙ A)."""
        return Product((lora_B, lora_A * lora_E), scale)


def form_of(shape: tuple[int, ...], axis: int, places: Tensor) -> FileForm:
    """Returns the form in files of a factor, of which these have some ranks alone.

    Args:
        shape: The factor's shape in the model.
        axis: The dimension of its ranks.
        places: The places of the ranks that files have.
    """

    def pack(tensor: Tensor) -> Tensor:
        return tensor.index_select(axis, places.to(tensor.device))

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(shape).index_copy(axis, places.to(tensor.device), tensor)

    return FileForm((*shape[:axis], len(places), *shape[axis + 1 :]), pack, unpack)
