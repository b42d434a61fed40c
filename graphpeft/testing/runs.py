"""Runs models for laws, with equal random numbers, and collects the results and effects of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft._torch import pytree
from graphpeft.graph.errors import GuardError
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.learning import check_learning
from graphpeft.model.adapt import get_peft_model


def run(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Returns the outputs of `model` with the random numbers of seed 0.

    >>> run(nn.Identity(), (torch.ones(2),))
    tensor([1., 1.])
    """
    seed_generators()
    return call(model, inputs)


def call(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Returns the outputs of `model` as `run` does, with the next random numbers."""
    if any(map(_is_object, pytree.tree_leaves(inputs))):
        inputs = pytree.tree_map(lambda value: copy.deepcopy(value) if _is_object(value) else value, inputs)
    args, kwargs = split_inputs(inputs)
    return model(*(args or ()), **kwargs)


def run_each(model: nn.Module, every: Sequence[ExampleInputs]) -> Any:
    """Returns the outputs of `model` on several inputs, one after the other, each as `run` does."""
    if len(every) == 1:
        return run(model, every[0])
    return {f"inputs {number}": run(model, inputs) for number, inputs in enumerate(every)}


def requiring_grad(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Returns a copy of a model in which these parameters alone require grad."""
    copied = copy.deepcopy(model).requires_grad_(False)
    for path in paths:
        copied.get_parameter(path).requires_grad_()
    return copied


def run_copy(
    model: nn.Module, every: Sequence[ExampleInputs], change: Callable[[Any], Any] = lambda copied: copied
) -> Any:
    """Returns the outputs of a copy of `model` as `run_each` does, so that one that counts its calls doesn't notice."""
    return run_each(change(copy.deepcopy(model)), every)


def accepted(inputs: ExampleInputs, others: Sequence[ExampleInputs], *models: nn.Module) -> list[ExampleInputs]:
    """Returns the inputs, and those of the others that no guard in a graph of the models refuses."""
    return [inputs, *(given for given in others if not any(_is_refused(model, given) for model in models))]


def _is_refused(model: nn.Module, inputs: ExampleInputs) -> bool:
    try:
        run(copy.deepcopy(model), inputs)
    except GuardError:
        return True
    return False


def seed_generators() -> None:
    """Sets PyTorch's generators to seed 0."""
    # torch.manual_seed records a stack trace for later CUDA initialisation, which takes longer than a forward
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


def _is_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, torch.Tensor | nn.Module)


def draw_otherwise(one: nn.Module, other: nn.Module, inputs: ExampleInputs) -> bool:
    """Returns whether two models leave PyTorch's random generators in different states."""
    run(one, inputs)
    drawn = _random_state()
    run(other, inputs)
    return drawn != _random_state()


def _random_state() -> bytes:
    on_accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return b"".join(state.numpy().tobytes() for state in (torch.get_rng_state(), *on_accelerators))


def left_by(model: nn.Module, owner: nn.Module, inputs: ExampleInputs) -> dict[str, Any]:
    """Runs `model` forward and backward, and returns all results and effects; `owner` has its named tensors."""
    leaves, given = differentiable(inputs)
    outputs = run(model, given)
    parameters = dict(owner.named_parameters())
    buffers = {**dict(owner.named_buffers()), **dict(model.named_buffers())}
    left = {
        "the outputs": outputs,
        "what of them requires grad": pytree.tree_map_only(torch.Tensor, lambda output: output.requires_grad, outputs),
        "the inputs afterwards": given,
        "the buffers": buffers,
    }
    # before the backward, which may fail after in-place writes
    left = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), left)
    inputs_by_number = {f"input {number}": leaf for number, leaf in enumerate(leaves)}
    return left | {"the gradients": _gradients(outputs, inputs_by_number | parameters)}


def _gradients(outputs: Any, tensors: dict[str, torch.Tensor]) -> Any:
    loss = loss_of(outputs)
    if not loss.requires_grad:
        return None
    try:
        found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return "values were overwritten that they need"
    return dict(zip(tensors, found, strict=True))


def differentiable(inputs: ExampleInputs) -> tuple[list[torch.Tensor], Any]:
    """Returns new leaves that require grad, and a copy of `inputs` computed from them, which a model may modify."""
    leaves: list[torch.Tensor] = []

    def fresh(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()

    return leaves, pytree.tree_map_only(torch.Tensor, fresh, inputs)


def perturbed(adapted: Any, seed: int = 1) -> Any:
    """Adds random numbers with standard deviation 0.1 to all trainable tensors, and returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def loss_of(outputs: Any) -> torch.Tensor:
    """Returns a scalar that depends on every output that requires grad.

    >>> loss_of({"y": torch.ones(3, requires_grad=True)}).item()
    3.0
    """
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return sum((leaf.square().sum() for leaf in leaves), torch.zeros(()))


_DRAWS = 8
"""How many times other first values are drawn for an adapter that doesn't learn."""


def dead_tensors(
    adapted: nn.Module, inputs: ExampleInputs, build: Callable[[], nn.Module], config: Any
) -> dict[str, str]:
    """Returns the trained tensors that learn nothing, whatever their first values are, and why."""
    dead = _dead(adapted, inputs)
    for seed in range(_DRAWS if dead else 0):
        model = build().train()
        torch.manual_seed(seed)
        still = _dead(get_peft_model(model, config, example_inputs=inputs), inputs)
        dead = {tensor: reason for tensor, reason in dead.items() if tensor in still}
    return dead


def _dead(model: Any, inputs: ExampleInputs) -> dict[str, str]:
    """Returns the trained tensors that learn nothing, and why."""
    return {
        f"{site.label}.{name}": site.reason
        for site in check_learning(model, inputs).dead
        for name, tensor in site.tensors.items()
        if tensor.state == "dead"
    }
