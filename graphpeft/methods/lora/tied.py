"""LoRA at a linear layer that has an embedding's table as its weight, with the factors of the embedding.

    y = x Wᵀ + b + s · dropout(x) B A        W of shape (entries, features), A (r, entries), B (features, r)

The change of the table is then one and the same in both, and both train it. In files each has factors of its own, as in
PEFT: a linear layer's are Bᵀ and Aᵀ. Source: PEFT's ``LoraModel._add_targets_to_tie`` and ``LoraLayer``'s
`tied_adapter`.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.traced_model import stands_for
from graphpeft.methods.lora.factors import draw, draw_as_layers, rank_of, scope_of_tied
from graphpeft.methods.lora.init.initialisation import RANDOM
from graphpeft.methods.lora.rule import LoraBranch
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis
from graphpeft.rules.products import Product
from graphpeft.rules.report import Refusal, Report
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import LeafSite, Site
from graphpeft.targeting import pattern_values, targets
from graphpeft.targeting.targets import Match
from graphpeft.wording import joined

_WAY_OUT = "name it in no list, or leave ensure_weight_tying False"


@dataclass(frozen=True, kw_only=True)
class LoraTied(LoraBranch):
    """The branch of a linear layer with the factors of the embedding to which it is tied."""

    flipped: bool = True

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses other operations than linear layers."""
        if site.op is ops.Linear and not site.transposed:
            return None
        return f"it is tied to {site.tied_to}, and isn't a linear layer that has the table as its weight"

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factor that is applied first, the embedding's B, and the other one, its A."""
        rank = rank_of(site, config)
        entries, features = site.shape
        return {
            "lora_A": ParameterSpec(
                (features, rank),
                "lora_A.weight",
                form=_transposed((rank, features)),
                scope=scope_of_tied(site, "lora_B"),
                rank=RankAxis(1),
            ),
            "lora_B": ParameterSpec(
                (rank, entries),
                "lora_B.weight",
                form=_transposed((entries, rank)),
                scope=scope_of_tied(site, "lora_A"),
                rank=RankAxis(0),
            ),
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Site, config: Any, module: nn.Module) -> None:
        """Gives the factors the values that PEFT gives them last: a linear layer's, unless A and B are to be random."""
        of_layer = {name: tensor.mT for name, tensor in parameters.items()}
        if config.init_lora_weights is False:
            draw_as_layers({name: tensor.clone() for name, tensor in of_layer.items()})
        else:
            draw(of_layer, config.init_lora_weights, rank_of(site, config))

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns the product of the embedding's B and A, whose transpose is the change."""
        return Product((lora_A, lora_B))


def _transposed(shape: tuple[int, int]) -> FileForm:
    return FileForm(shape, _transpose, _transpose)


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.mT


def names_with_tied(config: Any, model: nn.Module) -> None:
    """Adds to `target_modules` and `modules_to_save` of a config all layers that are tied to one in them."""
    modules = modules_by_path(model)
    groups = [(embedding, *others) for embedding, others in _tied_layers(modules).items()]
    parameters = [join(path, name) for path, module in modules.items() for name in module._parameters]
    _name_targets(config, groups, [*modules, *parameters])
    _name_saved(config, groups, modules)


