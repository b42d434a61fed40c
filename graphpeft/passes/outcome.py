"""What a pass is, and what it says of each place that it looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn


class Outcome(NamedTuple):
    """What a pass did at one site of an adapter.

    Attributes:
        site: The name of the adapted operation.
        reason: Why the pass left it as it is; None if it didn't.
    """

    site: str
    reason: str | None = None


@dataclass(frozen=True)
class Pass:
    """A change of how an adapted graph computes, and not of what.

    Attributes:
        name: Its name.
        apply: Edits a graph in place. It is given the module that owns the graph, of which it may ask what layers it
            calls, and what it reads of them; but all that differs among modules with equal graphs, such as sizes and
            dtypes, has to be asked in a run.
        looks_for: What it changes, for the message that there is nothing of that.
    """

    name: str
    apply: Callable[[fx.Graph, nn.Module], list[Outcome]]
    looks_for: str
