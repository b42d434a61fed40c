"""The module of Shadow's small model: of the class that runs the large model's layers, with fewer of them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphpeft._torch import without_compiler
from graphpeft.graph import in_place
from graphpeft.methods.prompts.caches import CACHES

_AROUND = ("model", "transformer", "decoder")
_STACKS = ("layers", "h")

SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""The names of a model's sizes in its config, by the names of the method's options for them."""


def stack_of(model: nn.Module) -> tuple[str, str]:
    """Returns the path of the module that runs a model's layers, and the name of the list of these in it."""
    for around in _AROUND:
        outer = model._modules.get(around)
        if outer is None:
            continue
        inner = outer._modules.get("decoder")
        for path, module in ((f"{around}.decoder", inner), (around, outer)):
            name = None if module is None else _stack_in(module)
            if name is not None:
                return path, name
    name = _stack_in(model)
    if name is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers, called {' or '.join(_STACKS)}, as Transformers' decoders "
            "have it; Shadow is for these"
        )
    return "", name


def _stack_in(module: nn.Module) -> str | None:
    return next((name for name in _STACKS if isinstance(module._modules.get(name), nn.ModuleList)), None)


def size_in(config: Any) -> int:
    """Returns the size of the hidden states that a model's config tells."""
    found = next((getattr(config, name) for name in SIZES["shadow_hidden_size"] if hasattr(config, name)), None)
    if found is None:
        raise ValueError("the model's config doesn't tell the size of its hidden states")
    return int(found)


def config_of_mirror(config: Any, options: Mapping[str, int | None]) -> Any:
    """Returns the config of the small model."""
    made = copy.deepcopy(config)
    for option, value in options.items():
        name = next((name for name in SIZES[option] if hasattr(made, name)), None)
        if value is not None and name is None:
            raise ValueError(f"{option}={value}: the model's config has no {' or '.join(SIZES[option])}")
        if value is not None:
            setattr(made, str(name), value)
    count = int(getattr(made, next(name for name in SIZES["shadow_num_hidden_layers"] if hasattr(made, name))))
    kinds = list(getattr(made, "layer_types", None) or ())
    if kinds:
        made.layer_types = [*kinds, *[kinds[-1]] * count][:count]
    if getattr(made, "max_window_layers", None) is not None:
        made.max_window_layers = min(int(made.max_window_layers), count)
    return made


def _embedding_of(module: Any) -> nn.Module | None:
    try:
        return module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None  # it was taken out


class Mirror:
    """The small model without its values, which copies of a config share.

    Attributes:
        shapes: The shapes of its parameters by name.
        unread: The names of those that it doesn't read.
    """

    def __init__(self, like: nn.Module, config: Any, dtype: torch.dtype, is_fed: bool) -> None:
        self._class, self._config, self._dtype, self._is_fed = in_place.original_class(like), config, dtype, is_fed
        with torch.random.fork_rng(devices=[]):
            module = self.drawn().to(dtype)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        embedding = _embedding_of(module) if is_fed else None
        unread = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set[int]()
        self.unread = frozenset(name for name, parameter in module.named_parameters() if id(parameter) in unread)
        for name, parameter in list(module.named_parameters()):
            owner, _, own = name.rpartition(".")
            module.get_submodule(owner)._parameters[own] = nn.Parameter(parameter.detach().to("meta"), False)
        self._module, self._lock = module, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __deepcopy__(self, memo: dict[int, Any]) -> Mirror:
        return self

    @property
    def size(self) -> int:
        """The size of its hidden states."""
        return size_in(self._config)

    def drawn(self) -> nn.Module:
        """Returns the small model with first values, drawn as PEFT draws them."""
        made = self._class(copy.deepcopy(self._config))
        if self._is_fed:
            made._modules.pop("embed_tokens", None)
        return made

    @without_compiler("the model that runs is one for all callers, behind a lock")
    def run(
        self, values: Mapping[str, Tensor], training: bool, inputs: Mapping[str, Any], cache: Any, first: int | None
    ) -> Tensor:
        """Returns its last hidden states, (rows, positions, features)."""
        device = next(iter(values.values())).device
        kept = {"use_cache": False} if first is None else {"use_cache": True, self._cache_name: cache}
        # the values are on the one module while it runs, whoever calls
        with self._lock:
            if self._module.training != training:
                self._module.train(training)
            buffers = {name: buffer.to(device) for name, buffer in self._module.named_buffers()}
            with self._numbered_from(first or 0):
                given = {**inputs, **kept, "return_dict": True}
                found = functional_call(self._module, {**buffers, **values}, (), given)
        return found.last_hidden_state

    @property
    def config(self) -> Any:
        """Its config."""
        return self._config

    @property
    def _cache_name(self) -> str:
        arguments = inspect.signature(self._class.forward).parameters
        return next((name for name in CACHES if name in arguments), CACHES[-1])

    @contextlib.contextmanager
    def _numbered_from(self, first: int) -> Iterator[None]:
        """Lets its layers have numbers from this one on, under which a cache has what they keep."""
        numbered: list[Any] = [
            module for module in self._module.modules() if isinstance(getattr(module, "layer_idx", None), int)
        ]
        try:
            for module in numbered:
                module.layer_idx += first
            yield
        finally:
            for module in numbered:
                module.layer_idx -= first
