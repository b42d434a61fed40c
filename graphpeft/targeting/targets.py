"""PEFT's rules for matching the names of modules and parameters, as functions over names.

For a module name such as `model.layers.3.self_attn.q_proj`:

    excluded(name) = exclude_modules covers name, or modules_to_save covers it or a module above it
    targeted(name) = target_modules is a string:  it matches the whole name, as a regular expression
                     target_modules is a list:    name is in it, or
                                                  name ends in "." + an entry, and its layer index is wanted
    match(name)    = EXCLUDED if excluded(name), YES if targeted(name), else NO

The layer index is the first number from the third component of the name on, or the first after `layers_pattern`. It
matters only where `layers_to_transform` is set. A name that is listed in full is a target whatever its layer.

The rules match PEFT 0.21.2, so that a config chooses the same modules there and here.
"""

from __future__ import annotations

import difflib
import enum
import itertools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from graphpeft.graph.paths import modules_by_path, names_wrapper, paths_inside_wrappers
from graphpeft.graph.traced_model import TracedModel, stands_for
from graphpeft.rules.options import TargetOptions
from graphpeft.sites.layer_kinds import is_linear
from graphpeft.targeting.patterns import Pattern

T = TypeVar("T")
Predicate = Callable[[str], bool]

ALL_LINEAR = "all-linear"
"""The value of `target_modules` for every linear module except the output head."""


_CLASSIFICATION_HEADS = ("score", "classifier")  # PEFT's SEQ_CLS_HEAD_NAMES, since no getter returns these heads


class Match(enum.Enum):
    """Whether a config targets or excludes a module name. Only `YES` is true in an `if`."""

    NO = "no"
    YES = "yes"
    EXCLUDED = "excluded"

    def __bool__(self) -> bool:
        return self is Match.YES


def match(options: TargetOptions, name: str) -> Match:
    """Returns whether a config targets the module `name`.

    `all-linear` must have been replaced by `all_linear_names` before: here it is a regular expression like any other
    string.

    Args:
        options: The config's options for names.
        name: The dotted path of a module.

    Returns:
        `EXCLUDED` if `exclude_modules` or `modules_to_save` covers the name, whether or not it is a target; else `YES`
        or `NO`.

    Raises:
        ValueError: A string among the options is not a regular expression.
    """
    return compile_matcher(options)(name)


def compile_matcher(options: TargetOptions) -> Callable[[str], Match]:
    """Prepares `match` for many names.

    Args:
        options: As for `match`.

    Returns:
        A function from a name to its `Match`.

    Raises:
        ValueError: A string among the options is not a regular expression.
    """
    is_excluded = _exclusion(options)
    is_targeted = _targeting(options)

    def matcher(name: str) -> Match:
        if is_excluded is not None and is_excluded(name):
            return Match.EXCLUDED
        return Match.YES if is_targeted(name) else Match.NO

    return matcher


def exactly(wanted: Collection[str], names: Iterable[str]) -> set[str] | str:
    """Returns the `target_modules` that matches these names and no others.

    Args:
        wanted: The names to match.
        names: All names of the model.

    Returns:
        The wanted names; or a regular expression, where one of them is the end of a name that isn't wanted.
    """
    chosen = set(wanted)
    also = _suffixed(frozenset(chosen))
    if any(also(name) for name in names if name not in chosen):
        return "|".join(map(re.escape, sorted(chosen)))
    return chosen


def without_wrappers(names: Any, model: nn.Module) -> Any:
    """Returns a value of `target_modules` whose names with wrappers also match the modules inside.

    ``named_modules`` gives the names of wrappers, such as ``_orig_mod`` of a compiled submodule, and users copy these.
    In this library a module has the same name with and without a wrapper.

    Args:
        names: The value, as a user gave it.
        model: The model.
    """
    if not names_wrapper(names if isinstance(names, str) else " ".join(names)):
        return names
    matches = compile_matcher(TargetOptions(target_modules=names))
    own = [path for name, path in paths_inside_wrappers(model).items() if matches(name)]
    if isinstance(names, str):
        return "|".join([f"(?:{names})", *map(re.escape, own)])
    if not own:
        return names
    others = {name for name in names if not names_wrapper(name)}
    also = compile_matcher(TargetOptions(target_modules=others))
    return exactly([path for path in modules_by_path(model) if path in own or also(path)], modules_by_path(model))


def match_parameter(options: TargetOptions, path: str) -> bool:
    """Returns whether `target_parameters` names the parameter at `path`.

    As in PEFT, `exclude_modules`, `modules_to_save` and `layers_to_transform` don't apply to parameters.

    Args:
        options: The config's options for names.
        path: The dotted path of a parameter, such as `model.layers.0.experts.gate_up_proj`.

    Returns:
        True if an entry is the whole path or its end, cut at a dot, or is what `own_parameter_entry` makes of it.
    """
    return any(
        path == target or path.endswith(f".{target}") or f".{path}" == target
        for target in options.target_parameters or ()
    )


