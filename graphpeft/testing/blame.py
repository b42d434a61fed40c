"""Which site, or which nodes, break a law: what its error tells beside what it found."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft._torch import pytree
from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.report import listed

Build = Callable[[], nn.Module]

_NO_LAWS_MATTER = (AdaptError, GuardError, TraceError)
"""What says by itself that a model or a config can't be taken, and why."""

_MOST_LINES = 12


class LawError(AssertionError):
    """A law that doesn't hold."""


def blames_a_site(law: Callable[..., None]) -> Callable[..., None]:
    """Lets the error of a law of adapters name the site that breaks it; other exceptions become such errors."""

    @functools.wraps(law)
    def checked(build: Build, config: PeftConfig, inputs: ExampleInputs, *args: Any, **kwargs: Any) -> None:
        try:
            law(build, config, inputs, *args, **kwargs)
        except _NO_LAWS_MATTER:
            raise
        except Exception as error:
            what = str(error) if isinstance(error, LawError) else f"{type(error).__name__}: {error}"
            breaks = functools.partial(_breaks, lambda narrowed: law(build, narrowed, inputs, *args, **kwargs))
            raise LawError(f"{what}\n{_blame(build, config, inputs, breaks)}") from error

    return checked


def _breaks(check: Callable[[PeftConfig], None], config: PeftConfig) -> bool:
    try:
        check(config)
    except _NO_LAWS_MATTER:
        return False
    except Exception:
        return True
    return False


def _blame(build: Build, config: PeftConfig, inputs: ExampleInputs, breaks: Callable[[PeftConfig], bool]) -> str:
    """Returns which site breaks the law by itself, as far as that can be told, with its nodes."""
    try:
        model = get_peft_model(build(), config, example_inputs=inputs)
    except Exception:
        return "the model can't be adapted at all"
    report = model.adapter_report()
    names = [adapted.site.name for adapted in report.adapted]
    while len(names) > 1:
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        guilty = (half for half in halves if _breaks_at(build, config, inputs, half, breaks))
        half = next(guilty, None)
        if half is None:
            return f"no site breaks it by itself, but these together do: {listed(names)}"
        names = half
    adapted = next(adapted for adapted in report.adapted if adapted.site.name == names[0])
    return describe(adapted, model, config.method)


def _breaks_at(
    build: Build, config: PeftConfig, inputs: ExampleInputs, names: Sequence[str], breaks: Callable[[PeftConfig], bool]
) -> bool:
    """Tells whether the law is broken where only sites of these names are adapted."""
    try:
        model = get_peft_model(build(), config, example_inputs=inputs, where=lambda site: site.name in names)
    except AdaptError:
        return False  # of these sites alone no config speaks
    return breaks(model.peft_config["default"])


def first_difference(model: nn.Module, traced: nn.Module, run: Callable[[nn.Module], Any]) -> str:
    """Returns the nodes of a traced model between the last layer whose value is the model's and the first where not.

    Args:
        model: The model.
        traced: Its trace, of modules of its own.
        run: Runs either.
    """
    template = template_of(traced)
    assert template is not None
    index = template.index(traced)
    graph, source = template.graphs[index], template.codes[index].src.splitlines()
    layers = [node for node in graph.nodes if node.op == "call_module"]
    paths = {str(node.target) for node in layers}
    found, expected = (_values_of_layers(each, paths, run) for each in (traced, model))
    equal = list(itertools.takewhile(_are_equal, zip(found, expected, strict=False)))
    nodes = list(graph.nodes)
    first = nodes.index(layers[len(equal) - 1]) + 1 if equal else 0
    behind = nodes.index(layers[len(equal)]) + 1 if len(equal) < len(layers) else len(nodes)
    lines = [line for node in nodes[first:behind] if (line := _of_node(node.name, source))]
    more = [f"… and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    shown = "\n".join(f"    {line}" for line in lines[:_MOST_LINES] + more)
    return f"the first difference is in the trace's nodes\n{shown}"


def _values_of_layers(
    model: nn.Module, paths: Collection[str], run: Callable[[nn.Module], Any]
) -> list[tuple[str, Any]]:
    """Returns what the modules at `paths` return in a run, in the order of their calls."""
    values: list[tuple[str, Any]] = []
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _, __, value, path=path: values.append((path, pytree.tree_map_only(Tensor, Tensor.clone, value)))
        )
        for path in paths
    ]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return values


def _are_equal(pair: tuple[tuple[str, Any], tuple[str, Any]]) -> bool:
    (path, value), (other_path, other) = pair
    (left, tree), (right, other_tree) = pytree.tree_flatten(value), pytree.tree_flatten(other)
    return (path, tree) == (other_path, other_tree) and all(
        torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def describe(adapted: AdaptedSite, model: nn.Module, method: str) -> str:
    """Returns a site with its rule, and the lines of the graph that are the operation and the rule's nodes there.

    Args:
        adapted: The site.
        model: The adapted model.
        method: The method's name.
    """
    site = adapted.site
    head = f"at the site {site.name} ({site.op.__name__}, {site.size}), by {adapted.rule!r} of {method}"
    lines = _lines(adapted, model.get_submodule(site.region))
    more = [f"… and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    shown = "\n".join(f"    {line}" for line in lines[:_MOST_LINES] + more)
    return f"{head}\nin the graph of {site.region or 'the model'}:\n{shown}"


def _lines(adapted: AdaptedSite, region: nn.Module) -> list[str]:
    template = template_of(region)
    if template is None or not template.slots:
        return ["its nodes aren't there: the adapter isn't active"]
    index = template.index(region)
    operations = set(adapted.site.nodes[index])
    own = {name for slot in template.slots for name in adapted.in_slot(slot).values()}
    source = template.codes[index].src.splitlines()
    tags = [node.meta[TAG] for node in template.graphs[index].nodes if TAG in node.meta]
    operations |= {tag.over for tag in tags if tag.site in operations and tag.over is not None}
    lines = []
    for node in template.graphs[index].nodes:
        is_of_rule = TAG in node.meta and node.meta[TAG].site in operations
        is_parameter = node.op == "get_attr" and str(node.target).rpartition(".")[2] in own
        if node.name in operations or (is_of_rule and not is_parameter):
            lines += [_of_node(node.name, source)]
    return [line for line in lines if line]


def _of_node(name: str, source: Sequence[str]) -> str:
    line = next((line.strip() for line in source if re.match(rf"\s*{re.escape(name)} = ", line)), "")
    return line.partition(";  ")[0]  # what follows only forgets values
