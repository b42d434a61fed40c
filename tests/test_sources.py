"""The source of a function's code is read as `inspect` reads it, and faster."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from graphpeft.code import attribute_paths

pytestmark = pytest.mark.quick("code")


@functools.lru_cache
def decorated(x: Any) -> Any:
    return x.weight


async def awaited(x: Any) -> Any:
    return x.weight


class Shown:
    @property
    def value(self) -> Any:
        return (
            self
        )  # fmt: skip

    @contextlib.contextmanager
    def within(self) -> Any:
        yield self


NESTED = [lambda x: x.weight, lambda x: x.bias]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "a decorator": decorated.__wrapped__,
    "async": awaited,
    "a property": Shown.value.fget,  # type: ignore[dict-item]
    "a context": Shown.within.__wrapped__,  # type: ignore[attr-defined]
    "a lambda": NESTED[0],
    "another lambda of the line": NESTED[1],
    "PyTorch's": nn.MultiheadAttention.forward,
    "Transformers'": transformers.models.llama.modeling_llama.LlamaAttention.forward,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_source_is_that_of_inspect(function: Any) -> None:
    assert attribute_paths._source_of(function.__code__) == inspect.getsource(function.__code__)


def test_code_without_a_file_has_no_source() -> None:
    found: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.up(x)", found)
    with pytest.raises(OSError, match="could not"):
        attribute_paths._source_of(found["forward"].__code__)
    assert attribute_paths.tree_of(found["forward"].__code__) is None


def test_all_nodes_are_found_each_with_the_one_around_it() -> None:
    tree = ast.parse(inspect.getsource(torch.nn.functional.multi_head_attention_forward))
    found = attribute_paths._nodes_in(tree)
    contexts = (ast.Load, ast.Store, ast.Del)
    assert [node for node, _ in found] == [node for node in ast.walk(tree) if not isinstance(node, contexts)]
    for node, parent in found[1:]:
        assert any(child is node for child in ast.iter_child_nodes(parent))
