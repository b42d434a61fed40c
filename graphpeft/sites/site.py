"""What can be adapted: a weight with the operations that use it, the call of a module, the boundary of a forward.

The region of a site is the module whose own forward contains the operations: for the weight of an ``nn.Linear`` the
Linear itself, for a weight that is used functionally the module that runs that line. A model that is a graph already is
one region.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphpeft.graph.ops import Convolution
from graphpeft.graph.ops.boundaries import Boundary, Leaf
from graphpeft.graph.paths import join
from graphpeft.sites.weight_layout import WeightLayout

Runs = tuple[tuple[int, int], ...]
"""Rows as runs of neighbours: the first of each run, and the one behind its last."""


class NoSiteError(Exception):
    """Why a weight, or a module, is no site."""


class OneCall(NamedTuple):
    """Which of the operations of a weight, or of the calls of a module, is meant, where each is a site of its own.

    Attributes:
        number: Its place in the order of the graph, from 1.
        of: How many there are.
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"call_{self.number}"


class Site(NamedTuple):
    """One weight and the operations that use it.

    Attributes:
        region: The path of the module whose graph holds the operations; "" is the model.
        nodes: The names of the operations' nodes, for each graph that the region has.
        op: The kind of operation, such as ``ops.Linear``; ``ops.Weight`` where no one kind describes its use.
        owner: The path of the module that owns the weight.
        attribute: The weight's name in its owner.
        shape: The weight's shape as it is stored.
        dtype: The weight's dtype.
        layout: The kind of operation for which it is stored: that of its layer, or `op`.
        transposed: Whether a layer stores it as (in, out), or whether the operation of a parameter reads it so.
        is_layer: Whether it is the weight of a layer that PEFT knows as a module, not only as a parameter.
        groups: Into how many groups a convolution's features are divided.
        shortens: Whether an embedding shortens the rows that it reads.
        parts: The rows of the parts of a fused projection that are adapted, if not all of it is.
        named: The module whose name stands for several weights, of which this is one; None for other weights.
        redrawn: Sites whose first values are drawn before those of this one, and once more in their own turn.
        bias: The path of the parameter that all operations add, or None if there is no such one.
        bias_conflict: The reason why a change of the bias that operations add isn't one of that parameter, or None.
        both_ways: Whether some of the operations read the weight as (in, out), and others as (out, in).
        call: Which of the weight's operations it is, if not all of them.
        tied_to: The path of the embedding whose table it has, if all sites with that table, the embedding's own among
            them, share one adapter's tensors.

    Example:
        >>> report = explain(nn.Sequential(nn.Linear(8, 16)), LoraConfig(r=2, target_modules=["0"]))
        >>> site = report.adapted[0].site
        >>> isinstance(site, Site), site.name, tuple(site.shape)
        (True, '0', (16, 8))
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    op: type
    owner: str
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: type
    transposed: bool
    is_layer: bool
    groups: int = 1
    shortens: bool = False
    parts: tuple[Runs, ...] = ()
    named: str | None = None
    redrawn: tuple[Site, ...] = ()
    bias: str | None = None
    bias_conflict: str | None = None
    both_ways: bool = False
    call: OneCall | None = None
    tied_to: str | None = None

    way_out = "narrow target_modules, or leave targets out with exclude_modules where the method has it"

    @property
    def unmergeable(self) -> str | None:
        """Why what an adapter does there can't be merged, or None."""
        if self.call is None:
            return None
        return f"it is one of {self.call.of} calls with a change of its own each, and the one weight can't have all"

    @property
    def in_features(self) -> int | None:
        """How many features the operation reads; None where the weight's shape doesn't tell."""
        return self.layout.features(self.shape, self.transposed, self.groups)[0]  # type: ignore[attr-defined]

    @property
    def out_features(self) -> int | None:
        """How many features the operation gives; None where the weight's shape doesn't tell."""
        return self.layout.features(self.shape, self.transposed, self.groups)[1]  # type: ignore[attr-defined]

    @property
    def weight_layout(self) -> WeightLayout:
        """How the weight is stored, beside PEFT's layout."""
        if not self.transposed:
            return WeightLayout()
        return WeightLayout((0, 1), self.groups) if self.layout is Convolution else WeightLayout((-2, -1))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The weight's shape in PEFT's layout: (out, in), or (out, in / groups, *kernel) of a convolution."""
        return self.weight_layout.turned_shape(self.shape)

    @property
    def beside(self) -> tuple[str, str]:
        """The tensor with whose device an adapter's tensors go: the path of its module, and its name."""
        return self.owner, self.attribute

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        """Nothing: a rule reads the weight and the bias as they stand in the graph."""
        return ()

    @property
    def prefix(self) -> str:
        """What the names of an adapter's tensors begin with on the owner."""
        own = "" if self.attribute == "weight" else f"{self.attribute}_"
        return own if self.call is None else f"{own}{self.call}_"

    @property
    def weight(self) -> str:
        """The path of the weight."""
        return join(self.owner, self.attribute)

    @property
    def name(self) -> str:
        """What PEFT calls the site: the path of the layer, or of the parameter."""
        if self.named is not None:
            return self.named
        return self.owner if self.is_layer else self.weight

    @property
    def label(self) -> str:
        """Its own name: where `name` stands for several weights, the path of this one; and which call it is."""
        own = self.name if self.named is None else self.weight
        return own if self.call is None else join(own, str(self.call))

    @property
    def size(self) -> str:
        """Its features, for a person to read."""
        return self.layout.size(self.shape, self.transposed)  # type: ignore[attr-defined]


