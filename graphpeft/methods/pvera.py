"""PVeRA: VeRA whose hidden features are random, each with a learned mean and a learned variance.

    y' = y + b ⊙ h Bᵀ        (μ, log σ²) = d ⊙ (dropout(x) Aᵀ)        h = μ + σ ⊙ noise in training, else h = μ

A (2r, in) and B (out, r) are cut from one frozen pair, as in VeRA. Merging takes the mean: ΔW = diag(b) B diag(d₁) A₁,
with the first r elements of d and rows of A.

Source: arXiv 2512.07703; the same numbers as PEFT's ``tuners/pvera/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft._torch import is_in_backward, without_compiler
from graphpeft.graph import ops
from graphpeft.graph.recorded import identity_in_evaluation, recorded
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.factored import Factored, ProjectedConfig, sizes_of
from graphpeft.rules.options import Editable, InitWeights, InputDropout, Number, Seed, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Diagonal, Product
from graphpeft.rules.registry import register
from graphpeft.sites.site import LeafSite
from graphpeft.targeting import targets


@dataclass(frozen=True, kw_only=True)
class Pvera(Factored):
    """The change of what a linear operation or a call computes.

    Attributes:
        rank: The number of hidden features.
        always_samples: Whether they are random in evaluation, too.
    """

    rank: int
    always_samples: bool = False

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights that aren't just multiplied by, since each input has its own noise."""
        reason = super().check(site, config)
        if reason is None and not _is_multiplied(site):
            reason = f"PVERA gives each input its own noise, and no one linear operation uses its {site.attribute}"
        return reason

    def unmergeable(self, site: Any) -> str | None:
        """Refuses an adapter that is random in evaluation."""
        if self.always_samples:
            return "with sample_at_inference=True, its outputs are random, which no weight does; load it with False"
        return super().unmergeable(site)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B, which all sites share, b and d, and the state of the generator of noise, if it has one."""
        rows, columns = config.largest
        specs = {
            "pvera_A": config.projection((2 * config.r, columns), "pvera_A"),
            "pvera_B": config.projection((rows, config.r), "pvera_B"),
            "pvera_lambda_b": ParameterSpec((self.sizes.rows,), "pvera_lambda_b"),
            "pvera_lambda_d": ParameterSpec((2 * config.r,), "pvera_lambda_d"),
        }
        if config.generator_seed is not None:
            shape = tuple(torch.Generator().get_state().shape)
            state = ParameterSpec(shape, "pvera_generator", is_trained=False, is_saved=False, dtype=torch.uint8)
            specs["pvera_generator"] = state
        return specs

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B by the config's seed; b is 0 and d is `d_initial`, or b is 1 and d is drawn."""
        if config.draws(site):
            generator = torch.Generator().manual_seed(config.projection_prng_key)
            for name in ("pvera_A", "pvera_B"):
                nn.init.kaiming_uniform_(parameters[name], generator=generator)
        parameters["pvera_lambda_b"].fill_(0 if config.init_weights else 1)
        # PEFT draws d in any case
        parameters["pvera_lambda_d"].normal_()
        if config.init_weights:
            parameters["pvera_lambda_d"].fill_(config.d_initial)
        if config.generator_seed is not None:
            state = torch.Generator().manual_seed(config.generator_seed).get_state()
            parameters["pvera_generator"].copy_(state)

    def rewrite(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Any,
        y: Any,
        training: Any,
        pvera_A: Any,
        pvera_B: Any,
        pvera_lambda_b: Any,
        pvera_lambda_d: Any,
        pvera_generator: Any = None,
        dropout: Any = None,
    ) -> Any:
        """Returns y + b ⊙ h Bᵀ."""
        h = self.entering(x, pvera_lambda_d, training, dropout)
        # slices would each make a gradient of their own of the whole
        halves = (pvera_lambda_d * F.linear(h, pvera_A[:, : self.sizes.columns])).chunk(2, dim=-1)
        if self.always_samples:
            h = normal_sample(halves[0], halves[1], pvera_generator)
        else:
            h = normal_sample_in_training(halves[0], halves[1], training, pvera_generator)
        return self.leaving(y + pvera_lambda_b * F.linear(h, pvera_B[: self.sizes.rows]), y)

    def product(self, pvera_A: Any, pvera_B: Any, pvera_lambda_b: Any, pvera_lambda_d: Any) -> Product:
        """Returns the change of the mean."""
        a, b = pvera_A[: self.rank, : self.sizes.columns], pvera_B[: self.sizes.rows]
        return Product((Diagonal(pvera_lambda_b), b, Diagonal(pvera_lambda_d[: self.rank]), a))


