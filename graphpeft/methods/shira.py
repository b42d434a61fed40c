"""SHiRA: a change of a few elements of a weight, at places that are chosen once.

    ΔW[places] = v        v: r · (out + in) numbers, as many as LoRA of rank r has

Source: Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175; the same numbers as PEFT's
``tuners/shira/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import Matrices, matrices_of
from graphpeft.methods.placed import Placed
from graphpeft.rules.options import Editable, InitWeights, Seed, Size, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Shira(Placed):
    """The change at one weight."""

    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights with fewer elements than the change has."""
        reason = super().check(site, config)
        if reason is None and _count(matrices_of(site), config.r) > matrices_of(site).size:
            reason = f"r={config.r} makes more elements than the {matrices_of(site).size} of its {site.attribute}"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the elements, and their places: a row and a column for each, of all matrices below each other."""
        count = _count(matrices_of(site), config.r)
        places = ParameterSpec((2, count), key="shira_indices", is_trained=False, dtype=torch.int32)
        return {"shira_weight": ParameterSpec((count,), key="shira_weight"), "shira_indices": places}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Chooses the places, and sets the elements to 0 or draws them."""
        parameters["shira_indices"].copy_(_places(self, site, config, module))
        if config.init_weights:
            parameters["shira_weight"].zero_()
        else:
            parameters["shira_weight"].normal_()

    def elements(self, own: Mapping[str, Any]) -> tuple[Any, Any]:
        """Returns the elements, and their rows and columns."""
        return own["shira_weight"], own["shira_indices"]


def _count(matrices: Matrices, rank: int) -> int:
    """Returns the number of elements that a change of matrices has."""
    return matrices.number * rank * (matrices.rows + matrices.columns)


def _places(rule: Shira, site: Any, config: Any, module: nn.Module) -> Tensor:
    """Returns the rows and the columns of a change's elements, (2, n), in the order of the weight's elements."""
    matrices = matrices_of(site)
    count = _count(matrices, config.r)
    if config.mask_fn is None:
        if config.mask_type != "random":
            raise AdaptError(
                f"mask_type={config.mask_type!r} has no function that chooses the places; set config.mask_fn"
            )
        generator = torch.Generator()
        if config.random_seed is not None:
            generator.manual_seed(config.random_seed)
        chosen = torch.randperm(matrices.size, generator=generator)[:count].sort().values
    else:
        seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
        mask = config.mask_fn(module, config.r, bias=site.bias is not None, **seed)
        if mask.shape != site.shape or int((mask == 1).sum()) != count:
            raise AdaptError(
                f"{site.label}: mask_fn returns {int((mask == 1).sum())} ones in a mask of shape {tuple(mask.shape)}, "
                f"and r={config.r} asks for {count} in one of the weight's shape, {tuple(site.shape)}"
            )
        chosen = torch.where(rule.layout.turned(mask.cpu()).flatten() == 1)[0]
    return torch.stack((chosen // matrices.columns, chosen % matrices.columns))


@register
@dataclass(kw_only=True)
class ShiraConfig(TargetedConfig):
    """The options of SHiRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175.

    A function that chooses the places otherwise is set as an attribute, ``config.mask_fn = function``, as in PEFT:
    ``function(layer, r, **kwargs)`` returns a mask in the shape of the layer's weight, with r · (out + in) ones. Files
    hold the places, so it isn't needed for loading.

    Attributes:
        r: How many elements are changed: r · (out + in), as many as LoRA of rank r has.
        mask_type: The name of the way in which places are chosen; for another than ``"random"``, set `mask_fn`.
        random_seed: The seed for random places; None for the default of a new ``torch.Generator``.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        init_weights: Whether the elements are 0 at first; if False, they are drawn from a normal distribution.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), ShiraConfig(r=2, target_modules=["0"]))
        >>> model[0].default.shira_weight.shape, model[0].default.shira_indices.shape
        (torch.Size([48]), torch.Size([2, 48]))
    """

    peft_type: ClassVar[PeftType] = PeftType.SHIRA
    prefix: ClassVar[str | None] = "shira_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_targets: ClassVar[targets.Defaults] = {**DEFAULT_TARGET_MODULES, "phi": ("q_proj", "v_proj")}
    mask_fn: ClassVar[Callable[..., Tensor] | None] = None
    """The function that chooses the places, which an instance may have."""

    r: Size = 32
    mask_type: Editable[str] = "random"
    random_seed: Editable[Seed | None] = None
    fan_in_fan_out: Turned = False
    init_weights: InitWeights = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Shira:
        """Returns the rule for a weight's shape."""
        return Shira(shape=site.matrix_shape, columns=matrices_of(site).columns)
