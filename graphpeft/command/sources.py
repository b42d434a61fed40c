"""Models that the command is given by name, and configs that are given by options."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from huggingface_hub import snapshot_download
from torch import nn

from graphpeft.auto import class_for
from graphpeft.files.hub import CONFIG_NAME
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import admits
from graphpeft.rules.registry import registered
from graphpeft.wording import joined, shortened

_FUNCTION = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<function>\w+)")


LORA = "LORA"
"""The method where none is named."""

_FUNCTION_WITH = (
    "write a function that returns PeftModel.from_pretrained(base, {!r}), and name it as package.module:function"
)
"""The way to a model of an adapter whose base isn't known."""


class Given(NamedTuple):
    """A model, and inputs with which it can be called; None if nothing tells of any."""

    model: nn.Module
    example_inputs: Any


def model_from(source: str) -> Given:
    """Returns the model that a name on the command line means."""
    kind, _, name = source.partition(":")
    if kind in _KINDS and name:
        return _KINDS[kind](name)
    named = _FUNCTION.fullmatch(source)
    if named is not None:
        return _made(named["module"], named["function"])
    if ":" in source:
        raise click.UsageError(f"{source} is no model: write timm:NAME, hf:PATH, package.module:function, or a folder")
    if (Path(source) / "config.json").is_file() and not is_adapter(source):
        raise click.UsageError(f"{source} holds a model of Transformers and no adapter; write hf:{source}")
    return on_its_base(source, _FUNCTION_WITH.format(source))


def base_from(source: str) -> Given:
    """Returns the model that a name means, with the weights for which an adapter was trained, not with first ones."""
    kind, _, name = source.partition(":")
    return _timm(name, pretrained=True) if kind == "timm" and name else model_from(source)


class Checkpoint(NamedTuple):
    """A model on the meta device, and the folder with its files."""

    model: nn.Module
    folder: Path


def checkpoint_from(adapter: str, base: str | None) -> Checkpoint | None:
    """Returns the checkpoint of Transformers that is the base of an adapter; None if the base is none, or not there."""
    config = _config_in(adapter)
    auto_class = None if base else class_for(config).auto_class
    name = config.base_model_name_or_path if base is None else base.removeprefix("hf:")
    if not name or not (auto_class or (base or "").startswith("hf:")):
        return None
    transformers = _library("transformers")
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, ignore_patterns=_OTHER_WEIGHTS))
        about = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):  # also of the Hub
        return None  # loading the model tells of it
    with torch.device("meta"):
        if auto_class is not None:
            return Checkpoint(getattr(transformers, auto_class).from_config(about), folder)
        return Checkpoint(_class_of(transformers, about)._from_config(about), folder)


_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*"]
"""Files of a repository that have its weights in other formats."""


def _class_of(transformers: Any, config: Any) -> Any:
    return getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


def on_its_base(source: str, way_out: str) -> Given:
    """Returns a saved adapter on the base that its config names."""
    config = _config_in(source)
    base = config.base_model_name_or_path
    if not base:
        raise click.UsageError(f"{source}: the adapter's config doesn't say what its base model is; {way_out}")
    if os.path.isabs(base) and not Path(base).exists():
        raise click.UsageError(
            f"{source}/{CONFIG_NAME}: base_model_name_or_path is {base!r}, which isn't there; {way_out}"
        )
    if config.task_type is None and config.auto_mapping is None:
        raise click.UsageError(
            f"{source}/{CONFIG_NAME}: neither task_type nor auto_mapping tells of which class the base is; {way_out}"
        )
    return _with_inputs(class_for(config).from_pretrained(source))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise click.ClickException(f"{name} isn't installed: pip install 'graphpeft[{name}]'") from error


def _timm(name: str, pretrained: bool = False) -> Given:
    timm = _library("timm")
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.partition('.')[0]}*")
        raise click.UsageError(f"timm has no model {name!r}" + (f"; it has {joined(similar)}" if similar else ""))
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained)
    except Exception as error:  # of the Hub, the network or the file
        if not pretrained:
            raise
        raise click.ClickException(
            f"timm:{name}: the pretrained weights can't be loaded: {shortened(str(error))}; an adapter needs the "
            "weights beside which it was trained; write a function that returns the base with them, and name it as "
            "package.module:function"
        ) from error
    sizes = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return Given(model, (torch.randn(1, *sizes),))


