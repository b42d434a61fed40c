"""Sites that can be adapted: a weight with the operations that use it, the call of a module, the boundary of a forward.

The region of a site is the module whose own forward contains the operations: for the weight of an ``nn.Linear``, the
Linear itself; for a weight that is used functionally, the module that runs that line. A model that is a graph already
is one region.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from graphpeft.graph.computed_weights import Computed
from graphpeft.graph.ops import Convolution
from graphpeft.graph.ops.boundaries import Boundary, Leaf
from graphpeft.graph.paths import join

Runs = tuple[tuple[int, int], ...]
"""Rows as runs of consecutive rows: the first row of each run, and the end (exclusive)."""


class WeightLayout(NamedTuple):
    """The dimensions in which a stored weight differs from PEFT's layout.

    Attributes:
        exchanged: The two dimensions that are stored in exchanged order, or None.
        groups: The groups of a transposed convolution, which is stored as (in, out / groups, *kernel).
        kernel: The sizes of a convolution's kernel; () for a matrix or a stack of matrices.
    """

    exchanged: tuple[int, int] | None = None
    groups: int = 1
    kernel: tuple[int, ...] = ()

    def turned(self, weight: Any) -> Any:
        """Converts a weight from the stored layout to PEFT's, or back; a tensor or a proxy."""
        if self.exchanged is None:
            return weight
        if self.groups == 1:
            return weight.transpose(*self.exchanged)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def turned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that `turned` gives a weight of shape `shape`."""
        if self.exchanged is None:
            return shape
        sizes = list(shape)
        first, second = self.exchanged
        sizes[first], sizes[second] = sizes[second] * self.groups, sizes[first] // self.groups
        return tuple(sizes)


_PLAIN, _TURNED = WeightLayout(), WeightLayout((-2, -1))


class NoSiteError(Exception):
    """A weight or a module has no site; the message says why."""


class OneCall(NamedTuple):
    """One of a weight's operations, or of a module's calls, where each is a site of its own.

    Attributes:
        number: Its place in the order of the graph, from 1.
        of: The number of operations or calls.
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"call_{self.number}"


class Site(NamedTuple):
    """One weight and the operations that use it.

    Attributes:
        region: The path of the module whose graph holds the operations; "" is the model.
        nodes: The names of the operations' nodes, for each graph of the region.
        op: The kind of the operations, such as ``ops.Linear``; ``ops.Weight`` where no one kind describes them.
        owner: The path of the module that owns the weight.
        attribute: The weight's name in its owner.
        shape: The weight's shape as it is stored.
        dtype: The weight's dtype.
        layout: The kind of operation for which the weight is stored: the kind of its layer, or `op`.
        transposed: Whether a layer stores the weight as (in, out), or a parameter's operation reads it as (in, out).
        is_layer: Whether PEFT adapts the weight as its layer, not as a parameter.
        groups: The number of groups of a convolution's features.
        shortens: Whether an embedding shortens the rows that it reads, by ``max_norm``.
        parts: The rows of each adapted part of a fused projection; empty if the whole projection is adapted.
        named: The module whose name stands for several weights, this one among them; None for other weights.
        redrawn: Sites whose initial values are drawn before this site's, and again in their own turn.
        bias: The path of the parameter that all operations add, or None.
        bias_conflict: Why a change of the added bias can't be a change of that parameter, or None.
        both_ways: Whether some of the operations read the weight as (in, out), and others as (out, in).
        call: The number of the weight's operation that is the site; None for all of them.
        tied_to: The path of the embedding whose table is the weight, if all sites with that table, the embedding's
            own included, share one adapter's tensors.
        computed: How the weight is computed from other tensors; None if it is a parameter.
        patched_forward: Why the layer's patched forward isn't known to compute what its class does; or None.
        own_code: Why no graph has the operations, so that the model's code computes with the changed weight; or None.
        fixed: The arguments of the region's forward that can have one value alone, each as ``name=value``.
        is_called: Whether operations are calls of the weight's module in a flat graph.

    Examples:
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
    own_code: str | None = None
    computed: Computed | None = None
    patched_forward: str | None = None
    fixed: tuple[str, ...] = ()
    is_called: bool = False

    way_out = "narrow target_modules, or leave targets out with exclude_modules where the method has it"

    def __deepcopy__(self, memo: dict[int, object]) -> Site:
        """Returns this one, since nothing in it can change."""
        return self

    @property
    def unmergeable(self) -> str | None:
        """Why an adapter's change there can't be merged, or None."""
        if self.computed is not None:
            return (
                f"its {self.attribute} is computed by {self.computed.by} from other tensors, and no parameter; remove "
                "that from the layer first, and adapt it then"
            )
        if self.patched_forward is not None:
            return (
                f"a forward was set on {self.owner} itself {self.patched_forward}; what that makes of another weight "
                "isn't what the adapter adds to its output"
            )
        return None if self.call is None else _of_one_call(self.call)

    @property
    def in_features(self) -> int | None:
        """The number of input features; None where the weight's shape doesn't show it."""
        return self.layout.features(self.shape, self.transposed, self.groups)[0]  # type: ignore[attr-defined]

    @property
    def out_features(self) -> int | None:
        """The number of output features; None where the weight's shape doesn't show it."""
        return self.layout.features(self.shape, self.transposed, self.groups)[1]  # type: ignore[attr-defined]

    @property
    def weight_layout(self) -> WeightLayout:
        """The stored layout of the weight, compared with PEFT's layout."""
        if len(self.shape) < 3:
            return _TURNED if self.transposed else _PLAIN
        is_convolution = self.layout is Convolution
        layout = _PLAIN
        if self.transposed:
            layout = WeightLayout((0, 1), self.groups) if is_convolution else _TURNED
        has_kernel = is_convolution or len(self.shape) > 3
        return layout._replace(kernel=layout.turned_shape(self.shape)[2:]) if has_kernel else layout

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The weight's shape in PEFT's layout: (out, in), or (out, in / groups, *kernel) of a convolution."""
        return self.weight_layout.turned_shape(self.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel; () for a matrix or a stack of matrices."""
        return self.weight_layout.kernel

    @property
    def beside(self) -> tuple[str, str]:
        """The tensor whose device an adapter's tensors share: the path of its module, and its name."""
        if self.computed is None:
            return self.owner, self.attribute
        return join(self.owner, self.computed.path), self.computed.name

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        """Nothing, since rules get the weight and the bias from the graph."""
        return ()

    @property
    def prefix(self) -> str:
        """The prefix of the names of an adapter's tensors on the owner."""
        own = "" if self.attribute == "weight" else f"{self.attribute}_"
        return own if self.call is None else f"{own}{self.call}_"

    @property
    def weight(self) -> str:
        """The path of the weight."""
        return join(self.owner, self.attribute)

    @property
    def name(self) -> str:
        """PEFT's name of the site: the path of the layer, or of the parameter."""
        if self.named is not None:
            return self.named
        return self.owner if self.is_layer else self.weight

    @property
    def label(self) -> str:
        """The site's own name: `name`, or the weight's path if `name` stands for several weights; and the call."""
        own = self.name if self.named is None else self.weight
        return own if self.call is None else join(own, str(self.call))

    @property
    def size(self) -> str:
        """The features as text."""
        return self.layout.size(self.shape, self.transposed)  # type: ignore[attr-defined]


