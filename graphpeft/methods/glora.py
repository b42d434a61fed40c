"""GLoRA: a weight and a bias are scaled and shifted, each by tensors of their own.

    W' = W + W ⊙ A + B              A and B: products of rank r, factors for each output, numbers, or nothing
    b' = b + b ⊙ D + E + W C        C: a product of rank r, a vector, or nothing; D and E: vectors, numbers, or nothing

Source: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967; the same
numbers as PEFT's ``tuners/glora/layer.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.lycoris import draw
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import DeltaRule
from graphpeft.rules.options import InitWeights, Size, TrainedBiases
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig

Kind = Literal["lora", "vector", "constant", "none"]
"""How a tensor is made: as a product, of a number for each feature, of one number, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Glora(DeltaRule):
    """The changes of one weight and of the bias beside it.

    Attributes:
        weight_kind: How A and B are made.
        coupling_kind: How C is made.
        bias_kind: How D and E are made.
    """

    weight_kind: Kind
    coupling_kind: Kind
    bias_kind: Kind

    needs_matrix: ClassVar[bool] = True

    def _kinds(self) -> dict[str, Kind]:
        kinds = (self.weight_kind, self.weight_kind, self.coupling_kind, self.bias_kind, self.bias_kind)
        return dict(zip("ABCDE", kinds, strict=True))

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the tensors of which A to E are made; a file has zeros for those that there aren't."""
        stack, rows, columns = matrices_of(site)
        sizes = {
            "A": (*stack, rows, columns),
            "B": (*stack, rows, columns),
            "C": (columns, 1),
            "D": (rows,),
            "E": (rows,),
        }
        specs: dict[str, ParameterSpec] = {}
        for name, kind in self._kinds().items():
            size = sizes[name]
            if kind == "lora":
                shapes = {"Xd": (*size[:-1], config.r), "Xu": (*size[:-2], config.r, size[-1])}
            else:
                column = size if name in "DE" else (*size[:-1], 1)
                shapes = {"X": column if kind == "vector" else (1,)}
            if kind == "none":
                key = f"glora_{name}.zeros"
                form = _form_of_zeros(key, size, site.dtype)
                specs[f"glora_{name}_zeros"] = ParameterSpec((0,), key, is_trained=False, form=form)
            else:
                specs |= {f"glora_{name}_{n}": ParameterSpec(shape, f"glora_{name}.{n}") for n, shape in shapes.items()}
        return specs

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the second factors of the products, and sets all others to zero, or draws them, too."""
        for name, kind in self._kinds().items():
            if kind == "lora":
                draw(parameters[f"glora_{name}_Xu"], site)
            if kind != "none":
                tensor = parameters[f"glora_{name}_{'Xd' if kind == 'lora' else 'X'}"]
                if config.init_weights:
                    tensor.zero_()
                elif kind == "constant":
                    tensor.normal_(0, 0.02)
                else:
                    draw(tensor if tensor.ndim > 1 else tensor[None], site)

    def delta(self, base: Any, **parts: Any) -> Any:
        """Returns W ⊙ A + B."""
        if self.weight_kind == "none":
            return torch.zeros_like(base)
        A, B = (self._beside_weight(self._made(name, self.weight_kind, parts)) for name in "AB")
        return base * A + B

    def _beside_weight(self, made: Any) -> Any:
        """Returns A or B in a shape that broadcasts over the weight, which may have the dimensions of a kernel."""
        if self.weight_kind == "lora":
            return self.shaped(made)
        kernel = self.layout.kernel
        return made[(..., *(None,) * len(kernel))] if kernel and self.weight_kind == "vector" else made

    @property
    def changes_bias(self) -> bool:
        """Whether there is any of C, D and E."""
        return (self.coupling_kind, self.bias_kind) != ("none", "none")

    def bias_delta(self, base_bias: Any, base: Any, **parts: Any) -> Any:
        """Returns b ⊙ D + E + W C."""
        change = None
        if self.bias_kind != "none":
            D, E = (self._made(name, self.bias_kind, parts) for name in "DE")
            change = base_bias * D + E
        if self.coupling_kind != "none":
            coupled = (base.flatten(1) @ self._made("C", self.coupling_kind, parts)).flatten()
            change = coupled if change is None else change + coupled
        return change

    def _made(self, name: str, kind: Kind, parts: Mapping[str, Any]) -> Any:
        """Returns one of A to E."""
        return parts[f"glora_{name}_Xd"] @ parts[f"glora_{name}_Xu"] if kind == "lora" else parts[f"glora_{name}_X"]


def _form_of_zeros(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> FileForm:
    """Returns the form of a tensor that is empty here, and all zeros in files."""
    return FileForm(shape, functools.partial(_zeros, shape=shape, dtype=dtype), functools.partial(_emptied, key=key))


def _zeros(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return tensor.new_zeros(shape, dtype=dtype)


def _emptied(tensor: Tensor, key: str) -> Tensor:
    if tensor.any():
        raise ValueError(f"{key} has other numbers than zeros")
    return tensor.new_zeros(0)


@register
@dataclass(kw_only=True)
class GloraConfig(TargetedConfig):
    """The options of GLoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967.

    Attributes:
        r: The rank of products.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"glora_only"``, the adapted layers'.
        config_A_B: How the factors A and the shifts B of the weight are made: ``"lora"``, ``"vector"``,
            ``"constant"`` or ``"none"``.
        config_C: How the weight acts on the bias: ``"lora"``, ``"vector"`` or ``"none"``.
        config_D_E: How the factors D and the shifts E of the bias are made: ``"vector"``, ``"constant"`` or ``"none"``.
            A layer without a bias has neither these nor C.
        init_weights: Whether a fresh adapter changes nothing; if False, all tensors are drawn.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), GloraConfig(r=2, target_modules=["0"]))
        >>> model[0].default.glora_A_Xd.shape, model[0].default.glora_C_Xd.shape, model[0].default.glora_D_X.shape
        (torch.Size([16, 2]), torch.Size([8, 2]), torch.Size([1]))
    """

    peft_type: ClassVar[PeftType] = PeftType.GLORA
    prefix: ClassVar[str | None] = "glora_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 8
    bias: TrainedBiases[Literal["none", "all", "glora_only"]] = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    init_weights: InitWeights = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Glora:
        """Returns the rule for a weight, with or without a bias beside it."""
        of_bias = (self.config_C, self.config_D_E) if getattr(site, "bias", None) is not None else ("none", "none")
        return Glora(weight_kind=self.config_A_B, coupling_kind=of_bias[0], bias_kind=of_bias[1])
