"""Forwards that Transformers' tensor parallelism (``tp_plan``, ``ep_plan``) puts around those of modules.

They prepare inputs and outputs, and call the forward of the class that they have kept. Without gradients, they exchange
a module's own tensors for their local parts, and would leave out an adapter's. So an adapted module has another one
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
    """The parts of a forward, or a hook, of tensor parallelism.

    Attributes:
        name: The name of the style's class.
        style: The object that prepares inputs and outputs; None if it is unknown.
        mesh: The mesh of processes.
        kept: The forward that it calls; None if it calls none.
    """

    name: str
    style: Any
    mesh: Any
    kept: Any


def hook_of(forward: Any) -> Hook | None:
    """Returns what a forward knows if it is one of tensor parallelism; else None."""
    if not isinstance(forward, types.FunctionType):
        return None
    python_module = forward.__module__ or ""  # generated code has none
    if not python_module.startswith("transformers.distributed."):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    known = {name: cells[name].cell_contents for name in ("self", "mesh", "original_forward") if name in cells}
    style = known.get("self")
    name = forward.__qualname__.partition(".")[0] if style is None else type(style).__name__
    return Hook(name, style, known.get("mesh"), known.get("original_forward"))


def refusal(module: nn.Module) -> str | None:
    """Returns why Transformers' plan keeps a module from being adapted, or None."""
    hook = hook_of(_placed(module))
    # a hook in some versions of Transformers, a forward in others
    for each in (hook, *map(hook_of, module._forward_pre_hooks.values())):
        if each is not None and each.name == "ReplicatedWithGradAllReduce":
            return "Transformers' tensor parallelism (tp_plan) sums up the gradients of its own parameters alone"
    if hook is None:
        return None
    if not is_followed(hook):
        return f"Transformers' plan (tp_plan or ep_plan) runs it by {hook.name}, whose tensors only its own code knows"
    if getattr(module, "_hf_quantized_needs_local_tp", False):
        return "Transformers' tensor parallelism (tp_plan) runs it on local parts of a quantised weight"
    return None


def is_followed(hook: Hook | None) -> bool:
    """Returns whether another forward of the module's class can run under a forward of tensor parallelism."""
    return hook is not None and hook.name in _STYLES and hook.kept is not None


def _placed(module: nn.Module) -> Any:
    forward = vars(module).get("forward")
    return stood_for(forward) or forward


def stood_for(forward: Any) -> Any | None:
    """Returns the forward of tensor parallelism for which a result of `around_present` stands; else None."""
    return forward.args[1] if isinstance(forward, functools.partial) and forward.func is _run else None


def around_present(module: nn.Module, forward: Any) -> functools.partial[Any]:
    """Returns the forward around that which the class of `module` has in each call."""
    return functools.partial(_run, module, forward)


def _run(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.distributed.tensor.experimental import implicit_replication

    hook: Any = hook_of(forward)
    style, mesh = _on_distributed_tensors(hook.style), hook.mesh
    args, kwargs = style.transform_inputs_pre_forward(module, args, kwargs, mesh)
    # other tensors are constants that a rule has made, alike in all processes
    with style.context_around_forward(module, mesh), implicit_replication():
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
