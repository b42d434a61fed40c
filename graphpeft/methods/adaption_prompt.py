"""Adaption prompts: the top layers' attention reads learned tokens, too, behind a gate that is closed at first.

    o = attention(h) + W_o (g · softmax(q kᵀ / √d) v)        q = R W_q h, k = W_k P, v = W_v P, g = 0 at first

h are the hidden states, P the learned tokens, d is the size of a head and R the rotation by position, where the model
has one. In GPT-2, W_o isn't applied, as in PEFT.

Source: Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv
2303.16199; the same numbers as PEFT's ``tuners/adaption_prompt/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.errors import TraceError
from graphpeft.graph.recorded import recorded
from graphpeft.methods.plain_attention import HIDDEN, POSITIONS, Heads, NotPlainError, heads_of, rotated, split
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Layers, Size
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import BoundaryRule
from graphpeft.sites.calls import boundary_site
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.wording import number_of

_DEFAULT_TARGETS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""The names of attention modules, by the model's type."""


@dataclass(frozen=True)
class AdaptionPrompt(BoundaryRule):
    """The output of an attention on learned tokens, added to its own.

    Attributes:
        heads: The heads of the attention.
    """

    heads: Heads

    def parameters(self, site: CallSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns P and g, which have the dtype of the attention's own weights, as in PEFT."""
        return {
            "adaption_prompt": ParameterSpec(
                (1, config.adapter_len, self.heads.width), "adaption_prompt", dtype=site.dtype
            ),
            "adaption_gate": ParameterSpec((1,), "adaption_gate", dtype=site.dtype),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws P, and closes the gate."""
        parameters["adaption_prompt"].normal_()
        parameters["adaption_gate"].zero_()

    def leave(
        self,
        output: Any,
        inputs: Mapping[str, Any],
        adaption_prompt: Any,
        adaption_gate: Any,
        q: Any,
        k: Any,
        v: Any,
        o: Any = None,
    ) -> Any:
        """Adds what is read from the learned tokens to the first of the returned values."""
        positions = inputs[POSITIONS] if self.heads.rotates else None
        read = attended(inputs[HIDDEN], positions, adaption_prompt, adaption_gate, (q, k, v, o), self.heads.size)
        return with_sum(output, read)

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "an attention reads learned tokens beside its own, which no weight does"


@recorded
def attended(
    hidden: Tensor,
    positions: tuple[Tensor, Tensor] | None,
    prompt: Tensor,
    gate: Tensor,
    layers: tuple[Callable[[Tensor], Tensor], ...],
    size: int,
) -> Tensor:
    """Returns what hidden states read from learned tokens, (batch, length, width).

    Args:
        hidden: The hidden states, (batch, length, width).
        positions: The cosines and sines of the rotation, (batch, length, head size) each; None without one.
        prompt: The learned tokens, (1, tokens, width).
        gate: The gate, (1,).
        layers: The layers that compute queries, keys, values and the output; None leaves the output as it is. One that
            computes the first three, one behind the other, stands for each of them.
        size: The size of a head.
    """
    *of_input, to_output = layers
    is_fused = of_input[0] is of_input[1]
    tokens = prompt.to(hidden.dtype)
    query, key, value = (
        split(layer(x), size, part if is_fused else None)
        for part, (layer, x) in enumerate(zip(of_input, (hidden, tokens, tokens), strict=True))
    )
    query = rotated(query, positions)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.to(query.dtype).repeat_interleave(groups, dim=1) for each in (key, value))
    weights = F.softmax(query @ key.mT / size**0.5, dim=-1, dtype=torch.float32).to(query.dtype)
    read = (gate.to(query.dtype) * weights @ value).transpose(1, 2).flatten(2)
    return read if to_output is None else to_output(read)


@recorded
def with_sum(output: Any, read: Tensor) -> Any:
    """Returns what an attention returned, with something added to the first value."""
    if isinstance(output, Tensor):
        return (output + read).to(output.dtype)
    return ((output[0] + read).to(output[0].dtype), *output[1:])


@register
@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """The options of adaption prompts; the names, defaults and meanings are PEFT's.

    Differs from PEFT, which knows Llama, Mistral and GPT-2 by name: any attention can be named whose forward computes
    what its `q_proj`, `k_proj`, `v_proj` and `o_proj` make of an attention in these models. It is compared with that on
    numbers, and refused otherwise. Several such adapters can be active; what they read is added up.

    Source: Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv
    2303.16199.

    Attributes:
        target_modules: The name of the attention modules; None for that of the model's type.
        adapter_len: The number of learned tokens in each of them.
        adapter_layers: In how many of them, the last ones.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
        >>> model = get_peft_model(model, AdaptionPromptConfig(adapter_len=4, adapter_layers=1))
        >>> {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(model).items()}
        {'base_model.model.transformer.h.1.attn.adaption_prompt': (1, 4, 16), \
'base_model.model.transformer.h.1.attn.adaption_gate': (1,)}
    """

    peft_type: ClassVar[PeftType] = PeftType.ADAPTION_PROMPT
    prefix: ClassVar[str | None] = "adaption_"
    lacks: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})

    target_modules: str | None = None
    adapter_len: Size | None = None
    adapter_layers: Layers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._heads: dict[str, Heads] = {}

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method gives attentions learned tokens to read, which is so."""
        return True

    @property
    def starts_as_identity(self) -> bool:
        """Whether a fresh adapter changes no output, which is so, since its gate is closed."""
        return True

    def check(self) -> None:
        """Raises ValueError for options without which there is no adapter."""
        super().check()
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None; give a number, as AdaptionPromptConfig(adapter_len=10, …)")

    def resolved(self, model: nn.Module) -> PeftConfig:
        """Returns the config with the name of the attention modules filled in.

        Args:
            model: The model to adapt.

        Raises:
            ValueError: If there is none for the model's type.
        """
        config: Any = super().resolved(model)
        if config.target_modules is None:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            if kind not in _DEFAULT_TARGETS:
                raise ValueError(
                    f"target_modules is None, and there is no default for a model of type {kind!r}; name its attention "
                    "modules, as target_modules='self_attn'"
                )
            config.target_modules = _DEFAULT_TARGETS[kind]
        return config

    def find_sites(self, finder: SiteFinder, report: Report) -> list[CallSite]:
        """Returns the boundaries of the last attentions of the name."""
        paths = [path for path in finder.modules if f".{path}".endswith(f".{self.target_modules}")]
        wanted = self.adapter_layers or 0
        if not paths:
            report.nothing_matched = f"no module is called {self.target_modules!r}"
            report.refused.append(Refusal("target_modules", report.nothing_matched, "name the attention modules"))
        elif len(paths) < wanted:
            reason = f"adapter_layers is {wanted}, for {number_of(len(paths), 'module')} {self.target_modules!r}"
            report.refused.append(Refusal("adapter_layers", reason, f"set adapter_layers={len(paths)} at the most"))
        else:
            return [site for path in paths[-wanted:] for site in self._sites_at(path, finder, report)]
        return []

    def _sites_at(self, path: str, finder: SiteFinder, report: Report) -> list[CallSite]:
        """Returns the boundary of one attention, or none, which is reported."""
        try:
            site = boundary_site(finder.regions, path)
            if site.region != path:
                raise TraceError("a flat graph has no call of it; adapt the model itself, and trace it then")
            heads = self._heads[path] = heads_of(finder.modules[path], site.arguments)
        except (NotPlainError, TraceError) as error:
            report.refused.append(Refusal(path, str(error), "name other attention modules, or take LoRA"))
            return []
        weight = getattr(finder.modules[path].get_submodule(heads.layers[0][1]), "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
        return [site._replace(role="attention", reads=heads.layers, dtype=dtype)]

    def rule_for(self, site: CallSite, dtype: torch.dtype) -> AdaptionPrompt:
        """Returns the rule of an attention."""
        return AdaptionPrompt(self._heads[site.owner])
