"""PEANuT: a small network computes the change of a weight from the weight.

    ΔW = s · B Hᵀ        h₀ = f(Wᵀ Aᵀ),  hᵢ = f(hᵢ₋₁ Eᵢᵀ),  g₀ = hₙ,  gᵢ = f(gᵢ₋₁ Dᵢᵀ) + hₙ₋ᵢ,  H = gₙ (in, r)
                         A (r, out), B (out, r), Eᵢ and Dᵢ (r, r) for i = 1 … n, f an activation
    y' = y + s · (x H) Bᵀ

Source: Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", arXiv 2410.01870; the
same numbers as PEFT's ``tuners/peanut/layer.py``, which multiplies x by ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.lycoris import draw
from graphpeft.methods.matrices import matrices_of
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.options import InitWeights, Number, Size, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product, Transposed
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig
from graphpeft.wording import shown


def _by_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "gelu_accurate": _by_tanh,
    "gelu_fast": _by_tanh,
    "gelu_new": _by_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _by_tanh,
    "gelu_pytorch_tanh": _by_tanh,
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""The activations by the names that they have in ``transformers.activations.ACT2FN``, but for those with parameters."""


@dataclass(frozen=True, kw_only=True)
class Peanut(ProductRule):
    """The change at one weight.

    Attributes:
        depth: How many layers the network has beside A and B, on either side.
        activation: The name of the activation.
    """

    depth: int
    activation: str

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    needs_matrix: ClassVar[bool] = True

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the layers of the network in their order."""
        (stack, rows, _), rank = matrices_of(site), config.r
        inner = {f"peanut_{side}_{n}": f"peanut_{side}.{n}.weight" for side, n in self._inner()}
        return {
            "peanut_A": ParameterSpec((*stack, rank, rows), key="peanut_A.weight"),
            **{name: ParameterSpec((*stack, rank, rank), key=key) for name, key in inner.items()},
            "peanut_B": ParameterSpec((*stack, rows, rank), key="peanut_B.weight"),
        }

    def _inner(self) -> list[tuple[str, int]]:
        return [(side, n) for side in ("encoders", "decoders") for n in range(self.depth)]

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws all layers but B, which is zero, or all."""
        # PEFT makes linear layers, which draws, before it draws
        for tensor in (*parameters.values(), *list(parameters.values())[:-1]):
            draw(tensor, site)
        B = parameters["peanut_B"]
        B.zero_() if config.init_weights else draw(B, site)

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns s."""
        return {"scale": config.scaling}

    def rewrite(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any,
        bias_change: Any = None,
        base: Any = None,
        **own: Any,
    ) -> Any:
        """Returns y', and for operations that aren't linear y + operation(x, ΔW)."""
        seen = self.layout.turned(base) if self.multiplies(operation) else base
        return super().rewrite(x, y, operation, training, change, bias_change, base=seen, **own)

    def delta(self, base: Any, **own: Any) -> Any:  # type: ignore[override]  # given by name
        """Returns ΔW, which depends on the weight."""
        return super().delta(base=base, **own)

    def product(self, peanut_A: Any, peanut_B: Any, base: Any, scale: Any, **inner: Any) -> Product:
        """Returns s B h(W)ᵀ."""
        return Product((peanut_B, Transposed(self._hidden(base, peanut_A, inner))), scale)

    def _hidden(self, weight: Any, A: Any, inner: Mapping[str, Any]) -> Any:
        return hidden(weight, A, self.activation, *(inner[f"peanut_{side}_{n}"] for side, n in self._inner()))


@recorded
def hidden(weight: Tensor, A: Tensor, activation: str, *inner: Tensor) -> Tensor:
    """Returns H, the values of the network's last layer but B, of shape (…, in, r).

    Args:
        weight: The weight, (…, out, in), or (out, in, *kernel).
        A: The first layer, (…, r, out).
        activation: The name of the activation.
        *inner: The layers of the encoder, and then as many of the decoder, (…, r, r).
    """
    f = _ACTIVATIONS[activation]
    matrices = weight.reshape(*A.shape[:-2], A.shape[-1], -1).to(A.dtype)
    h, kept = f(matrices.mT @ A.mT), []
    depth = len(inner) // 2
    for layer in inner[:depth]:
        kept.append(h)
        h = f(h @ layer.mT)
    for layer in inner[depth:]:
        h = f(h @ layer.mT) + kept.pop()
    return h


@register
@dataclass(kw_only=True)
class PeanutConfig(TargetedConfig):
    """The options of PEANuT beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", arXiv 2410.01870.

    Differs from PEFT: activations that have parameters, ``"prelu"`` and ``"xielu"``, are refused. PEFT makes a new one
    in each call, whose parameters are neither trained nor saved.

    Attributes:
        r: The number of features between the layers of the network.
        depth: How many layers the network has beside the first and the last one, on either side.
        act_fn: The activation, by its name in Transformers.
        scaling: The scale s.
        init_weights: Whether the last layer is zero at first; if False, it is drawn like the others.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), PeanutConfig(r=2, target_modules=["0"]))
        >>> model[0].default.peanut_A.shape, model[0].default.peanut_B.shape
        (torch.Size([2, 16]), torch.Size([16, 2]))
    """

    peft_type: ClassVar[PeftType] = PeftType.PEANUT
    prefix: ClassVar[str | None] = "peanut_"
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 32
    depth: Annotated[int, Within("a whole number from 0 on", 0, 1000)] = 0
    act_fn: str = "relu"
    scaling: Number = 1.0
    init_weights: InitWeights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_fn not in _ACTIVATIONS:
            reason = " has parameters of its own, which would be neither trained nor saved"
            known = f"choose one of {', '.join(_ACTIVATIONS)}"
            raise ValueError(
                f"act_fn {shown(self.act_fn)}{reason if self.act_fn in ('prelu', 'xielu') else ' is unknown'}; {known}"
            )

    def rule_for(self, site: Any, dtype: torch.dtype) -> Peanut:
        """Returns the rule for a weight's shape."""
        return Peanut(depth=self.depth, activation=self.act_fn)
