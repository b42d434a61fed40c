"""Experts' matrices as stacks: libraries that run all experts in one product have an entry for each stack of a kind.

Of ``layers.0.mlp.experts.3.gate_proj`` a stack has the matrix 3. A stack has one rank and one scale, so lower ranks
and experts without a change get zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from graphpeft.stacks.adapter_files import LowRank

_EXPERT = re.compile(r"(?P<before>.+)\.experts\.(?P<number>\d+)\.(?P<own>\w+)")


class OfExpert(NamedTuple):
    """The place of a matrix among experts.

    Attributes:
        before: The path of the module that has the experts.
        number: The number of the expert.
        own: The name of the matrix in the expert.
    """

    before: str
    number: int
    own: str


def of_expert(name: str) -> OfExpert | None:
    """Returns the place that a checkpoint's name tells, or None for the name of another matrix."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else OfExpert(match["before"], int(match["number"]), match["own"])


def name_of_stack(place: OfExpert) -> str:
    """Returns the name of the stack that has a matrix: the matrix's own without a number."""
    return f"{place.before}.experts.{place.own}"


def stacked(
    changes: Mapping[str, LowRank], experts: Iterable[str], name_of: Callable[[OfExpert], str]
) -> dict[str, LowRank]:
    """Returns changes with one for each stack of experts' matrices, and the others as they are.

    Args:
        changes: The changes by the names of a checkpoint.
        experts: The names of all experts' matrices in the checkpoint.
        name_of: Returns the name of the stack that has a matrix.
    """
    counts: dict[str, int] = {}
    for place in filter(None, map(of_expert, (*experts, *changes))):
        counts[place.before] = max(counts.get(place.before, 0), place.number + 1)
    found: dict[str, LowRank] = {}
    stacks: dict[str, dict[int, LowRank]] = {}
    for name, change in changes.items():
        place = of_expert(name)
        if place is None:
            found[name] = change
        else:
            stacks.setdefault(name_of(place), {})[place.number] = change
            found.setdefault(name_of(place), change._replace(A=change.A.new_zeros(counts[place.before], 0, 0)))
    return found | {name: _stack(own, len(found[name].A)) for name, own in stacks.items()}


def _stack(changes: Mapping[int, LowRank], count: int) -> LowRank:
    first, rank = next(iter(changes.values())), max(change.rank for change in changes.values())
    scale = next((change.scale for change in changes.values() if change.scale), 1.0)
    A = first.A.new_zeros(count, rank, first.A.shape[1])
    B = first.B.new_zeros(count, first.B.shape[0], rank)
    for number, change in changes.items():
        A[number], B[number], _ = change.of(rank, scale)
    return LowRank(A, B, scale)
