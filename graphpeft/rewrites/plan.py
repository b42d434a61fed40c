"""The plan of a rewrite of a model: its matches, and the new graphs; making the plan changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import fx, nn

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.source import read_anew, uses_in_forward
from graphpeft.graph import in_place
from graphpeft.graph.copied_graphs import copy_graph
from graphpeft.graph.dependencies import line_of
from graphpeft.graph.errors import TraceError
from graphpeft.graph.holders import has_holders
from graphpeft.graph.hosts.patched_code import class_of_forward
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import STATE, join, modules_by_path, within
from graphpeft.graph.template import Before, Graphs, Template, template_of
from graphpeft.rewrites.match import Match
from graphpeft.rewrites.matching import Occurrence, Stop, occurrences
from graphpeft.rewrites.pattern import Alternative, RewriteError
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.replacing import replace_all
from graphpeft.rewrites.report import Matched, NearMiss
from graphpeft.sites import example_runs
from graphpeft.sites.regions import Regions

Where = Callable[[Match], str | None]
"""Returns why a match doesn't count, or None if it does."""

_FEWEST = 3
"""The number of places that are told where a pattern isn't met at all."""


class Example(NamedTuple):
    """A rewrite by example.

    Attributes:
        name: Its name.
        alternatives: The ways in which its pattern can be met.
        replacement: The code that computes the new value.
        where: Its condition, or None.
    """

    name: str
    alternatives: tuple[Alternative, ...]
    replacement: Callable[..., Any]
    where: Where | None


def refuse_adapters(modules: Mapping[str, nn.Module]) -> None:
    """Raises RewriteError if a model has adapters."""
    adapted = [path for path, module in modules.items() if STATE in vars(module) or has_holders(module)]
    if adapted:
        raise RewriteError(
            f"{adapted[0] or 'the model'} has adapters, whose nodes stand in its graphs; rewrite a model before you "
            "adapt it, or after merge_and_unload()"
        )


class _Read(NamedTuple):
    """The occurrences in the graphs of a forward.

    Attributes:
        readers: The reader of the graph of each mode.
        found: The occurrences in each.
    """

    readers: list[Reader]
    found: list[list[Occurrence]]

    @property
    def keys(self) -> list[list[Any]]:
        """The keys that tell the occurrences apart, for each mode."""
        return [[occurrence.key for occurrence in of_mode] for of_mode in self.found]


