"""How far a model's outputs move when plain LoRA takes the place of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphpeft._torch import pytree
from graphpeft.adapters.adapter_names import name_like
from graphpeft.adapters.adapting import known_adapters
from graphpeft.adapters.loading import set_values
from graphpeft.dry_runs import trial
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.paths import unwrapped
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.transaction import undone_by


def conversion_deviation(
    model: Any,
    converted: tuple[LoraConfig, Mapping[str, Tensor]],
    example_inputs: ExampleInputs,
    adapter_name: str = "default",
) -> float:
    """Returns the largest difference of a model's outputs under an adapter and under the LoRA that was made of it.

    Both run in evaluation mode, each as the only active adapter. The model stays as it is.

    Args:
        model: The model with the adapter.
        converted: The result of `convert_to_lora` for it.
        example_inputs: A batch: a tuple of positional or a dict of keyword arguments of the model.
        adapter_name: The name of the adapter that was converted.

    Returns:
        The largest difference of an element of any tensor in the output, relative to the largest element; 0 for an
        output of zeros.

    Raises:
        AdaptError: If the model has no such adapter.
        TypeError: If the inputs are neither a tuple nor a dict.
        ValueError: If the model returns no floating-point tensors.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoHaConfig(r=4, target_modules=["0"]))
        >>> conversion_deviation(model, convert_to_lora(model, rank=2), (torch.ones(1, 8),))
        0.0
    """
    model = unwrapped(model)
    args, kwargs = split_inputs(example_inputs)
    config, tensors = converted
    temporary = name_like("converted", known_adapters(model).by_name)
    # a new adapter draws first values, which are not used
    with trial(model), torch.random.fork_rng(), torch.no_grad():
        for module in model.modules():
            undone_by(setattr, module, "training", module.training)
        model.eval()
        model.set_adapter(adapter_name)
        expected = _numbers(model(*args or (), **kwargs))
        model.add_adapter(temporary, config)
        set_values(model, temporary, tensors)
        model.set_adapter(temporary)
        found = _numbers(model(*args or (), **kwargs))
    largest = max(_largest(tensor) for tensor in expected)
    difference = max(_largest(a - b) for a, b in zip(found, expected, strict=True))
    return difference / largest if largest else difference


def _numbers(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]
    if not found:
        raise ValueError("the model returns no tensors of numbers that could be compared; compare what you make of it")
    return found


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
