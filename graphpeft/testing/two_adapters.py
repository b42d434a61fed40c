"""The law of two adapters that are active together: merging keeps the outputs, and removal restores the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft._torch import pytree
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.config import PeftConfig
from graphpeft.testing.alike import require_alike
from graphpeft.testing.blame import Build, blames_a_site
from graphpeft.testing.comparing import LawError, require_close, require_equal
from graphpeft.testing.merging import require_unmerged_exactly
from graphpeft.testing.runs import accepted, perturbed, run, run_copy, run_each
from graphpeft.testing.snapshots import require_unloaded, with_saved
from graphpeft.testing.variants import of_sites_that_merge, with_other_sizes


@blames_a_site
def assert_two_adapters_act_together(
    build: Build,
    config: PeftConfig,
    inputs: ExampleInputs,
    other: PeftConfig | None = None,
    tolerance: float = 1e-4,
    others: Sequence[ExampleInputs] = (),
) -> None:
    """Law 9: two active adapters have the same outputs when merged; without them, the model is restored.

    The law is checked in both orders, in evaluation: the later adapter acts on the weight that the earlier one changed.
    Each has an effect beside the other, if it has one alone. If the second adapter is deactivated or deleted,
    the first has its former outputs, bit for bit.

    Args:
        build: Builds the model.
        config: The first adapter's config.
        inputs: Inputs of the model.
        other: The second adapter's config; None for the same method with other sizes, where the model accepts them.
        tolerance: The allowed difference of outputs, as for `require_close`.
        others: Other inputs; those that a guard refuses are left out.

    Raises:
        LawError: If an output differs, or `unload` leaves something.
        AdaptError: If the two can't be active together or can't be merged, such as two that fully train the same
            tensor. The rest of the law holds.
    """
    second = other or with_other_sizes(config, build().eval(), inputs)
    adapters = _require_together(build, config, second, inputs, others, tolerance)
    # one unmergeable site keeps all from being merged; so check again with only the mergeable sites
    narrowed = [of_sites_that_merge(adapter, build, inputs) for adapter in adapters]
    if any(narrowed):
        _require_together(build, narrowed[0] or config, narrowed[1] or second, inputs, others, tolerance)


def _require_together(
    build: Build,
    config: PeftConfig,
    other: PeftConfig,
    inputs: ExampleInputs,
    others: Sequence[ExampleInputs],
    tolerance: float,
) -> Sequence[Adapter]:
    model = perturbed(get_peft_model(build().eval(), config, example_inputs=inputs))
    every = accepted(inputs, others, model)
    base = run_each(build().eval(), every)
    alone = run_each(model, every)
    model.add_adapter("second", other, example_inputs=inputs)
    require_equal(run_each(model, every), alone, "a second adapter that doesn't act changes the output")
    model.set_adapter("second")
    second_alone = run_each(perturbed(model, seed=2), every)
    adapters = list(model._peft_adapters.by_name.values())
    refusals = []
    for order in (("default", "second"), ("second", "default")):
        try:
            model.set_adapter(order)
            _require_both(model, every, base, {"default": alone, "second": second_alone}, tolerance)
            _require_merged_alike(model, order, every, tolerance)
        except AdaptError as error:
            refusals.append(error)
    for name, expected in (("second", second_alone), ("default", alone)):
        model.set_adapter(name)
        require_equal(run_each(model, every), expected, f"{name!r} differs after both have acted")
    model.delete_adapter("second")
    require_equal(run_each(model, every), alone, "deleting the second adapter changes the first")
    left = with_saved(build().eval(), model)
    require_unloaded(model.unload(), left, inputs)
    for refusal in refusals:
        raise refusal
    return adapters


def _require_both(
    model: Any, every: Sequence[ExampleInputs], base: Any, alone: Mapping[str, Any], tolerance: float
) -> None:
    """Requires that two active adapters don't compute what one of them does alone, if each has an effect alone."""
    # an effect within rounding may be rounded off beside another one
    if any(_are_close(base, output, tolerance) for output in alone.values()):
        return
    together = run_each(model, every)
    for name, output in alone.items():
        if _are_close(together, output, 0.0) and not _differs_in_double(model, name, every[0]):
            raise LawError(f"beside {name!r} the other adapter has no effect, and alone it has one")


def _differs_in_double(model: Any, name: str, inputs: ExampleInputs) -> bool:
    """Returns whether active adapters differ from one of them in double precision, where it rounds nothing off.

    Modules inside are asked, too: behind a tanh of large values, or a ReLU of negative ones, both give the same.
    """
    precise = copy.deepcopy(model).double()
    given = pytree.tree_map(lambda leaf: leaf.double() if _is_real(leaf) else leaf, inputs)
    together = _values_inside(precise, given)
    precise.set_adapter(name)
    return not _are_close(_values_inside(precise, given), together, 0.0)


def _values_inside(model: Any, inputs: ExampleInputs) -> list[torch.Tensor]:
    """Returns the tensors that a model and the modules inside return, in the order of their calls."""
    found: list[torch.Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.extend(leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        output = run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, *(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))]


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _are_close(found: Any, expected: Any, tolerance: float) -> bool:
    try:
        require_close(found, expected, tolerance, "")
    except LawError:
        return False
    return True


def _require_merged_alike(model: Any, order: Sequence[str], every: Sequence[ExampleInputs], tolerance: float) -> None:
    together = run_each(model, every)
    adapters = [model._peft_adapters.by_name[name] for name in order]
    if not all(adapter.changes_weights for adapter in adapters):
        return
    if any(adapter.coded_sites for adapter in adapters):
        require_unmerged_exactly(model, every[0])
        return
    first, last = order
    active = functools.partial(run_copy, model, every)
    merged = functools.partial(run_copy, model, every, lambda copied: copied.merge_and_unload())
    require_alike(merged, active, tolerance, f"{last!r} behind {first!r}: merged differs from active")
    in_place = functools.partial(run_copy, model, every, _merged_in_place)
    try:
        require_alike(in_place, active, tolerance, f"{last!r} behind {first!r}: merged in place differs")
    except AdaptError:
        return  # an adapter with a residual weight can be merged only for good
    model.merge_adapter()
    model.unmerge_adapter()
    require_equal(run_each(model, every), together, f"{last!r} behind {first!r}: unmerged differs from before")


def _merged_in_place(model: Any) -> Any:
    model.merge_adapter()
    return model
