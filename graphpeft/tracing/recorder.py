"""What the parts of the tracer ask of the one that records: nodes, decisions, errors, and whether it records now."""

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
        session: What the trace has found out so far.
        examples: The values of the nodes in the example.
    """

    session: Session
    examples: Examples

    # nodes

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Records one call and runs it on the example values; a result of None or a string is a plain value."""

    def attribute(self, name: str) -> Any:
        """Returns the proxy of the root's attribute at a path, or its value if that is None or a string."""

    def proxy_of(self, tensor: torch.Tensor) -> fx.Proxy:
        """Returns the proxy that stands for a tensor of a module, or for one that a graph keeps as a constant."""
        ...

    def give(self, placeholder: fx.Proxy, example: Any) -> None:
        """Notes the example argument that a placeholder stands for."""

    def note_assignment(self, module: nn.Module, name: str) -> None:
        """Notes which module's code assigns an attribute."""

    # decisions

    def decide(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> None:
        """Puts a check into the graph that `proxy`, which nothing else uses from now on, is `answer` in every run."""

    def check(self, proxy: fx.Proxy, answer: Any, decision: str | None = None) -> bool:
        """Puts a check into the graph that `proxy` is `answer` in every run; tells whether there was none so far."""
        ...

    def present(self, proxy: fx.Proxy, decision: str) -> fx.Proxy:
        """Puts a check into the graph that a value which the example has isn't None in a run."""
        ...

    # errors

    def failing(self, error: ErrorT) -> ErrorT:
        """Notes an error that the model's code may catch, and returns it."""
        ...

    def undecided(self, error: Exception | None = None) -> NeedsInputsError:
        """Returns the error for a decision on a value that isn't known."""
        ...

    # what goes on

    @property
    def is_running(self) -> bool:
        """Whether nothing is recorded just now: code runs on example values, or in another thread."""
        ...

    @property
    def is_of_this_thread(self) -> bool:
        """Whether a trace goes on in this thread."""
        ...

    @property
    def is_recording(self) -> bool:
        """Whether a trace goes on in this thread, and what is called now is recorded."""
        ...
