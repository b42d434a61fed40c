"""Names for the tensors that an exported model returns, where a format has names for them."""

from __future__ import annotations

import re
from typing import Any

from torch.export.graph_signature import TensorArgument

from graphpeft._torch import pytree
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.program import Program


def output_names(program: Program, runtime: str) -> list[str]:
    """Returns a name for each tensor of a program's result, made of keys and indices.

    Args:
        program: The program.
        runtime: The name of what is to run it, for errors.

    Raises:
        ExportError: If the result has other values than tensors.
    """
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
