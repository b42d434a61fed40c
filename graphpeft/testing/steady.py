"""Checks that a model's evaluation depends on its inputs alone: on no earlier run, random number or further row."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from graphpeft._torch import pytree
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.alike import require_alike
from graphpeft.testing.comparing import LawError, have_equal_elements, require_close, require_equal
from graphpeft.testing.runs import accepted, call, run, seed_generators


def require_steady(adapted: Any, base: nn.Module, inputs: ExampleInputs, tolerance: float) -> None:
    """Raises unless an adapted model in evaluation is a function of its inputs, row by row, as far as its base is."""
    if _writes_into_inputs(adapted, inputs) and not _writes_into_inputs(base, inputs):
        raise LawError("a run changes the model's inputs")
    first, second = _two_runs(adapted, inputs)
    if _is_repeatable(base, inputs):
        require_equal(second, first, "two runs in evaluation differ")
    if not any(one.rule.reads_whole_batch for one in adapted._peft_adapters.by_name["default"].sites):
        _require_rows_apart(adapted, base, inputs, tolerance)


def _require_rows_apart(adapted: nn.Module, base: nn.Module, inputs: ExampleInputs, tolerance: float) -> None:
    more = with_another_row(base, inputs)
    if more is None or len(accepted(inputs, [more], adapted)) == 1:
        return
    count = len(_tensors(inputs)[0])

    def rows(model: nn.Module, given: ExampleInputs) -> list[torch.Tensor]:
        outputs = _tensors(run(copy.deepcopy(model), given))
        return [output[:count] for output in outputs if output.ndim and len(output) == len(_tensors(given)[0])]

    try:
        require_close(rows(base, more), rows(base, inputs), tolerance, "")
    except LawError:
        return  # the base's rows depend on each other, too
    law = "a row's result depends on the other rows; a rule of which that is meant has reads_whole_batch = True"
    require_alike(lambda: rows(adapted, more), lambda: rows(adapted, inputs), tolerance, law)


def with_another_row(base: nn.Module, inputs: ExampleInputs) -> ExampleInputs | None:
    """Returns inputs with one more row in each tensor with rows; None if the base doesn't take such a batch."""
    tensors = _tensors(inputs)
    if not tensors or not tensors[0].ndim:
        return None
    count = len(tensors[0])

    def longer(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or len(tensor) != count:
            return tensor
        return torch.cat((tensor, tensor[:1].flip(-1) if tensor.ndim > 1 else tensor[:1]))

    more = pytree.tree_map_only(torch.Tensor, longer, inputs)
    try:
        run(copy.deepcopy(base), more)
    except Exception:  # the base's own code says in its own way that it is for other batches
        return None
    return more


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _two_runs(model: nn.Module, inputs: ExampleInputs) -> tuple[Any, Any]:
    copied = copy.deepcopy(model)
    seed_generators()
    return call(copied, inputs), call(copied, inputs)


def _is_repeatable(model: nn.Module, inputs: ExampleInputs) -> bool:
    first, second = _two_runs(model, inputs)
    try:
        require_equal(second, first, "")
    except LawError:
        return False
    return True


def _writes_into_inputs(model: nn.Module, inputs: ExampleInputs) -> bool:
    given = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, inputs)
    run(copy.deepcopy(model), given)
    return not all(map(have_equal_elements, _tensors(given), _tensors(inputs)))
