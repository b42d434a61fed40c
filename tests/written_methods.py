"""Methods as an author writes them by docs/rules.md: PEFT's, in few lines, with PEFT's files."""

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
    InputRule,
    ParameterSpec,
    PeftType,
    TargetedConfig,
    WeightRule,
    ops,
    recorded,
)


def kaiming(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)


# OFT, arXiv:2306.07280: W' = W Rᵀ, with blocks of rotations on the diagonal of R


@recorded
def rotations(q: Tensor, size: int) -> Tensor:
    """Returns the Cayley maps (1 + Q)(1 − Q)⁻¹ of skew matrices, from their upper triangles."""
    i, j = torch.triu_indices(size, size, 1)
    upper = q.new_zeros(q.shape[0], size, size).index_put((torch.arange(q.shape[0])[:, None], i[None], j[None]), q)
    skew, eye = upper - upper.mT, torch.eye(size, dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


@dataclass(frozen=True)
class Rotation(WeightRule, InputRule):
    size: int

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        shape = (site.in_features // self.size, self.size * (self.size - 1) // 2)
        return {"q": ParameterSpec(shape, key="oft_R.weight")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        parameters["q"].zero_()

    def enter(self, x: Any, q: Any) -> Any:
        return self.turned(x.to(q.dtype), rotations(q, self.size)).to(x.dtype)

    def delta(self, weight: Any, q: Any) -> Any:
        return self.turned(weight, rotations(q, self.size).mT) - weight

    def turned(self, x: Any, blocks: Any) -> Any:
        return torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (-1, self.size)), blocks).flatten(-2)


@dataclass(kw_only=True)
class OFTConfig(TargetedConfig):
    peft_type: ClassVar[Any] = PeftType.OFT
    starts_as_identity: ClassVar[bool] = False

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Rotation(self.oft_block_size)


# HRA, arXiv:2405.17484: W' = W Π (1 − 2 u uᵀ / ‖u‖²)


@recorded
def reflections(u: Tensor) -> Tensor:
    product = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    u = u / u.norm(dim=0)
    for i in range(u.shape[1]):
        product = product - 2 * product @ u[:, i : i + 1] @ u[:, i : i + 1].T
    return product


@dataclass(frozen=True)
class Reflections(DeltaRule):
    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        return {"u": ParameterSpec((site.in_features, config.r), key="hra_u")}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        half = torch.empty(parameters["u"].shape[0], parameters["u"].shape[1] // 2)
        kaiming(half)
        parameters["u"].copy_(half.repeat_interleave(2, dim=1))

    def delta(self, weight: Any, u: Any) -> Any:
        return weight @ reflections(u) - weight


@dataclass(kw_only=True)
class HRAConfig(TargetedConfig):
    peft_type: ClassVar[Any] = PeftType.HRA
    starts_as_identity: ClassVar[bool] = False

    r: int = 8
    apply_GS: bool = False  # noqa: N815
    init_weights: bool = True
    bias: str = "none"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Reflections()


# VeRA, arXiv:2310.11454: ΔW = diag(b) B diag(d) A, with one frozen A and one frozen B for the whole adapter


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
class VeraConfig(TargetedConfig):
    peft_type: ClassVar[Any] = PeftType.VERA
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


# SHiRA, arXiv:2406.13175: ΔW has values at few places, which are whole numbers that are saved


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
class ShiraConfig(TargetedConfig):
    peft_type: ClassVar[Any] = PeftType.SHIRA
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    starts_as_identity: ClassVar[bool] = True

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Sparse(site.matrix_shape)


METHODS = (OFTConfig, HRAConfig, VeraConfig, ShiraConfig)
