"""The class whose code a call of a module runs: a subclass of its own where a forward was set on the module itself."""

from __future__ import annotations

import types

from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.kept_forwards import set_forward


def class_of_forward(module: nn.Module) -> type:
    """Returns a class for readers of code, whose forward is what a call of `module` runs."""
    cls = in_place.original_class(module)
    forward = set_forward(module)
    if forward is None:
        return cls
    # torch.compile hides what it compiles
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    is_method = isinstance(forward, types.MethodType) and forward.__self__ is module
    function = forward.__func__ if is_method else staticmethod(forward)
    return cls if function is cls.forward else in_place.quiet_subclass(cls, {"forward": function})
