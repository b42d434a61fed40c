"""OSF: the directions of a weight's smallest singular values are trained, and stay off those of the largest ones.

    W' = U₁ S₁ V₁ + U S V        ΔW = U S V − U₀ S₀ V₀        W = U₁ S₁ V₁ + U₀ S₀ V₀ by its singular values
    ∂U ← (1 − U₁ U₁ᵀ) ∂U         ∂V ← ∂V (1 − V₁ᵀ V₁)         V with right singular vectors as rows

Only U, S and V are trained and saved, which are U₀, S₀ and V₀ at first. These, and U₁ and V₁, are computed from the
base's weight, also when a file is loaded. Where U₀ and U₁ are all directions, 1 − U₁ U₁ᵀ is U₀ U₀ᵀ, and U₁ isn't kept.

Source: Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv
2504.07097; the same numbers as PEFT's ``tuners/osf/layer.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.factored import Factored, sizes_of
from graphpeft.methods.steered import steered
from graphpeft.rules.options import Editable, Size, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Diagonal, Factor, Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.pattern_values import pattern_of
from graphpeft.targeting.patterns import Pattern
from graphpeft.targeting.target_config import TargetedConfig

_Share = Annotated[float, Within("a positive integer, or a share of the directions up to 1.0", 1e-9, 1)]

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")

DEFAULT_TARGET_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text"), _ALL),
    **dict.fromkeys(("qwen2", "qwen3", "phi"), _ALL),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value", "dense_4h_to_h")),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
}
"""OSF's `target_modules` by `model_type`, as in PEFT."""


@dataclass(frozen=True, kw_only=True)
class Osf(Factored):
    """The change of a weight."""

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses ranks that freeze no direction, or leave none, and weights whose numbers aren't known."""
        reason = self.numbers_unknown(site) or super().check(site, config)
        if reason is not None:
            return reason
        most, rank = self._directions, config.rank_at(site.name, self._directions)
        if 0 < rank < most:
            return None
        does = "leaves none to train" if rank else "freezes none"
        return f"of the {most} directions of its weight, the effective rank {rank} {does}; set it in rank_pattern"

    @property
    def _directions(self) -> int:
        return min(self.sizes.rows, self.sizes.columns)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns U, S and V, and what is frozen."""
        rows, columns, stack = self.sizes
        frozen = config.rank_at(site.name, self._directions)
        rank = self._directions - frozen
        shapes = {"U": (*stack, rows, rank), "S": (*stack, rank), "V": (*stack, rank, columns)}
        specs = {f"osf_{name}_low": ParameterSpec(at, f"osf_svd_params.{name}_low") for name, at in shapes.items()}
        first = {f"osf_{name}_init": at for name, at in shapes.items()}
        if rows > columns:
            first["osf_U_high"] = (*stack, rows, frozen)
        if columns > rows:
            first["osf_V_high"] = (*stack, frozen, columns)
        of_base: dict[str, Any] = {"is_trained": False, "is_saved": False}
        return specs | {name: ParameterSpec(at, name, **of_base) for name, at in first.items()}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Decomposes the weight; U, S and V are its last directions, or drawn."""
        u, s, v = torch.linalg.svd(self.numbers(site, module).float(), full_matrices=False)
        frozen = config.rank_at(site.name, self._directions)
        found = {"U": u[..., frozen:], "S": s[..., frozen:], "V": v[..., frozen:, :]}
        for name, first in found.items():
            parameters[f"osf_{name}_init"].copy_(first)
            # PEFT draws in the weight's precision
            low = first if config.init_weights is not False else torch.randn(first.shape, dtype=site.dtype)
            parameters[f"osf_{name}_low"].copy_(low)
        for name, high in {"osf_U_high": u[..., :frozen], "osf_V_high": v[..., :frozen, :]}.items():
            if name in parameters:
                parameters[name].copy_(high)

    def product(self, osf_S_low: Any, osf_S_init: Any, osf_U_init: Any, osf_V_init: Any, **others: Any) -> Product:
        """Returns U S V − U₀ S₀ V₀."""
        u, v = _steered(osf_U_init, osf_V_init, **others)
        now = Product((u, Diagonal(osf_S_low), v))
        return Product((_Difference(now, Product((osf_U_init, Diagonal(osf_S_init), osf_V_init))),))


