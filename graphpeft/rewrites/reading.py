"""Reads the nodes of one graph, in one mode, as operations in their one form; also calls of layers.

A form is one name of the function, its arguments by name, and its defaults: from the schemas of PyTorch's operators,
and for a layer from its own graph. So there is no table of functions or layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphpeft.graph import guards
from graphpeft.graph.dependencies import reads_metadata_only
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_forwards import has_forward, patched_forward
from graphpeft.graph.ops.linear import product_of
from graphpeft.graph.paths import join
from graphpeft.graph.settings import CHECKS, is_number
from graphpeft.graph.template import SIMPLE, VALUE, Template
from graphpeft.rewrites.spellings import as_transpose, bound, einsum_operands, transpose
from graphpeft.rewrites.values import MISSING, Attribute, Form, is_constant, rank_of, same, value_of

TemplateOf = Callable[[str], Template]
"""Returns the template of the layer at a path, or raises TraceError."""


class Reader:
    """The operations of one graph, in training or in evaluation.

    Attributes:
        reasons: Why the call of a layer isn't read as an operation.
        read_layers: The paths of layers whose calls are read as operations.
    """

    def __init__(
        self, graph: fx.Graph, root: nn.Module | None, training: bool, template_of: TemplateOf | None = None
    ) -> None:
        self.graph, self.root, self.training = graph, root, training
        self._template_of = template_of
        self._forms: dict[fx.Node, tuple[Form, ...]] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.read_layers: set[str] = set()

    def read(self, path: str) -> Any:
        """Returns what the graph's module has at a path; for a flag of training, the mode."""
        if path.rpartition(".")[2] == "training":
            return self.training
        value: Any = self.root
        for name in path.split("."):
            value = getattr(value, name, None)
        return value

    def has(self, path: str) -> bool:
        """Returns whether the graph's module has something at a path."""
        try:
            operator.attrgetter(path)(self.root)
        except AttributeError:
            return False
        return True

    def path(self, value: Any) -> str | None:
        """Returns the path of the attribute, or of the number of a flat graph, that a value is, or None."""
        if isinstance(value, fx.Node) and is_number(value):
            settings = self.read(str(value.all_input_nodes[0].all_input_nodes[0].target))
            return settings.reads.numbers[value.args[1]]
        return value.path if isinstance(value, Attribute) else None

    def constant(self, value: Any) -> Any:
        """Returns the present value of an attribute that is a plain one; any other value itself."""
        path = self.path(value)
        if path is None:
            return value
        present = self.read(path)
        is_plain = isinstance(present, SIMPLE) or (isinstance(present, tuple) and present and not _has_tensors(present))
        return value_of(present) if is_plain else value

    def is_sequence(self, value: Any) -> bool:
        """Returns whether a value is a sequence, such as a shape, of which a sum has an order."""
        if isinstance(value, Attribute):
            value = self.read(value.path)
        if not isinstance(value, fx.Node):
            return isinstance(value, list | tuple | str)
        if VALUE in value.meta:
            return isinstance(value.meta[VALUE], list | tuple)
        if value.op == "call_method" and value.target == "size":
            return len(value.args) + len(value.kwargs) == 1
        if value.target is operator.getitem:
            return isinstance(value.args[1], slice) and self.is_sequence(value.args[0])
        is_shape = value.target is getattr and value.args[1] == "shape"
        return bool(is_shape) or (value.target is operator.add and any(map(self.is_sequence, value.args)))

    def forms(self, value: Any) -> tuple[Form, ...]:
        """Returns the forms of a value, as the graph spells it first; () for a value that no operation computes."""
        if isinstance(value, Form):
            return (value,)
        if not isinstance(value, fx.Node) or value.op in ("placeholder", "get_attr", "output"):
            return ()
        if value not in self._forms:
            self._forms[value] = tuple(self._forms_of(value))
        return self._forms[value]

    def _forms_of(self, node: fx.Node) -> Iterator[Form]:
        if node.op == "call_module":
            form = self._of_layer(node)
            if form is not None:
                self.read_layers.add(str(node.target))
                yield form
                yield from self._as_products(form)
            return
        if node.target in CHECKS:
            return
        function, arguments, defaults, lengths = bound(node)
        x = arguments.get("input", arguments.get(0))
        swapped = as_transpose(function, arguments, rank_of(x, self.read)) if isinstance(function, str) else None
        if swapped is not None and self.root is None:
            # a pattern that says how many dimensions there are asks for as many
            yield Form("transpose", {**swapped.defaults, **swapped.arguments}, {}, {})
        elif swapped is not None:
            yield swapped
        spelled = Form(function, arguments, defaults, {}, lengths=lengths)
        yield spelled
        operands = einsum_operands(arguments.get(0), tuple(arguments.values())[1:]) if function == "einsum" else None
        if operands is not None:
            yield Form("matmul", {"input": operands[0], "other": operands[1]}, {}, {})
        if self.root is not None:
            yield from self._as_linear(node, spelled)
            yield from self._as_products(spelled)
            yield from self._with_bias(spelled)

    def _as_linear(self, node: fx.Node, spelled: Form) -> Iterator[Form]:
        """Yields the linear operation that a product with a matrix is."""
        product = product_of(node) if spelled.function != "linear" else None
        matrix = value_of(product.matrix) if product is not None else None
        if product is not None and rank_of(matrix, self.read) == 2 and isinstance(matrix, Attribute):
            weight = transpose(matrix) if product.transposed else matrix
            form = _linear(value_of(product.x), weight, value_of(product.bias))
            yield form
            yield from self._as_products(form)

    def _as_products(self, form: Form) -> Iterator[Form]:
        """Yields a linear operation spelled out: x @ wᵀ, or x @ wᵀ + b."""
        if form.function != "linear":
            return
        x, weight, bias = (form.given(name) for name in ("input", "weight", "bias"))
        twice = isinstance(weight, Form) and weight.function == "transpose"
        other = weight.arguments["input"] if twice else transpose(weight)
        product = Form("matmul", {"input": x, "other": other}, {}, form.assumes, form.inside)
        if bias is None:
            yield product
        else:
            yield Form("add", {"input": product, "other": bias}, {"alpha": 1}, form.assumes, form.inside)

    def _with_bias(self, form: Form) -> Iterator[Form]:
        """Yields the linear operation that the sum of a product and a vector of the module is."""
        if form.function != "add" or form.given("alpha") != 1:
            return
        one, other = form.arguments.get("input"), form.arguments.get("other")
        for product, bias in ((one, other), (other, one)):
            if not isinstance(product, fx.Node) or not isinstance(bias, Attribute) or rank_of(bias, self.read) != 1:
                continue
            plain = next((each for each in self.forms(product) if each.function == "linear"), None)
            if plain is not None and plain.given("bias") is None:
                linear = _linear(plain.arguments["input"], plain.arguments["weight"], bias)
                yield Form("linear", linear.arguments, linear.defaults, plain.assumes, (*plain.inside, product))

    # layers

    def _of_layer(self, node: fx.Node) -> Form | None:
        assert self.root is not None
        path = str(node.target)
        layer = self.root.get_submodule(path)
        if any(getattr(layer, name) for name in _HOOKS):
            self.reasons[node] = f"{path} has hooks, which an operation in its place wouldn't run"
            return None
        if patched_forward(layer) is not None or has_forward(layer):
            self.reasons[node] = f"{path} has a patched forward, which an operation wouldn't run"
            return None
        if isinstance(layer, _BATCH_NORMS):
            return self._of_batch_norm(node, path, layer)
        try:
            template = self._template_of(path) if self._template_of is not None else None
        except TraceError as error:
            self.reasons[node] = f"{path} has no graph: {error}"
            return None
        if template is None:
            return None
        return self._of_template(node, path, template)

    def _of_template(self, node: fx.Node, path: str, template: Template) -> Form | None:
        """Returns the one operation of a layer's graph, with what the call gives in place of its arguments."""
        graph = template.graphs[min(int(self.training), len(template.graphs) - 1)]
        computing = [each for each in graph.nodes if each.op.startswith("call_") and not _only_checks(each)]
        if len(computing) != 1 or graph.output_node().args[0] is not computing[0] or computing[0].op == "call_module":
            self.reasons[node] = f"{path} computes more than one operation in its own forward"
            return None
        given = _given(node, graph)
        assumes = _settings(template, graph, given, path) if given is not None else None
        if given is None or assumes is None:
            self.reasons[node] = f"{path} decides on its inputs"
            return None

        def outside(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return given[value]
            if isinstance(value, tuple):
                return tuple(map(outside, value))
            return Attribute(join(path, value.path)) if isinstance(value, Attribute) else value

        inner = bound(computing[0])
        arguments = {name: outside(value) for name, value in inner.arguments.items()}
        return Form(inner.function, arguments, inner.defaults, assumes | _without_hooks(path))

    def _of_batch_norm(self, node: fx.Node, path: str, layer: Any) -> Form | None:
        if self.training:
            self.reasons[node] = f"{path} changes its running statistics in training, which an operation wouldn't"
            return None
        if layer.running_mean is None or len(node.args) != 1 or type(layer).forward is not _BATCH_NORM:
            return None
        names = ("running_mean", "running_var", "weight", "bias")
        tensors = {name: Attribute(f"{path}.{name}") if getattr(layer, name) is not None else None for name in names}
        arguments = {"input": value_of(node.args[0]), **tensors, "training": Attribute(f"{path}.training")}
        absent = {f"{path}.{name}": None for name, tensor in tensors.items() if tensor is None}
        return Form(
            "batch_norm",
            {**arguments, "eps": Attribute(f"{path}.eps")},
            {"momentum": 0.1},
            absent | _without_hooks(path),
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _without_hooks(path: str) -> dict[str, Any]:
    return {f"{path}.{name}": {} for name in _HOOKS}


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BATCH_NORM = nn.BatchNorm2d.forward


def _linear(x: Any, weight: Any, bias: Any) -> Form:
    return Form("linear", {"input": x, "weight": weight, "bias": bias}, {"bias": None}, {})


def _given(node: fx.Node, graph: fx.Graph) -> dict[fx.Node, Any] | None:
    """Returns what a call gives for the arguments of a layer's graph; None if that isn't one value for each."""
    placeholders = [each for each in graph.nodes if each.op == "placeholder"]
    given = dict(zip(placeholders, value_of(node.args), strict=False))
    given |= {each: value_of(node.kwargs[each.target]) for each in placeholders if each.target in node.kwargs}
    given |= {each: each.args[0] for each in placeholders if each not in given and each.args}
    is_each = len(given) == len(placeholders) and len(node.args) + len(node.kwargs) <= len(given)
    return given if is_each and not any(str(each.target).startswith("*") for each in placeholders) else None


def _settings(template: Template, graph: fx.Graph, given: Mapping[fx.Node, Any], path: str) -> dict[str, Any] | None:
    """Returns the attributes of a layer that its graph takes for constants, by their paths outside.

    None if the graph checks more than these, on which an operation in its place would decide without a check.
    """
    held = {**template.fixed, **dict.fromkeys(template.absent)}
    for check in (node for node in graph.nodes if node.target in CHECKS):
        args: Any = check.args
        if check.target is guards.expect_each and all(each.op == "get_attr" for each in args[0]):
            held |= {str(each.target): value for each, value in zip(*args[:2], strict=True)}
        elif not _is_met(check.target, args, given):
            return None
    return {join(path, name): value for name, value in held.items()}


def _is_met(check: Any, args: tuple[Any, ...], given: Mapping[fx.Node, Any]) -> bool:
    """Returns whether what a call gives meets a check in every run."""
    value = given.get(args[0], MISSING) if isinstance(args[0], fx.Node) else MISSING
    if check is guards.expect_present:
        return value is not MISSING and value is not None
    return check is guards.expect and value is not MISSING and is_constant(value) and same(value, args[1])


def _only_checks(node: fx.Node) -> bool:
    """Returns whether a node checks a decision, or computes what only such nodes use."""
    if node.target in CHECKS:
        return True
    return bool(node.users) and reads_metadata_only(node) and all(map(_only_checks, node.users))


def _has_tensors(values: tuple[Any, ...]) -> bool:
    return any(isinstance(value, torch.Tensor | nn.Module) for value in values)
