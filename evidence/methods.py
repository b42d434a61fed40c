"""Writes docs/methods.md: PEFT's methods, and the kinds of weights that each adapts, found by trying.

`make methods` writes it, with the contracts of tests/; tests/test_methods_page.py compares it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from contracts import FIRST
from contracts.contract import Contract
from kinds import KINDS, Kind
from oracle import Case, outputs, perturb

import graphpeft
from graphpeft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    ShadowConfig,
    TaskType,
)
from graphpeft.rules.registry import registered

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"

NOT_MERGED: dict[str, str] = {
    "ADAPTION_PROMPT": "attentions read learned tokens",
    "POLY": "tasks choose what acts",
    "SHADOW": "a small model runs beside the layers",
    "XLORA": "tokens choose what acts",
}
"""Why methods can't be merged that have no contract, but for those that add virtual tokens."""

BY_ROW: frozenset[str] = frozenset({"XLORA"})
"""Methods without a contract whose adapters can act on single rows of a batch."""

ADAPTS: dict[str, str] = {
    "ADAPTION_PROMPT": "attentions of the last layers",
    "POLY": "linear layers",
    "SHADOW": "what the layers of a decoder are given",
    "XLORA": "linear layers and embeddings, where the experts do",
}
"""The places of the methods without a contract, but for those that add virtual tokens."""

_FRONT: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 20}

SIZED: dict[str, Any] = {
    "ADAPTION_PROMPT": AdaptionPromptConfig(adapter_len=10, adapter_layers=4, task_type=TaskType.CAUSAL_LM),
    "CARTRIDGE": CartridgeConfig(**_FRONT),
    "CPT": CPTConfig(task_type=TaskType.CAUSAL_LM, cpt_token_ids=[*range(20)], cpt_tokens_type_mask=[1] * 20),
    "MULTITASK_PROMPT_TUNING": MultitaskPromptTuningConfig(**_FRONT, num_tasks=3),
    "POLY": PolyConfig(target_modules=["q_proj", "v_proj"], n_tasks=3, task_type=TaskType.CAUSAL_LM),
    "PREFIX_TUNING": PrefixTuningConfig(**_FRONT),
    "PROMPT_TUNING": PromptTuningConfig(**_FRONT),
    "P_TUNING": PromptEncoderConfig(**_FRONT, encoder_hidden_size=64),
    "SHADOW": ShadowConfig(task_type=TaskType.CAUSAL_LM),
}
"""Configs of the methods without a contract, for their sizes: 20 tokens, 3 tasks; X-LoRA's depends on its experts."""

GUIDE = """\
| you want | take |
|---|---|
| the method that every tool reads | LoRA |
| LoRA's quality at ranks below 16 | LoRA with `use_dora=True`, HiRA |
| the smallest file | (IA)³, VeRA, FourierFT, TinyLoRA |
| ranks that are found in training | AdaLoRA |
| a change of the weight of higher rank than its parameters suggest | LoHa, LoKr, RandLoRA, HiRA |
| image models: style and subject in diffusion models | LoHa, LoKr, OFT |
| to keep the angles between what neurons do | OFT, BOFT, HRA |
| new tokens | trainable tokens, alone or in LoRA |
| to change no weight at all | prompt tuning, P-tuning, prefix tuning, adaption prompts |
| a long text that is read again and again | a cartridge |
| several LoRA adapters at once, mixed for each token | X-LoRA, or Arrow without training |
"""


def page() -> str:
    """Returns the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = "\n\n".join([overview(), layers(), sizes(), equations()])
    return f"""# Methods

Which method to take, what each adapts, and how it is merged and exported.
`make methods` tries all that with PEFT {peft.__version__}, and writes this page.

{GUIDE}
{tables}
"""


def table(head: str, lines: Iterator[str] | list[str]) -> str:
    """Returns a table of markdown."""
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *lines])


# what there is


def methods() -> list[str]:
    """Returns the names of PEFT's methods."""
    return sorted(method.value for method in peft.PeftType)


def contract_of(method: str) -> Contract | None:
    """Returns the contract of a method that changes weights."""
    return next((each for each in FIRST if each.method == method), None)


def overview() -> str:
    """Returns the table of all methods."""
    ours = registered()
    lines = [overview_line(method, ours[method]) for method in methods()]
    return f"""## All of them

All of PEFT's {len(lines)} methods exist here. Files are PEFT's, in both directions, unless a row says otherwise.

""" + table("| method | config | adapts | merges | rows of a batch | exports |", lines)


