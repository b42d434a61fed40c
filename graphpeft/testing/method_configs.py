"""Strategies for configs that fit a model, of methods whose options depend on each other or on the model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

from graphpeft import (
    AdaLoraConfig,
    AdaptError,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    TargetedConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WeightDecomposedConfig,
    explain,
)
from graphpeft.testing.generated_models import DIM, targets_of


def entries_for(chosen: list[str], paths: list[str]) -> list[str] | str:
    """Returns the `target_modules` for exactly these paths: the list itself, unless one is the end of another path."""
    ambiguous = any(path.endswith(f".{name}") for name in chosen for path in paths if path not in chosen)
    return "|".join(map(re.escape, chosen)) if ambiguous else chosen


def _from_weight(identity: bool) -> list[str]:
    """Returns the initialisations that read the weight; with `identity`, only exact ones, not up to rounding."""
    return ["mica"] if identity else ["pissa", "olora", "mica", "orthogonal"]


def _adds_bias(model: nn.Module, path: str) -> bool:
    layer = dict(model.named_modules()).get(path)
    return isinstance(layer, nn.Linear) and layer.bias is not None


def _variants(model: nn.Module, paths: list[str], identity: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Returns a strategy for the option of a variant, or none: those that need nothing in calls, for linear layers."""
    modules = dict(model.named_modules())
    if not all(type(modules.get(path)) is nn.Linear for path in paths):
        return st.just({})
    velora: list[dict[str, Any]] = [{"velora_config": {"num_groups": 2, "init_type": kind}} for kind in _VECTORS]
    blocks: list[dict[str, Any]] = [{"use_bdlora": {f"target_modules_bd_{factor}": [""]}} for factor in "ab"]
    drawn: list[dict[str, Any]] = [{"monteclora_config": {"num_samples": 2, "buffer_size": 1}}]
    return st.sampled_from([{}, *velora, *blocks, *drawn, *([] if identity else [{"kasa_config": {}}])])


_VECTORS = ("batch_average", "batch_average_once", "random")


@st.composite
def lora_configs(draw: Any, model: nn.Module, identity: bool) -> LoraConfig:
    """Returns a strategy for LoRA configs that fit `model`; with `identity`, a fresh adapter changes nothing."""
    paths = [path for path, _ in model.named_modules()]
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    special = draw(st.sampled_from(chosen))
    kind = draw(
        st.sampled_from([*([True, "gaussian"] if identity else [True, False, "gaussian"]), *_from_weight(identity)])
    )
    # the model's narrowest matrix has three rows
    ranks = {"orthogonal": [2, 4], "pissa": [1, 2, 3], "olora": [1, 2, 3], "mica": [1, 2, 3]}.get(
        str(kind), [1, 2, 3, 4]
    )
    # the bias of B is merged into the layer's bias
    can_have_bias = kind in (True, False) and all(_adds_bias(model, path) for path in chosen)
    lora_bias = draw(st.sampled_from([False, can_have_bias]))
    variant = draw(_variants(model, chosen, identity)) if kind in (True, "gaussian") else {}
    if variant:
        return LoraConfig(
            r=draw(st.sampled_from([1, 2])),
            lora_alpha=draw(st.sampled_from([1, 8, 3.5])),
            lora_dropout=draw(st.sampled_from([0.0, 0.4])),
            init_lora_weights=kind,
            target_modules=entries_for(chosen, paths),
            **variant,
        )
    return LoraConfig(
        r=draw(st.sampled_from(ranks)),
        lora_alpha=draw(st.sampled_from([1, 8, 3.5])),
        lora_dropout=draw(st.sampled_from([0.0, 0.4])),
        use_rslora=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        use_dora=draw(st.booleans()) and not lora_bias and kind != "mica",
        lora_bias=lora_bias,
        init_lora_weights=kind,
        target_modules=entries_for(chosen, paths),
        rank_pattern=draw(st.sampled_from([{}, {special: 2}])),
        alpha_pattern=draw(st.sampled_from([{}, {special: 5}])),
        modules_to_save=draw(st.sampled_from([None, ["norm"]] if any(p.endswith("norm") for p in paths) else [None])),
    )


@st.composite
def ia3_configs(draw: Any, model: nn.Module, identity: bool) -> IA3Config:
    """Returns a strategy for (IA)³ configs that fit `model`; with `identity`, all factors are 1 at first."""
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    entries = entries_for(chosen, [path for path, _ in model.named_modules()])
    enter = draw(st.lists(st.sampled_from(chosen), unique=True))
    return IA3Config(
        target_modules=entries,
        feedforward_modules="|".join(map(re.escape, enter)) if isinstance(entries, str) else enter,
        init_ia3_weights=identity or draw(st.booleans()),
    )