@dataclass(frozen=True)
class _Difference(Factor):
    """The difference of two products, which is 0 at first, within rounding."""

    now: Product
    first: Product

    def applied(self, h: Any) -> Any:
        """Returns the difference of what both are when they are applied."""
        return self.now.applied(h) - self.first.applied(h)

    def matrix(self) -> Any:
        """Returns the difference of both."""
        return self.now.dense() - self.first.dense()


def _steered(
    u_init: Any,
    v_init: Any,
    osf_U_low: Any,
    osf_V_low: Any,
    osf_U_high: Any = None,
    osf_V_high: Any = None,
    **_: Any,
) -> tuple[Any, Any]:
    """Returns U and V, whose gradients have no part in the frozen directions."""
    U, V = osf_U_low, osf_V_low
    on_u = steered(U, u_init, True) if osf_U_high is None else steered(U, osf_U_high, False)
    on_v = steered(V.mT, v_init.mT, True) if osf_V_high is None else steered(V.mT, osf_V_high.mT, False)
    return on_u, on_v.mT


@register
@dataclass(kw_only=True)
class OSFConfig(TargetedConfig):
    """The options of OSF beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Nayak et al., "Sculpting Subspaces", arXiv 2504.07097.

    Differs from PEFT: adapters can be unmerged, and the changes of several active ones add up; in PEFT, the first one
    acts alone. An effective rank that leaves a weight no direction to train is refused; PEFT takes it, and trains
    nothing there.

    Attributes:
        effective_rank: The number of directions that stay frozen, or their share of all as a float up to 1; None for a
            half. The remaining ones are trained.
        rank_pattern: Other such ranks, by regular expressions for any part of a path; the first that matches counts.
        init_weights: Whether the trained directions are the weight's at first; if False, they are drawn.
        target_svd_config: Accepted for PEFT's sake, where it has no effect either.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = OSFConfig(effective_rank=6, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> {name: tuple(t.shape) for name, t in model[0].default.named_parameters() if t.requires_grad}
        {'osf_U_low': (16, 2), 'osf_S_low': (2,), 'osf_V_low': (2, 8)}
    """

    peft_type: ClassVar[PeftType] = PeftType.OSF
    prefix: ClassVar[str | None] = "osf_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    adapts_leaves: ClassVar[bool] = True
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    effective_rank: Size | _Share | None = None
    rank_pattern: dict[str, Size | _Share] | None = None
    init_weights: Editable[bool | None] = True
    target_svd_config: Editable[dict[str, int] | None] = None

    @property
    def starts_as_identity(self) -> Literal["within rounding"] | bool:
        """Whether the trained directions are the weight's; PyTorch multiplies by them otherwise than by frozen ones."""
        return "within rounding" if self.init_weights is not False else False

    def targets_by_default(self, model: nn.Module) -> set[str] | str:
        """Returns the default `target_modules` of a model: all its linear layers, if its type has no others."""
        try:
            return super().targets_by_default(model)
        except ValueError:
            return self._all_linear(model)

    def rank_at(self, name: str, directions: int) -> int:
        """Returns the number of frozen directions at a site, as PEFT rounds it.

        Args:
            name: The site's name.
            directions: The number of directions of its weight.
        """
        rank = self._value_at(name)
        if rank is None:
            return directions // 2
        return min(directions, rank if isinstance(rank, int) else int(directions * rank))

    def _value_at(self, name: str) -> int | float | None:
        for key, value in (self.rank_pattern or {}).items():
            if Pattern(key, key, "rank_pattern").search(name):
                return value
        return self.effective_rank

    def rule_for(self, site: Any, dtype: torch.dtype) -> Osf:
        """Returns the rule for a linear operation or a call, or for a weight in any other use."""
        return Osf(sizes=sizes_of(site))

    def for_file(self, sites: Sequence[Any]) -> OSFConfig:
        """Returns the config with patterns that mean the same in any order, since PEFT sorts them."""
        config: Any = copy.deepcopy(self)
        if self.rank_pattern:
            values = {pattern_of(site.name): self._value_at(site.name) for site in sites}
            config.rank_pattern = {key: value for key, value in values.items() if value is not None}
        return config
