"""Configs of each method that fit generated models: hypothesis strategies for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

from graphpeft import (
    AdamssConfig,
    AdaptError,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    LilyConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftConfig,
    PeftType,
    PsoftConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    WaveFTConfig,
    WeightDecomposedConfig,
)
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.rules.registry import registered
from graphpeft.testing.generated_models import DIM, Case, bodies, cases, in_dtype, mixing_cases, token_cases
from graphpeft.testing.method_configs import (
    DRAWN,
    NOT_DRAWN,
    adalora_configs,
    choosing,
    ia3_configs,
    ln_tuning_configs,
    loha_configs,
    lokr_configs,
    lora_configs,
    plain_configs,
    prompt_encoder_configs,
    prompt_tuning_configs,
    pvera_configs,
    randlora_configs,
    tinylora_configs,
    trainable_tokens_configs,
    unilora_configs,
    vblora_configs,
    vera_configs,
    weight_decomposed_configs,
)


@functools.cache
def _cases_with_a_layer() -> st.SearchStrategy[Case]:
    """Returns a strategy for models, as `cases` does, whose body begins with a linear layer."""
    return cases(bodies().map(lambda build: lambda: nn.Sequential(nn.Linear(DIM, DIM), build())))


def _also_choosing(
    configs: Callable[..., st.SearchStrategy[Any]], **choices: Sequence[Any]
) -> Callable[..., st.SearchStrategy[Any]]:
    """Returns a function as `configs`, whose strategy chooses these options, too."""

    @st.composite
    def chosen(draw: Any, model: nn.Module, identity: bool) -> Any:
        options = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
        return dataclasses.replace(draw(configs(model, identity)), **options)

    return chosen


UNSAVED: dict[str, Any] = {"save_projection": [True, False]}
"""Choices of files: with the frozen projections, or without them, so that they are drawn again."""


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


METHODS: dict[str, Method] = {
    PeftType.LORA: Method(lora_configs, cases, is_identity=True, merges=True),
    PeftType.ADALORA: Method(adalora_configs, cases, is_identity=True, merges=True),
    PeftType.ADAMSS: Method(
        choosing(
            AdamssConfig,
            {"init_weights": "orthogonal"},
            r=[1, 3, 100],
            num_subspaces=[1, 2],
            subspace_rank=[1, 2],
            use_dynamic_rank=[True, False],
            init_weights=["orthogonal", None],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.BEFT: Method(
        choosing(BeftConfig, NOT_DRAWN, **DRAWN),
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
        choosing(
            C3AConfig,
            NOT_DRAWN,
            block_size=[1],
            init_weights=[True, False, "gaussian", "kaiming_uniform", "xavier_uniform"],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.DEFT: Method(
        choosing(
            DeftConfig,
            {"para": False, "init_weights": True},
            r=[1, 4],
            alpha=[None, 3],
            para=[True, False],
            decomposition_method=["relu", "qr"],
            deft_dropout=[0.0, 0.4],
            **DRAWN,
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.DELORA: Method(
        choosing(
            DeloraConfig,
            NOT_DRAWN,
            r=[1, 2, 4],
            delora_lambda=[1, 15, 3.5],
            module_dropout=[0.0, 0.4],
            bias=["none", "all", "delora_only"],
            **DRAWN,
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.FOURIERFT: Method(
        choosing(FourierFTConfig, NOT_DRAWN, n_frequency=[1, 6, 9], scaling=[20.0, 3], **DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.FROD: Method(
        choosing(
            FrodConfig,
            NOT_DRAWN,
            sparse_rate=[0.0, 0.01, 0.3, 1.0],
            frod_dropout=[0.0, 0.4],
            **UNSAVED,
            **DRAWN,
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.GLORA: Method(
        choosing(
            GloraConfig,
            NOT_DRAWN,
            r=[1, 2],
            config_A_B=["lora", "vector", "constant"],
            config_C=["lora", "vector", "none"],
            config_D_E=["vector", "constant", "none"],
            **DRAWN,
        ),
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
            num_B=[2, 3],  # a router to one alone learns nothing
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
    WeightDecomposedConfig.peft_type: Method(weight_decomposed_configs, cases, is_identity=True, merges=True),
    PeftType.MISS: Method(
        choosing(
            MissConfig,
            NOT_DRAWN,
            r=[1, 2, 3],
            miss_dropout=[0.0, 0.4],
            init_weights=[True, False, "mini"],
        ),
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
            coft=[True, False],
            eps=[0.3],
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.OSF: Method(
        choosing(OSFConfig, NOT_DRAWN, effective_rank=[None, 1, 2, 0.5], **DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.PEANUT: Method(
        choosing(PeanutConfig, NOT_DRAWN, r=[2, 3], depth=[0, 2], act_fn=["relu", "gelu"], scaling=[1.0, 3], **DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.PVERA: Method(_also_choosing(pvera_configs, **UNSAVED), cases, is_identity=True, merges=True),
    PeftType.RANDLORA: Method(_also_choosing(randlora_configs, **UNSAVED), cases, is_identity=True, merges=True),
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
        choosing(ShiraConfig, NOT_DRAWN, r=[1], random_seed=[None, 5], **DRAWN), cases, is_identity=True, merges=True
    ),
    PeftType.SUPERTUNING: Method(
        choosing(
            SupertuningConfig,
            NOT_DRAWN,
            sparsity=[0.5, 0.8],
            select_top=[True, False],
            r=[None, 2],
            lora_dropout=[0.0, 0.4],
            **DRAWN,
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.TINYLORA: Method(_also_choosing(tinylora_configs, **UNSAVED), cases, is_identity=True, merges=True),
    PeftType.TRAINABLE_TOKENS: Method(trainable_tokens_configs, token_cases, is_identity=True, merges=True),
    PeftType.UNILORA: Method(unilora_configs, cases, is_identity=False, merges=True),
    PeftType.VBLORA: Method(vblora_configs, cases, is_identity=False, merges=True),
    PeftType.VERA: Method(_also_choosing(vera_configs, **UNSAVED), cases, is_identity=True, merges=True),
    PeftType.WAVEFT: Method(
        choosing(WaveFTConfig, NOT_DRAWN, n_frequency=[1, 6, 9], scaling=[20.0, 3], use_idwt=[True, False], **DRAWN),
        cases,
        is_identity=True,
        merges=True,
    ),
    PeftType.PSOFT: Method(
        choosing(
            PsoftConfig,
            NOT_DRAWN,
            r=[2, 3],
            psoft_alpha=[1, 3.5],
            ab_svd_init=["psoft_init", "pissa_init"],
            psoft_orth=[True, False],
            psoft_mag_a=[True, False],
            use_cayley_neumann=[True, False],
            psoft_svd=["full", "lowrank"],
            random_seed=[5],
            psoft_dropout=[0.0, 0.4],
            **DRAWN,
        ),
        cases,
        is_identity=True,
        merges=True,
    ),
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


@contextlib.contextmanager
def refusals_discarded() -> Iterator[None]:
    """Discards an example that is refused, so that a property test goes on with another one.

    A law raises AdaptError, TraceError or GuardError where it doesn't apply: as for merging a tied weight.

    >>> with refusals_discarded():
    ...     pass
    """
    try:
        yield
    except (AdaptError, TraceError, GuardError):
        reject()


@st.composite
def adaptations(
    draw: Any,
    peft_type: str,
    identity: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> tuple[Case, PeftConfig]:
    """Returns a strategy for a model with a config that adapts it."""
    method = method_of(peft_type)
    case = draw(method.fits())
    config = draw(method.configs(case.build(), identity=identity))
    return in_dtype(case, draw(st.sampled_from(list(dtypes)))), config
