"""FRoD: layers of the same role have one basis in common, in which each layer is stretched and sparsely mixed.

    ΔW = U (S + diag(λ − λ₀)) Vᵀ        W = U diag(λ₀) Vᵀ, U with columns of length 1
                                        V (in, in) and the places of S: one for each category of layers

Only λ and the elements of S are trained. U and λ₀ follow from the base's weight and V, also when a file is loaded.

Source: "FRoD", AAAI, doi 10.1609/aaai.v40i31.39813; the same numbers as PEFT's ``tuners/frod/layer.py``.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.factored import Factored, FactoredConfig, sizes_of
from graphpeft.methods.frod.mixing import Mixed, sorted_places
from graphpeft.methods.frod.projections import (
    Projections,
    category_of,
    coordinates,
    count_of,
    is_spanned,
    numbers_of,
)
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.options import Editable, InitWeights, InputDropout, NotNegative, Probability, Seed, TrainedBiases
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, unchanged
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product, Transposed
from graphpeft.rules.registry import register
from graphpeft.rules.weight_reader import WeightReader
from graphpeft.targeting import targets


@dataclass(frozen=True, kw_only=True)
class Frod(Factored):
    """The change of a weight."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns λ and the elements of S; V and the places, which a category shares; and U and λ₀."""
        rows, columns, stack = self.sizes
        count, category = count_of(columns, config.sparse_rate), category_of(site.name)
        shared = {"frod_V": (columns, columns), "frod_s_indices": (2, count), "frod_s_size": (2,)}
        specs = {
            "frod_lambda_l": ParameterSpec((*stack, columns), "frod_lambda_l"),
            "frod_lambda_s_values": ParameterSpec((*stack, count), "frod_lambda_s_values"),
        }
        for name, shape in shared.items():
            key = f"{name}.{category}"
            fixed = ParameterSpec(shape, key, is_trained=False, scope=key, is_saved=config.save_projection)
            fixed = fixed._replace(written_once=config.save_projection, dtype=torch.int64)
            specs[name] = fixed._replace(form=FileForm(shape, unchanged, functools.partial(_within, size=columns)))
        # beside half precision, V isn't in single precision in PEFT's files
        specs["frod_V"] = specs["frod_V"]._replace(dtype=site.dtype, form=None)
        unsaved: dict[str, Any] = {"is_trained": False, "is_saved": False}
        for name, shape in {"frod_s_elements": (4, count + columns), "frod_s_starts": (2, columns)}.items():
            key = f"{name}.{category}"
            specs[name] = ParameterSpec(shape, key, scope=key, dtype=torch.int64, **unsaved)
        for name, shape in {"frod_U": (*stack, rows, columns), "frod_lambda_init": (*stack, columns)}.items():
            specs[name] = ParameterSpec(shape, name, **unsaved)
        return specs

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Makes V of all weights of the category, and U and λ₀ of this one; S is zero and λ is λ₀, or both drawn."""
        self._fill_shared(parameters, site, config)
        self._fill_own(parameters, site, module)
        stretch, values = parameters["frod_lambda_l"], parameters["frod_lambda_s_values"]
        stretch.copy_(parameters["frod_lambda_init"])
        values.zero_()
        if not config.init_weights:
            # PEFT draws in the weight's precision
            values.copy_(torch.empty(values.shape, dtype=site.dtype).normal_(std=0.1))
            stretch.add_(torch.randn(stretch.shape, dtype=site.dtype) * 0.1)

    def complete(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Makes U and λ₀ of the weight and the file's V; and V and the places, where the file has none."""
        if not config.save_projection:
            self._fill_shared(parameters, site, config)
        self._sort(parameters)
        if not self._fill_own(parameters, site, module):
            raise ValueError(
                f"frod_V doesn't span its weight, of category {category_of(site.name)!r}; load it on the base that it "
                "was trained on"
            )

    def _fill_shared(self, parameters: Mapping[str, Tensor], site: Any, config: Any) -> None:
        category = category_of(site.name)
        parameters["frod_V"].copy_(config.projections.basis(category))
        parameters["frod_s_indices"].copy_(config.projections.places[category])
        parameters["frod_s_size"].fill_(self.sizes.columns)
        self._sort(parameters)

    def _sort(self, parameters: Mapping[str, Tensor]) -> None:
        elements, starts = sorted_places(parameters["frod_s_indices"], self.sizes.columns)
        parameters["frod_s_elements"].copy_(elements)
        parameters["frod_s_starts"].copy_(starts)

    def _fill_own(self, parameters: Mapping[str, Tensor], site: Any, module: nn.Module) -> bool:
        weight, basis = numbers_of(site, module), parameters["frod_V"].cpu()
        unit, lengths = coordinates(basis, weight)
        unit, lengths = unit.to(site.dtype).float(), lengths.to(site.dtype).float()
        parameters["frod_U"].copy_(unit)
        parameters["frod_lambda_init"].copy_(lengths)
        return is_spanned(basis, unit, lengths, weight)

    def product(
        self,
        frod_U: Any,
        frod_V: Any,
        frod_lambda_l: Any,
        frod_lambda_init: Any,
        frod_lambda_s_values: Any,
        frod_s_indices: Any,
        frod_s_elements: Any,
        frod_s_starts: Any,
    ) -> Product:
        """Returns U (S + diag(λ − λ₀)) Vᵀ."""
        order = frod_s_elements, frod_s_starts
        middle = Mixed(frod_lambda_l - frod_lambda_init, frod_lambda_s_values, frod_s_indices, *order)
        return Product((frod_U, middle, Transposed(frod_V.to(frod_U.dtype))))


