"""X-LoRA: a classifier weighs LoRA adapters, its experts, for each token.

    y' = y + g Σₑ cₑ · sₑ x Aₑᵀ Bₑᵀ        c = softmax(classifier(h) / temperature), for each token, and each layer

h are the last hidden states of a first run of the model, in which all cₑ are `scaling_pass_value`, by default 0. The
classifier is trained, and the experts if they are to be. Source: Buehler and Buehler, "X-LoRA: Mixture of Low-Rank
Adapter Experts", arXiv 2402.07148; the same numbers as PEFT's ``tuners/xlora/``.
"""

from __future__ import annotations

import copy
import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.methods.xlora import classifier, first_run, in_files
from graphpeft.methods.xlora.experts import Experts, read_expert
from graphpeft.methods.xlora.model_methods import XLoraMethods
from graphpeft.methods.xlora.rule import XLora
from graphpeft.methods.xlora.scalings import INPUT, Log, used
from graphpeft.progress import over
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Editable, Layers, Number, Probability, Size, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.present_call import PresentCall
from graphpeft.rules.registry import register
from graphpeft.rules.report import Report
from graphpeft.sites.finder import SiteFinder
from graphpeft.wording import number_of

Features = Annotated[int, Within("a positive number of features, the model's", 1, 2**20)]


