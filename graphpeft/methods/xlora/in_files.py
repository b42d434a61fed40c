"""The files of X-LoRA: what PEFT 0.21.2 writes elsewhere, and experts that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graphpeft.adapters.file_names import ONCE
from graphpeft.methods.xlora.classifier import KEY, numbers
from graphpeft.methods.xlora.experts import Experts
from graphpeft.stacks.peft_files import PREFIX

_EXPERTS = "base_model.lora_model.model."
"""The begin of the names of experts' tensors in a model of PEFT's, which reads files by these."""


def with_lost_layers(
    config: Any, tensors: Mapping[str, Tensor], read: Callable[[str], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Returns a file's tensors with the layers of the classifier that it lacks.

    PEFT takes the number of a layer for the name of an expert: ``layers.0.weight`` isn't in the adapter's file, and is
    ``layers.weight`` in that of the expert ``0``.
    """
    found = dict(tensors)
    for number in map(str, numbers(config)):
        lost = [kind for kind in ("weight", "bias") if f"{ONCE}{KEY}.{number}.{kind}" not in found]
        if lost and number in (config.adapters or {}):
            with contextlib.suppress(FileNotFoundError, KeyError):
                beside = read(number)
                found |= {f"{ONCE}{KEY}.{number}.{kind}": beside[f"{ONCE}{KEY}.{kind}"] for kind in lost}
    return found


def apart(tensors: Mapping[str, Tensor], experts: Experts, trained: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Returns tensors with the factors of each expert by themselves."""
    found = dict(tensors)
    for label, own, axis, names in _factors(experts, trained):
        parts = found.pop(own).split(experts.ranks(label), dim=axis)
        found |= {name: part for name, part in zip(names, parts, strict=True) if part.numel()}
    return found


def side_by_side(tensors: Mapping[str, Tensor], experts: Experts, trained: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Returns tensors with the factors of all experts as those of one product; arguments as for `apart`."""
    found = dict(tensors)
    for label, own, axis, names in _factors(experts, trained):
        wanted = [name for name, rank in zip(names, experts.ranks(label), strict=True) if rank]
        there = [found.pop(name) for name in wanted if name in found]
        if there and len(there) < len(wanted):
            raise ValueError(f"it lacks some of {', '.join(wanted)}")
        kept = experts.side_by_side(label)[axis]
        for name, part in zip(wanted, there, strict=False):
            sides = part.shape[:axis] + part.shape[axis + 1 :]
            if part.ndim != 2 or sides != kept.shape[:axis] + kept.shape[axis + 1 :] or part.dtype != there[0].dtype:
                raise ValueError(f"{name} is of shape {tuple(part.shape)} and {part.dtype}, as no factor there is")
        # PEFT's file has none, where the experts are those that were read
        found[own] = torch.cat(there, dim=axis) if there else kept
    return found


def _factors(experts: Experts, trained: Mapping[str, str]) -> Iterator[tuple[str, str, int, list[str]]]:
    """Yields of each factor its site, its name, which of its dimensions is that of ranks, and its parts' names."""
    for label, beginning in trained.items():
        ending = ".weight" if beginning == "lora_" else ""
        for axis, factor in enumerate("AB"):
            parts = [f"{_EXPERTS}{label}.{beginning}{factor}.{n}{ending}" for n in range(len(experts.every))]
            yield label, f"{PREFIX}{label}.xlora_{factor}", axis, parts
