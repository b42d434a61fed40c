"""Two hypothesis profiles for property tests: a quick one for every change, and a long one for fuzzing."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

_COMMON: dict[str, Any] = {
    # each example builds and adapts a model, and the first one compiles code that the others share
    "deadline": None,
    "print_blob": True,
    # the smallest example of one failure says most; laws fail one after the other, and one fault breaks several
    "report_multiple_bugs": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def load_profile(default: str = "ci") -> None:
    """Registers the profiles ``ci`` (40 examples) and ``fuzz`` (10,000), and loads one."""
    settings.register_profile("ci", max_examples=40, **_COMMON)
    settings.register_profile("fuzz", max_examples=10_000, **_COMMON)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))
