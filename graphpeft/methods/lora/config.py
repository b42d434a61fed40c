"""LoRA: the change of a weight is a product of low rank; its options, and which of its rules adapts which site.

    y = W x + s B (A dropout(x))        s = α / r, or α / √r with `use_rslora`; A (r, in), B (out, r), B = 0 at first

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732; the same numbers as PEFT's
``tuners/lora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.lora import choice, combination, combined_config, in_files, option_checks
from graphpeft.methods.lora.init.initialisation import initialisation_of, traits_of
from graphpeft.methods.lora.nested import give_classes, warn_of_unused
from graphpeft.methods.lora.parts import with_parts
from graphpeft.methods.lora.tied import names_with_tied, with_tied
from graphpeft.methods.lora.variants import activated, kinds
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.combination import Combination, Part
from graphpeft.rules.config import OWN, PeftConfig
from graphpeft.rules.options import (
    Editable,
    Index,
    InputDropoutBelow1,
    Kind,
    NamedParameters,
    Number,
    Size,
    TrainedBiases,
    Tying,
)
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.present_call import PresentCall
from graphpeft.rules.registry import register
from graphpeft.rules.report import Report
from graphpeft.rules.rule import Rule
from graphpeft.rules.trained import TableRows
from graphpeft.sites.finder import SiteFinder
from graphpeft.targeting.full_training import named_rows
from graphpeft.targeting.target_config import TargetedConfig
from graphpeft.targeting.targeting import targeted_sites


@register
@dataclass(kw_only=True)
class LoraConfig(TargetedConfig):
    """LoRA's options beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Attributes:
        r: The rank of the factors A, (r, in), and B, (out, r).
        target_parameters: Paths (or their ends) of weights that are plain parameters.
        lora_alpha: α; the scale of the branch is α/r.
        lora_dropout: The probability of dropping an element of the branch's input.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"lora_only"``, the adapted layers'.
        use_rslora: Whether the scale is α/√r.
        init_lora_weights: True: A uniform as in ``nn.Linear``, B zero. ``"gaussian"``: A normal with deviation 1/r.
            False: both as in ``nn.Linear``, so that the adapter changes the outputs from the start. ``"pissa"``,
            ``"pissa_niter_16"`` (in so many steps), ``"olora"``: a part of the weight, which is subtracted from it.
            ``"mica"``: B the weight's minor directions, which aren't trained. ``"orthogonal"``: random, with B A = 0.
            ``"corda"``, ``"lora_ga"``: from the statistics of `preprocess_corda` and `preprocess_loraga`. ``"eva"``:
            random, until `initialize_lora_eva_weights` is called. ``"loftq"``: the error of rounding the weight; the
            rounded weight is read instead.
        corda_config: A `CordaConfig`, or its values as a dict.
        eva_config: An `EvaConfig`, or its values as a dict.
        lora_ga_config: A `LoraGAConfig`, or its values as a dict.
        loftq_config: A `LoftQConfig`, or its values as a dict; without any, an empty one.
        use_dora: Whether a vector is trained that gives the lengths of the weight's rows (DoRA).
        lora_bias: Whether B has a bias, which is trained.
        rank_pattern: Other ranks, by regular expressions for the end of a path; the first that matches counts.
        alpha_pattern: Other α, by the same kind of patterns.
        target_parts: The parts of fused projections that are adapted alone, by the projections' names as in a list of
            `target_modules`: names among ``"q"``, ``"k"`` and ``"v"``, which the graph around a projection tells
            apart, or rows as pairs of the first one and the one behind the last. Each part has factors of the rank `r`.
            It isn't an option of PEFT's.
        merged_quantiser: How merging rounds the changed weight, so that the forward computes with the rounded one, and
            merging loses nothing: a function from a weight to one of its shape and dtype, whose gradient is taken as
            the identity's, or ``"own"``, by which quantised layers round as they quantise. Files hold no function. It
            isn't an option of PEFT's.
        trainable_token_indices: Rows of the input embedding that are trained as they are, or such rows by the names of
            embeddings. Layers that are tied to an embedding follow.
        layer_replication: Ranges of a Transformers model's layers that it runs in turn instead of its own, each with
            an adapter of its own and the same weights.
        ensure_weight_tying: Whether layers that are tied to an embedding stay so: where one of them is named in
            `target_modules` or `modules_to_save`, all are, with the same factors or the same copy. Other rows for tied
            layers are refused.
        alora_invocation_tokens: Tokens from which on the adapter acts in each row (aLoRA), found in `input_ids` of a
            call, or in the prompt of ``generate``; a call may say by `alora_offsets` where they begin.
        use_bdlora: A `BdLoraConfig`, or its values as a dict: A or B is block-diagonal (BD-LoRA).
        arrow_config: An `ArrowConfig`: the adapter is a router over others; `create_arrow_model` makes it.
        kasa_config: A `KasaConfig`, or its values as a dict: trained singular values between A and B, on a weight
            without its smallest ones (KaSA).
        velora_config: A `VeloraConfig`, or its values as a dict: A is trained by a compressed input (VeLoRA).
        monteclora_config: A `MontecloraConfig`, or its values as a dict: A is drawn anew in each forward in training
            (MonteCLoRA).
        use_qalora: Refused, not supported yet.
        qalora_group_size: The same.
        megatron_config: The same.
        megatron_core: The same.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], rank_pattern={"0": 2})
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        >>> model[0].default.lora_A.shape
        torch.Size([2, 8])
    """

    default_targets: ClassVar[Mapping[str, tuple[str, ...] | str]] = DEFAULT_TARGET_MODULES
    peft_type: ClassVar[PeftType] = PeftType.LORA
    prefix: ClassVar[str | None] = "lora_"
    adapts_leaves: ClassVar[bool] = True
    patterns: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}

    r: Size = 8
    target_parameters: NamedParameters[list[str] | None] = None
    lora_alpha: Number = 8
    lora_dropout: InputDropoutBelow1 = 0.0
    fan_in_fan_out: Editable[bool] = False
    bias: TrainedBiases[Literal["none", "all", "lora_only"]] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    corda_config: Any = None
    eva_config: Any = None
    lora_ga_config: Any = None
    loftq_config: Any = field(default_factory=dict)
    rank_pattern: dict[str, Size] = field(default_factory=dict)
    alpha_pattern: dict[str, Number] = field(default_factory=dict)
    target_parts: dict[str, list[str | tuple[Kind, Kind]]] | None = field(default=None, metadata=OWN)
    merged_quantiser: Editable[Any] = field(default=None, metadata=OWN)
    ensure_weight_tying: Tying = False
    layer_replication: list[tuple[Index, Index]] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    alora_invocation_tokens: list[Index] | None = None
    arrow_config: Any = None
    kasa_config: Any = None
    use_bdlora: Any = None
    velora_config: Any = None
    monteclora_config: Any = None

    # read and written as PEFT does, and refused when set; Any is a dict, or one of PEFT's classes for it
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    qalora_group_size: int = 16
    use_qalora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()  # PEFT takes "OLoRA", "MiCA" and "Gaussian", too
        give_classes(self)
        super().__post_init__()
        self._check_values()

    def check(self) -> None:
        """Raises ValueError for options of PEFT's that aren't supported: nothing is ignored in silence."""
        super().check()
        self._check_values()
        option_checks.check_supported(self)
        initialisation_of(self.init_lora_weights)
        warn_of_unused(self)

    def _check_values(self) -> None:
        option_checks.check_values(self)

    @property
    def takes_product(self) -> bool:
        """Whether a new adapter takes s B A from the weights."""
        return traits_of(self).subtracts_product

    @property
    def replicated_layers(self) -> list[tuple[int, int]] | None:
        """The ranges of a Transformers model's layers that it runs in turn in place of its own."""
        return self.layer_replication

    def find_rows(self, modules: Mapping[str, nn.Module], report: Report) -> dict[str, TableRows]:
        """Returns the rows that `trainable_token_indices` names."""
        return named_rows(self.trainable_token_indices, "trainable_token_indices", modules, report)

    @property
    def starts_as_identity(self) -> bool:
        """Whether B starts at zero, and the weights stay as they are."""
        changes_weights = self.merged_quantiser is not None or self.kasa_config is not None
        return self.init_lora_weights in (True, "gaussian") and not changes_weights

    def for_file(self, sites: Sequence[Any]) -> LoraConfig:
        """Returns the config as PEFT reads it: weights that are no layer's are its `target_parameters`."""
        return in_files.written(self, sites)

    def converted(
        self, tensors: Mapping[str, Tensor], first: Mapping[str, Tensor]
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns plain LoRA of twice the rank, for a base from which B₀ A₀ isn't taken.

        Raises:
            ValueError: If a rank's scale can't stay as it is.
        """
        return in_files.converted(self, tensors, first)

    def fitted_to(self, keys: Collection[str]) -> LoraConfig:
        """Returns the config as it was before `for_file`: the ranks of parts are their own."""
        return in_files.read(self)

    def combined(self, configs: Sequence[Any], sites: Sequence[Any], how: Combination) -> LoraConfig:
        """Returns the config of an adapter that combines others: its rank is theirs or their sum, its scale 1."""
        return combined_config.combined_config(configs, sites, how)

    def combine(self, target: AdaptedSite, parts: Sequence[Part], how: Combination, count: int) -> dict[str, Any]:
        """Returns A and B of such an adapter at one site."""
        return combination.combine(target, parts, how, count)

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with everything filled in that depends on the model."""
        config = super().resolved(model)
        if self.ensure_weight_tying:
            names_with_tied(config, model)
        return config

    def find_sites(self, finder: SiteFinder, report: Report) -> list[Any]:
        """Returns the sites of the weights that the config names."""
        sites = targeted_sites(self, finder, report)
        if self.ensure_weight_tying:
            sites = with_tied(sites, self, finder, report)
        sites = kinds.only_layers(self, sites, report)
        return with_parts(sites, self.target_parts, finder, report) if self.target_parts else sites

    def call_inputs_from(self, call: PresentCall) -> Mapping[str, Any]:
        """Returns where aLoRA's tokens are in the rows of a call."""
        tokens = self.alora_invocation_tokens
        return activated.offsets_of_call(tuple(tokens), call.arguments, call.prompt) if tokens else {}

    def rule_for(self, site: Any, dtype: torch.dtype) -> Rule:
        """Returns the rule for the kind of operation that uses the weight, or for a call."""
        return choice.rule_for(self, site, dtype)
