"""The interface of the tracer for its parts: making nodes, decisions and errors, and whether it records now."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
import torch.fx as fx
from torch import nn

from graphpeft.graph.errors import NeedsInputsError
from graphpeft.tracing.examples import Examples
from graphpeft.tracing.session import Session

ErrorT = TypeVar("ErrorT", bound=BaseException)


class Recorder(Protocol):
    """Records the calls of a forward as nodes of a graph.

    Attributes:
        session: The findings of the trace so far.
        examples: The example values of the nodes.
    """

    session: Session
    examples: Examples

    # nodes

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Records one call and runs it on example values; returns a proxy, or the value if that is None or a string."""

    def attribute(self, name: str) -> Any:
        """Returns the proxy of the root's attribute at a path, or its value if this is None or a string."""

    def proxy_of(self, tensor: torch.Tensor) -> fx.Proxy:
        """Returns the proxy of a module's tensor, or of another tensor, which becomes a constant of the graph."""
        ...

    def give(self, placeholder: fx.Proxy, example: Any) -> None:
        """Stores the example argument of a placeholder."""

    def note_assignment(self, module: nn.Module, name: str) -> None:
        """Stores that the code of the current module assigns an attribute of `module`."""

    # decisions

    def decide(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> None:
        """Adds a check that `proxy` is `answer` in every run. The caller must not use `proxy` afterwards."""

    def check(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> bool:
        """Adds a check that `proxy` is `answer` in every run; returns whether the check is new."""
        ...

    def present(self, proxy: fx.Proxy, decision: str) -> fx.Proxy:
        """Adds a check that a value isn't None in a run, as in the example; returns `proxy`."""
        ...

    # errors

    def failing(self, error: ErrorT) -> ErrorT:
        """Stores an error, since the model's code may catch it, and returns the error."""
        ...

    def undecided(self, error: Exception | None = None) -> NeedsInputsError:
        """Returns the error for a decision on an unknown value."""
        ...

    # state

    @property
    def is_running(self) -> bool:
        """Whether calls aren't recorded now: code runs on example values, or in another thread."""
        ...

    @property
    def is_of_this_thread(self) -> bool:
        """Whether this thread is tracing."""
        ...

    @property
    def is_recording(self) -> bool:
        """Whether this thread is tracing and records its calls now."""
        ...