def own_parameter_entry(path: str) -> str:
    """Returns the entry of `target_parameters` that means a parameter, and if it is the model's own, no other one.

    The name of the model's own parameter would be the end of others' paths. PEFT has no adapters for it.

    Args:
        path: The dotted path of the parameter.
    """
    return path if "." in path else f".{path}"


def is_all_linear(target_modules: object) -> bool:
    """Returns whether `target_modules` is "all-linear", in any mix of cases."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def all_linear_names(
    model: nn.Module, task_type: str | None, modules: Mapping[str, nn.Module] | None = None
) -> list[str]:
    """Lists the modules that `target_modules="all-linear"` stands for.

    Args:
        model: Any model.
        task_type: The config's task, which decides on the output head, see `output_head`.
        modules: Its modules by path, if they are known.

    Returns:
        The names of all linear layers but the output head, in the model's order. A module used in several places is
        listed under its first name.
    """
    head = _output_head(model, task_type)
    return [
        name
        for name, module in (modules or modules_by_path(model)).items()
        if name and module is not head and is_linear(module)
    ]


def output_head(model: nn.Module, task_type: str | None) -> str | None:
    """Finds the output head, which `all-linear` leaves out.

    Of a Transformers model it is `get_output_embeddings()` or, if that is None and the task is `SEQ_CLS`, the module
    `score` or `classifier`. A traced one has it in its attribute `output_head`. No other model has a known head.

    Args:
        model: Any model.
        task_type: The config's task, a string or an enum that equals one.

    Returns:
        The name of the head, or None.
    """
    head = _output_head(model, task_type)
    return None if head is None else next((name for name, module in model.named_modules() if module is head), None)


def _output_head(model: nn.Module, task_type: str | None) -> nn.Module | None:
    modeling_utils = sys.modules.get("transformers.modeling_utils")
    # if Transformers isn't loaded, no model can be one of its classes
    if modeling_utils is None or not issubclass(stands_for(model), modeling_utils.PreTrainedModel):
        return None
    if isinstance(model, TracedModel):
        head = model.get_submodule(model.output_head) if model.output_head is not None else None
    else:
        head = cast(Any, model).get_output_embeddings()
    if head is None and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in _CLASSIFICATION_HEADS)
        head = next((candidate for candidate in heads if candidate is not None), None)
    return head


Defaults = Mapping[Any, tuple[str, ...] | str]
"""A method's default targets, by the model's type: suffixes, or a regular expression."""


def default_target_modules(model: nn.Module, defaults: Defaults) -> tuple[str, ...] | str:
    """Chooses `target_modules` for a model of a known type.

    Args:
        model: A model whose `config`, an object or a mapping, has a `model_type`.
        defaults: The defaults of the method.

    Returns:
        The entry of `defaults` for the model.

    Raises:
        ValueError: The model has no `model_type`, or one without a default. The message offers names to choose from.
    """
    about = getattr(model, "config", None)
    model_type = about.get("model_type") if isinstance(about, Mapping) else getattr(about, "model_type", None)
    if model_type in defaults:
        return defaults[model_type]
    what = f"model_type {model_type!r}" if model_type else f"class {type(model).__name__}"
    raise ValueError(f"no default target_modules are known for {what}. {_advice(model)}")


def near_misses(targets: str | Iterable[str], names: Iterable[str], n: int = 5) -> list[str]:
    """Finds the names nearest to targets that matched nothing.

    A target is compared with the full names, with their last components, and with their endings of as many components
    as the target has. The results are valid entries of `target_modules`.

    Args:
        targets: The config's `target_modules`; a regular expression is compared by its spelling.
        names: The names of the model.
        n: The most names to return.

    Returns:
        The nearest name to the first target, the nearest to the second, ..., then the second nearest to each, without
        repetition. Sets of targets are sorted.
    """
    known = [name for name in names if name]
    wanted = _in_order(targets)[: max(n, 1)]  # each takes milliseconds
    found = [difflib.get_close_matches(target, _comparable(known, target), n=max(n, 1)) for target in wanted]
    by_rank = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return list(dict.fromkeys(name for name in by_rank if name is not None))[:n]


def unmatched(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Lists the entries that are neither a name nor the end of one, cut at a dot.

    Args:
        entries: Entries of a list such as `target_modules`.
        names: The names of the model; reading stops when all entries have matched.

    Returns:
        The unmatched entries, sorted.
    """
    left = set(entries)
    longest = max((entry.count(".") + 1 for entry in left), default=0)
    for name in names if left else ():
        left.discard(name)
        dot = len(name)
        for _ in range(longest):
            dot = name.rfind(".", 0, dot)
            if dot < 0:
                break
            left.discard(name[dot + 1 :])
        if not left:
            return []
    return sorted(left)