@st.composite
def loha_configs(draw: Any, model: nn.Module, identity: bool) -> LoHaConfig:
    """Returns a strategy for LoHa configs that fit `model`; with `identity`, a fresh adapter changes nothing."""
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    special = draw(st.sampled_from(chosen))
    return LoHaConfig(
        r=draw(st.sampled_from([1, 2, 4])),
        alpha=draw(st.sampled_from([1, 8, 3.5])),
        target_modules=entries_for(chosen, [path for path, _ in model.named_modules()]),
        rank_pattern=draw(st.sampled_from([{}, {special: 3}])),
        alpha_pattern=draw(st.sampled_from([{}, {special: 5}])),
        init_weights=identity or draw(st.booleans()),
        **draw(_dropouts()),
    )


@st.composite
def adalora_configs(draw: Any, model: nn.Module, identity: bool) -> AdaLoraConfig:
    """Returns a strategy for AdaLoRA configs that fit `model`; with `identity`, a fresh adapter changes nothing."""
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    init_r = draw(st.sampled_from([1, 2, 4]))
    special = draw(st.sampled_from(chosen))
    mask = draw(st.lists(st.booleans(), min_size=init_r, max_size=init_r).filter(any))
    return AdaLoraConfig(
        init_r=init_r,
        total_step=draw(st.sampled_from([1, 20])),
        lora_alpha=draw(st.sampled_from([0, 1, 8, 3.5])),
        lora_dropout=draw(st.sampled_from([0.0, 0.4])),
        target_modules=entries_for(chosen, [path for path, _ in model.named_modules()]),
        rank_pattern=draw(st.sampled_from([None, {f"{special}.lora_E": mask}])),
        init_lora_weights=identity or draw(st.booleans()),
    )


@st.composite
def lokr_configs(draw: Any, model: nn.Module, identity: bool) -> LoKrConfig:
    """Returns a strategy for LoKr configs that fit `model`; with `identity`, a fresh adapter changes nothing."""
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    special = draw(st.sampled_from(chosen))
    return LoKrConfig(
        r=draw(st.sampled_from([1, 2, 4])),
        alpha=draw(st.sampled_from([1, 8, 3.5])),
        decompose_both=draw(st.booleans()),
        decompose_factor=draw(st.sampled_from([-1, 1, 2, 8])),
        rank_dropout_scale=draw(st.booleans()),
        target_modules=entries_for(chosen, [path for path, _ in model.named_modules()]),
        rank_pattern=draw(st.sampled_from([{}, {special: 3}])),
        alpha_pattern=draw(st.sampled_from([{}, {special: 5}])),
        init_weights=draw(st.sampled_from([True, "lycoris"] if identity else [True, False, "lycoris"])),
        **draw(_dropouts()),
    )


@functools.cache
def _dropouts() -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries({name: st.sampled_from([0.0, 0.4]) for name in ("rank_dropout", "module_dropout")})


@st.composite
def ln_tuning_configs(draw: Any, model: nn.Module, identity: bool) -> LNTuningConfig:
    """Returns a strategy for LN tuning of any modules of `model`, of which none is inside of another."""
    paths = [path for path, module in model.named_modules() if path and any(True for _ in module.parameters())]
    chosen: list[str] = []
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, unique=True)):
        if not any(f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") for other in chosen):
            chosen.append(path)
    return LNTuningConfig(target_modules="|".join(map(re.escape, chosen)))


@st.composite
def trainable_tokens_configs(draw: Any, model: nn.Module, identity: bool) -> TrainableTokensConfig:
    """Returns a strategy for trainable rows of tables and layers of `model`; with `identity`, those of the weights."""
    tables = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding | nn.Linear)}
    # a head follows the embedding whose weight it has
    first = {id(module.weight): path for path, module in reversed(tables.items())}
    tables = {path: tables[path] for path in tables if path in first.values()}
    chosen = draw(st.lists(st.sampled_from(list(tables)), min_size=1, unique=True))
    rows = min(len(tables[path].weight) for path in chosen)
    return TrainableTokensConfig(
        target_modules="|".join(map(re.escape, chosen)),
        token_indices=draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True)),
        init_weights=identity or draw(st.booleans()),
    )


@st.composite
def prompt_tuning_configs(draw: Any, model: nn.Module, identity: bool) -> PromptTuningConfig:
    """Returns a strategy for prompt tuning in the body of `model`."""
    return PromptTuningConfig(**draw(_prompt_options()))


@st.composite
def prompt_encoder_configs(draw: Any, model: nn.Module, identity: bool) -> PromptEncoderConfig:
    """Returns a strategy for P-tuning in the body of `model`."""
    kind = draw(st.sampled_from(["MLP", "LSTM"]))
    hidden = draw(st.integers(2, 5))
    # of one token alone, an LSTM has no state to pass on
    options = {**draw(_prompt_options()), "num_virtual_tokens": draw(st.integers(2, 4))}
    return PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=hidden, **options)


