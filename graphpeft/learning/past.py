"""Why no gradient reaches a tensor, and the line of code that goes past it."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from graphpeft.graph.traced_model import stands_for
from graphpeft.learning.watch import Watch


def reason_and_line(
    region: str, tensor: Tensor, gradient: Tensor | None, modules: Mapping[str, nn.Module], watch: Watch
) -> tuple[str, str]:
    """Returns the reason why a tensor doesn't learn, and the line of code; "" where no one line does it.

    Args:
        region: The path of the module whose forward uses the tensor.
        tensor: The tensor.
        gradient: Its gradient; None without one.
        modules: The model's modules by path.
        watch: What was seen of the forward.
    """
    if region not in watch.called:
        return _never_called(region, modules)
    if gradient is not None:
        reason = "a gradient reaches it and is zero whatever the adapters hold, as behind a factor of zero"
        return reason, watch.called[region]
    cuts = [cut for cut in watch.cuts if cut.reaches(tensor)]
    if not cuts:
        return "what it computes is no part of the loss", watch.called[region]
    # the last one: others, such as that of a value which is only compared, leave a way on to it
    cut = ([cut for cut in cuts if cut.is_number] or cuts)[-1]
    # a graph has a detach in the place of a region under no_grad
    if cut.under_no_grad or ("detach" in cut.function and "detach" not in cut.line):
        return "it runs without gradients, as under torch.no_grad()", cut.line
    return f"{cut.function} has no gradient", cut.line


def _never_called(region: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    around, _, name = region.rpartition(".")
    # containers have no forward of their own
    while around and type(modules[around]).__dict__.get("forward") is None and not _has_forward(modules[around]):
        around, _, name = around.rpartition(".")
    cls = stands_for(modules[around])
    place = _mention(cls, name)
    never = "it is never called with this batch"
    if place is None:
        return f"{never}; the forward of {cls.__name__} does not mention {name}", ""
    return f"{never}; in {cls.__name__} this line mentions {name}", place


def _has_forward(module: nn.Module) -> bool:
    return stands_for(module).forward is not nn.Module.forward


def _mention(cls: type, name: str) -> str | None:
    """Returns the first line of a class's methods but ``__init__`` that reads an attribute; None without one."""
    for base in cls.__mro__:
        for method_name, method in vars(base).items():
            if method_name == "__init__" or not inspect.isfunction(method):
                continue
            line = _line_that_reads(method, name)
            if line is not None:
                return line
    return None


def _line_that_reads(method: Callable[..., object], name: str) -> str | None:
    method = inspect.unwrap(method)  # of a decorated one, the file would be that of its decorator
    try:
        lines, first = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == name:
            file = os.path.basename(inspect.getsourcefile(method) or "")
            return f"`{lines[node.lineno - 1].strip()}` ({file}:{first + node.lineno - 1})"
    return None