def endings(names: Iterable[str], like: Iterable[str]) -> list[str]:
    """Lists the distinct endings of names that have as many components as a name of `like`."""
    lengths = {name.count(".") + 1 for name in like}
    return list(dict.fromkeys(".".join(name.split(".")[-length:]) for name in names for length in lengths))


def _exclusion(options: TargetOptions) -> Predicate | None:
    by_name = _listed(options.exclude_modules, "exclude_modules") if options.exclude_modules else None
    # a module in modules_to_save is fully trained, and an adapter inside it would train the same weights twice
    saved = [Pattern(rf"(^|.*\.){entry}($|\..*)", entry, "modules_to_save") for entry in options.modules_to_save or ()]
    if not saved:
        return by_name
    return lambda name: (by_name is not None and by_name(name)) or any(pattern.match(name) for pattern in saved)


def _targeting(options: TargetOptions) -> Predicate:
    targets = options.target_modules
    if targets is None:
        return _never
    wanted = _wanted_layers(options.layers_to_transform)
    # a regular expression chooses the layers itself
    if wanted is None or isinstance(targets, str):
        return _listed(targets, "target_modules")

    exact = frozenset(targets)
    is_suffixed = _suffixed(exact)
    layer_of = _layer_index(options.layers_pattern)
    return lambda name: name in exact or (is_suffixed(name) and layer_of(name) in wanted)


def _listed(entries: str | Collection[str], field: str) -> Predicate:
    """Returns a predicate: a string must match the whole name, as a regular expression; a list has names or endings."""
    if isinstance(entries, str):
        pattern = Pattern(entries, entries, field)
        return lambda name: pattern.fullmatch(name) is not None
    if not entries:
        return _never
    exact = frozenset(entries)
    if not any("." in entry for entry in exact):
        return lambda name: name.rpartition(".")[2] in exact
    is_suffixed = _suffixed(exact)
    return lambda name: name in exact or is_suffixed(name)


def _never(_name: str) -> bool:
    return False


def _suffixed(suffixes: frozenset[str]) -> Predicate:
    """Returns a predicate: whether a name ends in a dot and one of the suffixes.

    The name's endings are looked up in the set, shortest first, up to the components of the longest suffix. So the cost
    does not grow with the number of suffixes, of which `all-linear` makes hundreds.
    """
    longest = max((suffix.count(".") + 1 for suffix in suffixes), default=0)
    last = {suffix.rpartition(".")[2] for suffix in suffixes}

    def is_suffixed(name: str) -> bool:
        if name.rpartition(".")[2] not in last:
            return False
        dot = len(name)
        for _ in range(longest):
            dot = name.rfind(".", 0, dot)
            if dot < 0:
                return False
            if name[dot + 1 :] in suffixes:
                return True
        return False

    return is_suffixed


def _wanted_layers(layers_to_transform: int | Collection[int] | None) -> frozenset[int] | None:
    """Returns the indices of the wanted layers, or None for all layers, which an empty list means too."""
    if isinstance(layers_to_transform, int):
        return frozenset((layers_to_transform,))
    return frozenset(layers_to_transform) if layers_to_transform else None


def _layer_index(layers_pattern: str | Collection[str] | None) -> Callable[[str], int | None]:
    """Returns a function from a name to the index of its layer, or None.

    Each expression finds the first number that fits: in `model.layers.1.experts.0.w1` the layer is 1, the expert 0.
    """
    if not layers_pattern:
        # the number must be the third component or a later one: `layers.0.q_proj` has no index for PEFT either
        patterns: Sequence[Any] = [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    else:
        entries = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        patterns = [Pattern(rf"(?:^|.*?\.){entry}\.(?P<idx>\d+)\.", entry, "layers_pattern") for entry in entries]

    def layer_of(name: str) -> int | None:
        found = next(filter(None, (pattern.match(name) for pattern in patterns)), None)
        # an entry with a "|" outside brackets can match without a number
        return int(found["idx"]) if found and found["idx"] is not None else None

    return layer_of


def _advice(model: nn.Module) -> str:
    names = list(dict.fromkeys(_suggested(name) for name in all_linear_names(model, None) if name))
    if not names:
        return "Please specify `target_modules`; the model has no linear modules to suggest."
    return (
        f"Please specify `target_modules` in the config, for example some of its linear modules: target_modules={names}"
    )


def _suggested(name: str) -> str:
    """Returns a name's last component; of a number, the last two, since a bare "0" would match every first layer."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _in_order(targets: str | Iterable[str]) -> list[str]:
    if isinstance(targets, str):
        return [targets]
    return sorted(targets) if isinstance(targets, (set, frozenset)) else list(targets)


def _comparable(names: list[str], target: str) -> list[str]:
    parts = target.count(".") + 1
    split = [name.split(".") for name in names]
    endings = [".".join(components[-length:]) for components in split for length in (1, parts)]
    return list(dict.fromkeys([*endings, *names]))