def _within(tensor: Tensor, size: int) -> Tensor:
    """Returns a file's places, or the size that they are in; raises ValueError for those of another matrix."""
    if tensor.ndim == 1:
        fits = bool((tensor == size).all())
    else:
        fits = not tensor.numel() or bool(0 <= tensor.min() <= tensor.max() < size)
    if not fits:
        raise ValueError(f"it has places in another matrix than one of {size}×{size}")
    return tensor


@register
@dataclass(kw_only=True)
class FrodConfig(FactoredConfig):
    """The options of FRoD beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: "FRoD", AAAI, doi 10.1609/aaai.v40i31.39813.

    Differs from PEFT: U is made of the file's V, while PEFT makes it of the V that it computes anew, which another
    machine may compute otherwise. A fresh adapter changes nothing, bit for bit. Beside a base in half precision, PEFT
    rounds U, λ and V, and computes with their product; here a change is added to the weight itself.

    Attributes:
        projection_prng_key: The seed of the places of S; the same for all adapters of a model.
        save_projection: Whether files have V and the places. If not, they are made again when a file is loaded, by
            decompositions and a generator that may give others on another machine. The same for all adapters.
        frod_dropout: The probability of dropping an element of the branch's input in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"frod_only"``, the adapted layers'.
        init_weights: Whether S is zero and λ is λ₀ at first; if False, both are drawn.
        sparse_rate: The share of the places of S.
        regularization_alpha: α, by which an inverse is kept stable that V is made of.
        progressbar: Accepted for PEFT's sake; there is no progress bar.
        runtime_offload_base_weight: Accepted for PEFT's sake; weights stay where they are.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), FrodConfig(sparse_rate=0.1, target_modules=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters() if tensor.requires_grad}
        {'frod_lambda_l': (8,), 'frod_lambda_s_values': (6,)}
    """

    peft_type: ClassVar[PeftType] = PeftType.FROD
    prefix: ClassVar[str | None] = "frod_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    adapts_leaves: ClassVar[bool] = False
    shared_options: ClassVar[tuple[str, ...]] = ("projection_prng_key", "save_projection")
    default_targets: ClassVar[targets.Defaults] = {
        **DEFAULT_TARGET_MODULES,
        "phi": ("q_proj", "v_proj"),
        "vit": ("query", "value"),
    }

    projection_prng_key: Seed = 0
    save_projection: bool = True
    frod_dropout: InputDropout = 0.0
    bias: TrainedBiases[Literal["none", "all", "frod_only"]] = "none"
    init_weights: InitWeights = True
    sparse_rate: Probability = 0.01
    regularization_alpha: NotNegative = 1e-3
    progressbar: Editable[bool] = True
    runtime_offload_base_weight: Editable[bool] = False

    def check(self) -> None:
        """Raises ValueError for options that can't be, and warns of one that has no effect."""
        super().check()
        if self.runtime_offload_base_weight:
            text = "runtime_offload_base_weight=True has no effect: weights stay where they are; leave it out"
            warnings.warn(text, PeftWarning, stacklevel=6)

    def with_weights(self, sites: Sequence[Any], weights: WeightReader) -> FrodConfig:
        """Returns the config with the bases and places of all categories."""
        config: Any = copy.copy(self)
        config.projections = Projections(self, sites, weights)
        return config

    def rule_for(self, site: Any, dtype: torch.dtype) -> Frod:
        """Returns the rule for a linear operation, or for a weight."""
        return Frod(sizes=sizes_of(site))
