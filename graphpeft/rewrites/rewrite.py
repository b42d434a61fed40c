"""Rewrites of any model by example: where a pattern is met, a replacement computes instead, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import modules_by_path
from graphpeft.graph.template import template_of, wear_template
from graphpeft.rewrites.pattern import RewriteError, alternatives_of
from graphpeft.rewrites.plan import Example, Plan, Where, refuse_adapters
from graphpeft.rewrites.report import RewriteReport, Rewritten
from graphpeft.transaction import transaction
from graphpeft.wording import number_of

Expected = int | range
"""A number of matches, or several that are right."""


class Rewrite:
    """A rewrite by example: the operations of `pattern`, in any spelling, become those of `replacement`.

    Calling it rewrites a model in place, as adapters do: the modules remain the objects that they are, with their
    classes, hooks and tensors, and run other graphs. It is a pass of `torch.fx`, too.

    Args:
        pattern: A function in plain PyTorch. Its arguments stand for any values; those after ``*`` for numbers and
            other constants alone. Or `either` of several.
        replacement: A function that computes the new value from the arguments that it names.
        where: Returns why a match doesn't count, or None.
        name: The name in reports and pictures; None for that of the pattern.

    Attributes:
        name: The name.
        alternatives: The number of ways in which the pattern can be met.

    Raises:
        RewriteError: If the pattern computes nothing or several values, computes with tensors of its own, or decides on
            values.

    Examples:
        >>> faster = Rewrite(lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh"), name="faster_gelu")
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        >>> [(matched.module, matched.node) for matched in faster(model, expects=1).matches]
        [('1', 'gelu')]
    """

    def __init__(
        self,
        pattern: Callable[..., Any],
        replacement: Callable[..., Any],
        *,
        where: Where | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or getattr(replacement, "__name__", "rewrite").replace("<lambda>", "rewrite")
        self._example = Example(self.name, alternatives_of(pattern), replacement, where)
        self.__name__ = self.name

    @property
    def alternatives(self) -> int:
        """The number of ways in which the pattern can be met."""
        return len(self._example.alternatives)

    def find(
        self,
        model: nn.Module,
        *,
        inside: Iterable[str] | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> RewriteReport:
        """Returns where a model meets the pattern, and where it almost does; the model isn't changed.

        Args:
            model: Any module without adapters.
            inside: The paths of the modules whose forwards are read; None for all.
            example_inputs: A tuple of positional or a dict of keyword arguments of the model, for forwards that decide
                on their inputs, and for patterns that depend on shapes.

        Returns:
            The report.

        Raises:
            RewriteError: If the model has adapters.
            TypeError: If the model is no module, if `where` returns neither a text nor None, or if the model doesn't
                take the example inputs.
        """
        _check_module(model)
        plan = Plan(self._example, model, inside, example_inputs)
        return RewriteReport(self.name, tuple(plan.matches), tuple(plan.misses), plan.left)

    def __call__(
        self,
        model: nn.Module,
        *,
        expects: Expected | None = None,
        inside: Iterable[str] | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> Rewritten:
        """Rewrites a model in place.

        The forward of each module is read by itself, the innermost first. A graph of `trace` is one forward.

        Args:
            model: Any module without adapters.
            expects: The number of matches, or a range of numbers that are right; None for any number from one on.
            inside: The paths of the modules whose forwards are read; None for all.
            example_inputs: A tuple of positional or a dict of keyword arguments of the model, for forwards that decide
                on their inputs, and for patterns that depend on shapes.

        Returns:
            The report; its `graph_module` is the model.

        Raises:
            RewriteError: If the number of matches is another one, if the model has adapters, or if the replacement
                can't stand in a graph; the model is as it was.
            TypeError: As `find`, and if `expects` is neither a number nor a range.
        """
        _check_module(model)
        if expects is not None and (isinstance(expects, bool) or not isinstance(expects, int | range)):
            raise TypeError(f"expects is a number of matches, or a range of numbers, and not {expects!r}")
        with transaction(model):
            plan = Plan(self._example, model, inside, example_inputs)
            report = Rewritten(self.name, tuple(plan.matches), tuple(plan.misses), plan.left, model)
            if not _is_expected(len(plan.matches), expects):
                wanted = "at least one" if expects is None else expects
                raise RewriteError(f"{number_of(len(plan.matches), 'match', 'matches')}, and not {wanted}; {report}")
            for path, template in plan.templates.items():
                wear_template(plan.modules[path], template)
        return report


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a rewrite takes a module, and not a {type(model).__name__}")


def _is_expected(number: int, expects: Expected | None) -> bool:
    if expects is None:
        return number > 0
    return number in expects if isinstance(expects, range) else number == expects


def undo_rewrites(model: nn.Module) -> None:
    """Takes all rewrites of a model back: its modules run what they ran before the first one.

    Args:
        model: A model, or a copy of one that was rewritten.

    Raises:
        RewriteError: If the model has adapters; the model is as it was.
        TypeError: If the model is no module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        >>> _ = Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x))(model)
        >>> undo_rewrites(model)
        >>> type(model[1])
        <class 'torch.nn.modules.activation.GELU'>
    """
    _check_module(model)
    with transaction(model):
        modules = modules_by_path(model)
        refuse_adapters(modules)
        for module in modules.values():
            template = template_of(module)
            before = template.before if template is not None else None
            if before is None:
                continue
            if before.is_worn:
                # a copy of the model knows the same template, and graphs may be edited
                wear_template(module, before.template.for_copy())
            else:
                in_place.take_off(module, "graph")
