"""Forwards that Transformers' tensor parallelism (``tp_plan``) puts around those of modules.

They prepare inputs and outputs, and call the forward of the class that they have kept. Without gradients, they exchange a
module's own tensors for their local parts, of which an adapter's tensors are none. So an adapted module has another one
around its present forward, by the same style, with distributed tensors in each call.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, NamedTuple

from torch import nn

_STYLES = ("ColwiseParallel", "RowwiseParallel", "EmbeddingParallel", "SequenceParallel", "TensorParallelLayer")
"""The styles under which distributed tensors tell what each process computes."""


class Hook(NamedTuple):
    """What a forward of tensor parallelism knows.

    Attributes:
        style: What prepares inputs and outputs.
        mesh: The mesh of processes.
        kept: The forward that it calls; None if it calls none.
    """

    style: Any
    mesh: Any
    kept: Any


def hook_of(forward: Any) -> Hook | None:
    """Returns what a forward knows if it is one of tensor parallelism; else None."""
    if not isinstance(forward, types.FunctionType) or not forward.__module__.startswith("transformers.distributed."):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    known = {name: cells[name].cell_contents for name in ("self", "mesh", "original_forward") if name in cells}
    return Hook(known.get("self"), known.get("mesh"), known.get("original_forward"))


def refusal(module: nn.Module) -> str | None:
    """Returns why no graph can run under the forward of tensor parallelism that a module has, or None."""
    hook = hook_of(_placed(module))
    if hook is None:
        return None
    name = type(hook.style).__name__
    if name not in _STYLES or hook.kept is None:
        return f"Transformers' tensor parallelism (tp_plan) runs it by {name}, on tensors that only its own code knows"
    if getattr(module, "_hf_quantized_needs_local_tp", False):
        return "Transformers' tensor parallelism (tp_plan) runs it on local parts of a quantised weight"
    return None


def sums_gradients(module: nn.Module) -> bool:
    """Returns whether tensor parallelism sums up the gradients of a module's own parameters, and of no others."""
    hook = hook_of(_placed(module))
    return hook is not None and type(hook.style).__name__ == "ReplicatedWithGradAllReduce"


def _placed(module: nn.Module) -> Any:
    forward = vars(module).get("forward")
    return forward.args[1] if is_ours(forward) else forward


def is_ours(forward: Any) -> bool:
    """Returns whether a forward is one of those that `around_present` makes."""
    return isinstance(forward, functools.partial) and forward.func is _run


def around_present(module: nn.Module, forward: Any) -> functools.partial[Any]:
    """Returns the forward around that which the class of `module` has in each call.

    Args:
        module: The module.
        forward: The forward of tensor parallelism that it has.
    """
    return functools.partial(_run, module, forward)


def of_transformers(forward: functools.partial[Any]) -> Any:
    """Returns the forward that a result of `around_present` stands for."""
    return forward.args[1]


def _run(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    style, mesh, _ = hook_of(forward)  # pyright: ignore[reportGeneralTypeIssues]
    style = _on_distributed_tensors(style)
    args, kwargs = style.transform_inputs_pre_forward(module, args, kwargs, mesh)
    with style.context_around_forward(module, mesh):
        output = type(module).forward(module, *_distributed(module, args, mesh), **kwargs)
    return style.transform_output_post_forward(module, output, mesh)


@functools.lru_cache(maxsize=64)
def _on_distributed_tensors(style: Any) -> Any:
    changed = copy.copy(style)
    changed.should_use_local_tensors = lambda _: False
    return changed


def _distributed(module: nn.Module, args: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
    """Returns the arguments with the first as a distributed tensor, if the module has such, as ColwiseParallel has."""
    from torch.distributed.tensor import DTensor, Replicate

    if not args or isinstance(args[0], DTensor) or not any(isinstance(t, DTensor) for t in module._parameters.values()):
        return args
    return DTensor.from_local(args[0], mesh, [Replicate()], run_check=False), *args[1:]
