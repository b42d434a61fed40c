"""Makes plain linear layers out of quantised ones: the same objects, with another class and another weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Modules
from graphpeft.sites import quantisers
from graphpeft.transaction import delete_item, set_attribute, set_item


def dequantise(modules: Modules, numbers: Mapping[str, Tensor]) -> None:
    """Gives all quantised linear layers weights of numbers, in the dtype of their inputs.

    A layer that casts its inputs is taken to have the dtype of the model's other parameters.
    """
    usual = _dtype_of(modules)
    for path, layer in modules.items():
        if quantisers.is_known(layer):
            values = numbers[path] if path in numbers else quantisers.codes_of(layer).numbers()
            dtype = usual if usual and quantisers.casts_inputs(layer) else quantisers.dtype_before(layer)
            _become_linear(path, layer, nn.Parameter(values.to(dtype), requires_grad=False))
    _forget(modules[""])


def _dtype_of(modules: Modules) -> torch.dtype | None:
    """Returns the dtype of the first parameter of numbers of a layer that isn't quantised, if there is one."""
    found = (
        parameter.dtype
        for layer in modules.values()
        for parameter in ([] if quantisers.is_known(layer) else layer._parameters.values())
        if parameter is not None and parameter.is_floating_point()
    )
    return next(found, None)


def _become_linear(path: str, layer: nn.Module, weight: nn.Parameter) -> None:
    package = _package(type(layer._parameters["weight"]))
    bias = layer._parameters.get("bias")
    if _package(type(layer)) == package:
        set_attribute(layer, "__class__", nn.Linear)
    elif any(_package(cls) == package for cls in type(layer).__mro__):
        raise AdaptError(
            f"{path} is a {type(layer).__name__}, whose own code computes with quantised weights, so it can't become a "
            "plain linear layer; call merge_and_unload without dequantize"
        )
    set_item(layer._parameters, "weight", weight)
    if bias is not None and bias.dtype != weight.dtype:
        set_item(layer._parameters, "bias", nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad))
    for name in quantisers.NAMES_OF_LAYERS[package] & vars(layer).keys():
        delete_item(vars(layer), name)
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if _package(getattr(hook, "hook", hook)) == package:
            delete_item(layer._load_state_dict_pre_hooks, key)


def _package(of: object) -> str:
    return getattr(of, "__module__", "").partition(".")[0]


_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""By which Transformers, accelerate and PEFT know a quantised model."""


def _forget(model: nn.Module) -> None:
    """Lets a Transformers model, and its config, say no longer that it is quantised."""
    for name in _MARKS:
        delete_item(vars(model), name)
    if "is_quantized" in vars(model):
        set_item(vars(model), "is_quantized", False)
    of_model = getattr(vars(model).get("config"), "__dict__", {})
    delete_item(of_model, "quantization_config")
