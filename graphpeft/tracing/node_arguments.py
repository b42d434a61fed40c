"""Decides which objects a node can have as arguments."""

from __future__ import annotations

import collections
from dataclasses import fields
from typing import Any

import torch
import torch.fx as fx

from graphpeft.code.reach import is_iterator
from graphpeft.graph.errors import TraceError
from graphpeft.graph.template import VALUE
from graphpeft.tracing.linting import holds_proxy


def refuse_argument(value: Any) -> None:
    """Raises TraceError for an argument that no graph can hold."""
    if isinstance(value, torch.Generator):
        raise TraceError("it draws random numbers with a torch.Generator, which a graph can't hold")
    if is_iterator(value):
        raise TraceError(f"a {type(value).__name__} goes through the graph, which can't hold it; make a list of it")
    if isinstance(value, collections.defaultdict):
        raise TraceError("a defaultdict goes through the graph, which can't hold its function; use a dict")


def refuse_object_with_traced_values(value: Any) -> None:
    """Raises TraceError for an object that isn't a container and holds proxies."""
    if holds_proxy(value):
        raise TraceError(
            f"a {type(value).__name__} that holds traced tensors goes through the graph, which can't hold it; if "
            "it is a cache, pass use_cache=False in example_inputs"
        ) from None


def traced_fields(value: Any) -> dict[str, Any]:
    """Returns the fields from which a graph rebuilds a dataclass object; none if the object holds no proxy."""
    values = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    defaults = {field.name for field in fields(value) if field.default is None}
    if not any(map(holds_proxy, values.values())):
        return {}
    return {name: held for name, held in values.items() if held is not None or name not in defaults}


def plain_key(key: Any) -> Any:
    """Returns a dictionary key, with a proxy replaced by its value: hashing the proxy has added a check."""
    value = key.node.meta.get(VALUE, key) if isinstance(key, fx.Proxy) else key
    return key if isinstance(value, torch.Tensor) else value
