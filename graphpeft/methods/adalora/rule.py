"""AdaLoRA at a weight, and at an operation that multiplies by one.

W' = W + s · B (E ⊙ A)                     W of any layout, also each matrix of a stack, or a kernel
y' = y + s · dropout(x) (E ⊙ A)ᵀ Bᵀ        y = x Wᵀ + b, or the call of a quantised layer
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.recorded import as_node
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora.linear import dropped_by_row, products_by_row
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.parameter_spec import Dropout, FileForm, ParameterSpec
from graphpeft.rules.products import Product
from graphpeft.rules.rule import RunsByRow
from graphpeft.sites.site import LeafSite


@dataclass(frozen=True, kw_only=True)
class AdaLora(ProductRule):
    """The change of a matrix, of each matrix in a stack, or of a kernel."""

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    needs_matrix: ClassVar[bool] = True

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, E and B, with as many ranks as the config's `rank_pattern` leaves."""
        rank, shape = len(config.places_at(site.label)), site.matrix_shape
        *stack, rows, columns = shape[: len(shape) - len(self.kernel)]
        return _factors(tuple(stack), rank, rows, columns * math.prod(self.kernel))

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s; the small number in it is PEFT's."""
        return {"scale": (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)}

    def dropout_of(self, config: Any) -> float:
        """Returns `lora_dropout`."""
        return config.lora_dropout

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


def _factors(stack: tuple[int, ...], rank: int, rows: int, columns: int) -> dict[str, ParameterSpec]:
    shapes = {"lora_A": (rank, columns), "lora_E": (rank, 1), "lora_B": (rows, rank)}
    return {name: ParameterSpec((*stack, *shape), key=name) for name, shape in shapes.items()}


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


@dataclass(frozen=True, kw_only=True)
class AdaLoraBranch(AdaLora, RunsByRow):
    """A branch beside a linear operation; each row of a batch can have its own."""

    zeros_change_nothing: ClassVar[bool] = True

    def rewrite(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        lora_A: Any,
        lora_E: Any,
        lora_B: Any,
        scale: Any,
        dropout: Any = None,
    ) -> Any:
        """Returns y + s · dropout(x) (E ⊙ A)ᵀ Bᵀ."""
        h = self.entering(x, lora_A, training, dropout)
        scaled = lora_A * lora_E
        branch = h @ lora_B @ scaled if self._is_turned(operation) else F.linear(F.linear(h, scaled), lora_B)
        return self.leaving(add_scaled(y, branch, scale), y)

    @property
    def constants_by_row(self) -> Mapping[str, float | None]:
        """The constants that `by_row` reads."""
        return {"scale": None, "dropout": Dropout(0.0)}

    def by_row(
        self,
        x: Any,
        y: Any,
        operation: Any,
        lora_A: Any,
        lora_E: Any,
        lora_B: Any,
        scale: Any,
        dropout: Any,
    ) -> Any:
        """Returns y with the branch of each row's own factors."""
        h = as_node(dropped_by_row, x.to(lora_A.dtype) if self.casts else x, dropout)
        scaled = lora_A * lora_E
        first, second = (lora_B, scaled) if self._is_turned(operation) else (scaled.mT, lora_B.mT)
        return self.leaving(as_node(products_by_row, y, h, first, second, scale), y)

    def _is_turned(self, operation: Any) -> bool:
        """Returns whether an operation reads the weight as its outputs by inputs, and not the other way round."""
        return isinstance(operation, ops.Linear) and operation.transposed != (self.layout.exchanged is not None)


@dataclass(frozen=True, kw_only=True)
class AdaLoraLeaf(AdaLoraBranch):
    """A branch beside the call of a layer, such as a quantised one."""

    # a layer's input and output can be in another dtype than its own tensors
    casts: bool = True

    def check(self, site: LeafSite, config: Any) -> str | None:
        """Refuses nothing, since a call has an input and an output."""
        return None

    def parameters(self, site: LeafSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, E and B."""
        return _factors((), len(config.places_at(site.label)), site.out_features, site.in_features)
