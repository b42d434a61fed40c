"""LN tuning: trains a model's norms, or whatever modules are named, and no other tensors.

    y = (x − μ) / σ ⊙ γ + β         at a layer norm, whose γ and β are trained

Each adapter has a copy of all that a named module has, which is read in place of the module's own tensors.

Source: Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420;
the same tensors as PEFT's ``tuners/ln_tuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Report
from graphpeft.rules.trained import FullyTrainedModule
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig

_BEFORE_BOTH = ("input_layernorm", "post_attention_layernorm")
_AROUND_BOTH = (*_BEFORE_BOTH, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm")


@register
@dataclass(kw_only=True)
class LNTuningConfig(TargetedConfig):
    """The options of LN tuning, all of which name modules; the names, defaults and meanings are PEFT's.

    The modules that `target_modules` names are trained fully, with all modules inside of them. They can be of any kind.

    Source: Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv
    2312.11420.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        >>> model = get_peft_model(model, LNTuningConfig(target_modules=["1"]))
        >>> list(get_peft_model_state_dict(model))
        ['base_model.model.1.ln_tuning_layers.weight', 'base_model.model.1.ln_tuning_layers.bias']
    """

    peft_type: ClassVar[PeftType] = PeftType.LN_TUNING
    prefix: ClassVar[str | None] = "ln_tuning_"
    lacks: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})
    default_targets: ClassVar[targets.Defaults] = MappingProxyType(
        {
            "llama": (*_BEFORE_BOTH, "norm"),
            "bloom": (*_BEFORE_BOTH, "ln_f"),
            "llava": ("multi_modal_projector", *_BEFORE_BOTH, "norm", "embed_tokens", "lm_head"),
            "t5": ("layer_norm", "final_layer_norm"),
            "mt5": ("layer_norm", "final_layer_norm"),
            "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
            "gpt2": ("ln_1", "ln_2", "ln_f"),
            "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
            "gptj": ("ln_1", "ln_f"),
            "falcon": (*_BEFORE_BOTH, "ln_f"),
            "mistral": (*_BEFORE_BOTH, "norm"),
            "phi": ("input_layernorm", "final_layernorm"),
            "gemma": (*_BEFORE_BOTH, "norm"),
            "gemma2": _AROUND_BOTH,
            "gemma3_text": _AROUND_BOTH,
            "qwen2": ("post_attention_layernorm",),
            "qwen3": ("post_attention_layernorm",),
        }
    )
    starts_as_identity: ClassVar[Any] = True

    def ignores(self, key: str) -> bool:
        """Returns whether a file may hold a tensor that the adapter doesn't need.

        Args:
            key: The tensor's name in the file.
        """
        # of an embedding or a head, PEFT writes what the copy stands for, too
        return ".base_layer." in key

    def find_sites(self, finder: Any, report: Report) -> list[Any]:
        """Returns no sites: a module is trained as it is."""
        return []

    def find_fully_trained(self, modules: Mapping[str, nn.Module], report: Report) -> dict[str, FullyTrainedModule]:
        """Returns the modules that the config names."""
        return dict.fromkeys(self.targeted_modules(modules, report), FullyTrainedModule("ln_tuning_layers"))
