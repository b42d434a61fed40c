"""Configs of each method that fit generated models: hypothesis strategies for them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st
from torch import nn

from graphpeft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeanutConfig,
    PeftConfig,
    PeftType,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TargetedConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)
from graphpeft.rules.registry import registered
from graphpeft.testing.generated_models import DIM, Case, bodies, cases, mixing_cases, targets_of, token_cases


def _entries(chosen: list[str], paths: list[str]) -> list[str] | str:
    """Returns the `target_modules` for exactly these paths: the list itself, unless one is the end of another path."""
    ambiguous = any(path.endswith(f".{name}") for name in chosen for path in paths if path not in chosen)
    return "|".join(map(re.escape, chosen)) if ambiguous else chosen


def _from_weight(identity: bool) -> list[str]:
    """Returns the initialisations that read the weight; with `identity`, only exact ones, not up to rounding."""
    return ["mica"] if identity else ["pissa", "olora", "mica", "orthogonal"]


def _adds_bias(model: nn.Module, path: str) -> bool:
    layer = dict(model.named_modules()).get(path)
    return isinstance(layer, nn.Linear) and layer.bias is not None


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
    return LoraConfig(
        r=draw(st.sampled_from(ranks)),
        lora_alpha=draw(st.sampled_from([1, 8, 3.5])),
        lora_dropout=draw(st.sampled_from([0.0, 0.4])),
        use_rslora=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        use_dora=draw(st.booleans()) and not lora_bias and kind != "mica",
        lora_bias=lora_bias,
        init_lora_weights=kind,
        target_modules=_entries(chosen, paths),
        rank_pattern=draw(st.sampled_from([{}, {special: 2}])),
        alpha_pattern=draw(st.sampled_from([{}, {special: 5}])),
        modules_to_save=draw(st.sampled_from([None, ["norm"]] if any(p.endswith("norm") for p in paths) else [None])),
    )


@st.composite
def ia3_configs(draw: Any, model: nn.Module, identity: bool) -> IA3Config:
    """Returns a strategy for (IA)³ configs that fit `model`; with `identity`, all factors are 1 at first."""
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    entries = _entries(chosen, [path for path, _ in model.named_modules()])
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
        target_modules=_entries(chosen, [path for path, _ in model.named_modules()]),
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
        target_modules=_entries(chosen, [path for path, _ in model.named_modules()]),
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
        target_modules=_entries(chosen, [path for path, _ in model.named_modules()]),
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
    hidden = draw(st.integers(1, 5))
    return PromptEncoderConfig(
        encoder_reparameterization_type=kind, encoder_hidden_size=hidden, **draw(_prompt_options())
    )


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
    """Returns a function of a model that makes a strategy for configs: other targets, and options independently chosen.

    Args:
        config_class: The method's class, with an option `target_modules`.
        fresh: The options with which a fresh adapter is the identity, where not all choices have that.
        without: Paths that are no targets.
        **choices: The values of each option.
    """

    @st.composite
    def configs(draw: Any, model: nn.Module, identity: bool) -> Any:
        targets = [path for path in targets_of(model) if path not in without]
        chosen = draw(st.lists(st.sampled_from(targets), min_size=1, unique=True))
        options = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
        if identity:
            options.update(fresh or {})
        named = _entries(chosen, [path for path, _ in model.named_modules()])
        return config_class(target_modules=named, **options)

    return configs


_DRAWN: dict[str, Any] = {"init_weights": [True, False]}
_NOT_DRAWN = {"init_weights": True}

vera_configs = choosing(VeraConfig, _NOT_DRAWN, r=[1, 3], vera_dropout=[0.0, 0.4], d_initial=[0.1, -2.0], **_DRAWN)
pvera_configs = choosing(PveraConfig, _NOT_DRAWN, r=[1, 3], pvera_dropout=[0.0, 0.4], d_initial=[0.1, -2.0], **_DRAWN)
randlora_configs = choosing(
    RandLoraConfig,
    _NOT_DRAWN,
    r=[1, 3],
    randlora_alpha=[1, 3.5],
    randlora_dropout=[0.0, 0.4],
    sparse=[True, False],
    **_DRAWN,
)

# any size is a multiple of 1
vblora_configs = choosing(
    VBLoRAConfig,
    r=[1, 3],
    num_vectors=[4, 7],
    vector_length=[1],
    topk=[1, 2],
    vblora_dropout=[0.0, 0.4],
    init_vector_bank_bound=[0.02, 1.0],
)

unilora_configs = choosing(
    UniLoraConfig, r=[1, 3], theta_d_length=[5, 256], unilora_dropout=[0.0, 0.4], save_indices=[True, False], **_DRAWN
)

tinylora_configs = choosing(
    TinyLoraConfig,
    _NOT_DRAWN,
    r=[1, 3],
    u=[1, 5],
    weight_tying=[0.0, 0.5, 1.0],
    tinylora_dropout=[0.0, 0.4],
    init_v_bound=[1.0],
    init_weights=[True, "uniform"],
)


@functools.cache
def _cases_with_a_layer() -> st.SearchStrategy[Case]:
    """Returns a strategy for models, as `cases` does, whose body begins with a linear layer."""
    return cases(bodies().map(lambda build: lambda: nn.Sequential(nn.Linear(DIM, DIM), build())))


class Method(NamedTuple):
    """A method's strategies and properties, for tests.

    Attributes:
        configs: The strategy for its configs: a function of the model, and of whether a fresh adapter must be the
            identity.
        fits: The strategy for models that it can adapt.
        is_identity: Whether a fresh adapter can be the identity.
        merges: Whether the method changes weights.
    """

    configs: Callable[..., st.SearchStrategy[Any]]
    fits: Callable[[], st.SearchStrategy[Case]]
    is_identity: bool
    merges: bool


_DRAWN = {"init_weights": [True, False]}
_ZERO = {"init_weights": True}

METHODS: dict[str, Method] = {
    PeftType.LORA: Method(lora_configs, cases, is_identity=True, merges=True),
    PeftType.ADALORA: Method(adalora_configs, cases, is_identity=True, merges=True),
    PeftType.BEFT: Method(
        choosing(BeftConfig, _NOT_DRAWN, **_DRAWN),
        _cases_with_a_layer,
        is_identity=True,
        merges=True,
    ),
    PeftType.BOFT: Method(
        choosing(
            BOFTConfig,
            {"init_weights": True},
            boft_block_size=[2, 4],
            boft_n_butterfly_factor=[1, 2],
            bias=["none", "all", "boft_only"],
            init_weights=[True, False],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.C3A: Method(
        choosing(C3AConfig, _ZERO, block_size=[1], init_weights=[True, False, "gaussian"]),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.DEFT: Method(
        choosing(
            DeftConfig,
            {"para": False},
            r=[1, 4],
            alpha=[None, 3],
            para=[True, False],
            decomposition_method=["relu", "qr"],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.DELORA: Method(
        choosing(DeloraConfig, _ZERO, r=[1, 2, 4], delora_lambda=[1, 15, 3.5], **_DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.FOURIERFT: Method(
        choosing(FourierFTConfig, _ZERO, n_frequency=[1, 6, 9], scaling=[20.0, 3], **_DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.GLORA: Method(
        choosing(
            GloraConfig,
            _ZERO,
            r=[1, 2],
            config_A_B=["lora", "vector", "constant"],
            config_C=["lora", "vector", "none"],
            config_D_E=["vector", "constant", "none"],
            **_DRAWN,
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.WAVEFT: Method(
        choosing(WaveFTConfig, _ZERO, n_frequency=[1, 6, 9], scaling=[20.0, 3], use_idwt=[True, False], **_DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.GRALORA: Method(
        choosing(
            GraloraConfig,
            {"init_weights": True},
            r=[1, 2, 4],
            hybrid_r=[0, 3],
            alpha=[1, 8, 3.5],
            gralora_k=[1],  # models have features of odd numbers
            gralora_dropout=[0.0, 0.4],
            init_weights=[True, False],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.HIRA: Method(
        choosing(
            HiraConfig,
            {"init_weights": True},
            r=[1, 2, 4],
            hira_dropout=[0.0, 0.4],
            init_weights=[True, "gaussian", False],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.HRA: Method(
        choosing(
            HRAConfig,
            {"init_weights": True, "r": 2, "apply_GS": False},
            r=[1, 3],
            apply_GS=[True, False],
            init_weights=[True, False],
            bias=["none", "all", "hra_only"],
        ),
        cases,
        is_identity=False,
        merges=True,
    ),
    PeftType.IA3: Method(ia3_configs, cases, is_identity=True, merges=True),
    PeftType.LILY: Method(
        choosing(
            LilyConfig,
            {"init_weights": True},
            r=[1, 2, 4],
            stride_A=[1, 2],
            num_B=[1, 2, 3],
            scaling=[1.0, 0.5],
            init_weights=[True, False],
        ),
        cases,
        is_identity=True,
        merges=False,
    ),
    PeftType.LN_TUNING: Method(ln_tuning_configs, cases, is_identity=True, merges=True),
    PeftType.LOHA: Method(loha_configs, cases, is_identity=True, merges=True),
    PeftType.LOKR: Method(lokr_configs, cases, is_identity=True, merges=True),
    PeftType.MISS: Method(
        choosing(MissConfig, _ZERO, r=[1, 2, 3], init_weights=[True, False, "mini"]),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.OFT: Method(
        choosing(
            OFTConfig,
            {"init_weights": True},
            oft_block_size=[2, 4, 32],
            bias=["none", "all", "oft_only"],
            init_weights=[True, False],
            block_share=[True, False],
            use_cayley_neumann=[True, False],
            num_cayley_neumann_terms=[2, 5, 8],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.PEANUT: Method(
        choosing(PeanutConfig, _ZERO, r=[1, 2], depth=[0, 2], act_fn=["relu", "gelu"], scaling=[1.0, 3], **_DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.PVERA: Method(pvera_configs, cases, is_identity=True, merges=True),
    PeftType.RANDLORA: Method(randlora_configs, cases, is_identity=True, merges=True),
    PeftType.ROAD: Method(
        choosing(
            RoadConfig,
            {"init_weights": True},
            without=["head"],  # which has an odd number of outputs
            variant=["road_1", "road_2", "road_4"],
            group_size=[2, 4, 8],
            init_weights=[True, False],
        ),
        _cases_with_a_layer,
        is_identity=True,
        merges=True,
    ),
    PeftType.SHIRA: Method(
        choosing(ShiraConfig, _ZERO, r=[1], random_seed=[None, 5], **_DRAWN), cases, is_identity=True, merges=True
    ),
    PeftType.SUPERTUNING: Method(
        choosing(SupertuningConfig, _ZERO, sparsity=[0.5, 0.8], select_top=[True, False], r=[None, 2], **_DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.TINYLORA: Method(tinylora_configs, cases, is_identity=True, merges=True),
    PeftType.TRAINABLE_TOKENS: Method(trainable_tokens_configs, token_cases, is_identity=True, merges=True),
    PeftType.UNILORA: Method(unilora_configs, cases, is_identity=False, merges=True),
    PeftType.VBLORA: Method(vblora_configs, cases, is_identity=False, merges=True),
    PeftType.VERA: Method(vera_configs, cases, is_identity=True, merges=True),
    PeftType.PROMPT_TUNING: Method(prompt_tuning_configs, mixing_cases, is_identity=False, merges=False),
    PeftType.P_TUNING: Method(prompt_encoder_configs, mixing_cases, is_identity=False, merges=False),
}
"""The methods that adapt any model, by `peft_type`; add your own method here."""


def method_of(peft_type: str) -> Method:
    """Returns the entry of `METHODS` for a method; for other methods, an entry with `plain_configs`."""
    if peft_type in METHODS:
        return METHODS[peft_type]
    config_class = registered()[peft_type]
    configs = functools.partial(plain_configs, config_class)
    return Method(configs, cases, is_identity=bool(config_class().starts_as_identity), merges=False)


@st.composite
def plain_configs(draw: Any, config_class: type[PeftConfig], model: nn.Module, identity: bool) -> PeftConfig:
    """Returns a strategy for the configs of a class that differ only in their targets.

    Args:
        draw: Given by hypothesis.
        config_class: A class with an option `target_modules`.
        model: The model.
        identity: Ignored, since the class decides whether a fresh adapter is the identity.
    """
    chosen = draw(st.lists(st.sampled_from(targets_of(model)), min_size=1, unique=True))
    options: dict[str, Any] = {"target_modules": _entries(chosen, [path for path, _ in model.named_modules()])}
    return config_class(**options)


@st.composite
def adaptations(draw: Any, peft_type: str, identity: bool = False) -> tuple[Case, PeftConfig]:
    """Returns a strategy for a model with a config that adapts it.

    Args:
        draw: Given by hypothesis.
        peft_type: The method.
        identity: Whether a fresh adapter must be the identity.
    """
    method = method_of(peft_type)
    case = draw(method.fits())
    return case, draw(method.configs(case.build(), identity=identity))
