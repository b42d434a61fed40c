"""Compares an adapter with its author's reference: the method's equation in plain PyTorch.

Laws that compare an adapted model with the merged one hold for a rule whose `rewrite` and `delta` are wrong alike, as
one that takes rows for columns. Only the equation itself tells.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from graphpeft._torch import pytree
from graphpeft.graph.holders import value_at
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.arguments import Asked
from graphpeft.sites.site import Site
from graphpeft.testing.alike import require_alike
from graphpeft.testing.by_hand import with_trained
from graphpeft.testing.comparing import ROUNDING, LawError, require_close
from graphpeft.testing.runs import differentiable, loss_of, run, run_copy, run_each

Reference = Callable[..., Any]
"""A method's equation: a function of an adapted layer's values, which it names as arguments.

It gets ``x``, the layer's first input; ``inputs``, all inputs by name; ``layer``, the layer without the adapter, to be
called; ``weight``, in PEFT's layout, and ``bias``, or None; ``site``; ``config``; and the rule's own parameters and
constants by the rule's names for them. All tensors in half precision are converted to single precision.

If it asks for ``x`` or ``inputs``, it returns the layer's output; else the weight with the adapter's change, in PEFT's
layout: (out, in), or (out, in / groups, *kernel) of a convolution. Its gradients are compared, too: it detaches the
tensors that the method detaches.
"""


def require_reference(
    adapted: Any, base: nn.Module, every: Sequence[ExampleInputs], reference: Reference, tolerance: float
) -> None:
    """Raises unless an adapted model in evaluation computes what the reference says, and has its gradients."""
    adapter = adapted._peft_adapters.by_name["default"]
    changed = with_trained(copy.deepcopy(base), adapter, dict(adapted.named_modules()))
    asked = Asked(reference)
    is_of_outputs = asked.may_be("x") or asked.may_be("inputs")
    plain = copy.deepcopy(changed)
    for one in adapter.sites:
        if is_of_outputs:
            _require_output(one, adapted, changed, every, reference, tolerance)
        else:
            with torch.no_grad():
                _change_weight(one, changed, reference, _values(one, adapted, changed))
    if not is_of_outputs:
        law = "the adapted model isn't what the reference gives"
        require_alike(lambda: run_copy(adapted, every), lambda: run_copy(changed, every), tolerance, law)
    if not any(one.site.dtype in ROUNDING for one in adapter.sites):
        _require_gradients(copy.deepcopy(adapted), plain, every[0], reference, is_of_outputs, tolerance)


def _require_gradients(
    adapted: Any, base: nn.Module, inputs: ExampleInputs, reference: Reference, is_of_outputs: bool, tolerance: float
) -> None:
    """Raises unless the inputs and the trained tensors have the gradients that the reference gives; changes both."""
    trained: dict[str, torch.Tensor] = {}
    leaves: dict[str, torch.Tensor] = {}
    for one in adapted._peft_adapters.by_name["default"].sites:
        values = _values(one, adapted, base)
        for name in [name for name, spec in one.specs.items() if spec.is_trained and values[name].requires_grad]:
            label = f"{name} of {one.site.label}"
            trained[label] = values[name]
            values[name] = leaves[label] = values[name].detach().clone().requires_grad_()
        if is_of_outputs:
            layer = base.get_submodule(one.site.owner)
            layer.register_forward_hook(_replacing(reference, values, copy.deepcopy(layer)), with_kwargs=True)
        else:
            _change_weight(one, base, reference, values)
    found, expected = _gradients(adapted, trained, inputs), _gradients(base, leaves, inputs)
    require_close(found, expected, tolerance, "the adapted model hasn't the gradients that the reference gives")


def _replacing(reference: Reference, values: Mapping[str, Any], layer: nn.Module) -> Callable[..., Any]:
    def replaced(_: nn.Module, args: Any, kwargs: Any, _output: Any) -> Any:
        return _given(reference, {**values, **_of_call(layer, args, kwargs)})

    return replaced


def _gradients(model: nn.Module, tensors: Mapping[str, torch.Tensor], inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    """Returns the gradients of tensors and of a model's inputs; zeros where there is none."""
    leaves, given = differentiable(inputs)
    every = {**tensors, **{f"input {number}": leaf for number, leaf in enumerate(leaves)}}
    loss = loss_of(run(model, given))
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in every.items()}
    return dict(zip(every, torch.autograd.grad(loss, [*every.values()], materialize_grads=True), strict=True))


