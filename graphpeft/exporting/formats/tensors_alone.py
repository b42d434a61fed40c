"""Programs for runtimes that have tensors alone: without the other arguments, and with a name for each result."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import fx
from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallSignature
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from graphpeft._torch import pytree
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.program import Program


def of_tensors(program: ExportedProgram) -> ExportedProgram:
    """Returns a program with the tensors among its inputs as positional arguments, in their order.

    The two programs share their tensors and the symbols of their sizes.
    """
    signature = program.graph_signature
    fixed = {spec.arg.name for spec in signature.input_specs if _is_fixed(spec)}
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, nodes))
    for node, copied in nodes.items():
        copied.name = node.name  # a copy would rename an argument that is called as a builtin, such as input
        if node.name in fixed:
            graph.erase_node(copied)
    taken = [spec for spec in signature.input_specs if spec.arg.name not in fixed]
    [of_whole, *of_parts] = program.module_call_graph
    assert isinstance(of_whole.signature, ModuleCallSignature)
    names = [spec.arg.name for spec in taken if spec.kind is InputKind.USER_INPUT]
    arguments = [argument for argument in of_whole.signature.inputs if argument.name in names]
    in_spec = pytree.tree_structure((tuple(names), {}))
    called = dataclasses.replace(of_whole.signature, inputs=arguments, in_spec=in_spec, forward_arg_names=None)
    return ExportedProgram(
        program.graph_module,
        graph,
        ExportGraphSignature(taken, signature.output_specs),
        program.state_dict,
        dict(program.range_constraints),
        [dataclasses.replace(of_whole, signature=called), *of_parts],
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _is_fixed(spec: InputSpec) -> bool:
    return spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, TensorArgument)


def output_names(program: Program, runtime: str) -> list[str]:
    """Returns a name for each tensor of a program's result, made of keys and indices."""
    spec = program.exported.call_spec.out_spec
    assert spec is not None
    specs = program.exported.graph_signature.output_specs
    returned = [one for one in specs if one.kind.name in ("USER_OUTPUT", "USER_INPUT_MUTATION")]
    places = pytree.tree_leaves_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    names = [pytree.keystr(path) for path, _ in places]
    others = [
        name or "the result" for name, one in zip(names, returned, strict=True) if not _is_tensor_or_none(one.arg)
    ]
    if others:
        raise ExportError(
            f"the model returns what is no tensor: {', '.join(others)}. {runtime} has tensors alone: let the model "
            "return a tensor there, or nothing, or export with format='pt2'"
        )
    dotted = [re.sub(r"\W+", ".", name).strip(".") or "output" for name in names]
    taken = {one.name for one in program.inputs}
    return [
        f"output.{name}" if name[0].isdigit() or name in taken else name
        for name, one in zip(dotted, returned, strict=True)
        if isinstance(one.arg, TensorArgument)
    ]


def _is_tensor_or_none(argument: Any) -> bool:
    return isinstance(argument, TensorArgument) or getattr(argument, "value", argument) is None
