"""The findings of a rewrite: its matches, its near misses, and the modules that it couldn't look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphpeft.wording import as_html, number_of, shortened, text_table

_MOST_MISSES = 5
"""The number of near misses that a report shows."""

_LONGEST = 300
"""The most characters of a reason in a report."""


@dataclass(frozen=True)
class Matched:
    """A place where a rewrite's pattern is met.

    Attributes:
        module: The path of the module in whose forward it is; "" for the model.
        node: The name of the node whose value is replaced.
        line: The line of the model's code that made the node; "" if it isn't known.
        modes: The modes in whose graph it is: "evaluation", "training" or "both".

    Examples:
        >>> gelu = Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x), name="gelu")
        >>> gelu.find(nn.GELU()).matches[0].modes
        'both'
    """

    module: str
    node: str
    line: str
    modes: str


@dataclass(frozen=True)
class NearMiss:
    """A place where a rewrite's pattern is met in part.

    Attributes:
        module: The path of the module in whose forward it is.
        node: The name of the node at which the pattern was tried.
        matched: The number of the pattern's operations that are met by name.
        size: The number of the pattern's operations.
        stopped_at: The name of the node that stopped it.
        line: The line of the model's code that made this node; "" if it isn't known.
        reason: The reason.

    Examples:
        >>> gelu = Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x), name="gelu")
        >>> gelu.find(nn.GELU("tanh")).misses[0].reason
        "has 'tanh' as approximate, where the pattern has 'none'"
    """

    module: str
    node: str
    matched: int
    size: int
    stopped_at: str
    line: str
    reason: str

    def __str__(self) -> str:
        line = f" ({self.line})" if self.line else ""
        met = f"{self.matched} of {self.size} operations"
        return f"{self.module or 'the model'}, {self.node}: {self.stopped_at} {self.reason}{line}; {met} are met"


@dataclass(frozen=True)
class RewriteReport:
    """The findings of a rewrite in a model.

    Attributes:
        name: The name of the rewrite.
        matches: The places where its pattern is met, the innermost modules first.
        misses: The places where it is met in part, the nearest first.
        left: Why the forward of a module couldn't be read, by the module's path.

    Examples:
        >>> gelu = Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x), name="gelu")
        >>> print(gelu.find(nn.SiLU()))
        gelu: 0 matches
    """

    name: str
    matches: tuple[Matched, ...]
    misses: tuple[NearMiss, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.name}: {number_of(len(self.matches), 'match', 'matches')}"]
        if self.matches:
            rows = [(each.module or "the model", each.node, each.modes, each.line) for each in self.matches]
            lines += text_table(("module", "node", "mode", "line"), rows)
        if self.misses:
            lines.append("nearly:")
            lines += [f"  {miss}" for miss in self.misses[:_MOST_MISSES]]
            if len(self.misses) > _MOST_MISSES:
                lines.append(f"  and {len(self.misses) - _MOST_MISSES} more, see misses")
        if self.left:
            names = list(self.left)
            lines.append(f"{number_of(len(names), 'module')} couldn't be read, such as {names[0] or 'the model'}: ")
            lines[-1] += shortened(self.left[names[0]], _LONGEST)
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__
    _repr_html_ = as_html


@dataclass(frozen=True, repr=False)
class Rewritten(RewriteReport):
    """The result of a rewrite of a model; that of a pass, as `torch.fx` has it.

    Attributes:
        graph_module: The model, which is the object that it was.
        modified: Whether anything was rewritten.

    Examples:
        >>> gelu = Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x), name="gelu")
        >>> gelu(nn.Sequential(nn.GELU())).modified
        True
    """

    graph_module: Any = None

    @property
    def modified(self) -> bool:
        """Whether anything was rewritten."""
        return bool(self.matches)