@functools.cache
def _prompt_options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "num_virtual_tokens": st.integers(1, 4),
            "token_dim": st.just(DIM),
            "prompt_scope": st.just(["body"]),
            "prompt_position": st.sampled_from(["before", "after"]),
        }
    )


def choosing(
    config_class: type[TargetedConfig],
    fresh: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    **choices: Sequence[Any],
) -> Callable[..., st.SearchStrategy[Any]]:
    """Returns a function of a model that makes a strategy for configs: other targets, and options drawn one by one."""

    @st.composite
    def configs(draw: Any, model: nn.Module, identity: bool) -> Any:
        targets = [path for path in targets_of(model) if path not in without]
        chosen = draw(st.lists(st.sampled_from(targets), min_size=1, unique=True))
        options = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
        if identity:
            options.update(fresh or {})
        named = entries_for(chosen, [path for path, _ in model.named_modules()])
        return config_class(target_modules=named, **options)

    return configs


DRAWN: dict[str, Any] = {"init_weights": [True, False]}
"""Choices of first values: with or without an effect."""

NOT_DRAWN = {"init_weights": True}
"""The option without an effect."""


@st.composite
def weight_decomposed_configs(draw: Any, model: nn.Module, identity: bool) -> WeightDecomposedConfig:
    """Returns a strategy for configs around one of four methods: two that multiply by W, and two that don't."""
    directions = st.one_of(
        choosing(LoHaConfig, NOT_DRAWN, r=[1, 2], alpha=[1, 3.5], **DRAWN)(model, identity),
        choosing(LoKrConfig, NOT_DRAWN, r=[1, 2], alpha=[1, 3.5], **DRAWN)(model, identity),
        choosing(HiraConfig, NOT_DRAWN, r=[1, 2], **DRAWN)(model, identity),
        choosing(MissConfig, NOT_DRAWN, r=[1], init_weights=[True, "bat"])(model, identity),
    )
    return WeightDecomposedConfig(direction=draw(directions))


vera_configs = choosing(VeraConfig, NOT_DRAWN, r=[1, 3], vera_dropout=[0.0, 0.4], d_initial=[0.1, -2.0], **DRAWN)
# d scales logarithms of variances: where it is large, or drawn, the exponentials of layers in a row overflow
pvera_configs = choosing(PveraConfig, NOT_DRAWN, r=[1, 3], pvera_dropout=[0.0, 0.4], d_initial=[0.1, -0.5])
randlora_configs = choosing(
    RandLoraConfig,
    NOT_DRAWN,
    r=[1, 3],
    randlora_alpha=[1, 3.5],
    randlora_dropout=[0.0, 0.4],
    sparse=[True, False],
    **DRAWN,
)

# any size is a multiple of 1
vblora_configs = choosing(
    VBLoRAConfig,
    r=[1, 3],
    num_vectors=[4, 7],
    vector_length=[1],
    topk=[2, 3],  # one vector alone has the weight 1, whatever its logit
    vblora_dropout=[0.0, 0.4],
    init_vector_bank_bound=[0.02, 1.0],
)

unilora_configs = choosing(
    UniLoraConfig, r=[1, 3], theta_d_length=[5, 256], unilora_dropout=[0.0, 0.4], save_indices=[True, False], **DRAWN
)

tinylora_configs = choosing(
    TinyLoraConfig,
    NOT_DRAWN,
    r=[1, 3],
    u=[1, 5],
    weight_tying=[0.0, 0.5, 1.0],
    tinylora_dropout=[0.0, 0.4],
    init_v_bound=[1.0],
    init_weights=[True, "uniform"],
)


@st.composite
def plain_configs(draw: Any, config_class: Any, model: nn.Module, identity: bool) -> PeftConfig:
    """Returns a strategy for the configs of a class that differ only in their targets.

    The targets are those that the class takes one by one: linear layers, matrices and convolutions, or modules of all
    kinds if it adapts their boundaries or calls. A model without any is discarded.
    """
    paths = [path for path, _ in model.named_modules() if path]
    modules = dict(model.named_modules())
    convolutions = [path for path in paths if isinstance(modules[path], nn.Conv1d)]
    takes_modules = config_class.adapts_boundaries or config_class.adapts_leaves
    candidates = list(dict.fromkeys((*targets_of(model), *(paths if takes_modules else convolutions))))
    configs = {path: config_class(target_modules=entries_for([path], paths)) for path in candidates}
    taken = [path for path, config in configs.items() if _is_taken(model, config)]
    if not taken:
        reject()
    config = config_class(
        target_modules=entries_for(draw(st.lists(st.sampled_from(taken), min_size=1, unique=True)), paths)
    )
    if not _is_taken(model, config):
        reject()
    return config


def _is_taken(model: nn.Module, config: PeftConfig) -> bool:
    """Returns whether a config adapts a model."""
    try:
        return not explain(model, config).refused
    except AdaptError:
        return False
