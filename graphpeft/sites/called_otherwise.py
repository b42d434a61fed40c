"""Modules that code calls with other weights than their own, or inside a function with a gradient of its own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from graphpeft.code.source import has_functional_call, uses_in_forward
from graphpeft.graph.forward_classes import class_of_forward
from graphpeft.graph.holders import has_own_modules
from graphpeft.graph.paths import join
from graphpeft.peft_errors import PeftWarning
from graphpeft.sites.site import NoSiteError


class CalledOtherwise:
    """The modules of one model that its code may so call.

    Args:
        modules: The modules by path.
        graphs: The paths of those that are graphs, and have no code of the user's.
    """

    def __init__(self, modules: Mapping[str, nn.Module], graphs: Set[str]) -> None:
        self._modules, self._graphs = modules, graphs

    @functools.cached_property
    def _found(self) -> tuple[dict[str, str], dict[str, str]]:
        """The paths of the modules that are called with other weights, and in a function, each with its caller's."""
        with_others: dict[str, str] = {}
        in_function: dict[str, str] = {}
        for path, module in self._modules.items():
            # those of PyTorch call theirs as they are
            is_of_pytorch = type(module).__module__.startswith("torch.nn.modules.")
            if is_of_pytorch or path in self._graphs or not has_own_modules(module):
                continue
            uses: Any = uses_in_forward(class_of_forward(module))
            replaces = uses.replaces_weights or has_functional_call(vars(module).values())
            for read in uses.read if replaces or uses.has_own_gradient else ():
                if read.partition(".")[0] in module._modules:
                    called = join(path, read)
                    with_others.update({called: path} if replaces else {})
                    in_function.update({called: path} if uses.has_own_gradient else {})
        return with_others, in_function

    def check(self, owner: str) -> None:
        """Checks the module that owns a weight, and warns once of each module inside of which it gets no gradient.

        Args:
            owner: The path of the module.

        Raises:
            NoSiteError: If it may be called with another tensor in the place of its own.
        """
        with_others, in_function = self._found
        for around in _around(owner) if with_others or in_function else ():
            caller = with_others.get(around)
            if caller is not None:
                raise NoSiteError(
                    f"{caller or 'the model'} calls {around} by torch.func.functional_call, with other weights in "
                    "place of its own, and so without what an adapter would change in them"
                )
            caller = in_function.pop(around, None)
            if caller is not None:
                warnings.warn(
                    f"{caller or 'the model'} may call {around} in a torch.autograd.Function. Its backward runs only "
                    "if an input requires a gradient, and adapters inside get none without it: let inputs require "
                    "gradients, as enable_input_require_grads() does; check_learning(model, batch) tells what learns",
                    PeftWarning,
                    stacklevel=2,
                )


def _around(path: str) -> list[str]:
    """Returns a path and those of the modules around it, the model's aside."""
    names = path.split(".")
    return [".".join(names[:depth]) for depth in range(len(names), 0, -1)]
