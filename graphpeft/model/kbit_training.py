"""Prepares quantised models for training, and gives parameters the dtypes of mixed precision, as PEFT does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import adapters_of
from graphpeft.model.training_methods import let_inputs_require_grad
from graphpeft.transaction import set_attribute, transaction

_OTHERS = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""The quantisation methods of Transformers whose models keep their half precision."""


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Prepares a quantised Transformers model for training; call `get_peft_model` next.

    It freezes all parameters. All but the quantised ones get single precision, such as norms and the head, unless the
    model was quantised by GPTQ, AQLM, EETQ, HQQ or torchao. A model that is marked as quantised gets gradient
    checkpointing, and inputs that require gradients, without which a checkpoint of a frozen model has none.

    Args:
        model: The model.
        use_gradient_checkpointing: Whether a quantised model gets gradient checkpointing.
        gradient_checkpointing_kwargs: Arguments of ``torch.utils.checkpoint.checkpoint``. With ``use_reentrant=False``,
            inputs need no gradients, and don't get any.
        auto_clear_cache: Whether memory that the casts have left is given back to the GPU.

    Returns:
        The model.

    Raises:
        AdaptError: If the model has adapters, which would be frozen, or is to get gradient checkpointing and has none;
            it is unchanged then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
        >>> model = prepare_model_for_kbit_training(model)
        >>> model[1].weight.dtype, model[1].weight.requires_grad
        (torch.float32, False)
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    """
    if adapters_of(model) is not None:
        raise AdaptError(
            "the model has adapters already, which prepare_model_for_kbit_training would freeze; call it before "
            "get_peft_model"
        )
    checkpoints = use_gradient_checkpointing and _is_marked(model)
    if checkpoints and not hasattr(model, "gradient_checkpointing_enable"):
        raise AdaptError(
            f"a {type(model).__name__} has no gradient_checkpointing_enable; pass use_gradient_checkpointing=False"
        )
    with transaction(model):
        for parameter in model.parameters():
            set_attribute(parameter, "requires_grad", False)
            is_half = parameter.dtype in (torch.float16, torch.bfloat16)
            if is_half and _is_plain(parameter) and _method_of(model) not in _OTHERS:
                set_attribute(parameter, "data", parameter.data.to(torch.float32))
        if checkpoints:
            _checkpoint(model, dict(gradient_checkpointing_kwargs or {}))
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _is_marked(model: Any) -> bool:
    """Returns whether Transformers has marked a model as quantised."""
    in_bits = (getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit"))
    return any(in_bits) or _method_of(model) in _OTHERS


def _method_of(model: Any) -> str | None:
    return "hqq" if getattr(model, "hqq_quantized", False) else getattr(model, "quantization_method", None)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter's class is PyTorch's own: others may hold codes in any dtype."""
    return type(parameter).__module__.startswith("torch.")


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    # its newer name, where there is one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    taken = [name for name in inspect.signature(enable).parameters if name.endswith("_checkpointing_kwargs")]
    if options and not taken:
        raise AdaptError(f"a {type(model).__name__} takes no gradient_checkpointing_kwargs; leave them out")
    # PyTorch's default, which it warns of where nobody has said it
    options.setdefault("use_reentrant", True)
    if options["use_reentrant"]:
        let_inputs_require_grad(model)
    enable(**dict.fromkeys(taken, options))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives frozen parameters a dtype, and trained ones single precision, for training under autocast.

    Quantised weights stay as they are, since their codes aren't numbers that could be cast.

    Args:
        model: The model, usually an adapted one.
        dtype: The dtype of frozen parameters: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        TypeError: If `dtype` isn't a floating-point dtype; the model is unchanged then.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> cast_mixed_precision_params(model, torch.bfloat16)
        >>> model[0].weight.dtype, model[0].default.lora_A.dtype
        (torch.bfloat16, torch.float32)
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}, which is no floating-point dtype; pass torch.bfloat16 or torch.float16")
    with transaction(model):
        for parameter in model.parameters():
            if parameter.is_floating_point() and _is_plain(parameter):
                wanted = torch.float32 if parameter.requires_grad else dtype
                set_attribute(parameter, "data", parameter.data.to(wanted))
