"""Shadow: a small model runs beside the layers of a large one, and what it says is put into each of them.

    h ← h + α up(down(h − s))        before a layer
    s ← (1 − g) s + g t              behind it, t and σ⁻¹(g) being small networks of the layer's output

The first s is what the small model makes of the same tokens, which has the large one's class and fewer layers. With
`labels`, the loss of its own prediction is added to the model's. Source: PEFT's ``tuners/shadow/``, whose numbers are
the same.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph.errors import TraceError
from graphpeft.methods.shadow.mirror import SIZES, stack_of
from graphpeft.methods.shadow.rule import INPUT, Shadow, States
from graphpeft.methods.shadow.small_model import SmallModel, small_model_for
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Editable, Index, InitWeights, Layers, Number, Probability, Size, TargetOptions
from graphpeft.rules.peft_names import PeftType, TaskType
from graphpeft.rules.present_call import PresentCall
from graphpeft.rules.registry import register
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.trained import SiteParameters
from graphpeft.sites.calls import boundary_site
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.targeting.targeting import targeted_modules


@register
@dataclass(kw_only=True)
class ShadowConfig(PeftConfig):
    """The options of Shadow; the names, defaults and meanings are PEFT's.

    Differs from PEFT 0.21.2: a cache remains Transformers' own, in which the small model has layers behind the large
    one's; what nothing reads is frozen, as the networks behind the last layer; the loss of an adapter for inference has
    no part of the small model; several such adapters can be active. A small model from a checkpoint, diffusion models
    and `unload_shadow` don't exist here.

    Attributes:
        target_modules: The layers of the decoder, as a list of paths or their ends, or as a regular expression; None
            for all.
        exclude_modules: Layers to leave out, likewise.
        r: The rank of up and down.
        shadow_alpha: α.
        shadow_dropout: The probability of dropping an element of h − s.
        init_weights: Whether up is zero at first.
        shadow_model: ``"mirror"``, the only kind that there is here.
        shadow_num_hidden_layers: The number of the small model's layers; None for 1.
        shadow_hidden_size: The size of its hidden states; None for the large one's.
        shadow_num_attention_heads: The number of its attention heads; None for the large one's.
        shadow_intermediate_size: The width of its feed-forward layers; None for the large one's.
        share_embeddings: Whether it is given the large model's embeddings, if they are of its size.
        update_hidden_size: The number of features inside of the small networks; None for `r`.
        auxiliary_loss_weight: By what the loss of the small model's prediction is multiplied.
        layers_to_transform: The indices of the layers to adapt.
        layers_pattern: The name of the list of layers, for `layers_to_transform`.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> model = get_peft_model(model, ShadowConfig(task_type="CAUSAL_LM", r=2))
        >>> model(torch.arange(5)[None]).logits.shape
        torch.Size([1, 5, 50])
    """

    peft_type: ClassVar[PeftType] = PeftType.SHADOW
    prefix: ClassVar[str | None] = "shadow_"
    adds_to_caches: ClassVar[bool] = True
    is_by_token: ClassVar[bool] = True

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    r: Size = 8
    shadow_alpha: Number = 0.1
    shadow_dropout: Editable[Probability] = 0.2
    init_weights: InitWeights = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: Layers | None = None
    shadow_hidden_size: Size | None = None
    shadow_num_attention_heads: Size | None = None
    shadow_intermediate_size: Size | None = None
    share_embeddings: bool = True
    update_hidden_size: Size | None = None
    auxiliary_loss_weight: Editable[Number] = 0.05
    layers_to_transform: list[Index] | Index | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._small_model: SmallModel | None = None
        self._numbers: Mapping[str, int] = {}
        self._last = Last()

    def check(self) -> None:
        """Raises ValueError for what isn't supported, and for options that contradict each other, as in PEFT."""
        super().check()
        if self.shadow_model != "mirror":
            raise ValueError(
                f"shadow_model={self.shadow_model!r} would be a model from a checkpoint, which isn't supported; leave "
                "it 'mirror'"
            )
        if self.task_type not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
            raise ValueError(f"Shadow is for CAUSAL_LM and SEQ_CLS, and task_type is {self.task_type}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for a list of target_modules, not for a regular expression")

    @property
    def target_options(self) -> TargetOptions:
        """The options that name modules."""
        return TargetOptions(
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            modules_to_save=self.modules_to_save,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
        )

    # a model

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with the names of the layers, and with the small model.

        Raises:
            ValueError: If the model is no decoder of Transformers.
        """
        config: Any = super().resolved(model)
        if getattr(model, "config", None) is None or not hasattr(model, "get_input_embeddings"):
            raise ValueError(f"Shadow is for decoders of Transformers, and {type(model).__name__} is none")
        path, name = stack_of(model)
        around = model.get_submodule(path)
        count = len(around._modules[name])  # pyright: ignore[reportArgumentType]
        if config.target_modules is None:
            config.target_modules = [".".join(filter(None, (path, name, str(number)))) for number in range(count)]
        sizes = {option: getattr(self, option) for option in SIZES}
        sizes["shadow_num_hidden_layers"] = self.shadow_num_hidden_layers or 1
        classifies = self.task_type is TaskType.SEQ_CLS
        config._small_model = small_model_for(model, around, count, sizes, self.share_embeddings, classifies)
        return config

    def find_sites(self, finder: SiteFinder, report: Report) -> Sequence[Any]:
        """Returns the boundaries of the layers, in their order."""
        found = []
        stack = ".".join(filter(None, stack_of(finder.modules[""])))
        for path in targeted_modules(self, finder.modules, report):
            if path.rpartition(".")[0] != stack:
                reason = f"it is none of the layers in {stack}, which pass hidden states on to each other"
                report.refused.append(Refusal(path, reason, "name such layers, or leave target_modules out"))
                continue
            try:
                site = boundary_site(finder.regions, path)
                if site.region != path:
                    raise TraceError("a flat graph has no call of it; adapt the model itself")
                found.append(site)
            except TraceError as error:
                report.refused.append(Refusal(path, str(error), "name layers of a decoder, or take LoRA"))
        return found

    def prepared(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config with the numbers of the layers."""
        config = copy.copy(self)
        config._numbers = {site.owner: number for number, site in enumerate(sites)}
        return config

    def rule_for(self, site: CallSite, dtype: torch.dtype) -> Shadow:
        """Returns the rule of a layer."""
        return Shadow(site.arguments[0], dtype)

    # what the rule reads

    @property
    def numbers(self) -> Mapping[str, int]:
        """The numbers of the layers, by their paths."""
        return self._numbers

    @property
    def small_model(self) -> SmallModel:
        """The small model, without its values."""
        assert self._small_model is not None
        return self._small_model

    # a call

    def call_inputs_from(self, call: PresentCall) -> Mapping[str, Any]:
        """Returns the shadow states of a call: the first one, by a run of the small model.

        Raises:
            ValueError: If the call goes on from tokens in a cache that the small model hasn't seen.
        """
        own = call.parameters_at(0)
        first = self.small_model.state(call, own)
        self._last.loss = None
        if call.arguments.get("labels") is not None:
            predicts_tokens = self.task_type is TaskType.CAUSAL_LM
            self._last.loss = functools.partial(self.small_model.loss, call, own, first, predicts_tokens)
        return {INPUT: {self.small_model.key: States(first, len(self._numbers))}}

    def penalty(self, sites: Sequence[SiteParameters]) -> Tensor | None:
        """Returns the weighted loss of the small model's own prediction of the labels; None without these."""
        last, self._last.loss = self._last.loss, None
        loss = None if last is None or self.auxiliary_loss_weight <= 0 else last()
        return None if loss is None else self.auxiliary_loss_weight * loss


class Last:
    """The state that the last call leaves for its loss; a copy of a model begins without."""

    def __init__(self) -> None:
        self.loss: Callable[[], Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Last:
        return Last()

    def __reduce__(self) -> tuple[Any, ...]:
        return Last, ()
