"""Why a test fails with graphpeft that passes with PEFT: by what it raised, or by what was found by reading it.

The first reason that fits is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

WRAPPERS = "looks into PEFT's wrappers"
WORDING = "compares an error's or a warning's wording"
NAMES = "uses a name that graphpeft doesn't have"
OTHERWISE = "expects what graphpeft does otherwise, as the documentation says"
OPEN = "expects what graphpeft doesn't do yet"
UNKNOWN = "not explained"

KINDS = (WRAPPERS, WORDING, NAMES, OTHERWISE, OPEN, UNKNOWN)


@dataclass(frozen=True)
class Reason:
    """A kind, what to say, and patterns that a failure matches: its error, its test, and the line of the test."""

    kind: str
    text: str
    error: str = ""
    test: str = ""
    line: str = ""

    def fits(self, row: dict[str, Any]) -> bool:
        """Returns whether a failed test's row matches all patterns."""
        where = {"error": self.error, "test": self.test, "in_test": self.line}
        return all(re.search(pattern, row.get(key, "")) for key, pattern in where.items())


# Attributes of the modules with which PEFT wraps layers.
_OF_WRAPPERS = (
    "active_adapter|active_adapters|adapter_layer_names|alora_offsets|base_layer|base_model|disable_adapters|"
    "ephemeral_gpu_offload|in_proj_weight_.*|lora_A|lora_B|lora_alpha|lora_bias|lora_dropout|lora_embedding_A|"
    "lora_embedding_B|lora_magnitude_vector|lora_variant|merged|merged_adapters|modules_to_save|"
    "original_module|r|scaling|token_adapter|trainable_tokens_delta|use_dora|use_rslora|prompt_encoder|"
    "weight_.*|unmerge|update_layer|get_base_layer"
)

# Found by reading the tests.
READ: tuple[Reason, ...] = ()

AUTOMATIC = (
    Reason(WORDING, "another text", error="Regex pattern did not match|was expected to match|DID NOT WARN.*Emitted"),
    Reason(NAMES, "", error="^MissingNameError"),
    Reason(NAMES, "", error="exceptions must be derived from .*stand_in|_MissingObject"),
    Reason(
        WRAPPERS, "an attribute of wrapped layers", error=rf"^AttributeError: .* has no attribute '({_OF_WRAPPERS})'"
    ),
    Reason(WRAPPERS, "a class of wrapped layers", line="isinstance\\(.*(Layer|Wrapper|Linear)\\b"),
)


def reason(row: dict[str, Any]) -> Reason:
    """Returns why a test fails."""
    for candidate in (*READ, *AUTOMATIC):
        if candidate.fits(row):
            return Reason(candidate.kind, candidate.text or row["error"].partition(": ")[2])
    return Reason(UNKNOWN, row["error"].split(". ")[0][:160])
