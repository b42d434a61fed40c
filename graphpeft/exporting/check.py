"""Runs an exported file in its own runtime and compares it with the model, on the example and on other sizes."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphpeft._torch import pytree
from graphpeft.exporting import caches, sizes
from graphpeft.exporting.carriers import Case
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example, Shape, can_call
from graphpeft.exporting.formats.format import Export, Format, Runner
from graphpeft.exporting.program import exported
from graphpeft.exporting.root import in_plain_containers
from graphpeft.graph.autocast import HALVES
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.peft_errors import PeftWarning
from graphpeft.wording import joined

TOLERANCE = 1e-4
HALF_TOLERANCE = 3e-2
"""The tolerance for models with weights in float16 or bfloat16."""


class Checked(NamedTuple):
    """The comparison of one run of an exported file with the model.

    Attributes:
        case: The name of the `Case`; empty if adapters aren't inputs.
        shapes: The shapes of the model's own inputs.
        difference: The greatest absolute difference of any element; for floating-point results divided by the greatest
            absolute value of the expected result, if this is above 1.
    """

    case: str
    shapes: tuple[Shape, ...]
    difference: float


def checked(form: Format, export: Export, path: Any, example: Example) -> list[Checked]:
    """Compares the files at `path` with the model."""
    run = _loaded(form, export, path)
    tolerance = _tolerance(export.source)
    found = []
    for sized in _examples(form, export, example):
        for case in export.prepared.cases:
            expected = case.expected(export.source, sized)
            difference = _compared(run, case, sized, expected)
            if not difference <= tolerance:
                raise ExportError(_of_difference(form, export, difference, tolerance, _where(case, sized)))
            found.append(Checked(case.name, sized.shapes, difference))
    if form.has_graph and caches.has_cache(example) and export.dynamic is True:
        found += [_generated(form, export, run, case, caches.first_call(example)) for case in export.prepared.cases]
    if form.has_graph and not form.checks_inputs and export.dynamic is not False:
        _refuse_unchecked_decisions(run, export, example, tolerance)
    return found


def _generated(form: Format, export: Export, run: Runner, case: Case, start: Example) -> Checked:
    """Compares a file and the model while they generate, each with the cache that it returns, from an empty one on.

    The tokens are those that the model chooses.
    """
    tolerance, greatest = _tolerance(export.source), 0.0
    of_file = of_model = start
    for _ in range(_TOKENS):
        expected = case.expected(export.source, of_model)
        found = _ran(run, case, of_file)
        difference = _differences(found, expected, _where(case, of_model))
        if not difference <= tolerance:
            raise ExportError(_of_difference(form, export, difference, tolerance, _where(case, of_model)))
        greatest = max(greatest, difference)
        tokens = expected["logits"][:, -1:].argmax(-1)
        spec = pytree.tree_structure(expected["present"])
        present = pytree.tree_unflatten(_leaves(found)[0][-spec.num_leaves :], spec)
        of_file = caches.next_call(of_model, tokens, present)
        of_model = caches.next_call(of_model, tokens, expected["present"])
    return Checked(f"{case.name or 'the model'}, {_TOKENS} tokens", start.shapes, greatest)


_TOKENS = 10
"""How many tokens a file that has a cache generates in a check."""


def _loaded(form: Format, export: Export, path: Any) -> Runner:
    try:
        return form.runner(export, path)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"what was exported can't be loaded: {in_short(error)}. Let the model take and return "
            "tensors and plain numbers alone"
        ) from error


def _examples(form: Format, export: Export, example: Example) -> Iterator[Example]:
    """Yields the example, the example in other sizes, and the example again if calls have changed a buffer."""
    before = {name: buffer.clone() for name, buffer in export.source.named_buffers()}
    yield example
    yield from _others(form, export, example)
    after = dict(export.source.named_buffers())
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        yield example


def _others(form: Format, export: Export, example: Example) -> Iterator[Example]:
    """Yields the example in other sizes that both the model and its program accept."""
    if not form.has_graph:
        return
    for choices in sizes.accepted(export.program, example.shapes):
        others = [example.sized(shapes) for shapes in dict.fromkeys(choices) if shapes != example.shapes]
        accepted = (one for one in others if all(_is_accepted(case, export, one) for case in export.prepared.cases))
        yield from itertools.islice(accepted, 1)


def _refuse_unchecked_decisions(run: Runner, export: Export, example: Example, tolerance: float) -> None:
    """Raises ExportError if a file silently returns wrong results for sizes at which the model branches otherwise.

    PyTorch's program refuses such sizes, but files for other runtimes don't contain its checks. Where another way of
    the model gives the same results, it may have further conditions, so it is traced, too.
    """
    case, are_given = export.prepared.cases[0], export.dynamic is not True
    tried, too_large = sizes.breaks(export.program, example.shapes, are_given)
    ways, known = 0, {example.shapes}
    while tried:
        one = tried.pop(0)
        sized = example.sized(one.shapes)
        if one.shapes in known or not _is_refused_by_program_alone(case, export, sized):
            continue
        known.add(one.shapes)
        if _is_silently_wrong(run, case, sized, case.expected(export.probe, sized), tolerance):
            raise ExportError(_of_break(one))
        ways += one.is_own
        if one.is_own and ways <= _MOST_WAYS:
            with contextlib.suppress(ExportError, GuardError, TraceError):
                more, larger = sizes.breaks(exported(export.prepared, sized, export.dynamic), one.shapes, are_given)
                tried += more
                too_large += larger
    if too_large:
        _warn(
            f"the file is right where {joined(list(dict.fromkeys(too_large)))}; larger sizes weren't tried, since they "
            "need much memory"
        )
    if ways > _MOST_WAYS:
        _warn(
            f"the model branches at {ways} sizes without another result, and further branches were looked for behind "
            f"{_MOST_WAYS} of these"
        )


_MOST_WAYS = 8
"""How many other ways through a model are traced to find further conditions, since a trace can take a minute."""


def _is_refused_by_program_alone(case: Case, export: Export, sized: Example) -> bool:
    return not can_call(export.runnable, case.full(sized)) and can_call(_expected_by_probe(case, export), sized)


def _warn(untried: str) -> None:
    warnings.warn(
        f"{untried}, and the file doesn't refuse others. Limit the sizes by dynamic=, or use format='pt2', which does",
        PeftWarning,
        stacklevel=5,
    )


def _of_break(found: sizes.Break) -> str:
    holds = f": it is right where {found.condition}" if found.condition else ""
    limit = f"Limit the sizes, as in dynamic={found.mend}, or use" if found.mend else "Use"
    return (
        f"on inputs of the shapes {list(found.shapes)} the model decides otherwise than on the example, and what was "
        f"exported doesn't see that, but returns something else{holds}. {limit} format='pt2', which refuses others; "
        "check=False exports it all the same"
    )


def _is_silently_wrong(run: Runner, case: Case, example: Example, expected: Any, tolerance: float) -> bool:
    try:
        found = run(case, example)
    except Exception:  # each runtime has its own error classes; an error is a correct answer here
        return False
    try:
        return not _differences(found, expected, "") <= tolerance
    except ExportError:
        return True


def _is_accepted(case: Case, export: Export, example: Example) -> bool:
    return can_call(_expected_by_probe(case, export), example) and can_call(export.runnable, case.full(example))


def _expected_by_probe(case: Case, export: Export) -> Callable[..., Any]:
    return lambda *args, **kwargs: case.expected(export.probe, Example(args, kwargs))


def _of_difference(form: Format, export: Export, difference: float, tolerance: float, where: str) -> str:
    drawn = export.program.draws() if form.has_graph else []
    reason = f", since it draws random numbers by {joined(drawn)}, which can't be compared" if drawn else ""
    return (
        f"what was exported differs by {difference:.2g} from the model for {where}, where {tolerance:.0e} is "
        f"allowed{reason}; check=False exports it all the same"
    )


def _where(case: Case, example: Example) -> str:
    return f"{case.name or 'the model'} on inputs of the shapes {list(example.shapes)}"


def _compared(run: Runner, case: Case, example: Example, expected: Any) -> float:
    return _differences(_ran(run, case, example), expected, _where(case, example))


def _ran(run: Runner, case: Case, example: Example) -> Any:
    try:
        return run(case, example)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"what was exported can't be run for {_where(case, example)}, which the model itself can: "
            f"{in_short(error)}. Give example_inputs of such shapes, or dynamic=False"
        ) from error


def _differences(found: Any, expected: Any, where: str) -> float:
    """Returns the greatest difference of two results."""
    (ours, our_others), (theirs, their_others) = _leaves(found), _leaves(expected)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise ExportError(
            f"what was exported returns tensors of the shapes {[tuple(t.shape) for t in ours]} for {where}, and the "
            f"model {[tuple(t.shape) for t in theirs]}"
        )
    if our_others != their_others:
        raise ExportError(f"what was exported returns {our_others} for {where}, and the model {their_others}")
    return max((_difference(*pair) for pair in zip(ours, theirs, strict=True)), default=0.0)


def _leaves(value: Any) -> tuple[list[Tensor], list[Any]]:
    """Returns the tensors of a result, and its other values."""
    leaves = [leaf for leaf in pytree.tree_leaves(in_plain_containers(value)) if leaf is not None]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, [leaf for leaf in leaves if not isinstance(leaf, Tensor)]


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        return _difference(torch.view_as_real(found.to(expected.dtype)), torch.view_as_real(expected))
    ours, theirs = found.detach().to("cpu", torch.float64), expected.detach().to("cpu", torch.float64)
    if not torch.equal(_infinite(ours), _infinite(theirs)):
        return float("inf")
    difference = float(torch.where(torch.isfinite(theirs), ours - theirs, 0.0).abs().max())
    if not expected.is_floating_point():
        return difference  # not relative, since index 50,001 is a wrong result for 50,000
    return difference / max(1.0, float(torch.nan_to_num(theirs, 0.0, 0.0, 0.0).abs().max()))


def _infinite(values: Tensor) -> Tensor:
    """Returns 0 for finite elements, and a different number for each of NaN, ∞ and −∞."""
    return torch.where(torch.isfinite(values), 0.0, torch.nan_to_num(values, 1.0, 2.0, 3.0))


def _tolerance(model: Any) -> float:
    return HALF_TOLERANCE if any(p.dtype in HALVES for p in model.parameters()) else TOLERANCE
