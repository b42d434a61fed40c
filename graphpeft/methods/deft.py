"""DEFT: what a weight does in a few directions of its outputs is taken out, and something learned is put in its place.

    ΔW = Q (s R − Kᵀ W)        "relu":  Q = P,       K = relu(P)        P (out, r), R (r, in), s = α/r, or 1 without α
                               "qr":    Q = qr(P),   K = Q
                               with `para`, without R

    y' = y + (s · dropout(x) Rᵀ − (y₀ − b) K) Qᵀ        y₀: the output of the layer as it was

Source: the same numbers as PEFT's ``tuners/deft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.computed_weights import read_weight
from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.matrices import as_matrices, matrices_of
from graphpeft.rules.delta_rule import DeltaRule, ProductRule
from graphpeft.rules.options import Editable, InputDropout, Number, Size, TrainedBiases, Turned
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Deft(ProductRule):
    """The change at one weight.

    Attributes:
        is_orthogonal: Whether the directions are made orthogonal.
        injects: Whether something is put in their place.
    """

    is_orthogonal: bool = False
    injects: bool = True

    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses dropout where it would act on more than R's input."""
        reason = super().check(site, config)
        if reason is None and self.dropout_of(config) and site.op is not ops.Linear and not config.inference_mode:
            reason = "deft_dropout is for the input of R alone, which only a linear operation has; set it to 0"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns P and R."""
        stack, rows, columns = matrices_of(site)
        rank = min(config.r, rows)
        specs = {"deft_P": ParameterSpec((*stack, rows, rank), key="deft_P")}
        return specs | ({"deft_R": ParameterSpec((*stack, rank, columns), key="deft_R")} if self.injects else {})

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws P; gives R what makes ΔW zero, or draws it."""
        P = parameters["deft_P"].normal_(0, 0.02)
        if not self.injects:
            return
        if not config.init_weights:
            parameters["deft_R"].normal_(0, 0.02 * config.init_scale)
            return
        weight = read_weight(module, site.attribute)
        assert weight is not None
        precise = torch.promote_types(P.dtype, torch.float32)
        matrices = as_matrices(self.layout.turned(weight.detach().to(precise)), site)
        _, taken = self._directions(P.to(matrices))
        parameters["deft_R"].copy_(taken.mT @ matrices / self.constants(site, config)["scale"])

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scale": config.alpha / min(config.r, matrices_of(site).rows) if config.alpha else 1.0}

    def dropout_of(self, config: Any) -> float:
        """Returns `deft_dropout`, which acts on R's input."""
        return config.deft_dropout if self.injects else 0.0

    def _directions(self, P: Any) -> tuple[Any, Any]:
        """Returns Q and K."""
        if self.is_orthogonal:
            Q = orthogonal(P)
            return Q, Q
        return P, torch.relu(P)

    def rewrite(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any,
        bias_change: Any = None,
        dropout: Any = None,
        plain: Any = None,
        deft_P: Any = None,
        deft_R: Any = None,
        scale: Any = None,
    ) -> Any:
        """Returns y', and for operations that aren't linear y + operation(x, ΔW)."""
        if not self.multiplies(operation):
            return DeltaRule.rewrite(self, x, y, operation, training, change, bias_change, dropout)
        Q, K = self._directions(deft_P)
        made = -((plain.to(deft_P.dtype) if self.casts else plain) @ K)
        if self.injects:
            made = made + F.linear(self.entering(x, deft_P, training, dropout), deft_R) * scale
        return self.leaving(y + made @ Q.mT, y)

    def delta(self, base: Any, **own: Any) -> Any:  # type: ignore[override]  # given by name
        """Returns ΔW, which depends on the weight."""
        return super().delta(base=base, **own)

    def product(self, base: Any, deft_P: Any, deft_R: Any = None, scale: Any = None) -> Product:
        """Returns Q (s R − Kᵀ W)."""
        Q, K = self._directions(deft_P)
        made = -(K.mT @ in_rows(base, K))
        return Product((Q, made + deft_R * scale if self.injects else made))


@recorded
def in_rows(weight: Tensor, directions: Tensor) -> Tensor:
    """Returns a weight as matrices with as many rows as directions have, (…, rows, columns)."""
    return weight.reshape(*directions.shape[:-1], -1)


@recorded
def orthogonal(P: Tensor) -> Tensor:
    """Returns the first factor of the QR decomposition, of which there is none in half precision."""
    return torch.linalg.qr(P.to(torch.promote_types(P.dtype, torch.float32)))[0].to(P.dtype)


@register
@dataclass(kw_only=True)
class DeftConfig(TargetedConfig):
    """The options of DEFT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Attributes:
        r: The number of directions; a layer with fewer outputs has as many as it has outputs.
        decomposition_method: ``"relu"`` for P as it is drawn, or ``"qr"`` for orthogonal directions.
        init_scale: A factor of R's standard deviation where R is drawn.
        alpha: α, so that R is scaled by α/r; None for no scale.
        para: Whether nothing is put in the place of what is taken out, as in PaRa; then there is no R.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        deft_dropout: The probability of dropping an element of R's input, in training.
        init_weights: Whether R is chosen so that a fresh adapter changes nothing; if False, it is drawn.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"deft_only"``, the adapted layers'.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), DeftConfig(r=2, target_modules=["0"]))
        >>> model[0].default.deft_P.shape, model[0].default.deft_R.shape
        (torch.Size([16, 2]), torch.Size([2, 8]))
    """

    peft_type: ClassVar[PeftType] = PeftType.DEFT
    prefix: ClassVar[str | None] = "deft_"
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: Editable[Number] = 1.0
    alpha: Number | None = None
    para: bool = False
    fan_in_fan_out: Turned = False
    deft_dropout: InputDropout = 0.0
    init_weights: Editable[bool] = True
    bias: TrainedBiases[Literal["none", "all", "deft_only"]] = "none"

    @property
    def starts_as_identity(self) -> bool | Literal["within rounding"]:
        """Whether R makes the change zero, which it does within rounding."""
        return "within rounding" if self.init_weights and not self.para else False

    def rule_for(self, site: Any, dtype: torch.dtype) -> Deft:
        """Returns the rule for a weight's shape."""
        is_orthogonal = self.decomposition_method == "qr"
        return Deft(is_orthogonal=is_orthogonal, injects=not self.para)
