"""Models of quantised layers, by torchao and by bitsandbytes, and LoRA on them, by this library and by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import torchao.quantization as torchao
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, LinearNF4
from oracle import Case, by_us, peft_config, perturb
from torch import nn


def by_torchao(config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    """Returns what builds two layers, quantised by torchao."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(dtype)
        torchao.quantize_(model, config())
        return model

    return make


def by_bitsandbytes(
    cls: type[nn.Module], dtype: torch.dtype = torch.float32, **options: Any
) -> Callable[[], nn.Module]:
    """Returns what builds two layers of a class of bitsandbytes."""

    def make() -> nn.Module:
        # they quantise where they are moved to a device
        model = nn.Sequential(cls(64, 64, **options), nn.Tanh(), cls(64, 64, **options)).to(dtype).to("cpu")
        for layer in (model[0], model[2]):
            # else some CPUs pack 4 bits anew in the first evaluation, and give no gradients from then on
            vars(layer)["support_avx512bf16_for_cpu"] = False
        return model

    return make


LIBRARIES: dict[str, Any] = {
    "torchao int8": torchao.Int8WeightOnlyConfig,
    "torchao int8 of tensors": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()),
    "torchao int8 of groups": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32)),
    "torchao int8 of inputs, too": torchao.Int8DynamicActivationInt8WeightConfig,
    "torchao float8": torchao.Float8WeightOnlyConfig,
    "torchao intx": torchao.IntxWeightOnlyConfig,
    # PyTorch's types lack its int4
    "torchao intx of 4 bits": lambda: torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)),  # type: ignore[attr-defined]
    "torchao intx of inputs, too": torchao.Int8DynamicActivationIntxWeightConfig,
}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    **{name: by_torchao(make) for name, make in LIBRARIES.items()},
    "torchao int8 bfloat16": by_torchao(torchao.Int8WeightOnlyConfig, torch.bfloat16),
    "bitsandbytes int8": by_bitsandbytes(Linear8bitLt, has_fp16_weights=False),
    "bitsandbytes int8 bfloat16": by_bitsandbytes(Linear8bitLt, torch.bfloat16, has_fp16_weights=False),
    "bitsandbytes fp4": by_bitsandbytes(Linear4bit),
    "bitsandbytes nf4": by_bitsandbytes(LinearNF4),
    "bitsandbytes nf4 bfloat16": by_bitsandbytes(LinearNF4, torch.bfloat16, compute_dtype=torch.bfloat16),
    "bitsandbytes nf4, packed as floats": by_bitsandbytes(LinearNF4, quant_storage=torch.float32),
    "bitsandbytes nf4 without bias": by_bitsandbytes(LinearNF4, bias=False),
    "bitsandbytes nf4 with plain scales": by_bitsandbytes(LinearNF4, compress_statistics=False),
}
LIBRARIES["torchao int8 bfloat16"] = LIBRARIES["torchao int8"]


def _case(name: str) -> Case:
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    return Case(name, MAKERS[name], lambda: (torch.randn(4, 3, 64).to(dtype),), {"target_modules": ["0", "2"]})


CASES = [_case(name) for name in MAKERS]


def ours_of(case: Case, **options: Any) -> Any:
    """Returns this library's model, with values that training may give."""
    model = by_us(case, **options)
    perturb(model)
    return model


def theirs_of(case: Case, **options: Any) -> Any:
    """Returns PEFT's model, which is told by marks how the base is quantised."""
    model: Any = case.build()
    if "bitsandbytes" in case.name:
        setattr(model, "is_loaded_in_8bit" if "int8" in case.name else "is_loaded_in_4bit", True)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, peft_config(case, **options)).eval()
    for layer in adapted.modules():
        if hasattr(layer, "get_apply_tensor_subclass"):
            vars(layer)["get_apply_tensor_subclass"] = LIBRARIES[case.name]
    perturb(adapted)
    return adapted
