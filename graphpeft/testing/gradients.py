"""Compares the gradients of a rewritten model with those of the model, for what both still train.

A pass may fold a parameter into another one, as a normalisation into a convolution. Then the parameter is gone, or is
there and has no effect, and training changes the other one. If there is no other one, training changes nothing any more
that it should change: a pass that computes with a copy of a parameter has the same outputs, and is wrong.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.comparing import LawError, difference, have_equal_elements, require_close, require_equal
from graphpeft.testing.runs import differentiable, loss_of, run
from graphpeft.wording import joined

Gradients = dict[str, Tensor]
"""Gradients by the names of parameters and the numbers of inputs; zeros where there is none."""


def require_same_gradients(
    model: nn.Module, rewritten: nn.Module, inputs: ExampleInputs, tolerance: float, law: str
) -> None:
    """Raises unless a rewritten model has the gradients of the model, and trains something for each lost parameter."""
    expected = _gradients(model, inputs)
    try:
        found = _gradients(rewritten, inputs)
    except Exception as error:
        raise LawError(f"{law}, it fails: {type(error).__name__}: {error}") from error
    before, after = dict(model.named_parameters()), dict(rewritten.named_parameters())

    def is_trained(gradients: Gradients, name: str) -> bool:
        return name in gradients and not _are_close(gradients[name], torch.zeros_like(gradients[name]), tolerance)

    same = {name for name, tensor in before.items() if name in after and _is_same(tensor, after[name])}
    unused = {
        name
        for name in same
        if is_trained(expected, name) and not is_trained(found, name) and not _has_effect(rewritten, name, inputs)
    }
    kept = {name for name in expected if name not in before} | (same - unused)
    zeros = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    wanted = {name: gradient for name, gradient in expected.items() if name in kept}
    require_close(
        {name: found.get(name, zeros[name]) for name in wanted}, wanted, tolerance, f"{law}, it has other gradients"
    )
    lost = [name for name in before if name not in same - unused and is_trained(expected, name)]
    if lost and not any(is_trained(found, name) for name in after if name not in same):
        raise LawError(
            f"{law}, {joined(lost)} no longer trained, and no parameter in place; for a pass that is for inference "
            "alone, freeze the model before: requires_grad_(False)"
        )


def _gradients(model: nn.Module, inputs: ExampleInputs) -> Gradients:
    leaves, given = differentiable(inputs)
    loss = loss_of(run(model, given))
    # after the run, in which a model may fold its constants
    tensors = {f"input {number}": leaf for number, leaf in enumerate(leaves)}
    tensors |= {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not loss.requires_grad or not tensors:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def _has_effect(model: nn.Module, name: str, inputs: ExampleInputs) -> bool:
    """Returns whether a model's outputs depend on a parameter's values."""
    as_it_is, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        parameter = other.get_parameter(name)
        parameter.add_(torch.rand_like(parameter) + 0.5)
        return not _are_equal(run(other, inputs), run(as_it_is, inputs))


def _are_equal(one: object, other: object) -> bool:
    try:
        require_equal(one, other, "")
    except LawError:
        return False
    return True


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return difference(one, other, tolerance) is None


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and have_equal_elements(one, other)
