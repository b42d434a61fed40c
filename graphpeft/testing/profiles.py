"""Two ways to run property tests: a quick one for every change, and a long one that looks for the unthought-of."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

_COMMON: dict[str, Any] = {
    # a model is built and adapted for each example, the first of them compiling what the others share
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def load_profile(default: str = "ci") -> None:
    """Registers the profiles ``ci`` (40 examples) and ``fuzz`` (10,000), and loads one.

    Args:
        default: Which, unless the environment's `HYPOTHESIS_PROFILE` names another.
    """
    settings.register_profile("ci", max_examples=40, **_COMMON)
    settings.register_profile("fuzz", max_examples=10_000, **_COMMON)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))
