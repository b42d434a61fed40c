"""Finds the site that breaks a law of adapters, and adds the site and its nodes to the error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.testing.comparing import LawError
from graphpeft.testing.lines import lines_of
from graphpeft.testing.runs import seed_generators
from graphpeft.wording import joined

Build = Callable[[], nn.Module]

_REFUSALS = (AdaptError, GuardError, TraceError)
"""Errors that say by themselves why a model or a config is refused; no law is broken."""


def blames_a_site(law: Callable[..., None]) -> Callable[..., None]:
    """Makes the errors of a law name the site that breaks it; other exceptions become LawErrors, too."""

    @functools.wraps(law)
    def checked(build: Build, config: PeftConfig, inputs: ExampleInputs, *args: Any, **kwargs: Any) -> None:
        seed_generators()  # so that a failure comes again: adapters draw their first values
        try:
            law(build, config, inputs, *args, **kwargs)
        except _REFUSALS:
            raise
        except Exception as error:
            failure = error
        else:
            return
        # not while the error is handled: hypothesis tells failures apart by the errors in whose handling they arise,
        # and the files of graphs' code have other names in each run
        what = str(failure) if isinstance(failure, LawError) else f"{type(failure).__name__}: {failure}"
        breaks = functools.partial(_breaks, lambda narrowed: law(build, narrowed, inputs, *args, **kwargs))
        raise LawError(f"{what}\n{_blame(build, config, inputs, breaks)}") from failure

    return checked


def _breaks(check: Callable[[PeftConfig], None], config: PeftConfig) -> bool:
    seed_generators()
    try:
        check(config)
    except _REFUSALS:
        return False
    except Exception:
        return True
    return False


def _blame(build: Build, config: PeftConfig, inputs: ExampleInputs, breaks: Callable[[PeftConfig], bool]) -> str:
    """Returns the site that breaks the law by itself, with its nodes, or why there is no such site."""
    try:
        model = get_peft_model(build(), config, example_inputs=inputs)
    except Exception:
        return "the model can't be adapted at all"
    report = model.adapter_report()
    names = [adapted.site.name for adapted in report.adapted]
    if not names:
        return f"the adapter has no site; it trains {joined(report.fully_trained)}"
    while len(names) > 1:
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        guilty = (half for half in halves if _breaks_at(build, config, inputs, half, breaks))
        half = next(guilty, None)
        if half is None:
            return f"no site breaks it by itself, but these together do: {joined(names)}"
        names = half
    adapted = next(adapted for adapted in report.adapted if adapted.site.name == names[0])
    return describe(adapted, model, config.method)


def _breaks_at(
    build: Build, config: PeftConfig, inputs: ExampleInputs, names: Sequence[str], breaks: Callable[[PeftConfig], bool]
) -> bool:
    """Returns whether the law is broken when only sites with these names are adapted."""
    try:
        model = get_peft_model(build(), config, example_inputs=inputs, where=lambda site: site.name in names)
    except AdaptError:
        return False  # no config names exactly these sites
    return breaks(model.peft_config["default"])


def describe(adapted: AdaptedSite, model: nn.Module, method: str) -> str:
    """Describes a site with its rule, and the lines of the graph with the operation and the rule's nodes."""
    site = adapted.site
    head = f"at the site {site.name} ({site.op.__name__}, {site.size}), by {adapted.rule!r} of {method}"
    shown = _nodes_shown(adapted, model.get_submodule(site.region))
    return f"{head}\nin the graph of {site.region or 'the model'}:\n{shown}"


def _nodes_shown(adapted: AdaptedSite, region: nn.Module) -> str:
    template = template_of(region)
    if template is None or not template.slots:
        return "    its nodes aren't there: the adapter isn't active"
    index = template.index(region)
    graph = template.graphs[index]
    operations = set(adapted.site.nodes[index])
    own = tuple(name for slot in template.slots for name in adapted.in_slot(slot).values())
    tags = [node.meta[TAG] for node in graph.nodes if TAG in node.meta]
    operations |= {tag.over for tag in tags if tag.site in operations and tag.over is not None}

    def is_of_rule(node: fx.Node) -> bool:
        is_parameter = node.op == "get_attr" and str(node.target).endswith(own)
        return TAG in node.meta and node.meta[TAG].site in operations and not is_parameter

    return lines_of([node for node in graph.nodes if node.name in operations or is_of_rule(node)], graph)
