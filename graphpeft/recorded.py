"""Functions that become one node of a graph where code that runs on proxies calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.fx as fx


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes calls of `function` with proxies one node of their graph."""

    @functools.wraps(function)
    def record(*args: Any) -> Any:
        proxy = next((argument for argument in args if isinstance(argument, fx.Proxy)), None)
        return function(*args) if proxy is None else proxy.tracer.create_proxy("call_function", record, args, {})

    return record
