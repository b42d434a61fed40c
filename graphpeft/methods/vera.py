"""VeRA: all layers share two frozen random projections, and each trains two vectors that scale them.

    ΔW = diag(b) B diag(d) A        A (r, in), B (out, r): cut from one A and one B, which fit the largest weights

Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454; the same numbers as PEFT's
``tuners/vera/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.factored import Factored, ProjectedConfig, sizes_of
from graphpeft.rules.options import Editable, InitWeights, InputDropout, Number, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Diagonal, Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets


@dataclass(frozen=True, kw_only=True)
class Vera(Factored):
    """The change of a weight."""

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, which all sites share, and b and d."""
        (rows, columns), stack = config.largest, self.sizes.stack
        return {
            "vera_A": config.projection((config.r, columns), "vera_A"),
            "vera_B": config.projection((rows, config.r), "vera_B"),
            "vera_lambda_b": ParameterSpec((*stack, self.sizes.rows), "vera_lambda_b"),
            "vera_lambda_d": ParameterSpec((*stack, config.r), "vera_lambda_d"),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B by the config's seed; b is 0 and d is `d_initial`, or b is 1 and d is drawn."""
        if config.draws(site):
            generator = torch.Generator().manual_seed(config.projection_prng_key)
            for name in ("vera_A", "vera_B"):
                bound = (6 / parameters[name].shape[1]) ** 0.5
                parameters[name].uniform_(-bound, bound, generator=generator)
        parameters["vera_lambda_b"].fill_(0 if config.init_weights else 1)
        # PEFT draws d in any case
        parameters["vera_lambda_d"].normal_()
        if config.init_weights:
            parameters["vera_lambda_d"].fill_(config.d_initial)

    def product(self, vera_lambda_d: Any, vera_lambda_b: Any, vera_A: Any, vera_B: Any) -> Product:
        """Returns diag(b) B diag(d) A."""
        a, b = vera_A[:, : self.sizes.columns], vera_B[: self.sizes.rows]
        return Product((Diagonal(vera_lambda_b), b, Diagonal(vera_lambda_d), a))


@register
@dataclass(kw_only=True)
class VeraConfig(ProjectedConfig):
    """The options of VeRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

    Differs from PEFT: each adapter has projections of the size of its own largest weights. In PEFT, further adapters of
    a model have those of the first one, and fail if these are too small.

    Attributes:
        r: The number of rows of A, and of columns of B.
        projection_prng_key: The seed of the projections; the same for all adapters of a model.
        save_projection: Whether files have the projections. If not, they are drawn again when a file is loaded, by a
            generator that may draw other numbers in another version of PyTorch. The same for all adapters of a model.
        vera_dropout: The probability of dropping an element of the branch's input in training.
        d_initial: The first value of all elements of d.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"vera_only"``, the adapted layers'.
        init_weights: Whether b is 0 at first, and d is `d_initial`; if False, b is 1, and d is drawn.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), VeraConfig(r=4, target_modules=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters() if tensor.requires_grad}
        {'vera_lambda_b': (16,), 'vera_lambda_d': (4,)}
    """

    peft_type: ClassVar[PeftType] = PeftType.VERA
    prefix: ClassVar[str | None] = "vera_lambda_"
    default_targets: ClassVar[targets.Defaults] = {**DEFAULT_TARGET_MODULES, "phi": ("q_proj", "v_proj")}

    r: Size = 256
    vera_dropout: InputDropout = 0.0
    d_initial: Editable[Number] = 0.1
    bias: TrainedBiases[Literal["none", "all", "vera_only"]] = "none"
    init_weights: InitWeights = True

    def rule_for(self, site: Any, dtype: torch.dtype) -> Vera:
        """Returns the rule for a linear operation, for a call, or for a weight."""
        return Vera(sizes=sizes_of(site))
