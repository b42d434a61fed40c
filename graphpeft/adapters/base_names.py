"""Names of base models: compares the one in an adapter's config with the name of the model that gets the adapter."""

from __future__ import annotations

import re
import warnings
from typing import Any

from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.wording import shortened


def base_name(model: Any, config: PeftConfig) -> str | None:
    """Returns the name of the base model, or where it lies: as the config has it, or else the model itself."""
    return config.base_model_name_or_path or _own_name(model)


def warn_of_other_base(model: Any, config: PeftConfig, stacklevel: int) -> None:
    """Warns if a saved adapter is for a base model of another name than a model has, and both have one."""
    if _own_name(model) and _is_other(model, config):
        warnings.warn(
            f"the adapter fits, and was {_names(model, config)}; on other weights it does something else. If they are "
            "the same, set base_model_name_or_path in the adapter's config",
            PeftWarning,
            stacklevel=stacklevel,
        )


def other_base(model: Any, config: PeftConfig) -> str:
    """Returns words for an error: both names, if they differ; "" if the adapter's file has none, or the same."""
    return f" It was {_names(model, config)}." if _is_other(model, config) else ""


def _names(model: Any, config: PeftConfig) -> str:
    own = _own_name(model)
    this = repr(shortened(own)) if own else f"a {type(model).__name__} without a name"
    return f"saved for the base {shortened(config.base_model_name_or_path or '')!r}, and this model is {this}"


def _own_name(model: Any) -> str | None:
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _is_other(model: Any, config: PeftConfig) -> bool:
    saved, own = _last_part(config.base_model_name_or_path or ""), _last_part(_own_name(model) or "")
    return bool(saved) and saved != own


def _last_part(name: str) -> str:
    """Returns what a repository on the Hub, its mirrors, and folders into which it was copied have in common."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    cached = next((part for part in parts if part.startswith("models--")), None)  # as the cache of the Hub calls it
    return (cached.split("--", 2)[-1] if cached is not None else "".join(parts[-1:])).casefold()
