"""Rewrites of any model by example: where a pattern is met, a replacement computes instead, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import fx, nn

from graphpeft.graph import in_place
from graphpeft.graph.copied_graphs import copy_graph
from graphpeft.graph.errors import TraceError
from graphpeft.graph.facts import line_of
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.paths import STATE, join, modules_by_path
from graphpeft.graph.template import Before, Graphs, Template, template_of, wear_template
from graphpeft.rewrites.match import Match
from graphpeft.rewrites.matching import Occurrence, Stop, occurrences
from graphpeft.rewrites.pattern import RewriteError, alternatives_of
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.replacing import replace_all
from graphpeft.rewrites.report import Matched, NearMiss, RewriteReport, Rewritten
from graphpeft.sites import example_runs
from graphpeft.sites.regions import Regions
from graphpeft.transaction import transaction
from graphpeft.wording import number_of

Where = Callable[[Match], str | None]
"""Returns why a match doesn't count, or None if it does."""

Expected = int | range
"""A number of matches, or several that are right."""


_FEWEST = 3
"""The number of places that are told where a pattern isn't met at all."""


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
        RewriteError: If the pattern computes nothing, several values, or with tensors of its own.

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
        self._alternatives = alternatives_of(pattern)
        self._replacement, self._where = replacement, where
        self.__name__ = self.name

    @property
    def alternatives(self) -> int:
        """The number of ways in which the pattern can be met."""
        return len(self._alternatives)

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
        """
        plan = _Plan(self, model, inside, example_inputs)
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
        """
        plan = _Plan(self, model, inside, example_inputs)
        report = Rewritten(self.name, tuple(plan.matches), tuple(plan.misses), plan.left, model)
        if not _is_expected(len(plan.matches), expects):
            wanted = "at least one" if expects is None else expects
            raise RewriteError(f"{number_of(len(plan.matches), 'match', 'matches')}, and not {wanted}; {report}")
        with transaction(model):
            for path, template in plan.templates.items():
                wear_template(plan.modules[path], template)
        return report


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

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        >>> _ = Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x))(model)
        >>> undo_rewrites(model)
        >>> type(model[1])
        <class 'torch.nn.modules.activation.GELU'>
    """
    modules = modules_by_path(model)
    _refuse_adapters(modules)
    with transaction(model):
        for module in modules.values():
            template = template_of(module)
            before = template.before if template is not None else None
            if before is None:
                continue
            if before.is_own_code:
                in_place.take_off(module, "graph")
            else:
                wear_template(module, before.template)


def _refuse_adapters(modules: Mapping[str, nn.Module]) -> None:
    adapted = [path for path, module in modules.items() if STATE in vars(module)]
    if adapted:
        raise RewriteError(
            f"{adapted[0] or 'the model'} has adapters, whose nodes stand in its graphs; rewrite a model before you "
            "adapt it, or after merge_and_unload()"
        )


class _Read(NamedTuple):
    """What is found in the graphs of a forward.

    Attributes:
        readers: The reader of the graph of each mode.
        found: The occurrences in each.
    """

    readers: list[Reader]
    found: list[list[Occurrence]]

    @property
    def keys(self) -> list[list[Any]]:
        """What tells the occurrences apart, for each mode."""
        return [[occurrence.key for occurrence in of_mode] for of_mode in self.found]


class _Plan:
    """What a rewrite does to a model; making it changes nothing.

    Args:
        rewrite: The rewrite.
        model: The model.
        inside: The paths of the modules whose forwards are read; None for all.
        example_inputs: Inputs of the model, or None.

    Attributes:
        modules: The modules of the model, by path.
        templates: The new template of each module that changes.
        matches: The matches.
        misses: The near misses, the nearest first.
        left: Why the forward of a module couldn't be read.
    """

    def __init__(
        self, rewrite: Rewrite, model: nn.Module, inside: Iterable[str] | None, example_inputs: ExampleInputs | None
    ) -> None:
        self.modules = modules_by_path(model)
        _refuse_adapters(self.modules)
        self._rewrite, self._model, self._example_inputs = rewrite, model, example_inputs
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

    def _paths(self, inside: Iterable[str] | None) -> list[str]:
        """Returns the paths of the modules whose forwards are read, the innermost first."""
        if isinstance(inside, str):
            raise RewriteError(f"inside is the text {inside!r}; pass a list of paths, [{inside!r}]")
        wanted = list(self.modules) if inside is None else list(inside)
        unknown = [path for path in wanted if path not in self.modules]
        if unknown:
            raise RewriteError(f"the model has no module {unknown[0]!r}")
        graphs = [path for path, module in self.modules.items() if isinstance(module, fx.GraphModule)]
        graphs = [path for path in graphs if not _was_own_code(self.modules[path])]
        within = [path for path in wanted if not any(path != graph and _is_in(path, graph) for graph in graphs)]
        called = [path for path in within if path in self._regions.modules and self._regions.is_called(path)]
        return sorted(called, key=lambda path: -path.count(".") - bool(path))

    def _template(self, path: str) -> Template:
        """Returns the template that the module at a path has, or would have.

        Raises:
            TraceError: If it can't have one.
        """
        if path not in self._read_templates:
            self._read_templates[path] = self._lifted(path)
        return self._read_templates[path]

    def _of_layer(self, path: str) -> Template:
        """Returns the template of a layer whose call is read as an operation.

        Raises:
            TraceError: If it has none, or if this rewrite has changed it, and isn't to meet what it has made itself.
        """
        if path in self.templates:
            raise TraceError("it is rewritten itself")
        return self._template(path)

    def _lifted(self, path: str) -> Template:
        module = self.modules[path]
        if self._example_inputs is not None and template_of(module) is None and not isinstance(module, fx.GraphModule):
            try:
                inputs = example_runs.inputs_of(self._model, module, self._example_inputs)
                return self._regions.recordings.lift(module, inputs)
            except example_runs.NotReachedError:
                pass  # its graph may do without an example
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
        self._note(read, path)
        if not any(read.found):
            return
        before = template.before or Before(template, template_of(module) is None and _runs_code(module))
        self.templates[path] = Template(self._rewritten(template, read), False, before=before)

    def _find(self, template: Template, path: str) -> _Read:
        read = _Read([], [])
        for training in (False, True):
            graph = template.graphs[min(int(training), len(template.graphs) - 1)]
            reader = Reader(graph, self.modules[path], training, lambda inner: self._of_layer(join(path, inner)))

            def judge(occurrence: Occurrence, reader: Reader = reader) -> tuple[str | None, Mapping[str, Any]]:
                match = Match(occurrence, reader, path)
                return (self._rewrite._where(match) if self._rewrite._where is not None else None), match.assumed

            found, misses = occurrences(self._rewrite._alternatives, reader, judge)
            read.readers.append(reader)
            read.found.append(found)
            for node, size, stop in misses:
                self._note_miss(path, node, size, stop)
        return read

    def _rewritten(self, template: Template, read: _Read) -> Graphs:
        """Returns the new graphs: one for each mode if they differ."""
        same = len(template.graphs) == 1 and read.keys[0] == read.keys[1]
        modes = (0,) if same else (0, 1)
        graphs = []
        for mode in modes:
            graph = copy_graph(read.readers[mode].graph)
            replace_all(graph, read.readers[mode], read.found[mode], self._rewrite._replacement, self._rewrite.name)
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


def _runs_code(module: nn.Module) -> bool:
    return not isinstance(module, fx.GraphModule)


def _was_own_code(module: nn.Module) -> bool:
    template = template_of(module)
    return template is not None and template.before is not None and template.before.is_own_code


def _is_in(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")