class Plan:
    """The plan of a rewrite of a model; making it changes nothing.

    Attributes:
        modules: The modules of the model, by path.
        templates: The new template of each module that changes.
        matches: The matches.
        misses: The near misses, the nearest first.
        left: Why the forward of a module couldn't be read.
    """

    def __init__(
        self, example: Example, model: nn.Module, inside: Iterable[str] | None, example_inputs: ExampleInputs | None
    ) -> None:
        read_anew()
        self.modules = modules_by_path(model)
        refuse_adapters(self.modules)
        self._example, self._model, self._example_inputs = example, model, example_inputs
        self._regions = Regions(model, {}, example_inputs)
        self._read_templates: dict[str, Template] = {}
        self.templates: dict[str, Template] = {}
        self.matches: list[Matched] = []
        self.misses: list[NearMiss] = []
        self.left: dict[str, str] = {}
        self._met: set[tuple[str, str]] = set()
        self._called: set[str] = set()
        self._read_as_calls: set[str] = set()
        for path in self._paths(inside):
            self._rewrite_module(path)
        self.misses = self._nearest()
        # a layer without a graph is read where it is called
        self.left = {path: reason for path, reason in self.left.items() if path not in self._read_as_calls}

    @functools.cached_property
    def _inputs(self) -> dict[str, ExampleInputs]:
        """The inputs that the example gives to each module that it reaches, by path."""
        if self._example_inputs is None:
            return {}
        called = {path: module for path, module in self._regions.modules.items() if self._regions.is_called(path)}
        return example_runs.inputs_of_each(self._model, called, self._example_inputs)

    def _paths(self, inside: Iterable[str] | None) -> list[str]:
        """Returns the paths of the modules whose forwards are read, the innermost first."""
        if isinstance(inside, str):
            raise RewriteError(f"inside is the text {inside!r}; pass a list of paths, [{inside!r}]")
        wanted = list(self.modules) if inside is None else list(inside)
        unknown = [path for path in wanted if path not in self.modules]
        if unknown:
            raise RewriteError(f"the model has no module {unknown[0]!r}")
        graphs = [path for path, module in self.modules.items() if _is_graph(module)]
        within = [path for path in wanted if not any(path != graph and _is_in(path, graph) for graph in graphs)]
        called = [path for path in within if path in self._regions.modules and self._regions.is_called(path)]
        return sorted(called, key=lambda path: -path.count(".") - bool(path))

    def _template(self, path: str) -> Template:
        """Returns the template that the module at a path has, or would have."""
        if path not in self._read_templates:
            self._read_templates[path] = self._lifted(path)
        return self._read_templates[path]

    def _of_layer(self, path: str) -> Template:
        """Returns the template of a layer whose call is read as an operation."""
        if path in self.templates:
            raise TraceError("it is rewritten itself")
        return self._template(path)

    def _lifted(self, path: str) -> Template:
        module = self.modules[path]
        has_graph = template_of(module) is not None or isinstance(module, fx.GraphModule)
        # an example would fix one of several ways
        if path in self._inputs and not has_graph and len(self._regions.ways.get(path, [])) < 2:
            return self._regions.recordings.lift(module, self._inputs[path])
        template = self._regions.template(path)
        if template is None:
            raise self._regions.errors[path]
        return template

    def _rewrite_module(self, path: str) -> None:
        module = self.modules[path]
        try:
            template = self._template(path)
        except TraceError as error:
            self.left[path] = str(error)
            return
        read = self._find(template, path)
        past = self._read_past(path) if any(read.found) else None
        if past is not None:
            self.left[path] = past
            return
        self._note(read, path)
        if not any(read.found):
            return
        before = template.before or Before(template, template_of(module) is not None)
        self.templates[path] = Template(self._rewritten(template, read, path), False, before=before)

    def _read_past(self, path: str) -> str | None:
        """Returns that other code computes with a module's tensors without calling it, if it does."""
        around = path
        while around:
            around = around.rpartition(".")[0]
            uses = uses_in_forward(class_of_forward(self.modules[around]))
            paths = [f"{used}." for used in uses.read]
            for name in self.modules[path]._parameters:
                tensor = f"{join(within(path, around), name)}."
                if not uses.read_elsewhere.isdisjoint((name, ANY)) or any(used.startswith(tensor) for used in paths):
                    return f"its {name} is read by {around or 'the model'}, which needn't call it"
        return None

    def _find(self, template: Template, path: str) -> _Read:
        read = _Read([], [])
        for training in (False, True):
            graph = template.graphs[min(int(training), len(template.graphs) - 1)]
            reader = Reader(graph, self.modules[path], training, lambda inner: self._of_layer(join(path, inner)))

            def judge(occurrence: Occurrence, reader: Reader = reader) -> tuple[str | None, Mapping[str, Any]]:
                match = Match(occurrence, reader, path)
                return _reason(self._example, match), match.assumed

            found, misses = occurrences(self._example.alternatives, reader, judge)
            read.readers.append(reader)
            read.found.append(found)
            for node, size, stop in misses:
                self._note_miss(path, node, size, stop)
        return read

    def _rewritten(self, template: Template, read: _Read, path: str) -> Graphs:
        """Returns the new graphs: one for each mode if they differ."""
        same = len(template.graphs) == 1 and read.keys[0] == read.keys[1]
        modes = (0,) if same else (0, 1)
        graphs = []
        for mode in modes:
            graph = copy_graph(read.readers[mode].graph)
            found, example = read.found[mode], self._example
            replace_all(graph, read.readers[mode], found, example.replacement, example.name, is_root=not path)
            graph.lint()
            graphs.append(copy_graph(graph))
        return tuple(graphs)

    def _note(self, read: _Read, path: str) -> None:
        modes: dict[str, list[str]] = {}
        lines: dict[str, str] = {}
        for mode, found in zip(("evaluation", "training"), read.found, strict=True):
            for occurrence in found:
                modes.setdefault(occurrence.result.name, []).append(mode)
                lines.setdefault(occurrence.result.name, line_of(occurrence.result))
        for node, of_node in modes.items():
            self.matches.append(Matched(path, node, lines[node], "both" if len(of_node) == 2 else of_node[0]))

        of_modes = [occurrence for found in read.found for occurrence in found]
        nodes = [node for occurrence in of_modes for node in occurrence.state.nodes]
        self._read_as_calls |= {join(path, layer) for reader in read.readers for layer in reader.read_layers}
        self._met |= {(path, node.name) for node in nodes}
        self._called |= {join(path, str(node.target)) for node in nodes if node.op == "call_module"}

    def _nearest(self) -> list[NearMiss]:
        """Returns the near misses that are news: most of the pattern is met, or nothing else is known."""
        misses = [miss for miss in self.misses if miss.module not in self._called]
        news = [miss for miss in misses if (miss.module, miss.node) not in self._met]
        news.sort(key=lambda miss: miss.size - miss.matched)
        near = [miss for miss in news if 2 * miss.matched > miss.size]
        return near if near or self.matches else news[:_FEWEST]

    def _note_miss(self, path: str, node: fx.Node, size: int, stop: Stop) -> None:
        if stop.node.op == "call_module" and join(path, str(stop.node.target)) in self.templates:
            return
        miss = NearMiss(path, node.name, stop.matched, size, stop.node.name, line_of(stop.node), stop.reason)
        if miss not in self.misses:
            self.misses.append(miss)


def _reason(example: Example, match: Match) -> str | None:
    """Returns why the condition of a rewrite refuses a match, or None if it doesn't."""
    reason = example.where(match) if example.where is not None else None
    if reason is not None and not isinstance(reason, str):
        raise TypeError(
            f"where of {example.name} returns {reason!r}; it returns why a match doesn't count, or None if it does"
        )
    return reason


def _is_graph(module: nn.Module) -> bool:
    """Returns whether a module is a graph by itself, and no module with code of its own that was rewritten."""
    template = template_of(module)
    before = template.before if template is not None else None
    was_given_graph = before is not None and not before.is_worn
    return issubclass(in_place.original_class(module), fx.GraphModule) or (template is not None and not was_given_graph)


def _is_in(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")
