"""Uni-LoRA: all elements of all layers' factors are elements of one trained vector, at places drawn by a seed.

    ΔW = B A        A = θ[places of A] ⊙ scales of A        B = θ[places of B] ⊙ scales of B

Each element of θ is at as many places as any other one, or at one more; it is divided by the square root of their
number, so that the map from θ to all factors keeps lengths.

Source: Li et al., "Uni-LoRA: One Vector is All You Need", arXiv 2506.00799; the same numbers as PEFT's
``tuners/unilora/layer.py``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.factored import Factored, FactoredConfig, sizes_of
from graphpeft.rules.options import Editable, InputDropout, Number, Size, TrainedBiases, Within
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, unchanged
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product
from graphpeft.rules.registry import register


@dataclass(frozen=True, kw_only=True)
class UniLora(Factored):
    """The change of a weight."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns θ, which all sites share, and the places and scales of both factors."""
        theta = ParameterSpec((config.theta_d_length,), "unilora_theta_d", scope="unilora_theta_d", written_once=True)
        found = {"unilora_theta_d": theta}
        for factor, shape in self._shapes(config).items():
            places, scales = f"unilora_indices_{factor}", f"unilora_scales_{factor}"
            form = FileForm(shape, unchanged, functools.partial(_places, length=config.theta_d_length))
            fixed = ParameterSpec(shape, places, is_trained=False, is_saved=config.save_indices)
            found[places] = fixed._replace(dtype=torch.int64, form=form)
            found[scales] = fixed._replace(key=scales)
        return found

    def _shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        rows, columns, stack = self.sizes
        return {"A": (*stack, config.r, columns), "B": (*stack, rows, config.r)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws θ at the first site, and takes the site's own of all places."""
        first = config.first_place_of(site)
        if first == 0 and config.init_weights:
            bound = config.init_theta_d_bound
            parameters["unilora_theta_d"].uniform_(-bound, bound)
        elif first == 0:
            parameters["unilora_theta_d"].normal_()
        places, scales = drawn_places(config.number_of_places, config.theta_d_length, config.proj_seed)
        for factor, shape in self._shapes(config).items():
            # PEFT draws places here, too, and exchanges them later
            torch.randint(0, config.theta_d_length, shape)
            own = parameters[f"unilora_indices_{factor}"]
            own.copy_(places[first : first + own.numel()].view(shape))
            parameters[f"unilora_scales_{factor}"].copy_(scales[own])
            first += own.numel()

    def product(
        self,
        unilora_theta_d: Any,
        unilora_indices_A: Any,
        unilora_indices_B: Any,
        unilora_scales_A: Any,
        unilora_scales_B: Any,
    ) -> Product:
        """Returns B A."""
        a, b = unilora_theta_d[unilora_indices_A], unilora_theta_d[unilora_indices_B]
        return Product((b * unilora_scales_B, a * unilora_scales_A))


# the sites of an adapter ask for them one after the other
@functools.lru_cache(maxsize=1)
def drawn_places(number: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the elements of θ at all places of all factors, and by what each element is multiplied, as PEFT does."""
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError("Uni-LoRA's places are drawn by NumPy's generator, as PEFT's are; install numpy") from error
    generator = np.random.default_rng(seed)
    data = np.repeat(np.arange(length), number // length)
    if number % length:
        data = np.concatenate([data, generator.choice(length, size=number % length, replace=False)])
    generator.shuffle(data)
    places = torch.as_tensor(data, dtype=torch.int64)
    counts = torch.bincount(places, minlength=length)
    return places, torch.where(counts > 0, counts.float().rsqrt(), torch.zeros(()))


def _places(tensor: Tensor, length: int) -> Tensor:
    """Returns a file's places; raises ValueError for places beyond the vector."""
    if tensor.numel() and not 0 <= tensor.min() <= tensor.max() < length:
        raise ValueError(f"it has places beyond the {length} elements of unilora_theta_d")
    return tensor


@register
@dataclass(kw_only=True)
class UniLoraConfig(FactoredConfig):
    """The options of Uni-LoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Li et al., "Uni-LoRA: One Vector is All You Need", arXiv 2506.00799.

    Attributes:
        r: The rank of ΔW.
        proj_seed: The seed by which the places are drawn.
        theta_d_length: The number of elements of θ.
        unilora_dropout: The probability of dropping an element of the branch's input in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"unilora_only"``, the adapted layers'.
        init_theta_d_bound: θ is drawn from −bound to bound at first.
        init_weights: Whether it is; if False, it is drawn from a normal distribution.
        save_indices: Whether files have the places and their scales. If not, they are drawn again when a file is
            loaded, by a generator that may draw others in another version of NumPy.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = UniLoraConfig(r=2, theta_d_length=16, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 12)), config)
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters() if tensor.requires_grad}
        {'unilora_theta_d': (16,)}
    """

    peft_type: ClassVar[PeftType] = PeftType.UNILORA
    prefix: ClassVar[str | None] = "unilora_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: Size = 4
    proj_seed: Annotated[int, Within("a whole number from 0 on", 0, 2**63 - 1)] = 42
    theta_d_length: Size = 256
    unilora_dropout: InputDropout = 0.0
    bias: TrainedBiases[Literal["none", "all", "unilora_only"]] = "none"
    init_theta_d_bound: Editable[Number] = 0.02
    init_weights: Editable[bool] = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"init_theta_d_bound is {self.init_theta_d_bound}; it must be positive")

    def prepared(self, sites: Sequence[Any]) -> UniLoraConfig:
        """Returns the config with the number of places of all sites, and with where each site's begin."""
        config: Any = copy.copy(self)
        config._first_places, config._number_of_places = {}, 0
        for site in sites:
            rows, columns, stack = sizes_of(site)
            config._first_places[site.label] = config._number_of_places
            config._number_of_places += torch.Size(stack).numel() * self.r * (rows + columns)
        return config

    @property
    def number_of_places(self) -> int:
        """The number of places of all sites."""
        return self._number_of_places

    def first_place_of(self, site: Any) -> int:
        """Returns the number of the places of the sites in front of a site.

        Args:
            site: The site.
        """
        return self._first_places[site.label]

    def rule_for(self, site: Any, dtype: torch.dtype) -> UniLora:
        """Returns the rule for a linear operation, for a call, or for a weight."""
        return UniLora(sizes=sizes_of(site))