class LeafSite(NamedTuple):
    """The call of a module whose inside is its own affair, such as a layer whose weight is quantised.

    Attributes:
        region: The path of the module whose graph has the call: the module itself, or a flat graph around it.
        nodes: The names of the calls, for each graph that the region has.
        owner: The path of the module, where an adapter's tensors live.
        in_features: The size of the last dimension of the module's first argument.
        out_features: The size of the last dimension of what it returns.
        beside: The tensor with whose device an adapter's tensors go: the path of its module, and its name.
        dtype: The dtype of its weight; of one that holds integers, the default. Without a weight, that of its
            parameters, of the model's, or the default.
        quantised: What its weight is, if that holds codes of numbers.
        call: Which of the module's calls it is, if not all of them.

    Example:
        >>> report = explain(nn.Sequential(nn.Linear(8, 16)), LoraConfig(r=2, target_modules=["0"]))
        >>> isinstance(report.adapted[0].site, LeafSite)  # its weight is known
        False
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    owner: str
    in_features: int
    out_features: int
    beside: tuple[str, str]
    dtype: torch.dtype
    quantised: str | None = None
    call: OneCall | None = None

    op = Leaf
    attribute = ""
    reads = ()
    is_layer = True
    named = None
    redrawn = ()
    way_out = Site.way_out

    @property
    def kind(self) -> str:
        """What it is, for a person to read."""
        weight = f" whose weight is quantised ({self.quantised})" if self.quantised is not None else ""
        return f"the call of a module{weight}"

    @property
    def unmergeable(self) -> str:
        """Why what an adapter does there can't be merged."""
        if self.quantised is None:
            return f"it is {self.kind}, and changes no weight"
        return f"it is {self.kind}; merge the adapter on the model as it was before, and quantise that"

    @property
    def prefix(self) -> str:
        """What the names of an adapter's tensors begin with on the owner."""
        return "" if self.call is None else f"{self.call}_"

    @property
    def label(self) -> str:
        """Its own name: that of the module, and which call it is."""
        return self.name if self.call is None else join(self.name, str(self.call))

    @property
    def name(self) -> str:
        """The path of the module."""
        return self.owner

    @property
    def size(self) -> str:
        """Its features, for a person to read."""
        return f"{self.in_features} → {self.out_features}"


class CallSite(NamedTuple):
    """The boundary of one module's forward.

    Attributes:
        region: The path of the module whose graph has the boundary: the module itself, or a flat graph around it.
        nodes: The names of the boundaries, one for each call of the module, for each graph that the region has.
        owner: The path of the module, where an adapter's tensors live; "" is the model.
        role: What the module is for an adapter that has several such sites, such as "encoder".
        beside: The tensor with whose device an adapter's tensors go: the path of its module, and its name.
        dtype: The dtype of an adapter's tensors.
        arguments: The names of the forward's arguments.
        reads: What else a rule may read, by its name for it: paths, seen from the module.
        file_path: What the names of its tensors begin with in files.
        positions: How many positions of tokens the module has a table for; None without a table.

    Example:
        >>> report = explain(nn.Sequential(nn.Linear(8, 16)), LoraConfig(r=2, target_modules=["0"]))
        >>> isinstance(report.adapted[0].site, CallSite)  # a weight is adapted, not a module's boundary
        False
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    owner: str
    role: str
    beside: tuple[str, str]
    dtype: torch.dtype
    arguments: tuple[str, ...]
    reads: tuple[tuple[str, str], ...] = ()
    file_path: str = ""
    positions: int | None = None

    op = Boundary
    prefix = ""
    redrawn = ()
    way_out = "name another module in prompt_scope"
    unmergeable = "the adapter changes what modules are given, not weights"

    @property
    def name(self) -> str:
        """The path of the module, for a person to read."""
        return self.owner or "the model"

    label = name

    @property
    def size(self) -> str:
        """What the module is for the adapter, for a person to read."""
        return self.role
