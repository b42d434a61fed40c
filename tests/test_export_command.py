"""The command ``graphpeft export``."""

from __future__ import annotations

import sys

import pytest
import torch
from exports import LLAMA

import graphpeft
from graphpeft.command import main

MODULE = """
import torch
from graphpeft import LoraConfig, get_peft_model

def made():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(model, config), (torch.randn(3, 4),)

def half():
    return 1
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "models_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("models_of_mine", None)


def test_a_function_gives_the_model_and_the_report_is_printed(here, capsys):
    assert main(["export", "models_of_mine:made", "m.pt2", "--adapters", "inputs"]) == 0
    assert "adapter 'default'  (4, 4)" in capsys.readouterr().out
    assert {file.name for file in here.glob("m.*")} == {"m.pt2", "m.default.safetensors"}


@pytest.mark.quick("command", "exporting")
def test_sizes_can_be_fixed_and_checks_left_out(here, capsys):
    assert main(["export", "models_of_mine:made", "m.pt2", "--fixed", "--unchecked"]) == 0
    printed = capsys.readouterr().out
    assert "(3, 4)" in printed
    assert "not checked" in printed


@pytest.mark.quick("command")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["models_of_mine:made", "m.onnx"], "m.onnx is to end with .pt2"),
        (["models_of_mine:half", "m.pt2"], "returned int"),
        (["models_of_mine:none", "m.pt2"], "no attribute 'none'"),
        (["nothing_here:made", "m.pt2"], "No module named 'nothing_here'"),
        (["no-such-folder", "m.pt2"], "no-such-folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_error_is_one_line_and_status_one(here, capsys, arguments, reason):
    assert main(["export", *arguments]) == 1
    printed = capsys.readouterr()
    assert reason in printed.err
    assert printed.err.startswith("graphpeft export: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(here.glob("m.*"))


def test_an_adapter_whose_config_names_its_base_is_a_source(tmp_path, capsys):
    LLAMA.base().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = graphpeft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type=graphpeft.TaskType.CAUSAL_LM
    )
    model = graphpeft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "m.pt2")]) == 0
    found = torch.export.load(tmp_path / "m.pt2").module()(**LLAMA.inputs())
    assert torch.allclose(found["logits"], LLAMA.output(model), atol=1e-4)


@pytest.mark.quick("command")
def test_help_says_what_a_source_is(capsys):
    with pytest.raises(SystemExit) as left:
        main(["export", "--help"])
    assert left.value.code == 0
    assert "package.module:function" in capsys.readouterr().out
