"""The config file of each method has the keys that PEFT's config of it has, and PEFT loads it without a warning."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from graphpeft import PeftConfig, PeftType
from graphpeft.rules.registry import registered

NEEDED: dict[str, dict[str, Any]] = {
    PeftType.CPT: {"cpt_token_ids": [1, 2], "task_type": "CAUSAL_LM"},
    PeftType.ADALORA: {"total_step": 5},
    PeftType.XLORA: {"hidden_size": 16, "adapters": {"0": "folder"}},
}
"""Options without which there is no config of a method."""

OF_PEFT: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
METHODS = [pytest.param(name, cls, id=cls.__name__) for name, cls in registered().items() if name in list(PeftType)]


def keys_of_peft(name: str) -> set[str]:
    """Returns the keys in a file that PEFT writes; `runtime_config` is of a run alone."""
    return {field.name for field in dataclasses.fields(OF_PEFT[name])} - {"runtime_config"}


@pytest.mark.parametrize(("name", "config_class"), METHODS)
def test_a_config_file_has_the_keys_of_pefts(name: str, config_class: type[PeftConfig], tmp_path: Path) -> None:
    options = NEEDED.get(name, {})
    config_class(**options).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() == keys_of_peft(name) | {"peft_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is OF_PEFT[name]


@pytest.mark.parametrize(("name", "config_class"), METHODS)
def test_a_methods_options_have_pefts_defaults(name: str, config_class: type[PeftConfig], tmp_path: Path) -> None:
    options = NEEDED.get(name, {})
    config_class(**options).save_pretrained(tmp_path / "ours")
    OF_PEFT[name](**options).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize(("name", "config_class"), METHODS)
def test_a_config_that_is_saved_has_its_own_inference_mode(
    name: str, config_class: type[PeftConfig], inference_mode: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = NEEDED.get(name, {}) | {"inference_mode": inference_mode}
    for made, folder in ((config_class(**options), tmp_path / "ours"), (OF_PEFT[name](**options), tmp_path / "theirs")):
        made.save_pretrained(str(folder))
        assert PeftConfig.from_pretrained(folder).inference_mode == inference_mode