def _change_weight(one: AdaptedSite, base: nn.Module, reference: Reference, values: Mapping[str, Any]) -> None:
    """Gives a layer of the base the weight that the reference returns."""
    site = one.site
    if not isinstance(site, Site):
        raise TypeError(f"the reference returns a weight, and {site.label} has none; ask for x, and return the output")
    weight = _given(reference, values)
    if tuple(weight.shape) != tuple(site.matrix_shape):
        shapes = f"{tuple(weight.shape)}, and that of {site.label} has {tuple(site.matrix_shape)}"
        raise LawError(f"the reference returns a weight of shape {shapes}")
    # another object, since a tied layer keeps the weight
    owner = base.get_submodule(site.owner)
    cast(Any, owner._parameters)[site.attribute] = site.weight_layout.turned(weight).to(site.dtype)


def _require_output(
    one: AdaptedSite,
    adapted: Any,
    base: nn.Module,
    every: Sequence[ExampleInputs],
    reference: Reference,
    tolerance: float,
) -> None:
    site, layer = one.site, base.get_submodule(one.site.owner)
    is_call = not isinstance(site, Site) or site.is_layer
    calls = _calls(adapted, adapted.get_submodule(site.owner), every) if is_call else []
    if not calls or getattr(site, "call", None) is not None:
        raise TypeError(f"the reference asks for x, and {site.label} is no call of a layer; ask for weight instead")
    single = copy.deepcopy(layer).float() if site.dtype in ROUNDING else layer
    for args, kwargs, found in calls:
        args, kwargs = _in_single((args, kwargs))
        with torch.no_grad():
            expected = _given(reference, _values(one, adapted, base) | _of_call(single, args, kwargs))
        expected, tree = pytree.tree_flatten(expected)
        like = [each.dtype if isinstance(each, torch.Tensor) else None for each in pytree.tree_leaves(found)]
        if len(like) == len(expected):
            expected = [each if to is None else each.to(to) for each, to in zip(expected, like, strict=True)]
        law = f"the output of {site.label} isn't what the reference gives"
        require_close(found, pytree.tree_unflatten(expected, tree), tolerance, law)


def _calls(model: nn.Module, layer: nn.Module, every: Sequence[ExampleInputs]) -> list[tuple[Any, Any, Any]]:
    """Returns the arguments and the output of each call of a layer."""
    calls: list[tuple[Any, Any, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, (args, kwargs, output)))

    handle = layer.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            run_each(model, every)
    finally:
        handle.remove()
    return calls


def _values(one: AdaptedSite, adapted: Any, base: nn.Module) -> dict[str, Any]:
    """Returns what a reference can ask for at any site, beside the inputs of a call."""
    site, owner = one.site, adapted.get_submodule(one.site.owner)
    values = {name: value_at(owner, place) for name, place in one.names.items()}
    if isinstance(site, Site):
        weight = site.weight_layout.turned(getattr(base.get_submodule(site.owner), site.attribute))
        values |= {"weight": weight, "bias": None if site.bias is None else base.get_parameter(site.bias)}
    return _in_single(values) | {"site": site, "config": adapted.peft_config["default"]}


def _given(reference: Reference, values: Mapping[str, Any]) -> Any:
    return reference(**{name: values[name] for name in Asked(reference).among(values)})


def _of_call(layer: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns what a reference can ask for at a call of a layer."""
    inputs = dict(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)
    return {"x": (*args, *kwargs.values())[0], "inputs": inputs, "layer": layer}


def _in_single(value: Any) -> Any:
    """Converts all tensors in half precision to single precision."""
    return pytree.tree_map_only(torch.Tensor, lambda each: each.float() if each.dtype in ROUNDING else each, value)
