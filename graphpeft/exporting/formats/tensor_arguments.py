"""A program that takes tensors alone, for runtimes that would ask for the other arguments, too, which are fixed."""

from __future__ import annotations

import dataclasses

from torch import fx
from torch.export import ExportedProgram, ExportGraphSignature, ModuleCallSignature
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from graphpeft._torch import pytree


def of_tensors(program: ExportedProgram) -> ExportedProgram:
    """Returns a program with the tensors among its inputs as positional arguments, in their order.

    The two programs share their tensors and the symbols of their sizes.

    Args:
        program: The program.
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