def _of_one_call(call: OneCall) -> str:
    return f"it is one of {call.of} calls with a change of its own each, and the one weight can't have all"


class LeafSite(NamedTuple):
    """The call of an opaque module, such as a layer whose weight is quantised.

    Attributes:
        region: The path of the module whose graph has the call: the module itself, or a flat graph around it.
        nodes: The names of the calls, for each graph of the region.
        owner: The path of the module, where an adapter's tensors live.
        in_features: The size of the last dimension of the module's first argument.
        out_features: The size of the last dimension of the module's output.
        beside: The tensor whose device an adapter's tensors share: the path of its module, and its name.
        dtype: The dtype of the module's weight, or PyTorch's default if that holds integers; where the weight is
            quantised, the module's `compute_dtype`, if it has one. Without a weight, the dtype of the module's
            parameters, else of the model's, else the default.
        quantised: The description of the weight, if it is quantised.
        is_recoded: Whether a change can be added to the quantised weight: its codes are made anew from numbers.
        quantises_inputs: Whether the module quantises its inputs as well as its weight, if `is_recoded`.
        reads: The attributes that a rule may read there: the rule's name for each, and the module's.
        call: The number of the module's call that is the site; None for all of them.

    Examples:
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
    is_recoded: bool = False
    quantises_inputs: bool = False
    reads: tuple[tuple[str, str], ...] = ()
    call: OneCall | None = None

    op = Leaf
    attribute = ""
    is_layer = True
    named = None
    redrawn = ()
    own_code = None
    fixed = ()
    way_out = Site.way_out

    @property
    def kind(self) -> str:
        """The kind of site, as text."""
        weight = f" whose weight is quantised ({self.quantised})" if self.quantised is not None else ""
        return f"the call of a module{weight}"

    @property
    def unmergeable(self) -> str | None:
        """Why an adapter's change there can't be merged, or None."""
        if self.call is not None:
            return _of_one_call(self.call)
        if self.quantised is None:
            return f"it is {self.kind}, and changes no weight"
        if self.is_recoded:
            return None
        return f"it is {self.kind}; merge the adapter on the model as it was before, and quantise that"

    @property
    def weight(self) -> str:
        """The path of the weight, if there is one."""
        return join(self.owner, "weight")

    @property
    def prefix(self) -> str:
        """The prefix of the names of an adapter's tensors on the owner."""
        return "" if self.call is None else f"{self.call}_"

    @property
    def label(self) -> str:
        """The site's own name: the module's name, and the call."""
        return self.name if self.call is None else join(self.name, str(self.call))

    @property
    def name(self) -> str:
        """The path of the module."""
        return self.owner

    @property
    def size(self) -> str:
        """The features as text."""
        return f"{self.in_features} → {self.out_features}"


class CallSite(NamedTuple):
    """The boundary of one module's forward.

    Attributes:
        region: The path of the module whose graph has the boundary: the module itself, or a flat graph around it.
        nodes: The names of the boundaries, one for each call of the module, for each graph of the region.
        owner: The path of the module, where an adapter's tensors live; "" is the model.
        role: The module's role for an adapter with several such sites, such as "encoder".
        beside: The tensor whose device an adapter's tensors share: the path of its module, and its name.
        dtype: The dtype of an adapter's tensors.
        arguments: The names of the forward's arguments.
        reads: Further tensors that a rule may read: the rule's name for each, and its path relative to the module.
        file_path: The prefix of its tensors' names in files.
        positions: The number of token positions in the module's table; None without a table.

    Examples:
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
    own_code = None
    fixed = ()
    way_out = "name another module in prompt_scope"
    unmergeable = "the adapter changes what modules are given or return, not weights"

    @property
    def name(self) -> str:
        """The path of the module as text."""
        return self.owner or "the model"

    label = name

    @property
    def size(self) -> str:
        """The module's role for the adapter."""
        return self.role