def _tied_layers(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Returns the paths of the other modules whose weight is an embedding's tensor, by the embedding's path."""
    by_weight: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(path)
    found: dict[str, list[str]] = {}
    for paths in by_weight.values():
        embeddings = [path for path in paths if issubclass(stands_for(modules[path]), nn.Embedding)]
        if len(paths) > 1 and embeddings:
            found[embeddings[0]] = [path for path in paths if path != embeddings[0]]
    return found


def _name_targets(config: Any, groups: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    decide = targets.compile_matcher(config.target_options)
    named = (group for group in groups if any(decide(path) for path in group))
    lacking = [path for group in named for path in group if decide(path) is Match.NO]
    if lacking and isinstance(config.target_modules, str):
        config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, lacking)])
    elif lacking:
        config.target_modules = {*config.target_modules, *lacking}
        decide_now = targets.compile_matcher(config.target_options)
        others = [name for name in names if decide_now(name) and not decide(name) and name not in lacking]
        _refuse_others(others, lacking, "give target_modules as a regular expression")


def _name_saved(config: Any, groups: Sequence[Sequence[str]], paths: Iterable[str]) -> None:
    saved = tuple(config.modules_to_save or ())
    named = (group for group in groups if any(_is_saved(path, saved) for path in group))
    lacking = [path for group in named for path in group if not _is_saved(path, saved)]
    if lacking:
        config.modules_to_save = [*saved, *lacking]
        now = tuple(config.modules_to_save)
        others = [path for path in paths if _is_saved(path, now) and not _is_saved(path, saved) and path not in lacking]
        _refuse_others(others, lacking, "leave ensure_weight_tying False")


def _is_saved(path: str, saved: tuple[str, ...]) -> bool:
    """Returns whether a module is one of `modules_to_save` or inside of one."""
    around = itertools.accumulate(path.split("."), join)
    return bool(saved) and any(outer.endswith(saved) for outer in around)


def _refuse_others(others: Sequence[str], wanted: Sequence[str], way_out: str) -> None:
    if others:
        raise ValueError(
            f"ensure_weight_tying has {joined(wanted)} named, too, and that name would mean {joined(others)} as well; "
            f"{way_out}"
        )


def with_tied(
    sites: Sequence[Site | LeafSite], config: Any, finder: SiteFinder, report: Report
) -> list[Site | LeafSite]:
    """Returns sites with tied layers marked and put last, as PEFT has them."""
    by_owner = {site.owner: site for site in sites if isinstance(site, Site) and site.is_layer}
    embeddings: dict[str, Site] = {}
    tied: dict[str, Site] = {}
    groups = [(embedding, *others) for embedding, others in _tied_layers(finder.modules).items()]
    adapted = [group for group in groups if any(path in by_owner for path in group)]
    if not groups:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights: no tied modules were found in the "
            "model",
            PeftWarning,
            stacklevel=2,
        )
    elif not adapted and config.modules_to_save is None and config.trainable_token_indices is None:
        warnings.warn(
            "ensure_weight_tying=True has no effect: nothing that is adapted is tied, so no tied modules are added",
            PeftWarning,
            stacklevel=2,
        )
    for embedding, *others in adapted:
        for path in (embedding, *others):
            if path not in by_owner:
                reason = f"it is tied to {joined([*by_owner.keys() & {embedding, *others}])}, and isn't adapted"
                report.refused.append(Refusal(path, f"{reason}, which ensure_weight_tying forbids", _WAY_OUT))
            elif path == embedding:
                embeddings[path] = by_owner[path]._replace(tied_to=embedding)
            elif reason := _refusal(path, embedding, config):
                report.refused.append(Refusal(path, f"it is tied to {embedding}, and {reason}", _WAY_OUT))
            else:
                tied[path] = by_owner[path]._replace(tied_to=embedding)
    return [*(embeddings.get(site.owner, site) for site in sites if site.owner not in tied), *tied.values()]


def _refusal(path: str, embedding: str, config: Any) -> str | None:
    """Returns the reason why a layer can't have the factors of the embedding to which it is tied, or None."""
    for name, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        own, other = (pattern_values.pattern_value(getattr(config, name), each, default) for each in (path, embedding))
        if own != other:
            return f"{name} gives {own} to it and {other} to that; give both the same"
    if any(each == key or each.endswith(f".{key}") for key in config.target_parts or () for each in (path, embedding)):
        return "target_parts has factors for some of its rows alone; leave them out"
    if config.init_lora_weights not in RANDOM:
        return f"init_lora_weights={config.init_lora_weights!r} would be another one in each; choose a random one"
    return "use_dora=True has lengths of its own for each; leave it False" if config.use_dora else None