@register
@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """The options of X-LoRA; the names, defaults and meanings are PEFT's.

    Each call runs the model twice: the first run finds out how much each token gets of each expert. So a call is given
    all tokens, and none in a cache; ``generate`` keeps no cache.

    Differs from PEFT 0.21.2: its `save_pretrained` leaves out layers of the classifier, and writes each in the folder
    of an expert; they are read from there, and written where they belong. Experts that are trained are written, too, by
    names that PEFT reads; its own files lack them. `hidden_size` is read from the model. A model stays in training
    mode, and may use its cache in other calls.

    Source: Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", arXiv 2402.07148.

    Attributes:
        hidden_size: The number of features of the hidden states; None for that of the model.
        adapters: The experts: folders of LoRA adapters, or repositories on the Hub, by the names ``"0"``, ``"1"``, …
        enable_softmax: Whether the scalings of a token's experts are a softmax.
        enable_softmax_topk: Whether those of `top_k_lora` are, for themselves.
        layerwise_scalings: Whether each layer has scalings of its own.
        xlora_depth: The number of the classifier's layers.
        xlora_size: The number of features between them.
        xlora_dropout_p: The probability of dropping an element there.
        use_trainable_adapters: Whether the experts are trained, too.
        softmax_temperature: By what the classifier's values are divided for the softmax.
        top_k_lora: How many experts a token keeps at a layer, those with the largest scalings; None for all.
        scaling_pass_value: All scalings in the first run.
        global_scaling_weight: g, by which all experts are multiplied.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
        >>> def base():
        ...     return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
        >>> for name in ("one", "other"):
        ...     get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(name)
        >>> model = get_peft_model(base(), XLoraConfig(adapters={"0": "one", "1": "other"}))
        >>> _ = model(torch.arange(5)[None])
        >>> model.get_latest_scalings().shape  # rows, positions, layers, experts
        torch.Size([1, 5, 1, 2])
    """

    peft_type: ClassVar[PeftType] = PeftType.XLORA
    prefix: ClassVar[str | None] = "xlora_"
    lacks: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})
    runs_model: ClassVar[bool] = True
    goes_on_from_caches: ClassVar[bool] = False
    is_by_token: ClassVar[bool] = True
    offered: ClassVar[type[Any] | None] = XLoraMethods

    hidden_size: Features | None = None
    adapters: Editable[dict[str, str] | None] = None
    enable_softmax: Editable[bool] = True
    enable_softmax_topk: Editable[bool] = False
    layerwise_scalings: bool = False
    xlora_depth: Layers = 1
    xlora_size: Size = 2048
    xlora_dropout_p: Probability = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: Editable[Annotated[float, Within("positive and finite", 1e-30, 3.4e38)]] = 1.0
    top_k_lora: Editable[Size | None] = None
    scaling_pass_value: Editable[Number] = 0.0
    global_scaling_weight: Editable[Number] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._experts, self._log, self._key = Experts(()), Log(), 0
        self._layers: dict[str, int] = {}
        self._tables: frozenset[str] = frozenset()
        self._dtype = torch.float32

    def check(self) -> None:
        """Raises ValueError for options without which there is no adapter."""
        super().check()
        names = sorted(self.adapters or (), key=lambda name: (len(name), name))
        if not names or names != [str(number) for number in range(len(names))]:
            raise ValueError(
                f"adapters has the names {names}; give at least one expert, by the names '0', '1', … as PEFT has them "
                "in its layers"
            )
        self.check_count(self.top_k_lora)

    def check_count(self, top_k_lora: int | None) -> None:
        """Raises ValueError for a number of experts that there aren't.

        Args:
            top_k_lora: The number; None for all.
        """
        if top_k_lora is not None and not 1 <= top_k_lora <= len(self.adapters or ()):
            raise ValueError(f"top_k_lora is {top_k_lora}, for {number_of(len(self.adapters or ()), 'expert')}")

    # a model

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with the size of the model's hidden states.

        Raises:
            ValueError: If the model doesn't tell it, or can't return its hidden states.
        """
        config: Any = super().resolved(model)
        arguments = inspect.signature(model.forward).parameters.values()
        if not any(each.name == first_run.HIDDEN or each.kind is inspect.Parameter.VAR_KEYWORD for each in arguments):
            raise ValueError(
                f"X-LoRA calls a model with {first_run.HIDDEN}=True, which {type(model).__name__} doesn't take"
            )
        if config.hidden_size is None:
            config.hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
        if config.hidden_size is None:
            raise ValueError(f"{type(model).__name__} doesn't tell the size of its hidden states; give hidden_size")
        config._key = uuid.uuid4().int >> 80
        config._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return config

    def find_sites(self, finder: SiteFinder, report: Report) -> Sequence[Any]:
        """Reads the experts, and returns the sites that any of them adapts, in the order of the model's modules."""
        paths, found = self.adapters or {}, {}
        model, inputs = finder.modules[""], finder.regions.example_inputs
        names = over(sorted(paths, key=int), "reading experts", "adapters")
        self._experts = Experts([read_expert(model, paths[name], name, inputs) for name in names])
        for expert in self._experts.every:
            found |= {site.label: site for site in expert.config.find_sites(finder, report)}
        order = {path: number for number, path in enumerate(finder.modules)}
        return sorted(found.values(), key=lambda site: order[site.owner])

    def prepared(self, sites: Sequence[Any]) -> PeftConfig:
        """Returns the config with the numbers of the layers."""
        config = copy.copy(self)
        config._layers = {site.label: number for number, site in enumerate(sites)}
        config._tables = frozenset(site.label for site in sites if site.op is ops.Embedding)
        return config

    def rule_for(self, site: Any, dtype: torch.dtype) -> XLora:
        """Returns the rule of a layer."""
        experts = self._experts.every
        expert = next(expert for expert in experts if site.label in expert.factors)
        lora: Any = expert.config.rule_for(site, dtype)
        drops = tuple([each.config.lora_dropout if site.label in each.factors else 0.0 for each in experts])
        is_flat = site.op is ops.Linear and site.transposed
        ranks, scales = self._experts.ranks(site.label), self._experts.scales(site.label)
        return XLora(lora, ranks, scales, drops, dtype, is_flat)

    # what the rule reads

    @property
    def experts(self) -> Experts:
        """The experts."""
        return self._experts

    @property
    def layers(self) -> Mapping[str, int]:
        """The number of each layer by its site's label."""
        return self._layers

    @property
    def key(self) -> int:
        """The key that tells the adapter's scalings from those of another one."""
        return self._key

    @property
    def log(self) -> Log:
        """The scalings of the model's calls."""
        return self._log

    @property
    def classifier(self) -> dict[str, ParameterSpec]:
        """The parameters of the classifier, by the rule's names."""
        return classifier.parameters(self, len(self._experts.every), len(self._layers), self._dtype)

    # a call

    def apart_from(self, others: Mapping[str, Any]) -> str | None:
        """Returns why the adapter can't act together with others: they give layers other tokens than the call's."""
        name = next((name for name, other in others.items() if other.is_adaption_prompt), None)
        reason = f"{name!r} gives projections of an attention its own tokens" if name is not None else None
        return super().apart_from(others) or reason

    def call_inputs_from(self, call: PresentCall) -> Mapping[str, Any]:
        """Returns the scalings of a call, which a first run of the model tells."""
        predicted = first_run.scalings(self, call)
        self._log.note(predicted)
        return {INPUT: {self._key: used(self, predicted)}}

    # files

    def with_those_beside(
        self, tensors: Mapping[str, Tensor], read: Callable[[str], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Returns the tensors with those layers of the classifier that PEFT 0.21.2 takes for an expert's."""
        return in_files.with_lost_layers(self, tensors, read)

    def packed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the tensors with those of each expert by PEFT's names in a model."""
        return in_files.apart(tensors, self._experts, self._trained)

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the tensors with those of all experts side by side; the experts' own where PEFT has left them out."""
        return in_files.side_by_side(tensors, self._experts, self._trained)

    @property
    def _trained(self) -> Mapping[str, str]:
        """The labels of the sites whose factors are trained, each with how PEFT's names of these begin."""
        labels = self._layers if self.use_trainable_adapters else ()
        return {label: "lora_embedding_" if label in self._tables else "lora_" for label in labels}
