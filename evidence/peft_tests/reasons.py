"""The reason why a test that passes with PEFT fails with graphpeft.

Reasons in `READ` were found by reading the test; the others follow from its error. The first one that fits is taken.
"""

from __future__ import annotations

import re
from typing import Any

from found_by_reading import BETTER, INSIDE, NAMES, OPEN, OTHERWISE, READ, WORDING, WRAPPERS, WRONG, Reason

UNKNOWN = "not explained"

KINDS = (WRONG, OPEN, UNKNOWN, NAMES, OTHERWISE, BETTER, WORDING, WRAPPERS, INSIDE)

# Kinds of tests that no other library can pass without PEFT's modules and words.
APART = (WORDING, WRAPPERS, INSIDE)

# Attributes of the modules that PEFT puts around layers and models.
_OF_WRAPPERS = (
    "_adapters|_init_tinylora_v|unilora_theta_d|vblora_vector_bank|pvera_generator|glora_B|_get_available_adapters|_get_module_names_tied_with_embedding|_restore_weights|active_adapter|"
    "active_adapters|adapter_layer_names|base_layer|default|disable_adapters|enable_adapters|get_base_layer|"
    "get_delta_weight|in_features|lora_A|lora_B|lora_alpha|lora_bias|lora_dropout|lora_embedding_A|lora_embedding_B|"
    "lora_magnitude_vector|lora_variant|merge|merged|merged_adapters|modules_to_save|original_module|prompt_encoder|"
    "r|scale_layer|scaling|set_adapter|set_scale|token_adapter|trainable_tokens_delta|unmerge|unscale_layer|"
    "update_layer|use_dora|use_rslora|weight_.*"
)

_CLASSES_OF_WRAPPERS = (
    "AuxiliaryTrainingWrapper|BaseTuner|BaseTunerLayer|Conv\\dd|Dora\\w+|Embedding|Linear|Lora\\w*Layer|LoraModel|"
    "MixedModel|ModulesToSaveWrapper|ParamWrapper|PrefixEncoder|PromptEmbedding|PromptEncoder|TrainableTokens\\w+|"
    "_LoraFactorsProxy|_get_submodules"
)

# Functions that PEFT has for itself, beside those that begin with an underscore.
_INSIDE = (
    "_.*|build_peft_weight_mapping|check_target_module_exists|init_empty_weights|inspect_matched_modules|"
    "skip_init_on_device"
)

AUTOMATIC = (
    Reason(WRAPPERS, "uses a class of wrappers", error=rf"MissingNameError: ({_CLASSES_OF_WRAPPERS})$"),
    Reason(INSIDE, "", error=rf"MissingNameError: ({_INSIDE})$"),
    Reason(NAMES, "", error="MissingNameError|exceptions must be derived from .*stand_in|_MissingObject"),
    Reason(WRAPPERS, "an attribute of wrappers", error=rf"AttributeError: .* has no attribute '({_OF_WRAPPERS})'"),
    Reason(
        WRAPPERS,
        "names of parameters",
        error="AssertionError: .*(lora_[AB]|modules_to_save|trainable_tokens_delta)\\.default",
    ),
    Reason(
        WRAPPERS,
        "finds PEFT's classes in a model",
        error="^AssertionError",
        line="isinstance\\(.*(Layer|Wrapper|Linear)\\b",
    ),
    Reason(WRAPPERS, "finds PEFT's classes in a model", error="^AssertionError", asked="Layer|Wrapper|Linear"),
    Reason(WORDING, "another text of an error", error="AssertionError: Regex pattern did not match"),
    Reason(WORDING, "another text of a warning", error=r"built-in method startswith of str .*Unexpected keyword arg"),
    Reason(WORDING, "another text of a warning", error="Regex pattern did not match any of the"),
    Reason(WORDING, "another text of an error", error="^AssertionError: assert '[^']+' in (str\\(|'<ExceptionInfo|\")"),
    Reason(WORDING, "another class or text of a warning", error="DID NOT WARN.*Emitted warnings: \\[ ?\\w"),
    Reason(WORDING, "a warning of PEFT's", error="DID NOT WARN.*Emitted warnings: \\[\\]\\.$"),
    Reason(WORDING, "a warning of PEFT's", error="WarningsRecorder|any\\(<generator", line="recwarn|warning"),
)


def reason(row: dict[str, Any]) -> Reason:
    """Returns why a test fails."""
    for candidate in (*READ, *AUTOMATIC):
        if candidate.fits(row):
            return Reason(candidate.kind, candidate.text or _missing(row["error"]))
    return Reason(UNKNOWN, row["error"].split(". ")[0][:160])


def _missing(error: str) -> str:
    found = re.search(r"MissingNameError: (\w+)", error)
    return f"`{found[1]}`" if found else error[:100]
