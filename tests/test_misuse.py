"""What PEFT takes and the user can't have meant is refused or warned of, with the place, the reason and a way out."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import MLP, llama_config
from torch import nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, get_peft_model
from graphpeft.testing import laws


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], *words: str) -> Iterator[None]:
    """Expects an error whose message has all of `words`, and a model that is as it was."""
    before = laws.snapshot(model)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    laws.require_unchanged(model, before, "what is refused")


@contextlib.contextmanager
def warned(*words: str) -> Iterator[None]:
    """Expects one warning, which has all of `words` and names a line of this file."""
    with pytest.warns(UserWarning, match=re.escape(words[0])) as caught:
        yield
    [warning] = caught
    for word in words:
        assert word in str(warning.message)
    assert warning.filename == __file__


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), **options)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(**options)).eval()


# a model or a config that is none


GIVEN_AS_MODEL: list[tuple[Any, list[str]]] = [
    (nn.Linear, ["model is the class Linear", "pass an instance", "Linear(…)"]),
    (transformers.LlamaForCausalLM, ["the class LlamaForCausalLM", "LlamaForCausalLM.from_pretrained(…)"]),
    ("some/model", ["model is 'some/model'", "load that model first", "PeftModel.from_pretrained(model, folder)"]),
    (LoraConfig(target_modules=["up"]), ["model is a LoraConfig", "get_peft_model(model, config)"]),
    ([nn.Linear(1, 1)], ["model is a list", "nn.Module"]),
    (None, ["model is a NoneType", "nn.Module"]),
]


@pytest.mark.parametrize(("given", "words"), GIVEN_AS_MODEL)
def test_a_model_that_is_none_is_told_from_one(given: Any, words: list[str], tmp_path: Path) -> None:
    get_peft_model(MLP.build(), lora("up")).save_pretrained(tmp_path)
    for use in (
        lambda: get_peft_model(given, lora("up")),
        lambda: graphpeft.explain(given, lora("up")),
        lambda: PeftModel.from_pretrained(given, tmp_path),
    ):
        with pytest.raises(TypeError) as caught:
            use()
        for word in words:
            assert word in str(caught.value)


GIVEN_AS_CONFIG: list[tuple[Any, list[str]]] = [
    (LoraConfig, ["config is the class LoraConfig", "pass an instance", "LoraConfig(…)"]),
    (peft.LoraConfig, ["config is the class LoraConfig", "pass an instance"]),
    ({"r": 2}, ["config is a dict", "LoraConfig(**…)"]),
    ({"peft_type": "LORA", "r": 2}, ["config is a dict", "PeftConfig.from_dict(…)"]),
    ("some/adapter", ["'some/adapter'", "PeftConfig.from_pretrained", "PeftModel.from_pretrained(model, folder)"]),
    (Path("adapter"), ["PosixPath('adapter')", "PeftConfig.from_pretrained(folder)"]),
    (nn.Linear(1, 1), ["config is a Linear", "the model first", "LoraConfig(…)"]),
]


@pytest.mark.parametrize(("given", "words"), GIVEN_AS_CONFIG)
def test_a_config_that_is_none_is_told_from_one(given: Any, words: list[str], tmp_path: Path) -> None:
    adapted = get_peft_model(MLP.build(), lora("up"), "first")
    adapted.save_pretrained(tmp_path)
    for model, use in (
        (MLP.build(), lambda model: get_peft_model(model, given)),
        (MLP.build(), lambda model: graphpeft.explain(model, given)),
        (MLP.build(), lambda model: PeftModel.from_pretrained(model, tmp_path / "first", config=given)),
        (adapted, lambda model: model.add_adapter("second", given)),
    ):
        with refused(model, TypeError, *words):
            use(model)


def test_arguments_in_another_order_are_told() -> None:
    model = get_peft_model(MLP.build(), lora("up"))
    swapped: Any = model.add_adapter
    with refused(model, TypeError, "model.add_adapter(adapter_name, config)"):
        swapped(lora("up"), "second")
    base: Any = MLP.build()
    with refused(base, TypeError, "config is a Linear", "pass the model first"):
        get_peft_model(base, nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_config_in_place_of_a_folder_is_told_from_one() -> None:
    model: Any = MLP.build()
    given: Any = lora("up")
    with refused(model, TypeError, "model_id is a LoraConfig", "folder", "get_peft_model(model, config)"):
        PeftModel.from_pretrained(model, given)
    adapted = get_peft_model(model, lora("up"))
    with refused(adapted, TypeError, "model_id is a LoraConfig"):
        adapted.load_adapter(given, "second")


# a model that PEFT has adapted


def injected(model: Any) -> Any:
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), model)


def inside(model: Any) -> Any:
    return nn.ModuleDict({"encoder": peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))})


def wrapped(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))


def base_of_wrapped(model: Any) -> Any:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    return model


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (wrapped, "the model is a PeftModel of PEFT"),
        (base_of_wrapped, "first.up is a Linear of PEFT"),
        (injected, "first.up is a Linear of PEFT"),
        (inside, "encoder is a PeftModel of PEFT"),
    ],
)
def test_a_model_that_peft_has_adapted_is_refused(wrap: Callable[[Any], Any], place: str, tmp_path: Path) -> None:
    get_peft_model(MLP.build(), lora("up")).save_pretrained(tmp_path)
    model = wrap(MLP.build())
    words = (place, "merge_and_unload() or unload()", "PeftModel.from_pretrained(model, folder)")
    with refused(model, AdaptError, *words):
        get_peft_model(model, lora("down"))
    with refused(model, AdaptError, *words):
        graphpeft.explain(model, lora("down"))
    with refused(model, AdaptError, *words):
        PeftModel.from_pretrained(model, tmp_path)


def test_a_prompt_of_pefts_is_refused_too() -> None:
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = peft.get_peft_model(llama(), config)
    with refused(model, AdaptError, "the model is a PeftModelForCausalLM of PEFT"):
        get_peft_model(model, lora("q_proj"))


@pytest.mark.parametrize("way_out", ["unload", "merge_and_unload"])
def test_what_peft_gives_back_is_adapted(way_out: str) -> None:
    base = getattr(wrapped(MLP.build()), way_out)()
    assert get_peft_model(base, lora("up")) is base


def test_peft_isnt_imported_for_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    get_peft_model(MLP.build(), lora("up"))
    assert "peft" not in sys.modules
