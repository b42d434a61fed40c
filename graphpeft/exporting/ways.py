"""The ways in which an export can carry adapters: each makes a plain module of an adapted one.

merged   in the weights
baked    as branches, whose tensors are weights
inputs   as arguments: any adapter of the same shapes, with the one graph
rows     as arguments that hold several adapters, and the number of the one that each row of the batch has
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.adapters import mixing
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.present_rows import rows_present
from graphpeft.adapters.state import Adapters, adapters_of
from graphpeft.exporting import adapter_inputs, copies
from graphpeft.exporting.adapter_inputs import AdapterInput, Interface
from graphpeft.exporting.calls import Root
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.example import Example
from graphpeft.exporting.rows import GivenRows
from graphpeft.passes.optimization import optimize


@dataclasses.dataclass(frozen=True)
class Case:
    """One of the computations that an export has to do: with no adapters given, with one, or with several by rows.

    Attributes:
        name: What it is, for a person to read.
        given: Returns the arguments that the exported model takes beside the model's own, for these.
        expected: Returns what an adapted model computes, in evaluation mode.
    """

    name: str
    given: Callable[[Example], dict[str, Any]]
    expected: Callable[[Any, Example], Any]

    def full(self, example: Example) -> Example:
        """Returns all that the exported model is called with."""
        return example.with_(**self.given(example))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A plain module, and what it has to compute.

    Attributes:
        way: The way's name.
        model: The copied model, in evaluation mode, with what the way has made of it.
        root: What is exported, which calls it.
        cases: What it has to compute; the first one is what it is traced with.
        adapters: The tensors of each adapter by their names as inputs, as its file is to have them.
        interface: What an adapter has to be; None where adapters are no inputs.
        defaults: The tensors that are given unless others are.
    """

    way: str
    model: Any
    root: Root
    cases: tuple[Case, ...]
    adapters: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    interface: Interface | None = None
    defaults: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


def _as_it_is(model: Any, example: Example) -> Any:
    return example.call(model)


_AS_IT_IS = Case("", lambda _: {}, _as_it_is)


def merged(model: nn.Module) -> Prepared:
    """Returns the base model with the active adapters in its weights."""
    state = adapters_of(model)
    if state is None:
        plain = copies.sharing_weights(model)
        return Prepared("merged", plain, Root(plain), (_AS_IT_IS,))
    copied = copies.with_own_weights(model)
    left = [] if state.are_off else [name for name in state.active if name not in state.merged]
    try:
        plain = copied.merge_and_unload(adapter_names=left)
    except AdaptError as error:
        raise ExportError(f"{error}. Or export it with adapters='baked', which keeps the branch") from error
    return Prepared("merged", plain, Root(plain), (_AS_IT_IS,))


def baked(model: nn.Module) -> Prepared:
    """Returns the model with the active adapters alone."""
    state = _adapted(model, "baked")
    copied = copies.sharing_weights(model)
    optimize(copied, [])
    copies.take_tensors_off(copied, state.by_name.keys() - {*state.read})
    return Prepared("baked", copied, Root(copied), (_AS_IT_IS,))


def inputs(model: nn.Module) -> Prepared:
    """Returns the model with one more argument, `adapters`: the tensors of one adapter by their names."""
    copied, name, own, values, interface = _with_inputs(model, "inputs")
    modules = dict(copied.named_modules())
    copies.take_tensors_off(copied, copied._peft_adapters.by_name)
    root = Root(copied, ("adapters",), lambda adapters: adapter_inputs.given(modules, own, adapters))
    cases = [_with_one(other, values[other]) for other in sorted(values, key=lambda other: other != name)]
    return Prepared("inputs", copied, root, tuple(cases), values, interface, values[name])


def _with_one(name: str, values: Mapping[str, Tensor]) -> Case:
    def expected(model: Any, example: Example) -> Any:
        model.set_adapter(name, inference_mode=True)
        return example.call(model)

    return Case(f"adapter {name!r}", lambda _: {"adapters": dict(values)}, expected)


