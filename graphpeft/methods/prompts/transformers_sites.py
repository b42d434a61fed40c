"""The modules of a Transformers model that get a prompt, or a cache with a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.graph.errors import TraceError
from graphpeft.methods.prompts.caches import CACHES
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.calls import boundary
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite

ENCODER, DECODER, GENERATOR = "encoder", "decoder", "generator"
LABELS_TOKENS, LABELS_SEQUENCES = "labels tokens", "labels sequences"
"""The roles of modules that get a prompt."""


def transformers_sites(finder: SiteFinder, report: Report, task: TaskType | None) -> list[CallSite]:
    """Returns the boundaries at which a Transformers model takes a prompt."""
    model: Any = finder.modules[""]
    if _is_pair(model):
        roles = {ENCODER: model.get_encoder(), DECODER: model.get_decoder()}
    else:
        roles = {LABELS_TOKENS if _labels_tokens(task, model) else LABELS_SEQUENCES: model}
    sites = [_site(finder, report, role, module) for role, module in roles.items()]
    return [site for site in sites if site is not None]


def cache_sites(finder: SiteFinder, report: Report) -> list[CallSite]:
    """Returns the boundary of the module of a Transformers model that takes a cache."""
    model: Any = finder.modules[""]
    if not hasattr(model, "get_input_embeddings"):
        reason = f"a {type(model).__name__} has no get_input_embeddings, by which the embedding of tokens is found"
        report.refused.append(Refusal("the model", reason, "adapt the Transformers model itself"))
        return []
    candidates = [model.get_decoder()] if _is_pair(model) else [model, *model.children()]
    role = GENERATOR if generates_by_mask(model) else DECODER
    for module in candidates:
        if not set(CACHES).isdisjoint(inspect.signature(module.forward).parameters):
            site = _site(finder, report, role, module)
            return [site] if site is not None else []
    report.refused.append(Refusal("the model", "its forward takes no cache, where a prefix goes", "use prompt tuning"))
    return []


def checkpointable(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the paths of modules of a Transformers model that tell whether they are checkpointed."""
    # without asking for attributes by nn.Module.__getattr__, since most modules have none
    name = "gradient_checkpointing"
    return [path for path, module in modules.items() if name in vars(module) or hasattr(type(module), name)]


def generates_by_mask(model: Any) -> bool:
    """Returns whether `generate` counts the positions of a model's tokens by their mask, and passes them."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not _is_pair(model)


def _is_pair(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _site(finder: SiteFinder, report: Report, role: str, module: Any) -> CallSite | None:
    owner = _path_of(module, finder.modules)
    try:
        region, nodes, arguments = boundary(finder.regions, owner)[:3]
    except TraceError as error:
        way_out = "give its forward arguments with names and plain defaults"
        report.refused.append(Refusal(owner or "the model", str(error), way_out))
        return None
    model: Any = finder.modules[""]
    beside = _path_of(model.get_input_embeddings(), finder.modules), "weight"
    reads = (("word_embeddings", _path_within(module, module.get_input_embeddings())),)
    reads += (("config", "config"),) if hasattr(module, "config") else ()
    inside = f"{owner}." if owner else ""
    paths = [path.removeprefix(inside) for path in checkpointable(finder.modules) if path.startswith(inside) and path]
    # the list of all layers, since some of them may be checkpointed; else what checkpoints all of its layers
    lists = [path.rpartition(".")[0] for path in paths if path.rpartition(".")[2].isdecimal()]
    reads += tuple([("layers", path) for path in (*lists, *paths)[:1]])
    return CallSite(
        region, nodes, owner, role, beside, torch.get_default_dtype(), arguments, reads, positions=_positions(module)
    )


def _positions(module: Any) -> int | None:
    """Returns the number of positions in a module's table; None if it computes them."""
    tables = [
        inner
        for path, inner in module.named_modules()
        if isinstance(inner, nn.Embedding) and any(word in path for word in ("position", "wpe"))
    ]
    most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if not tables or most is None:
        return None
    # the first positions of such a table are for padding
    reserved = max(0 if table.padding_idx is None else table.padding_idx + 1 for table in tables)
    return min(most, *(table.num_embeddings for table in tables)) - reserved


def _path_of(module: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    return next(path for path, other in modules.items() if other is module)


def _path_within(outer: nn.Module, module: nn.Module) -> str:
    """Returns a path from `outer` to a module inside, of which there may be several."""
    return next(path for path, other in outer.named_modules(remove_duplicate=False) if other is module)


def _labels_tokens(task: TaskType | None, model: nn.Module) -> bool:
    """Returns whether a model has one label for each token of its input; without a task its class's name tells."""
    if task is None:
        return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForTokenClassification", "ForMaskedLM"))
    return task in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS)
