"""The shapes of the values that the nodes of a model's graphs have in a run.

A node's value is read where another node takes it: generated code names it as the node is named. The last one is what
the forward returns.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import fx, nn
from torch.overrides import TorchFunctionMode

from graphpeft.graph.running_nodes import running_node
from graphpeft.graph.template import worn_template
from graphpeft.showing.nodes import shape_of


class NodeShapes(TorchFunctionMode):
    """Notes shapes while models run in its context.

    Args:
        modules: The modules whose graphs are looked at, by path.

    Attributes:
        found: Shapes and dtypes as text, by the path of a graph's module and a node's name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str]] = {}
        self._modules = {path: module for path, module in modules.items() if worn_template(module) is not None}
        self._paths = {id(module): path for path, module in self._modules.items()}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes shapes in the context."""
        with contextlib.ExitStack() as stack:
            for path, module in self._modules.items():
                stack.callback(module.register_forward_hook(self._returns(path)).remove)
            stack.enter_context(self)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes what the node that calls a function takes, and calls it."""
        self._note_taken(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def _note_taken(self, frame: FrameType | None) -> None:
        while frame is not None:
            running = running_node(frame)
            if running is not None:
                module, node = running
                if id(module) in self._paths:
                    for source in node.all_input_nodes:
                        self._note(self._paths[id(module)], source, frame.f_locals.get(source.name))
                return
            frame = frame.f_back

    def _returns(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            template = worn_template(module)
            if template is not None:
                end = next(iter(reversed(template.graphs[template.index(module)].nodes)))
                if isinstance(end.args[0], fx.Node):
                    self._note(path, end.args[0], output)

        return note

    def _note(self, path: str, node: fx.Node, value: Any) -> None:
        if shape := shape_of(value):
            self.found.setdefault(path, {})[node.name] = shape
