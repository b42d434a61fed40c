"""Puts virtual tokens into one module of any model: into its token sequence, and out of its output.

    y = module([prompt; x])[:, tokens:]                 x of shape (batch, length, dim)

The rest of the model never sees them. With one scope around all layers they go through the layers once (shallow
prompts); with a scope for each layer each has fresh ones (deep prompts). Source: Jia et al., "Visual Prompt Tuning",
arXiv 2203.12119.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft._torch import pytree
from graphpeft.graph.errors import TraceError
from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.placements import Placement
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.target_options import TargetOptions
from graphpeft.sites.calls import boundary
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.targeting import targets
from graphpeft.wording import joined, number_of

SCOPE = "scope"
"""The role of modules that get virtual tokens of their own."""


@dataclass(frozen=True)
class InScope(Placement):
    """Into a module's token sequence, and out of its output.

    Attributes:
        tokens: The number of virtual tokens.
        position: Whether they stand ``"before"`` or ``"after"`` the module's own tokens.
        sequence: The name of the argument that is the sequence.
    """

    tokens: int
    position: str
    sequence: str

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the virtual tokens into the sequence, and lengthens its masks."""
        sequence = inputs[self.sequence]
        masks = {
            name: mask_with_tokens(mask, name, sequence, self.tokens, self.position)
            for name, mask in inputs.items()
            if "mask" in name and not name.startswith(_OF_OTHERS)
        }
        caches = [value for name, value in inputs.items() if "cache" in name or "past" in name or name == "kwargs"]
        changed = {self.sequence: inserted(prompt, sequence, self.position, *caches), **masks}
        if CAUSAL in inputs:
            changed[CAUSAL] = causal_with_tokens(inputs[CAUSAL], self.position, *masks.values())
        return changed

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Takes the virtual tokens out."""
        others = [value for name, value in inputs.items() if name != self.sequence]
        return taken_out(output, inputs[self.sequence], self.tokens, self.position, *others)


def scope_sites(
    scope: str | Sequence[str], position: str, finder: SiteFinder, report: Report, dtype: torch.dtype
) -> tuple[list[CallSite], list[int]]:
    """Returns the boundaries of the modules that a scope names, and the sizes of a token that example inputs show.

    Args:
        scope: Names of modules, matched as `target_modules` are.
        position: Whether virtual tokens stand ``"before"`` or ``"after"`` the tokens.
        finder: Finds sites in the model.
        report: Gets the modules that can't take virtual tokens.
        dtype: The dtype of the virtual tokens.
    """
    named = TargetOptions(target_modules=scope)
    paths = [path for path in finder.modules if path and targets.match(named, path)]
    if not paths:
        near = targets.near_misses(scope, [path for path in finder.modules if path])
        hint = f"; near misses: {', '.join(near)}" if near else ""
        report.refused.append(Refusal("prompt_scope", f"{scope!r} names no module{hint}", "name a module by its path"))
    sites, sizes = [], []
    for path in paths:
        try:
            _refuse_what_cannot_see(finder.modules[path], position)
            site, size = _scope_site(path, finder, dtype)
        except TraceError as error:
            report.refused.append(Refusal(path, str(error), _way_out(finder.modules[path], path)))
            continue
        sites.append(site)
        sizes += size
    return sites, sizes


def _scope_site(path: str, finder: SiteFinder, dtype: torch.dtype) -> tuple[CallSite, list[int]]:
    crossing = boundary(finder.regions, path)
    if not crossing.arguments:
        raise TraceError("its forward takes no arguments")
    sequence = crossing.arguments[0]
    inputs = crossing.values or finder.regions.inputs_of(path)
    size = [] if inputs is None else [_token_size(inputs, sequence)]
    beside = next(((owner, name) for owner, name in _tensors(path, finder.modules)), None)
    if beside is None:
        raise TraceError("the model has no parameters, which would tell the device of virtual tokens")
    region, nodes, arguments = crossing[:3]
    return CallSite(region, nodes, path, SCOPE, beside, dtype, arguments, file_path=path), size


def _refuse_what_cannot_see(module: nn.Module, position: str) -> None:
    """Raises TraceError if the attentions in a module would not see virtual tokens at `position`."""
    for path, inner in module.named_modules():
        if getattr(inner, "batch_first", True) is False:
            raise TraceError(
                f"{path or 'it'} takes sequences of shape (tokens, batch, dim), and a prompt goes into (batch, tokens, "
                "dim); build it with batch_first=True"
            )
        if position == "after" and getattr(inner, CAUSAL, False) is True:
            raise TraceError(f"{path or 'it'} is causal: no token sees what stands after it; put the prompt before")


def _token_size(inputs: Any, name: str) -> int:
    value = inputs.get(name) if isinstance(inputs, dict) else inputs[0]
    if not isinstance(value, Tensor) or value.ndim != 3:
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"that is a {type(value).__name__}"
        raise TraceError(f"it is given {name} {what}, which is no token sequence (batch, tokens, dim)")
    return value.shape[-1]


def _way_out(module: nn.Module, path: str) -> str:
    inside = [f"{path}.{name}" for name, _ in module.named_children()]
    is_container = inside and type(module).forward is nn.Module.forward
    return (
        f"name modules inside it, such as {joined(inside)}" if is_container else "name another module in prompt_scope"
    )


def _tensors(path: str, modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Returns parameters, those inside the module at `path` first."""
    inside = [other for other in modules if other == path or other.startswith(f"{path}.")]
    return [
        (owner, name)
        for owner in (*inside, *modules)
        for name, tensor in modules[owner]._parameters.items()
        if tensor is not None
    ]


