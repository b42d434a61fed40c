"""Checks whether a graph can replace a module's forward."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn

from graphpeft.code.source import calls_forward, functions_called, names_in
from graphpeft.graph import in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_forwards import name_of, patched_forward
from graphpeft.graph.hosts.tensor_parallel import refusal

_INTERFACE = frozenset(name for name in dir(fx.GraphModule) if not name.startswith("_")) - frozenset(dir(nn.Module()))
"""The public attributes that ``fx.GraphModule`` adds to a module."""


def refuse_what_a_graph_cannot_replace(module: nn.Module) -> None:
    """Raises TraceError if a graph can't replace the forward of `module`."""
    foreign = patched_forward(module)
    if foreign is not None and _asks_for_class_forward(foreign):
        raise TraceError(
            f"its forward was set on the instance ({name_of(foreign)}) and looks for that of the module's class in "
            "each call, which would be the graph's; keep that before, as in `forward = module.forward`, and call that"
        )
    parallel = refusal(module)
    if parallel is not None:
        raise TraceError(
            f"{parallel}; leave it out, or load the model without the plan and shard it by PyTorch's parallelize_module"
        )
    call = in_place.original_class(module).__call__
    if call is not nn.Module.__call__ and not calls_forward(call):
        raise TraceError("it has a __call__ of its own that doesn't call its forward; put what it does into that")
    names = (*vars(module), *module._parameters, *module._buffers, *module._modules)
    taken = _conflicting_names(type(module), names)
    if taken:
        raise TraceError(f"it has attributes of its own that a graph module needs: {', '.join(taken)}; rename them")


def _asks_for_class_forward(forward: Any) -> bool:
    names = (names_in(function.__code__).read for function in functions_called([forward]))
    return any("forward" in read and not read.isdisjoint(("type", "__class__")) for read in names)


# cached, since equal modules have equal names
@functools.lru_cache(maxsize=256)
def _conflicting_names(cls: type, names: tuple[str, ...]) -> list[str]:
    return sorted(_INTERFACE.intersection((*names, *dir(cls))))
