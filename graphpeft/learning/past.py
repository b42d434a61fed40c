"""Why no gradient reaches a tensor, and the line of code that goes past it."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from graphpeft._torch import CheckpointFunction
from graphpeft.graph.traced_model import stands_for
from graphpeft.learning.places import ROWS
from graphpeft.learning.watch import Watch


def reason_and_line(
    region: str, name: str, tensor: Tensor, gradient: Tensor | None, modules: Mapping[str, nn.Module], watch: Watch
) -> tuple[str, str]:
    """Returns the reason why a tensor doesn't learn, and the line of code; "" where no one line does it."""
    if region not in watch.called:
        return _never_called(region, modules)
    line = watch.called[region]
    if region in watch.empty:
        return "it is called with no rows in this batch", line
    if gradient is not None:
        return _of_gradient(name, gradient), line
    silent = None if watch.silent is None else watch.silent.above(tensor)
    if silent is not None:
        return f"the backward of {silent} gives no gradient", line
    cuts = watch.cuts_of(tensor)
    if not cuts:
        return "what it computes is no part of the loss", line
    # the last one: others, such as that of a value which is only compared, leave a way on to it
    cut = ([cut for cut in cuts if cut.is_number] or cuts)[-1]
    if cut.within == CheckpointFunction.__name__:
        return "a reentrant checkpoint gives none if its inputs need none; see enable_input_require_grads", cut.line
    if cut.within:
        return f"{cut.within} has no gradient", cut.line
    # a graph has a detach in the place of a region under no_grad
    if cut.under_no_grad or ("detach" in cut.function and "detach" not in cut.line):
        return "it runs without gradients, as under torch.no_grad()", cut.line
    return f"{cut.function} has no gradient", cut.line


def _of_gradient(name: str, gradient: Tensor) -> str:
    if not bool(gradient.isfinite().all()):
        return "its gradient isn't finite, as behind a division by zero or a root of zero"
    if name == ROWS:
        return "a gradient reaches it and is zero, as where the batch has none of the trained tokens"
    return "a gradient reaches it and is zero whatever the adapters hold, as behind a factor of zero"


def _never_called(region: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    around, _, name = region.rpartition(".")
    # containers have no forward of their own, or one that mentions no name
    while around and (not _has_forward(modules[around]) or isinstance(modules[around], nn.Sequential)):
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
    """Returns the first line of a class's forward, or of methods that it names, that reads an attribute."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        called = waiting.pop(0)
        for method in _definitions(cls, called):
            read = _lines_that_read(method)
            if name in read:
                return read[name]
            new = [other for other in read if other not in seen]
            seen |= {*new}
            waiting += new
    return None


def _definitions(cls: type, name: str) -> Iterator[Callable[..., object]]:
    """Yields the function that a class has by a name, and those of its bases that it calls by `super`."""
    for base in cls.__mro__:
        found: Any = vars(base).get(name)
        function = found.fget if isinstance(found, property) else found
        # of a decorated one, the file would be that of its decorator
        method = inspect.unwrap(function) if callable(function) else None
        if inspect.isfunction(method):
            yield method
            if "super" not in method.__code__.co_names:
                return


def _lines_that_read(method: Callable[..., object]) -> dict[str, str]:
    """Returns the first line of a method that reads each attribute, by the attribute's name."""
    try:
        lines, first = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return {}
    file = os.path.basename(inspect.getsourcefile(method) or "")
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)]
    return {
        node.attr: f"`{lines[node.lineno - 1].strip()}` ({file}:{first + node.lineno - 1})"
        for node in sorted(read, key=lambda node: node.lineno, reverse=True)
    }