# nodes


CAUSAL = "is_causal"
"""The argument, or attribute, by which attentions are told that no token sees those after it."""

_OF_OTHERS = ("memory_", "encoder_", "cross_")
"""The prefixes of the names of masks of other sequences."""


@recorded
def inserted(prompt: Tensor, sequence: Tensor, position: str, *caches: Any) -> Tensor:
    """Puts virtual tokens, (tokens, dim), before or after each sequence, (batch, length, dim)."""
    if any(map(_is_cache, caches)):
        raise ValueError(
            "a module with a prompt in its scope is given a cache, which would keep the virtual tokens; pass "
            "use_cache=False"
        )
    if not isinstance(sequence, Tensor):
        raise ValueError(f"a module with a prompt is given a {type(sequence).__name__}, which is no token sequence")
    if sequence.is_nested:
        raise ValueError(
            "a module with a prompt is given a nested tensor; build nn.TransformerEncoder with "
            "enable_nested_tensor=False"
        )
    if sequence.ndim != 3 or sequence.shape[-1] != prompt.shape[-1]:
        raise ValueError(
            f"a prompt of {number_of(prompt.shape[0], 'token')} of size {prompt.shape[1]} can't go into an input of "
            f"shape {tuple(sequence.shape)}, which is no token sequence (batch, tokens, {prompt.shape[1]})"
        )
    batch = prompt.to(sequence.dtype).expand(sequence.shape[0], -1, -1)
    return torch.cat((batch, sequence) if position == "before" else (sequence, batch), dim=1)


def _is_cache(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_cache, value.values()))
    # a flag, such as use_cache, is none
    return hasattr(value, "get_seq_length") or (isinstance(value, tuple | list) and len(value) > 0)


@recorded
def causal_with_tokens(is_causal: bool | None, position: str, *masks: Tensor | None) -> bool | None:
    """Returns whether an attention is causal: a lengthened mask tells it, and the hint is no longer true."""
    if any(mask is not None for mask in masks):
        return None if is_causal is None else False
    if is_causal and position == "after":
        raise ValueError("no token of a causal module sees a prompt after it; put the prompt before")
    return is_causal


_LEAVE_OUT = {
    "src_mask": True,
    "tgt_mask": True,
    "src_key_padding_mask": False,
    "tgt_key_padding_mask": False,
    "key_padding_mask": False,
}
"""Masks of PyTorch's layers whose True leaves a token out, and whose numbers are added; whether they are by pairs."""

_KEEP = "attention_mask"
"""The mask of Transformers models, whose True keeps a token."""


@recorded
def mask_with_tokens(mask: Tensor | None, name: str, sequence: Tensor, tokens: int, position: str) -> Tensor | None:
    """Lengthens a mask so that every token sees the virtual ones.

    Args:
        mask: None, or a mask by token, (batch, length), or by pairs of tokens, (…, length, length).
        name: The argument's name; PyTorch's names tell the meaning of the values.
        sequence: The sequence without virtual tokens.
        tokens: The number of virtual tokens.
        position: Where they stand.

    Raises:
        ValueError: If the mask has another shape, or the meaning of its values isn't known.
    """
    if not isinstance(mask, Tensor):
        return mask
    around = (tokens, 0) if position == "before" else (0, tokens)
    length = sequence.shape[1]
    # as many sequences as tokens are no reason to take the one for the other
    if mask.shape == sequence.shape[:2] and not _LEAVE_OUT.get(name, False):
        return F.pad(mask, around, value=_visible(mask, name, is_by_pair=False))
    if mask.shape[-2:] == (length, length):
        return F.pad(mask, around * 2, value=_visible(mask, name, is_by_pair=True))
    raise ValueError(
        f"{name} has shape {tuple(mask.shape)}; a prompt can only lengthen masks of shape (batch, {length}) or "
        f"(…, {length}, {length})"
    )


def _visible(mask: Tensor, name: str, is_by_pair: bool) -> int:
    """Returns the value by which a mask lets a token be seen."""
    if name in _LEAVE_OUT or (mask.is_floating_point() and is_by_pair):
        return 0
    means_either = mask.dtype == torch.bool or "pad" in name
    if mask.is_floating_point() or (means_either and name != _KEEP):
        raise ValueError(
            f"{name} is of {mask.dtype}, and what its values mean for the virtual tokens isn't known; pass an integer "
            "mask, where 1 keeps a token, or a float mask by pairs of tokens, which is added"
        )
    return 1


@recorded
def taken_out(output: Any, sequence: Tensor, tokens: int, position: str, *others: Any) -> Any:
    """Takes the virtual tokens out of a module's output: a sequence, or a container that begins with one.

    Other sequences of as many tokens in the container lose them, too, but for those among `others`, the module's other
    arguments.
    """
    leaves, structure = pytree.tree_flatten(output)
    batch, length = sequence.shape[:2]
    prompted = (batch, length + tokens)
    if not leaves or not _is_sequence(leaves[0], prompted):
        first = leaves[0] if leaves else None
        what = f"of shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise ValueError(
            f"a module with a prompt returned {what}, where the prompt can't be found; it must return a sequence of "
            f"{length} + {tokens} tokens"
        )
    kept = slice(tokens, None) if position == "before" else slice(length)
    given = {id(other) for other in others}
    return structure.unflatten(
        [leaf[:, kept] if _is_sequence(leaf, prompted) and id(leaf) not in given else leaf for leaf in leaves]
    )


def _is_sequence(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == shape
