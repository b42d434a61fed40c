"""Adapter modes of exports: each mode has a function that prepares a model for the export.

merged   adapters are added to the weights
baked    adapters are branches, whose tensors are weights
inputs   one adapter is an argument, so one graph serves all adapters of the same shapes
rows     several adapters are an argument, and another argument chooses the adapter of each row of the batch
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.adapters import mixing
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.present_rows import ROWS, RowParameters
from graphpeft.adapters.state import Adapters, adapters_of
from graphpeft.exporting import adapter_inputs, copies
from graphpeft.exporting.adapter_inputs import AdapterInputs
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.example import Example
from graphpeft.exporting.root import Root
from graphpeft.graph.holders import name_at, place_of, value_at
from graphpeft.graph.paths import modules_by_path
from graphpeft.passes.optimization import optimize
from graphpeft.wording import number_of


@dataclasses.dataclass(frozen=True)
class Case:
    """One use of an exported model and its expected result: without adapters, with one, or with one for each row.

    A check runs every case in the exported file and in the adapted model, and compares the results.

    Attributes:
        name: The name in reports and errors.
        given: Returns the additional arguments of the exported model for an example.
        expected: Runs the adapted model, a copy in evaluation mode, on an example, and returns the result.
    """

    name: str
    given: Callable[[Example], dict[str, Any]]
    expected: Callable[[Any, Example], Any]

    def full(self, example: Example) -> Example:
        """Returns the example with all arguments of the exported model."""
        return example.with_(**self.given(example))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model that is ready to be exported.

    Attributes:
        adapter_mode: A name in `CARRIERS`.
        model: The copied model, in evaluation mode, changed for the adapter mode.
        root: The module to export; it calls `model`.
        cases: The uses of the export; PyTorch's exporter traces the first.
        adapters: The tensors for each adapter's own file, by adapter name and input name.
        interface: The inputs for an adapter; None if adapters aren't inputs.
        defaults: The default values of the adapter inputs, by input name.
    """

    adapter_mode: str
    model: Any
    root: Root
    cases: tuple[Case, ...]
    adapters: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    interface: AdapterInputs | None = None
    defaults: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


_CALL = Case("", lambda _: {}, lambda model, example: example.call(model))
"""A call of the model without further arguments."""


def merged(model: nn.Module) -> Prepared:
    """Prepares the base model with the active adapters added to its weights."""
    state = adapters_of(model)
    if state is None:
        base = copies.sharing_weights(model)
        return Prepared("merged", base, Root(base), (_CALL,))
    copied = copies.with_own_weights(model)
    unmerged = [] if state.are_off else [name for name in state.active if name not in state.merged]
    try:
        # into codes it would be rounded, and programs couldn't read the codes
        is_coded = any(state.by_name[name].coded_sites for name in (*unmerged, *state.merged))
        base = copied.merge_and_unload(adapter_names=unmerged, dequantize=is_coded)
    except AdaptError as error:
        raise ExportError(f"{error}. Or export it with adapters='baked', which keeps the branch") from error
    return Prepared("merged", base, Root(base), (_CALL,))


def baked(model: nn.Module) -> Prepared:
    """Prepares the model with the active adapters as branches, without the other adapters."""
    state = _adapters(model, "baked")
    copied = copies.sharing_weights(model)
    optimize(copied, [])
    copies.take_tensors_off(copied, state.by_name.keys() - {*state.read})
    return Prepared("baked", copied, Root(copied), (_CALL,))


def inputs(model: nn.Module) -> Prepared:
    """Prepares the model with an additional argument `adapters`: the tensors of one adapter by input name."""
    copied, name, interface, values = _with_inputs(model, "inputs")
    modules = modules_by_path(copied)
    copies.take_tensors_off(copied, copied._peft_adapters.by_name)
    root = Root(copied, ("adapters",), lambda adapters: adapter_inputs.given(modules, interface.inputs, adapters))
    cases = tuple(_with_one(other, values[other]) for other in sorted(values, key=lambda other: other != name))
    return Prepared("inputs", copied, root, cases, values, interface, values[name])


def _with_one(name: str, values: Mapping[str, Tensor]) -> Case:
    def expected(model: Any, example: Example) -> Any:
        model.set_adapter(name, inference_mode=True)
        return example.call(model)

    return Case(f"adapter {name!r}", lambda _: {"adapters": dict(values)}, expected)


def rows(model: nn.Module) -> Prepared:
    """Prepares the model with additional arguments: stacked `adapters`, and `adapter_rows`, one number for each row."""
    copied, name, interface, values = _with_inputs(model, "rows")
    modules = modules_by_path(copied)
    try:
        mixing.run_at_once(modules, copied._peft_adapters, name)
    except AdaptError as error:
        raise ExportError(
            f"{error}. Export it with adapters='inputs' and call it for the rows of each adapter"
        ) from error
    copies.take_tensors_off(copied, copied._peft_adapters.by_name)

    @contextlib.contextmanager
    def around(adapters: Mapping[str, Tensor], adapter_rows: Tensor) -> Iterator[None]:
        with (
            adapter_inputs.given(modules, interface.inputs, adapters),
            ROWS.during(GivenRows(name, adapter_rows)),
        ):
            yield

    root = Root(copied, ("adapters", "adapter_rows"), around)
    names = list(values)
    stacks_of_one = {other: {key: value.unsqueeze(0) for key, value in values[other].items()} for other in names}
    stacked = {key: torch.cat([stacks_of_one[other][key] for other in names]) for key in interface.inputs}
    return Prepared("rows", copied, root, (_by_rows(names, stacked),), stacks_of_one, interface, stacked)


