"""VB-LoRA: the parts of all layers' factors are mixtures of few vectors from one trained bank.

    ΔW = B A        A (r, in), B (out, r): each L elements in a row of A, and in a column of B, are one part
    part = Σᵢ softmax(top-k logits)ᵢ · bank[iᵗʰ of the top k]        bank (num_vectors, L)

Source: Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179; the same
numbers as PEFT's ``tuners/vblora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.methods.factored import Factored, FactoredConfig, sizes_of
from graphpeft.rules.options import Editable, InputDropout, Number, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets

_TARGETS: dict[str, tuple[str, ...] | str] = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "gpt_bigcode": ("c_attn",),
    "deberta": ("in_proj",),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""The default `target_modules`, by `model_type`, as in PEFT."""


@dataclass(frozen=True, kw_only=True)
class Vblora(Factored):
    """The change of a weight.

    Attributes:
        top: How many vectors are mixed for each part.
    """

    top: int

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses weights whose sizes aren't multiples of the vectors' length."""
        reason = super().check(site, config)
        for what, size in (("output", self.sizes.rows), ("input", self.sizes.columns)):
            if reason is None and size % config.vector_length:
                reason = f"its {size} {what} features are no multiple of vector_length={config.vector_length}"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the bank, which all sites share, and the logits of both factors' parts."""
        (rows, columns, stack), length, vectors = self.sizes, config.vector_length, config.num_vectors
        bank, a, b = "vblora_vector_bank", "vblora_logits_A", "vblora_logits_B"
        return {
            bank: ParameterSpec((vectors, length), bank, scope=bank, written_once=True),
            a: ParameterSpec((*stack, config.r, columns // length, vectors), a),
            b: ParameterSpec((*stack, rows // length, config.r, vectors), b),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws all of them; PEFT draws the bank anew for each layer, so that the last one's stays."""
        bound = config.init_vector_bank_bound
        parameters["vblora_vector_bank"].uniform_(-bound, bound)
        for name in ("vblora_logits_A", "vblora_logits_B"):
            parameters[name].normal_(0, config.init_logits_std)

    def product(self, vblora_vector_bank: Any, vblora_logits_A: Any, vblora_logits_B: Any, training: Any) -> Product:
        """Returns B A."""
        a = mixtures(vblora_logits_A, vblora_vector_bank, self.top, training).flatten(-2)
        b = mixtures(vblora_logits_B, vblora_vector_bank, self.top, training).mT.flatten(-3, -2)
        return Product((b, a))


@recorded
def mixtures(logits: Tensor, bank: Tensor, top: int, training: bool) -> Tensor:
    """Returns the mixtures of a bank's vectors, (…, length).

    Args:
        logits: Of shape (…, vectors).
        bank: Of shape (vectors, length).
        top: How many vectors are mixed: those of the largest logits.
        training: Whether the logits are trained.
    """
    if training and not is_captured() and logits.flatten(0, -2)[0].isinf().any():
        raise RuntimeError(
            "an adapter that was saved with save_only_topk_weights=True can't be trained on, since its file lacks the "
            "other logits; call eval() for inference, and save what is to be trained further without it"
        )
    largest, places = logits.topk(top, dim=-1)
    return (F.softmax(largest, dim=-1)[..., None] * bank[places]).sum(-2)


@register
@dataclass(kw_only=True)
class VBLoRAConfig(FactoredConfig):
    """The options of VB-LoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179.

    Attributes:
        r: The rank of ΔW.
        num_vectors: The number of vectors in the bank.
        vector_length: Their length L, of which all sizes of adapted weights are multiples.
        topk: How many vectors are mixed for each part.
        save_only_topk_weights: Whether files have only the weights of the mixed vectors, and their places. Such an
            adapter can't be trained on.
        vblora_dropout: The probability of dropping an element of the branch's input in training.
        fan_in_fan_out: Accepted for PEFT's sake: how a weight is stored is read from the graph.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"vblora_only"``, the adapted layers'.
        init_vector_bank_bound: The bank is drawn from −bound to bound at first.
        init_logits_std: The standard deviation of the logits at first.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> config = VBLoRAConfig(r=2, num_vectors=16, vector_length=4, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 12)), config)
        >>> {name: tuple(tensor.shape) for name, tensor in model[0].default.named_parameters()}
        {'vblora_vector_bank': (16, 4), 'vblora_logits_A': (2, 2, 16), 'vblora_logits_B': (3, 2, 16)}
    """

    peft_type: ClassVar[PeftType] = PeftType.VBLORA
    prefix: ClassVar[str | None] = "vblora_"
    default_targets: ClassVar[targets.Defaults] = _TARGETS

    r: Size = 4
    num_vectors: Size = 256
    vector_length: Size = 256
    topk: Size = 2
    save_only_topk_weights: bool = False
    vblora_dropout: InputDropout = 0.0
    bias: TrainedBiases[Literal["none", "all", "vblora_only"]] = "none"
    init_vector_bank_bound: Editable[Number] = 0.02
    init_logits_std: Editable[Number] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} vectors can't be mixed out of num_vectors={self.num_vectors}")

    def rule_for(self, site: Any, dtype: torch.dtype) -> Vblora:
        """Returns the rule for a linear operation, for a call, or for a weight."""
        return Vblora(sizes=sizes_of(site), top=self.topk)

    def packed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns a file's tensors, with `save_only_topk_weights` the places and weights of the top k for logits."""
        if not self.save_only_topk_weights:
            return tensors
        dtype = next(dtype for most, dtype in _PLACES if self.num_vectors < most)
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if not key.endswith(_LOGITS):
                found[key] = tensor
                continue
            largest, places = tensor.topk(self.topk)
            found[key + _INDICES] = places.to(dtype)
            # the last one is what the others leave of 1
            found[key + _WEIGHTS] = F.softmax(largest, dim=-1)[..., :-1].contiguous()
        return found

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns a file's tensors with logits for the places and weights of the top k."""
        found = dict(tensors)
        for key in [key.removesuffix(_INDICES) for key in tensors if key.endswith(_INDICES)]:
            if key + _WEIGHTS in found:
                found[key] = self._logits(key, found.pop(key + _INDICES), found.pop(key + _WEIGHTS))
        return found

    def _logits(self, key: str, places: Tensor, weights: Tensor) -> Tensor:
        """Returns logits by which the vectors at these places have these weights, and all others none."""
        is_one_fewer = (*places.shape[:-1], places.shape[-1] - 1) == tuple(weights.shape)
        if not is_one_fewer or places.is_floating_point() or not weights.is_floating_point():
            raise ValueError(f"{key}{_INDICES} and {key}{_WEIGHTS} don't belong together")
        places = places.long()
        if places.numel() and not 0 <= places.min() <= places.max() < self.num_vectors:
            raise ValueError(f"{key}{_INDICES} has places beyond the {self.num_vectors} vectors of the bank")
        whole = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1).clamp(min=0)
        none = whole.new_full((*places.shape[:-1], self.num_vectors), -torch.inf)
        return none.scatter(-1, places, whole.log())


_LOGITS = (".vblora_logits_A", ".vblora_logits_B")
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_PLACES = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
"""The integers in which PEFT writes places among so many vectors."""
