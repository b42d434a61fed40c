"""The type of passes, and their outcomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn


class Outcome(NamedTuple):
    """The outcome of a pass at one site of an adapter.

    Attributes:
        site: The name of the adapted operation.
        reason: Why the pass left the site unchanged; None if the pass changed it.
    """

    site: str
    reason: str | None = None


@dataclass(frozen=True)
class Pass:
    """A change of an adapted graph that keeps its results.

    Attributes:
        name: The name.
        apply: Edits a graph in place. Its second argument is the module that owns the graph. `apply` may read which
            layers the module has, and their options. Facts that differ among modules with equal graphs, such as sizes
            and dtypes, must be read in a run.
        looks_for: A phrase for the nodes that the pass changes, for the message that there are none.
    """

    name: str
    apply: Callable[[fx.Graph, nn.Module], list[Outcome]]
    looks_for: str