def _by_rows(names: list[str], stacked: Mapping[str, Tensor]) -> Case:
    # PyTorch's exporter fixes sizes of 1, so a single adapter gets a second one of zeros, which acts as the base
    chosen_from = names if len(names) > 1 else [*names, BASE]
    zeros = len(chosen_from) - len(names)
    several = {key: torch.cat([value, *[torch.zeros_like(value)] * zeros]) for key, value in stacked.items()}

    def given(example: Example) -> dict[str, Any]:
        rows = torch.arange(example.batch - 1, -1, -1, device=example.tensors[0].device) % len(chosen_from)
        return {"adapters": several, "adapter_rows": rows}

    def expected(model: Any, example: Example) -> Any:
        chosen = [chosen_from[row] for row in given(example)["adapter_rows"].tolist()]
        return example.with_(adapter_names=chosen).call(model)

    return Case("a batch of adapters", given, expected)


CARRIERS: Mapping[str, Callable[[nn.Module], Prepared]] = {
    "merged": merged,
    "baked": baked,
    "inputs": inputs,
    "rows": rows,
}
"""The functions by adapter mode. Each leaves its model unchanged, and raises ExportError if the mode can't hold it."""


def _adapters(model: nn.Module, adapter_mode: str) -> Adapters:
    state = adapters_of(model)
    if state is None:
        raise ExportError(
            f"the {type(model).__name__} has no adapters, and adapters={adapter_mode!r} is for those; adapt it with "
            "get_peft_model, or export it as it is with adapters='merged'"
        )
    return state


def _with_inputs(model: nn.Module, adapter_mode: str) -> tuple[Any, str, AdapterInputs, dict[str, dict[str, Tensor]]]:
    """Prepares a copy of a model for adapters as inputs."""
    state = _adapters(model, adapter_mode)
    if state.merged:
        raise ExportError("adapters are merged into the weights; call unmerge_adapter() before you export them apart")
    if len(state.acting) != 1:
        raise ExportError(
            f"adapters={adapter_mode!r} is for one adapter at a time, and {state.acting or 'none'} act; activate one "
            "with set_adapter, or combine several by add_weighted_adapter"
        )
    [name] = state.acting
    copied = copies.sharing_weights(model)
    optimize(copied, [])
    # inputs of all adapters, read before the graphs change
    found = {other: adapter_inputs.inputs_of(copied, other) for other in (name, *state.by_name)}
    adapter_inputs.take_numbers_as_tensors(copied, name)
    unread = set(adapter_inputs.unread(copied, name, found[name].inputs))
    interface = found[name]._replace(inputs={k: one for k, one in found[name].inputs.items() if k not in unread})
    of_name = f"a graph for adapter {name!r}"
    values = {other: adapter_inputs.fitted(one, interface, other, of_name) for other, one in found.items()}
    return copied, name, interface, values


class GivenRows:
    """The rows of a call in which the attributes of one adapter hold the stacked tensors of several adapters.

    Implements `PresentRows` for the call, and `RowParameters` for each tensor in the call.

    Args:
        name: The adapter that has the attributes.
        rows: The index of each row's adapter in the stack, int64 of shape (batch,).
    """

    names: tuple[str, ...] = ()

    def __init__(self, name: str, rows: Tensor) -> None:
        self._name, self._rows = name, rows

    def runner_of(self, module: nn.Module) -> None:
        """Returns None: the graphs that modules wear are those for rows."""

    def read(self, module: nn.Module, acting: Any) -> Tensor:
        """Raises ExportError, since a tensor of a module that is read differs from row to row."""
        raise ExportError(
            f"the model's code reads {acting.name} of an adapted {type(module).__name__} beside its call, and that "
            "differs from row to row; leave the layer out, or export with adapters='inputs'"
        )

    def of(self, tensor: Tensor, module: nn.Module) -> RowParameters:
        """Returns the adapters' parameters for the rows of `tensor`."""
        if not tensor.ndim or tensor.shape[0] != self._rows.shape[0]:
            raise ValueError(
                f"adapter_rows has {number_of(self._rows.shape[0], 'row')}, and an adapted {type(module).__name__} is "
                f"given a tensor of the shape {tuple(tensor.shape)}, whose first dimension must be the batch"
            )
        return self

    def stacked(self, owner: nn.Module, stem: str, where: Any) -> Tensor:
        """Returns the parameters `stem` of `owner`, stacked for the rows."""
        return value_at(owner, name_at(self._name, stem)).index_select(0, self._rows)

    def dropout(self, owner: nn.Module, stem: str) -> float:
        """Returns 0, since an exported program drops nothing."""
        return 0.0

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the numbers `stem` of `owner`, one for each row; one number for all rows if it isn't an input."""
        holder, own = place_of(owner, name_at(self._name, stem))
        number = getattr(holder, own, missing)
        return number.index_select(0, self._rows) if isinstance(number, Tensor) else number
