"""TinyLoRA: a few numbers choose a change among random ones, in the space of a weight's first singular vectors.

    ΔW = B R A        R = Σᵢ vᵢ Pᵢ        A = √S_r V_rᵀ, B = U_r √S_r of W = U S Vᵀ; Pᵢ (r, r) random

Only v is trained, and layers may have one v in common. A and B are frozen, and in files.

Source: "Learning to Reason in 13 Parameters", arXiv 2602.04118; the same numbers as PEFT's
``tuners/tinylora/layer.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.factored import Factored, FactoredConfig, sizes_of
from graphpeft.methods.matrices import as_matrices
from graphpeft.rules.options import Editable, InputDropout, Number, Probability, Seed, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product
from graphpeft.rules.registry import register


@dataclass(frozen=True, kw_only=True)
class TinyLora(Factored):
    """The change of a weight."""

    adapts: ClassVar[tuple[type, ...]] = (*Factored.adapts, ops.Embedding)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns v, which the sites of a group share, and A, B and P."""
        rows, columns, stack = self.sizes
        rank, key = min(config.r, rows, columns), f"tinylora_v.{config.group_of(site)}"
        frozen = {
            "tinylora_A": ParameterSpec((*stack, rank, columns), "tinylora_A", is_trained=False),
            "tinylora_B": ParameterSpec((*stack, rows, rank), "tinylora_B", is_trained=False),
            "tinylora_P": ParameterSpec(
                (config.u, rank, rank), "tinylora_P", is_trained=False, is_saved=config.save_projection
            ),
        }
        return {"tinylora_v": ParameterSpec((config.u,), key, scope=key, written_once=True), **frozen}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Decomposes the weight, draws P by the config's seed, and v at the first site of a group."""
        weight = read_weight(module, site.attribute)
        assert weight is not None
        v = parameters["tinylora_v"]
        if config.is_first_of_group(site):
            # PEFT draws in the weight's precision
            bound = config.init_v_bound if config.init_weights == "uniform" else 0.0
            v.copy_(torch.empty(v.shape, dtype=weight.dtype).uniform_(-bound, bound) if bound else v.zero_())
        matrices = as_matrices(self.layout.turned(weight.detach()), site)
        a, b = parameters["tinylora_A"], parameters["tinylora_B"]
        left, values, right = torch.linalg.svd(matrices.float(), full_matrices=False)
        rank, dtype = a.shape[-2], weight.dtype
        root = values[..., :rank].to(dtype).sqrt()
        a.copy_(root[..., None] * right[..., :rank, :].to(dtype))
        b.copy_(left[..., :rank].to(dtype) * root[..., None, :])
        generator = torch.Generator().manual_seed(config.projection_seed + config.index_of(site))
        p = parameters["tinylora_P"]
        p.copy_(torch.normal(0.0, rank**-0.5, p.shape, generator=generator))

    def product(self, tinylora_A: Any, tinylora_B: Any, tinylora_v: Any, tinylora_P: Any) -> Product:
        """Returns B R A."""
        return Product((tinylora_B, chosen(tinylora_v, tinylora_P), tinylora_A))


def chosen(v: Any, p: Any) -> Any:
    """Returns R = Σᵢ vᵢ Pᵢ.

    Args:
        v: Of shape (u,).
        p: Of shape (u, r, r).
    """
    return torch.einsum("i,ijk->jk", v, p)


@register
@dataclass(kw_only=True)
class TinyLoraConfig(FactoredConfig):
    """The options of TinyLoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: "Learning to Reason in 13 Parameters", arXiv 2602.04118.

    Differs from PEFT: with ``init_weights=False``, v is zero, while PEFT leaves in it what was in memory. And P of a
    further adapter follows from the layer's number in that adapter; in PEFT, from that in the first one.

    Attributes:
        r: The number of singular vectors.
        u: The number of elements of each v.
        weight_tying: The share of layers that have their v in common with another one: 0 gives each its own, 1 gives
            all the same.
        projection_seed: The seed of P in the first layer; those of the others follow.
        save_projection: Whether files have P. If not, it is drawn again when a file is loaded, by a generator that may
            draw other numbers in another version of PyTorch. The same for all adapters of a model.
        init_v_bound: With ``init_weights="uniform"``, v is drawn from −bound to bound at first.
        tinylora_dropout: The probability of dropping an element of the branch's input in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"tinylora_only"``, the adapted layers'.
        init_weights: Whether v is zero at first; ``"uniform"`` draws it.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = TinyLoraConfig(u=13, weight_tying=1.0, target_modules=["0", "1"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), config)
        >>> [(name, tuple(tensor.shape)) for name, tensor in model.named_parameters() if tensor.requires_grad]
        [('0.default.tinylora_v', (13,))]
    """

    peft_type: ClassVar[PeftType] = PeftType.TINYLORA
    prefix: ClassVar[str | None] = "tinylora_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    adapts_leaves: ClassVar[bool] = False
    shared_options: ClassVar[tuple[str, ...]] = ("save_projection",)

    r: Size = 2
    u: Size = 64
    weight_tying: Probability = 0.0
    projection_seed: Seed = 42
    save_projection: bool = True
    init_v_bound: Editable[Number] = 0.02
    tinylora_dropout: InputDropout = 0.0
    bias: TrainedBiases[Literal["none", "all", "tinylora_only"]] = "none"
    init_weights: Editable[bool | Literal["uniform"]] = True

    @property
    def starts_as_identity(self) -> bool:
        """Whether v is zero."""
        return self.init_weights != "uniform"

    def prepared(self, sites: Sequence[Any]) -> TinyLoraConfig:
        """Returns the config with the numbers of the sites, from which their groups follow."""
        config: Any = copy.copy(self)
        config._numbers = {site.label: index for index, site in enumerate(sites)}
        return config

    def index_of(self, site: Any) -> int:
        """Returns the number of a site among all.

        Args:
            site: The site.
        """
        return self._numbers[site.label]

    def group_of(self, site: Any) -> int:
        """Returns the number of the group whose v a site has.

        Args:
            site: The site.
        """
        return self._group(self.index_of(site))

    def is_first_of_group(self, site: Any) -> bool:
        """Returns whether no site of the same group comes before a site.

        Args:
            site: The site.
        """
        index = self.index_of(site)
        return index == 0 or self._group(index - 1) != self._group(index)

    def _group(self, index: int) -> int:
        number = len(self._numbers)
        groups = max(1, round(number * (1 - self.weight_tying)))
        return min(index // max(1, number // groups), groups - 1)

    def rule_for(self, site: Any, dtype: torch.dtype) -> TinyLora:
        """Returns the rule for a linear operation, for an embedding, or for a weight."""
        return TinyLora(sizes=sizes_of(site))