def _transformers(path: str) -> Given:
    transformers = _library("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except OSError as error:
        raise click.UsageError(f"hf:{path}: {error}") from error
    return _with_inputs(_class_of(transformers, config).from_pretrained(path))


def _with_inputs(model: Any) -> Given:
    example = getattr(model, "dummy_inputs", None)
    if example is None:
        return Given(model, None)
    # an exported program can't return a cache
    caches = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return Given(model, {**example, **caches})


def _made(module: str, function: str) -> Given:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as for python -m
    torch.manual_seed(0)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another one that isn't
        raise click.UsageError(str(error)) from error
    if not hasattr(found, function):
        raise click.UsageError(f"module {module!r} has no attribute {function!r}")
    made = _called(getattr(found, function), f"{module}:{function}")
    if isinstance(made, nn.Module):
        return Given(made, None)
    if not isinstance(made, tuple) or len(made) != 2:
        raise click.UsageError(
            f"{module}:{function} returned {type(made).__name__}; it is to return a model, or (model, example_inputs)"
        )
    return Given(*made)


def _called(function: Any, name: str) -> Any:
    """Calls a function that was named; what goes wrong in it is told with the name."""
    if not callable(function) or isinstance(function, nn.Module):
        raise click.UsageError(
            f"{name} is no function, but of {type(function).__name__}; name one that returns a model"
        )
    try:
        return function()
    except SystemExit as error:
        raise RuntimeError(f"{name} left Python with exit code {error.code}") from error
    except Exception as error:
        raise RuntimeError(f"{name} raised {type(error).__name__}: {error}".removesuffix(": ")) from error


_KINDS: dict[str, Callable[[str], Given]] = {"timm": _timm, "hf": _transformers}


def config_from(config: str | None, method: str | None, options: Sequence[str]) -> PeftConfig:
    """Returns the config that options of the command describe."""
    if config is not None:
        read = _config_in(config)
        if method is not None and method.upper() != read.method:
            raise click.UsageError(f"{config} is of the method {read.method}; leave --method {method} out")
        given = dict(_option(type(read), option) for option in options)
        # a saved config is for inference, and what is told here is how it trains
        build = functools.partial(dataclasses.replace, read)
        return _with(build, type(read), read.method, {"inference_mode": False, **given})
    classes = registered()
    method = LORA if method is None else method
    if method.upper() not in classes:
        raise click.UsageError(f"there is no method {method!r}; there are {', '.join(sorted(classes))}")
    cls = classes[method.upper()]
    return _with(cls, cls, method, dict(_option(cls, option) for option in options))


def _config_in(source: str) -> PeftConfig:
    place = Path(source)
    try:
        return PeftConfig.from_file(place) if place.is_file() else PeftConfig.from_pretrained(source)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _with(build: Callable[..., PeftConfig], cls: type, method: str, options: dict[str, Any]) -> PeftConfig:
    try:
        return build(**options)
    except (TypeError, ValueError) as error:
        unread = next((name for name, value in options.items() if not admits(cls, name, value)), None)
        forms = [form for empty, form in _JSON_FORMS if unread is not None and admits(cls, unread, empty)]
        hint = f"; as JSON, write {unread}='{forms[0]}'" if forms else ""
        raise click.UsageError(f"{method}: {error}{hint}") from error


_JSON_FORMS = ([], '["name", …]'), ({}, '{"name": value, …}')
"""An empty list and an empty dict, each with its form in JSON."""


def _option(cls: type, text: str) -> tuple[str, Any]:
    name, is_given, value = text.partition("=")
    if not is_given:
        raise click.UsageError(f"--set {text}: write NAME=VALUE, such as r=16 or target_modules='[\"qkv\"]'")
    read = _ways_to_read(value)
    return name, next((each for each in read if admits(cls, name, each)), read[0])


def _ways_to_read(value: str) -> list[Any]:
    """Returns what the text of an option can mean, the likeliest first."""
    entries = [entry.strip() for entry in value.strip().removesuffix(",").split(",")]
    # a module may be called 0, as in target_modules=0, and one name is a list where only a list will do
    read = [entries, value] if "," in value else [value, entries]
    read.append([_literal_or_text(entry) for entry in entries])
    literal = _literal(value)
    return read if literal is _NONE else [literal, *read]


_NONE: Any = object()
"""Stands for no value, since None is one."""


def _literal(text: str) -> Any:
    """Returns the value of JSON or of Python's literals, in which errors tell options; `_NONE` for other text."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = read(text)
            return _NONE if isinstance(value, tuple) else value  # names with commas between them are a list
    return _NONE


def _literal_or_text(text: str) -> Any:
    literal = _literal(text)
    return text if literal is _NONE else literal


def needed_inputs(given: Given, source: str) -> Any:
    """Returns the example inputs of a model."""
    if given.example_inputs is None:
        raise click.UsageError(
            f"{source}: a {type(given.model).__name__} tells of no inputs; write a function that returns the model and "
            "example inputs, and name it as package.module:function"
        )
    return given.example_inputs


def is_adapter(source: str) -> bool:
    """Returns whether a name is a folder with an adapter."""
    return (Path(source) / CONFIG_NAME).is_file()
