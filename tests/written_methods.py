"""Methods as an author writes them by docs/rules.md: one whose sites share tensors, and one with whole numbers."""

# an author writes `starts_as_identity = True`, where the base class has a property
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft import (
    DeltaRule,
    ParameterSpec,
    TargetedConfig,
    ops,
    recorded,
)


def kaiming(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)


# as VeRA, but of one shape: ΔW = diag(b) B diag(d) A, with one frozen A and one frozen B for the whole adapter


def drawn_projections(shapes: list[torch.Size], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bounds = [(6 / columns) ** 0.5 for _, columns in shapes]
    return [torch.empty(shape).uniform_(-b, b, generator=generator) for shape, b in zip(shapes, bounds, strict=True)]


@dataclass(frozen=True)
class Projections(DeltaRule):
    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        rows, columns = site.matrix_shape
        written = {"written_once": config.save_projection, "is_saved": config.save_projection, "is_trained": False}
        return {
            "A": ParameterSpec((config.r, columns), key="vera_A", scope="A", **written),
            "B": ParameterSpec((rows, config.r), key="vera_B", scope="B", **written),
            "b": ParameterSpec((rows,), key="vera_lambda_b"),
            "d": ParameterSpec((config.r,), key="vera_lambda_d"),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        shapes = [parameters[name].shape for name in "AB"]
        for name, drawn in zip("AB", drawn_projections(shapes, config.projection_prng_key), strict=True):
            parameters[name].copy_(drawn)
        parameters["d"].normal_().fill_(config.d_initial)
        parameters["b"].zero_()

    def dropout_of(self, config: Any) -> float:
        return config.vera_dropout

    def delta(self, A: Any, B: Any, b: Any, d: Any) -> Any:
        return (b[:, None] * B) @ (d[:, None] * A)


@dataclass(kw_only=True)
class SharingConfig(TargetedConfig):
    peft_type: ClassVar[Any] = "TEST_SHARING"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    starts_as_identity: ClassVar[bool] = True

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Projections()


# as SHiRA: ΔW has values at few places, which are whole numbers that are saved


@recorded
def placed(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=values.dtype, device=values.device).index_put(tuple(places.long()), values)


@dataclass(frozen=True)
class Sparse(DeltaRule):
    shape: tuple[int, ...]

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        count = config.r * sum(site.matrix_shape)
        places = ParameterSpec((2, count), key="shira_indices", is_trained=False, dtype=torch.int32)
        return {"values": ParameterSpec((count,), key="shira_weight"), "places": places}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        rows, columns = site.matrix_shape
        generator = torch.Generator()
        if config.random_seed is not None:
            generator.manual_seed(config.random_seed)
        chosen = torch.randperm(rows * columns, generator=generator)[: parameters["values"].numel()].sort().values
        parameters["places"].copy_(torch.stack((chosen // columns, chosen % columns)))
        parameters["values"].zero_()

    def delta(self, values: Any, places: Any) -> Any:
        return placed(values, places, *self.shape)


@dataclass(kw_only=True)
class PlacesConfig(TargetedConfig):
    peft_type: ClassVar[Any] = "TEST_PLACES"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    starts_as_identity: ClassVar[bool] = True

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Sparse(site.matrix_shape)


METHODS = (SharingConfig, PlacesConfig)