def rows(model: nn.Module) -> Prepared:
    """Returns the model with two more arguments: `adapters`, those of several, and `adapter_rows`, one for each row."""
    copied, name, own, values, interface = _with_inputs(model, "rows")
    modules = dict(copied.named_modules())
    try:
        mixing.run_at_once(modules, copied._peft_adapters, name)
    except AdaptError as error:
        raise ExportError(
            f"{error}. Export it with adapters='inputs' and call it for the rows of each adapter"
        ) from error
    copies.take_tensors_off(copied, copied._peft_adapters.by_name)

    @contextlib.contextmanager
    def around(adapters: Mapping[str, Tensor], adapter_rows: Tensor) -> Iterator[None]:
        with adapter_inputs.given(modules, own, adapters), rows_present(GivenRows(name, adapter_rows)):
            yield

    root = Root(copied, ("adapters", "adapter_rows"), around)
    names = list(values)
    ones = {other: {key: value.unsqueeze(0) for key, value in values[other].items()} for other in names}
    together = {key: torch.cat([ones[other][key] for other in names]) for key in own}
    return Prepared("rows", copied, root, (_by_rows(names, together),), ones, interface, together)


def _by_rows(names: list[str], together: Mapping[str, Tensor]) -> Case:
    # a trace takes the number of adapters for one that can change only if there is more than one; nothing is the base
    chosen_from = names if len(names) > 1 else [*names, BASE]
    nothing = len(chosen_from) - len(names)
    stacked = {key: torch.cat([value, *[torch.zeros_like(value)] * nothing]) for key, value in together.items()}

    def given(example: Example) -> dict[str, Any]:
        rows = torch.arange(example.batch - 1, -1, -1, device=example.tensors[0].device) % len(chosen_from)
        return {"adapters": stacked, "adapter_rows": rows}

    def expected(model: Any, example: Example) -> Any:
        chosen = [chosen_from[row] for row in given(example)["adapter_rows"].tolist()]
        return example.with_(adapter_names=chosen).call(model)

    return Case("a batch of adapters", given, expected)


WAYS: Mapping[str, Callable[[nn.Module], Prepared]] = {
    "merged": merged,
    "baked": baked,
    "inputs": inputs,
    "rows": rows,
}
"""The ways by their names; each leaves the model as it is, and raises ExportError for what it can't carry."""


def _adapted(model: nn.Module, way: str) -> Adapters:
    state = adapters_of(model)
    if state is None:
        raise ExportError(
            f"the {type(model).__name__} has no adapters, and adapters={way!r} is for those; adapt it with "
            "get_peft_model, or export it as it is with adapters='merged'"
        )
    return state


class _WithInputs(NamedTuple):
    """A copy of a model, of which an adapter is to be inputs.

    Attributes:
        model: The copy.
        name: Its adapter that acts.
        inputs: That adapter's tensors and numbers.
        values: Those of all adapters, by the same names.
        interface: What an adapter has to be.
    """

    model: Any
    name: str
    inputs: dict[str, AdapterInput]
    values: dict[str, dict[str, Tensor]]
    interface: Interface


def _with_inputs(model: nn.Module, way: str) -> _WithInputs:
    state = _adapted(model, way)
    if state.merged:
        raise ExportError("adapters are merged into the weights; call unmerge_adapter() before you export them apart")
    if len(state.acting) != 1:
        raise ExportError(
            f"adapters={way!r} is for one adapter at a time, and {state.acting or 'none'} act; activate one with "
            "set_adapter, or combine several by add_weighted_adapter"
        )
    [name] = state.acting
    copied = copies.sharing_weights(model)
    optimize(copied, [])
    # all of them before the graphs are changed
    found = {own: adapter_inputs.carried(copied, own) for own in (name, *state.by_name)}
    adapter_inputs.let_numbers_be_tensors(copied, name)
    own = dict(found[name].inputs)
    for key in adapter_inputs.unread(copied, name, own):
        del own[key]
    interface = Interface.of(found[name]._replace(inputs=own))
    of_name = f"a graph for adapter {name!r}"
    values = {other: adapter_inputs.fitted(one, interface, other, of_name) for other, one in found.items()}
    return _WithInputs(copied, name, own, values, interface)