def overview_line(method: str, config: type[Any]) -> str:
    """Returns a method's row."""
    contract, name = contract_of(method), f"`{config.__name__}`"
    if contract is None:
        prompts = issubclass(config, PromptLearningConfig)
        adapts = "what the model is given" if prompts else ADAPTS[method]
        why = "it adds virtual tokens" if prompts else NOT_MERGED[method]
        return f"| {method} | {name} | {adapts} | no: {why} | {'yes' if method in BY_ROW else 'no'} | pt2, ONNX |"
    exports = ", ".join(name for key, name in (("pt2", "pt2"), ("onnx", "ONNX")) if key not in contract.refuses)
    merges, rows = ("no" if each in contract.refuses else "yes" for each in ("merge", "rows"))
    return f"| {method} | {name} | [weights](#weights) | {merges} | {rows} | {exports or 'merged alone'} |"


# layers


def layers() -> str:
    """Returns the table of the kinds of weights that each method adapts."""
    head = "| method | " + " | ".join(kind.name for kind in KINDS) + " |"
    lines = [
        f"| {contract.method.value} | " + " | ".join(cell(contract, kind) for kind in KINDS) + " |"
        for contract in FIRST
    ]
    return (
        "## Weights\n\n"
        "**+** both libraries adapt it; **alone**: graphpeft alone; **PEFT**: PEFT alone; **−** neither.\n"
        "An adapted weight's adapter changes the output, and merging keeps that change where the method merges.\n\n"
    ) + table(head, lines)


def cell(contract: Contract, kind: Kind) -> str:
    """Returns a cell."""
    ours = works(lambda case: graphpeft.get_peft_model(case.build(), contract.our_config(case)), contract, kind)
    # PEFT's errors about layers that it doesn't know are of any class, and some come with the first call
    with_peft = works(lambda case: peft.get_peft_model(case.build(), theirs(contract, case)), contract, kind, Exception)
    return {(True, True): "+", (True, False): "alone", (False, True): "PEFT", (False, False): "−"}[ours, with_peft]


def theirs(contract: Contract, case: Case) -> Any:
    """Returns PEFT's config, which names parameters apart where the method knows them."""
    targets: list[Any] = [*case.targets["target_modules"]]
    is_parameter = targets[0] in dict(case.build().named_parameters())
    if is_parameter and "target_parameters" in inspect.signature(contract.theirs).parameters:
        return contract.their_config(case, target_modules=[], target_parameters=targets)
    return contract.their_config(case)


def works(
    adapt: Callable[[Case], Any],
    contract: Contract,
    kind: Kind,
    refusals: type[Exception] = graphpeft.AdaptError,
) -> bool:
    """Returns whether an adapter changes the output, and merging keeps that change.

    Args:
        adapt: Adapts the model of a case.
        contract: The method's contract.
        kind: The kind of weight.
        refusals: The class of the errors that say that the kind isn't adapted.
    """
    case = kind.case
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = adapt(case)
            perturb(model)
            active, base = outputs(model.eval(), case), outputs(case.build(), case)
            if torch.allclose(active, base, atol=1e-4):
                return False
            if "merge" in contract.refuses or not kind.merges:
                return True
            merged = outputs(model.merge_and_unload(), case)
    except refusals:
        return False
    return torch.allclose(merged, active, atol=1e-4)


# sizes


def sizes() -> str:
    """Returns the table of the parameters that each method trains."""
    configs = {method: config_of_size(method) for method in methods()}
    lines = [
        f"| {method} | {' | '.join(sizes_of(config))} |" for method, config in configs.items() if config is not None
    ]
    return (
        "## Sizes\n\n"
        "A Llama of 4 layers and 256 features. Options are each method's defaults, but for the targets (`q_proj` and\n"
        "`v_proj`, or the method's own), for sizes that have to fit, and for 20 tokens and 3 tasks. X-LoRA's are\n"
        "those of its experts and of a classifier.\n\n"
    ) + table("| method | trained | file, kB |", lines)


def config_of_size(method: str) -> Any:
    """Returns a method's config for its size; None if that depends on other adapters."""
    contract = contract_of(method)
    return SIZED.get(method) if contract is None else contract.of_size()


def sizes_of(config_of_method: Any) -> tuple[str, str]:
    """Returns the number of parameters and the size of a file, as text."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8
    )
    torch.manual_seed(0)
    model: Any = graphpeft.get_peft_model(transformers.LlamaForCausalLM(config), config_of_method)
    trained, _ = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return f"{trained:,}", f"{size / 1000:,.0f}"


# equations


def equations() -> str:
    """Returns the section of each method: what its module's docstring says, and how it differs from PEFT's."""
    ours = registered()
    return "\n\n".join(["## Equations", *(section(method, ours[method]) for method in methods())])


def section(method: str, config: type[Any]) -> str:
    """Returns a method's section."""
    first, _, rest = inspect.cleandoc(inspect.getdoc(inspect.getmodule(config)) or "").partition("\n\n")
    paragraphs = rest.split("\n\n")
    shown = [f"```text\n{textwrap.dedent(each)}\n```" if each.startswith(" ") else each for each in paragraphs]
    told = [each for each in inspect.cleandoc(config.__doc__ or "").split("\n\n") if each.startswith("Differs")]
    return "\n\n".join([f"### {method}", first, *shown, *told])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")
