"""The variants, by the options of LoRA that ask for them, and where they can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from graphpeft.graph import ops
from graphpeft.graph.ops.boundaries import Leaf
from graphpeft.methods.lora.variants.activated import Activated
from graphpeft.methods.lora.variants.arrow import Arrow, ArrowConfig
from graphpeft.methods.lora.variants.blocks import BdLoraConfig, of_blocks
from graphpeft.methods.lora.variants.kasa import Kasa, KasaConfig
from graphpeft.methods.lora.variants.monteclora import Monteclora, MontecloraConfig
from graphpeft.methods.lora.variants.velora import VeloraConfig, of_options
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Rule
from graphpeft.wording import shown


class Variant(NamedTuple):
    """A variant of LoRA.

    Attributes:
        name: Its name.
        rule: Returns its rule from LoRA's for the same site, the site and the config.
        options: The class of the option's own options, if it has some.
        is_of_calls: Whether it is also for calls of layers, such as quantised ones.
    """

    name: str
    rule: Callable[[Any, Any, Any], Rule]
    options: type | None = None
    is_of_calls: bool = False


VARIANTS: dict[str, Variant] = {
    "alora_invocation_tokens": Variant(
        "aLoRA",
        lambda lora, _, config: Activated(lora, tuple(config.alora_invocation_tokens)),
        is_of_calls=True,
    ),
    "arrow_config": Variant(
        "Arrow",
        lambda lora, _, config: Arrow(lora, config.arrow_config.top_k, config.arrow_config.router_temperature),
        ArrowConfig,
        is_of_calls=True,
    ),
    "use_bdlora": Variant("BD-LoRA", of_blocks, BdLoraConfig),
    "velora_config": Variant("VeLoRA", lambda lora, _, config: of_options(lora, config.velora_config), VeloraConfig),
    "kasa_config": Variant("KaSA", lambda lora, *_: Kasa(lora), KasaConfig),
    "monteclora_config": Variant(
        "MonteCLoRA",
        lambda lora, _, config: Monteclora(
            lora, config.monteclora_config.num_samples, config.monteclora_config.sample_scaler
        ),
        MontecloraConfig,
    ),
}
"""The variants by the option that asks for them."""

NESTED = {option: variant.options for option, variant in VARIANTS.items() if variant.options is not None}
"""The options that have options of their own, with the class of these."""

_UNLIKE = ("target_parts", "merged_quantiser", "ensure_weight_tying")
"""Options of other changes than the plain product's."""


def variant_of(config: Any) -> Variant | None:
    """Returns the variant that a config asks for, or None."""
    return next((variant for option, variant in VARIANTS.items() if getattr(config, option)), None)


def check(config: Any) -> None:
    """Raises ValueError for options that can't go with a variant, or several variants."""
    asked = [option for option in VARIANTS if getattr(config, option)]
    if not asked:
        return
    if config.arrow_config and not config.arrow_config.task_adapter_names:
        raise ValueError("arrow_config is of a router over saved adapters, which create_arrow_model makes; call that")
    others = [*asked[1:], *(name for name in ("use_dora", *_UNLIKE) if getattr(config, name))]
    if config.init_lora_weights == "mica":
        others.append("init_lora_weights")
    if others:
        raise ValueError(
            f"{asked[0]}={shown(getattr(config, asked[0]))} can't go with "
            f"{others[0]}={shown(getattr(config, others[0]))}; leave one of them out"
        )


def only_layers(config: Any, sites: Sequence[Any], report: Report) -> list[Any]:
    """Returns the sites where a config's variant can be."""
    variant = variant_of(config)
    if variant is None:
        return list(sites)
    fitting = [site for site in sites if _is_place_of(variant, site)]
    for site in sites:
        if site not in fitting:
            reason = f"{variant.name} is for linear layers, as in PEFT, and its weight isn't just one's"
            report.refused.append(Refusal(site.label, reason))
    return fitting


def _is_place_of(variant: Variant, site: Any) -> bool:
    if site.op is Leaf:
        return variant.is_of_calls
    is_linear = site.is_layer and site.op is ops.Linear and site.layout is ops.Linear
    return is_linear and len(site.shape) == 2 and site.named is None and not site.both_ways


def rule_for(config: Any, site: Any, lora: Any) -> Rule:
    """Returns the rule of a config's variant at a site, or LoRA's if it asks for none."""
    variant = variant_of(config)
    return lora if variant is None else variant.rule(lora, site, config)