@recorded
def normal_sample(mean: Tensor, log_variance: Tensor, state: Tensor | None = None) -> Tensor:
    """Returns random numbers around means."""
    deviation = torch.exp(0.5 * log_variance)
    noise = torch.randn_like(deviation) if state is None else _normal_of(state, deviation)
    return mean + noise * deviation


@identity_in_evaluation
@recorded
def normal_sample_in_training(
    mean: Tensor, log_variance: Tensor, training: bool, state: Tensor | None = None
) -> Tensor:
    """Returns random numbers around means in training, and the means in evaluation; arguments as `normal_sample`."""
    return normal_sample(mean, log_variance, state) if training else mean


@without_compiler("the state of a random generator is read and written")
def _normal_of(state: Tensor, like: Tensor) -> Tensor:
    """Returns normal numbers, as many as `like` has, from a generator on the CPU with this state."""
    if is_in_backward():
        raise RuntimeError(
            "gradient checkpointing runs a forward again, and the generator of PVeRA's generator_seed would draw other "
            "numbers; leave generator_seed None, for PyTorch's own generator, which checkpoints put back"
        )
    generator = torch.Generator()
    generator.set_state(state.detach().cpu())
    noise = torch.randn(like.shape, dtype=like.dtype, generator=generator)
    with torch.no_grad():
        state.copy_(generator.get_state())
    return noise.to(like.device)


def _is_multiplied(site: Any) -> bool:
    """Returns whether all operations of a site multiply by a matrix, in the same way."""
    return isinstance(site, LeafSite) or (site.op is ops.Linear and len(site.shape) == 2 and not site.both_ways)


@register
@dataclass(kw_only=True)
class PveraConfig(ProjectedConfig):
    """The options of PVeRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: arXiv 2512.07703.

    Differs from PEFT: an adapter that samples at inference isn't merged, while PEFT merges its mean. A generator of its
    own is refused under gradient checkpointing, where PEFT's draws other numbers for the backward. And each adapter has
    projections of the size of its own largest weights; in PEFT, further adapters of a model have those of the first
    one, and fail if these are too small.

    Attributes:
        r: The number of hidden features.
        projection_prng_key: The seed of the projections; the same for all adapters of a model.
        save_projection: Whether files have the projections. If not, they are drawn again when a file is loaded, by a
            generator that may draw other numbers in another version of PyTorch. The same for all adapters of a model.
        pvera_dropout: The probability of dropping an element of the branch's input in training.
        d_initial: The first value of all elements of d.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"pvera_only"``, the adapted layers'.
        init_weights: Whether b is 0 at first, and d is `d_initial`; if False, b is 1, and d is drawn.
        sample_at_inference: Whether the hidden features are random in evaluation, too.
        generator_seed: The seed of a generator that each layer has for its noise; None for PyTorch's own generator.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), PveraConfig(r=4, target_modules=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters() if tensor.requires_grad}
        {'pvera_lambda_b': (16,), 'pvera_lambda_d': (8,)}
    """

    peft_type: ClassVar[PeftType] = PeftType.PVERA
    prefix: ClassVar[str | None] = "pvera_lambda_"
    default_targets: ClassVar[targets.Defaults] = {
        **DEFAULT_TARGET_MODULES,
        "phi": ("q_proj", "v_proj"),
        "dinov2": ("query", "value"),
    }

    r: Size = 256
    pvera_dropout: InputDropout = 0.0
    d_initial: Editable[Number] = 0.1
    bias: TrainedBiases[Literal["none", "all", "pvera_only"]] = "none"
    init_weights: InitWeights = True
    sample_at_inference: Editable[bool] = False
    generator_seed: Editable[Seed | None] = None

    def rule_for(self, site: Any, dtype: torch.dtype) -> Pvera:
        """Returns the rule for a linear operation, or for a call."""
        return Pvera(sizes=sizes_of(site), rank=self.r, always_samples=self.sample_at_inference)
