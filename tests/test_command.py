"""The command ``graphpeft``: what each subcommand prints and writes, its exit codes, and its help."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from click.testing import CliRunner
from contracts import FIRST
from contracts.contract import Contract
from models import tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

import graphpeft
from graphpeft import LoHaConfig, LoraConfig, TaskType, get_peft_model
from graphpeft.command import graphpeft as command
from graphpeft.command import main
from graphpeft.command.sources import config_from
from graphpeft.files.checkpoint_files import CheckpointFiles

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}")
    for begins in (
        "fan_in_fan_out is set",
        "Unsupported layer type",
        "Sparse invariant",
        "The symmetric",
        "no gradient",
        "Failed to load the CUDA",
        "Setting boft_n",
        "LoRA adapter added to ConvNd layer with groups",
    )
]

MODULE = """
import torch
from graphpeft import LoraConfig, get_peft_model

def base():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), (torch.randn(3, 4),)

def alone():
    return base()[0]

def made():
    model, inputs = base()
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(model, config), inputs

def half():
    return 1

def raises():
    return {}["head"]

def leaves():
    raise SystemExit(7)

layer = torch.nn.Linear(4, 4)
number = 5

def asserts():
    assert False

class Talks(torch.nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x) * 0

def talks():
    print("made")
    return torch.nn.Sequential(Talks(4, 4)), (torch.randn(3, 4),)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "models_of_mine.py").write_text(MODULE)
    (tmp_path / "imports_another.py").write_text("import another_one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("models_of_mine", None)


def saved(folder: Path, config: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    get_peft_model(model, config or LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def saved_llama(folder: Path) -> None:
    model: Any = tiny_llama()
    model.save_pretrained(folder / "base")
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")


# info


@pytest.mark.parametrize("contract", FIRST, ids=str)
def test_info_tells_of_an_adapter_of_peft(contract: Contract, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    case = contract.cases[0]
    theirs = peft.get_peft_model(case.build(), contract.their_config(case))
    theirs.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert told["method"] == contract.method.value
    assert told["tensors"] == len(tensors)
    assert told["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert told["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert told["peft_reads_it"] == "yes"
    assert told["digest"] == graphpeft.PeftConfig.from_pretrained(tmp_path).digest()


@pytest.mark.quick("command")
def test_info_prints_a_line_for_each_fact(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    told = {words[0]: words[1] for words in lines if len(words) == 2}
    assert (told["method"], told["options"], told["targets"]) == ("LORA", "r=2, α=3, init_lora_weights=False", "0")


@pytest.mark.quick("command")
def test_info_without_an_adapter_tells_versions(capsys: pytest.CaptureFixture[str]):
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["graphpeft"] == graphpeft.__version__
    assert told["torch"] == torch.__version__
    assert told["python"] == platform.python_version()
    assert main(["info"]) == 0
    assert f"graphpeft        {graphpeft.__version__}\n" in capsys.readouterr().out


def test_a_method_that_peft_lacks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path, graphpeft.WeightDecomposedConfig(direction=LoHaConfig(r=2, target_modules=["0"])))
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peft_reads_it"].startswith("no: it has no method")


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x, self.kernel)


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


@pytest.mark.parametrize(
    ("build", "target", "reads"),
    [
        (lambda: nn.Sequential(Kernel()), "kernel", False),
        (Kernel, "kernel", False),
        (Matrix, "matrix", False),
        (lambda: nn.Sequential(Matrix()), "matrix", True),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3)), "0", True),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3, groups=3)), "0", False),  # a rank that the groups don't divide
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 3, groups=2)), "0", True),
    ],
)
def test_whether_peft_reads_it_is_what_peft_does(
    build: Any, target: str, reads: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    get_peft_model(build(), LoraConfig(r=2, lora_alpha=3, target_modules=[target])).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert (json.loads(capsys.readouterr().out)["peft_reads_it"] == "yes") is reads
    if reads:
        peft.PeftModel.from_pretrained(build(), tmp_path)
    else:
        with pytest.raises((ValueError, RuntimeError)):
            peft.PeftModel.from_pretrained(build(), tmp_path)


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def without_a_factor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}, folder / "adapter_model.safetensors"
    )


def without_the_first_factor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "lora_A" not in name}, folder / "adapter_model.safetensors"
    )


def of_another_type(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": "eight"}))


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncated, ("adapter_model.safetensors",)),
        (without_a_factor, ("adapter_model.safetensors", "lacks base_model.model.0.lora_B.weight")),
        (without_the_first_factor, ("adapter_model.safetensors", "lacks base_model.model.0.lora_A.weight")),
        (of_another_type, ("adapter_config.json", "r must be int")),
        (without_config, ("adapter_config.json",)),
    ],
)
def test_a_broken_folder_is_exit_code_2_and_names_file_and_key(
    damage: Any, named: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved(tmp_path)
    damage(tmp_path)
    assert main(["info", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("graphpeft info: ")
    assert all(part in error for part in named)
    assert len(error.splitlines()) == 1


def test_an_error_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path)
    truncated(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 2
    assert "adapter_model.safetensors" in json.loads(capsys.readouterr().out)["error"]


# models


@pytest.mark.quick("command")
def test_explain_tells_what_would_be_adapted(here: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["explain", "models_of_mine:base", "--set", "r=3", "--set", "target_modules=0,1"]
    assert main(arguments) == 0
    assert "LORA adapter 'default': 2 sites, 42 parameters" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [site["parameters"] for site in told["adapted"]] == [24, 18]
    assert [(site["unmergeable"], site["fixed_arguments"]) for site in told["adapted"]] == [(None, [])] * 2


def test_explain_takes_a_saved_config_and_changes_of_it(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter", LoHaConfig(r=2, target_modules=["0"]))
    assert main(["explain", "models_of_mine:alone", "--config", "adapter", "--set", "r=5"]) == 0
    assert "LOHA adapter 'default': 1 site, 80 parameters" in capsys.readouterr().out


def test_what_a_saved_config_would_train_is_told(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter")
    assert main(["explain", "models_of_mine:base", "--config", "adapter"]) == 0
    printed = capsys.readouterr().out
    assert "learns" in printed
    assert "can't be told" not in printed


def test_explain_has_exit_code_1_where_the_config_cannot_be_applied(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "models_of_mine:base", "--set", "target_modules=7,8"]) == 1
    assert "nothing in Sequential matches ['7', '8']" in capsys.readouterr().out


def test_models_of_timm_are_named(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "timm:resnet10t", "--method", "lora", "--set", 'target_modules=["conv1.0"]']) == 0
    assert "Convolution  3 → 24, 3×3" in capsys.readouterr().out


def test_models_of_transformers_are_named(here: Path, capsys: pytest.CaptureFixture[str]):
    tiny_llama().save_pretrained("llama")  # type: ignore[operator]
    assert main(["explain", "hf:llama", "--set", 'target_modules=["q_proj"]', "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["adapted"]) == 2


def test_trace_prints_its_report(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", "models_of_mine:base"]) == 0
    assert "modules kept as calls" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["models_of_mine:made", "models_of_mine:base"])
def test_show_writes_a_picture(model: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", model, "picture.html", "--set", 'target_modules=["1"]']) == 0
    assert "a picture in picture.html" in capsys.readouterr().out
    assert '"adapter"' in (here / "picture.html").read_text() or '"adapters"' in (here / "picture.html").read_text()


def test_verify_prints_the_laws_and_tells_by_its_exit_code(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "models_of_mine:base", "--set", 'target_modules=["1"]', "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"]
    assert len(told["laws"]) > 5


# saved adapters


def test_merge_writes_the_weights_with_the_adapter(here: Path):
    model = saved(here / "adapter")
    base = "import torch, models_of_mine\ndef base():\n    torch.manual_seed(0)\n    return models_of_mine.alone()\n"
    (here / "seeded.py").write_text(base)
    assert main(["merge", "adapter", "merged.safetensors", "--base", "seeded:base"]) == 0
    merged = model.merge_and_unload().state_dict()  # type: ignore[operator]
    written = load_file(here / "merged.safetensors")
    assert {*written} == {*merged}
    assert all(torch.equal(written[name], tensor) for name, tensor in merged.items())


@pytest.mark.parametrize("damage", [truncated, without_config], ids=["truncated", "without config"])
def test_merge_of_a_broken_folder_is_exit_code_2(damage: Any, here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter")
    damage(here / "adapter")
    assert main(["merge", "adapter", "merged.safetensors", "--base", "models_of_mine:alone"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_merge_makes_the_folder_of_its_file(here: Path):
    saved(here / "adapter")
    assert main(["merge", "adapter", "new/folder/merged.safetensors", "--base", "models_of_mine:alone"]) == 0
    assert (here / "new" / "folder" / "merged.safetensors").is_file()


def test_a_config_alone_is_not_measured(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "models_of_mine:base", "m.html", "--set", "target_modules=0", "--measure"]) == 2
    assert "name an adapted MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_missing_library_is_told_with_its_extra(
    library: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["trace", f"{'hf' if library == 'transformers' else library}:some"]) == 2
    assert f"pip install 'graphpeft[{library}]'" in capsys.readouterr().err


def test_merge_writes_the_folder_of_a_transformers_model(here: Path):
    saved_llama(here)
    assert main(["merge", "adapter", "merged"]) == 0
    merged = load_file(here / "merged" / "model.safetensors")
    base = load_file(here / "base" / "model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed == {name for name in base if "q_proj" in name}


def test_a_merged_model_takes_the_place_of_an_earlier_one_whole(here: Path, monkeypatch: pytest.MonkeyPatch):
    saved_llama(here)
    assert main(["merge", "adapter", "merged"]) == 0
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    for name in (*stale, "notes.txt"):
        (here / "merged" / name).write_text("{}")
    before = {file.name: file.read_bytes() for file in (here / "merged").iterdir()}

    def fails(files: CheckpointFiles, *_: object) -> None:
        raise OSError("no space is left")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFiles, "complete", fails)
        assert main(["merge", "adapter", "merged"]) == 1
    assert {file.name: file.read_bytes() for file in (here / "merged").iterdir()} == before
    assert main(["merge", "adapter", "merged"]) == 0
    assert {file.name for file in (here / "merged").iterdir()} == before.keys() - {*stale}


def test_a_conversion_that_computes_something_else_is_not_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Fails if the deviation is told and not judged."""
    saved(here / "adapter", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    monkeypatch.setattr("graphpeft.stacks.mlx.of_one_rank", _with_halves)
    assert main(["convert", "adapter", "mlx", "--to", "mlx", "--base", "models_of_mine:base"]) == 2
    assert "more than rounding does; nothing is written" in capsys.readouterr().err
    assert not (here / "mlx").exists()


def _with_halves(lora: Any) -> Any:
    return lora._replace(layers={path: each._replace(B=each.B / 2) for path, each in lora.layers.items()})


def test_what_the_files_cannot_hold_is_merged_in_memory(here: Path, capsys: pytest.CaptureFixture[str]):
    """Fails if a head that the checkpoint doesn't have is left out, or nobody is told how much memory it takes."""
    saved_llama(here)
    model: Any = transformers.LlamaForSequenceClassification.from_pretrained("base")
    get_peft_model(model, LoraConfig(r=2, task_type=TaskType.SEQ_CLS)).save_pretrained("adapter")
    assert main(["merge", "adapter", "merged", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["in_memory"].startswith("the whole model: ")
    assert "has no score.weight" in told["in_memory"]
    assert "score.weight" in load_file(here / "merged" / "model.safetensors")


def test_merge_of_a_model_of_ones_own_asks_for_a_file(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter")
    assert main(["merge", "adapter", "merged", "--base", "models_of_mine:alone"]) == 2
    assert "name a file, merged.safetensors" in capsys.readouterr().err


def test_convert_writes_plain_lora(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter", LoHaConfig(r=1, target_modules=["0"], init_weights=False))
    assert main(["convert", "adapter", "lora", "--rank", "3", "--base", "models_of_mine:alone", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 24
    assert graphpeft.LoraConfig.from_pretrained("lora").r == 3


def test_convert_writes_other_files_and_reads_them(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_rslora=True))
    assert main(["convert", "adapter", "mlx", "--to", "mlx", "--base", "models_of_mine:base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deviation"] < 1e-6
    assert {file.name for file in (here / "mlx").iterdir()} == {"adapter_config.json", "adapters.safetensors"}
    assert main(["info", "mlx", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {told["peft_reads_it"], told["sglang_serves_it"]} == {
        "no: the files are of mlx-lm; write others by graphpeft convert mlx FOLDER --to peft"
    }
    assert main(["convert", "mlx", "peft", "--to", "peft", "--base", "models_of_mine:base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deviation"] < 1e-6
    assert graphpeft.LoraConfig.from_pretrained("peft").r == 2
    assert main(["info", "adapter", "--json"]) == 0
    assert "ignores use_rslora" in json.loads(capsys.readouterr().out)["sglang_serves_it"]


def test_convert_without_a_base_converts_by_names_and_shapes(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert main(["convert", "adapter", "mlx", "--to", "mlx", "--json"]) == 0
    assert "names no base model" in json.loads(capsys.readouterr().out)["deviation"]
    assert (here / "mlx" / "adapters.safetensors").is_file()


# export


def test_a_function_gives_the_model_and_the_report_is_printed(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", "models_of_mine:made", "m.pt2", "--adapters", "inputs"]) == 0
    assert "adapter 'default'  (4, 4)" in capsys.readouterr().out
    assert {file.name for file in here.glob("m.*")} == {"m.pt2", "m.default.safetensors"}


@pytest.mark.quick("command", "exporting")
def test_sizes_can_be_fixed_and_checks_left_out(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", "models_of_mine:made", "m.pt2", "--fixed", "--unchecked"]) == 0
    printed = capsys.readouterr().out
    assert "(3, 4)" in printed
    assert "not checked" in printed


def test_a_saved_adapter_of_a_transformers_model_is_exported(here: Path, capsys: pytest.CaptureFixture[str]):
    saved_llama(here)
    assert main(["export", "adapter", "m.pt2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checked"]


def test_a_bias_of_lora_is_no_half_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path, LoraConfig(r=2, target_modules=["0"], lora_bias=True))  # the tensors of PEFT's, which warns of them
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "adapter", "taken"],
        ["merge", "adapter", "folder.safetensors"],
        ["convert", "adapter", "taken"],
        ["convert", "adapter", "base/../adapter"],
    ],
)
def test_nothing_is_written_in_the_place_of_something_else(
    arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]
):
    saved_llama(here)
    (here / "taken").write_text("as it was")
    (here / "folder.safetensors").mkdir()
    before = (here / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 2  # Transformers' save_pretrained logs about a file, and returns
    assert f"{arguments[2]} is " in capsys.readouterr().err
    assert (here / "taken").read_text() == "as it was"
    assert not list((here / "folder.safetensors").iterdir())
    assert (here / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_convert_tells_how_far_outputs_move(here: Path, capsys: pytest.CaptureFixture[str]):
    config = LoHaConfig(r=4, target_modules=["0"], init_weights=False)
    saved(here / "adapter", config)
    found = []
    for rank, base in (("1", "base"), ("4", "base"), ("1", "alone")):
        assert (
            main(["convert", "adapter", f"lora-{rank}", "--rank", rank, "--base", f"models_of_mine:{base}", "--json"])
            == 0
        )
        found.append(json.loads(capsys.readouterr().out)["deviation"])
    assert found[0] > 0.01
    assert found[1] < 1e-5
    assert found[2] == "not known: nothing tells of example inputs"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model_name_or_path": "/nowhere/a base"}, "base_model_name_or_path is '/nowhere/a base', which isn't"),
        ({"task_type": None, "auto_mapping": None}, "neither task_type nor auto_mapping tells"),
    ],
)
def test_a_base_that_cannot_be_found_is_told_by_file_and_key(
    changes: dict[str, Any], reason: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    saved_llama(here)
    file = here / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    capsys.readouterr()
    for arguments, way_out in ((["merge", "adapter", "m"], "name it by --base"), (["show", "adapter"], "a function")):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert f"adapter/adapter_config.json: {reason}" in error
        assert way_out in error


def test_the_folder_of_a_base_is_told_as_a_model_of_transformers(here: Path, capsys: pytest.CaptureFixture[str]):
    saved_llama(here)
    capsys.readouterr()
    assert main(["explain", "base"]) == 2
    assert "write hf:base" in capsys.readouterr().err


def test_a_method_beside_a_config_of_another_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]):
    saved(here / "adapter")
    assert main(["explain", "models_of_mine:base", "--config", "adapter", "--method", "lora"]) == 0
    assert main(["explain", "models_of_mine:base", "--config", "adapter", "--method", "LOHA"]) == 2
    assert "adapter is of the method LORA; leave --method LOHA out" in capsys.readouterr().err


def test_a_config_beside_an_adapted_model_is_told(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "models_of_mine:made", "picture.html", "--set", "r=2"]) == 0
    assert "warning: models_of_mine:made is adapted, and drawn as it is" in capsys.readouterr().err


# errors


@pytest.mark.quick("command")
@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["export", "models_of_mine:made", "m.onnx", "--format", "pt2"], 1, "m.onnx is to end with .pt2"),
        (["export", "models_of_mine:made", "m.tflite"], 1, "m.tflite is to end with .pt2 for format='pt2'"),
        (["export", "models_of_mine:half", "m.pt2"], 2, "returned int"),
        (["export", "models_of_mine:none", "m.pt2"], 2, "no attribute 'none'"),
        (["export", "nothing_here:made", "m.pt2"], 2, "No module named 'nothing_here'"),
        (["export", "nothing_here.inside:made", "m.pt2"], 2, "No module named 'nothing_here'"),
        (["export", "imports_another:made", "m.pt2"], 1, "No module named 'another_one'"),
        (["explain", "timm:nosuch"], 2, "timm has no model 'nosuch'"),
        (["explain", "timm:resnet18x.a1_in1k"], 2, "timm has no model 'resnet18x.a1_in1k'"),
        (["explain", "hf:no-such-folder"], 2, "no-such-folder"),
        (["explain", "models_of_mine:base", "--set", "r=true"], 2, "r must be int, not True"),
        (["export", "no-such-folder", "m.pt2"], 2, "no-such-folder"),
        (["export", "models_of_mine:alone", "m.pt2"], 2, "tells of no inputs"),
        (["export", "models_of_mine:made", "m.pt2", "--format", "zip"], 2, "'zip' is not one of"),
        (["explain", "no such: model"], 2, "is no model: write timm:NAME"),
        (["explain", "models_of_mine:base", "--method", "NONE"], 2, "there is no method 'NONE'"),
        (["explain", "models_of_mine:base", "--set", "q=1"], 2, "has no option 'q'"),
        (["explain", "models_of_mine:base", "--set", "r"], 2, "write NAME=VALUE"),
        (["explain", "models_of_mine:base", "--set", "r=two"], 2, "r must be int, not 'two'"),
        (
            ["explain", "models_of_mine:base", "--set", "layers_to_transform=a"],
            2,
            """not 'a'; as JSON, write layers_to_transform='["name", …]'""",
        ),
        (
            ["explain", "models_of_mine:base", "--set", "rank_pattern=a"],
            2,
            """not 'a'; as JSON, write rank_pattern='{"name": value, …}'""",
        ),
        (["explain", "models_of_mine:base", "--config", "no-such-folder"], 2, "no-such-folder"),
        (["explain", "models_of_mine:base", "--config", "models_of_mine.py"], 2, "models_of_mine.py isn't JSON"),
        (["merge", "no-such-folder", "m.safetensors"], 2, "no-such-folder"),
        (["explain", "models_of_mine:raises"], 1, "KeyError: 'head'"),
        (["trace", "models_of_mine:asserts"], 1, "AssertionError"),
        (["nothing"], 2, "No such command 'nothing'"),
        (["trace", "models_of_mine:raises"], 1, "models_of_mine:raises raised KeyError: 'head'"),
        (["trace", "models_of_mine:leaves"], 1, "models_of_mine:leaves left Python with exit code 7"),
        (["trace", "models_of_mine:number"], 2, "models_of_mine:number is no function, but of int"),
        (["trace", "models_of_mine:layer"], 2, "models_of_mine:layer is no function, but of Linear"),
        (["export", "models_of_mine:made", "m.ONNX"], 1, "m.ONNX is to end with .onnx for format='onnx'"),
        (["explain", "models_of_mine:base", "--method", ""], 2, "there is no method ''"),
        (["convert", "adapter", "lora", "--rank", "2.7"], 2, "2.7 is neither a whole number, the rank, nor a share"),
        (["convert", "adapter", "lora", "--rank", "inf"], 2, "inf is neither a whole number, the rank, nor a share"),
        (["convert", "adapter", "lora", "--rank", "0"], 2, "0 is no rank: the least is 1"),
        (["convert", "adapter", "lora", "--rank", "2", "--to", "mlx"], 2, "--rank is of plain LoRA"),
        (["convert", "adapter", "lora", "--to", "mlz"], 2, "'mlz' is not one of 'peft', 'transformers4'"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    arguments: list[str], code: int, reason: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    found = main(arguments)
    error = capsys.readouterr().err
    assert (found, len(error.splitlines())) == (code, 1), error
    assert reason in error


@pytest.mark.quick("command")
@pytest.mark.parametrize(("given", "sites"), [("0", ["0"]), ("0,1", ["0", "1"]), ('["1"]', ["1"])])
def test_a_name_that_is_a_number_is_a_name(
    given: str, sites: list[str], here: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", "models_of_mine:base", "--set", f"target_modules={given}", "--json"]) == 0
    assert [each["site"] for each in json.loads(capsys.readouterr().out)["adapted"]] == sites


@pytest.mark.quick("command")
@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("target_parameters=mix", ["mix"]),
        ("target_parameters=mix,", ["mix"]),
        ("target_parameters=mix,0,", ["mix", "0"]),
        ('target_parameters=["mix"]', ["mix"]),
        ("target_modules=qkv", "qkv"),
        ("target_modules=qkv,", {"qkv"}),
        ("layers_to_transform=3", 3),
        ("layers_to_transform=3,4", [3, 4]),
        ("exclude_modules=0,", {"0"}),
        ("target_modules=q, v", {"q", "v"}),
        ("target_modules=['q', 'v']", {"q", "v"}),
        ("target_modules=None", None),
        ("target_modules=.*[qv]", ".*[qv]"),
        ("use_dora=True", True),
        ("use_dora=true", True),
        ("init_lora_weights=False", False),
        ("init_lora_weights=gaussian", "gaussian"),
        ("lora_dropout=.1", 0.1),
        ("rank_pattern={'q': 3}", {"q": 3}),
    ],
)
def test_an_option_is_read_as_what_it_takes(given: str, read: Any):
    name, _, _ = given.partition("=")
    config: Any = config_from(None, "LORA", [given])
    assert getattr(config, name) == read


@pytest.mark.quick("command")
def test_show_tells_of_a_config_that_cannot_be_applied_and_is_exit_code_1(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["show", "models_of_mine:base", "x.html", "--set", "target_modules=1x"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "nothing in Sequential matches '1x'" in printed.err
    assert printed.err.startswith("graphpeft show: ")
    assert (here / "x.html").exists()
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [printed.err.removeprefix("graphpeft show: ").strip()]
    assert main(["show", "models_of_mine:base", "x.html", "--set", "target_modules=1,", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"picture"}


@pytest.mark.quick("command")
def test_show_names_sites_that_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "models_of_mine:base", "x.html", "--method", "ROAD", "--set", "target_modules=0,"]) == 1
    assert capsys.readouterr().err.startswith("graphpeft show: 0: its 4 output features don't fall into groups")


@pytest.mark.quick("command")
@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (["show", "adapter"], "write a function that returns PeftModel.from_pretrained(base, 'adapter')"),
        (["export", "adapter", "m.pt2"], "write a function that returns PeftModel.from_pretrained(base, 'adapter')"),
        (["merge", "adapter", "m.safetensors"], "name it by --base"),
        (["convert", "adapter", "lora"], "name it by --base"),
    ],
)
def test_an_adapter_without_a_base_tells_the_way_that_the_subcommand_has(
    arguments: list[str], way_out: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    saved(here / "adapter")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert way_out in error
    assert ("--base" in error) == ("--base" in way_out)


@pytest.mark.parametrize(("path", "format"), [("m.onnx", "onnx"), ("m.pt2", "pt2"), ("m.safetensors", "safetensors")])
def test_export_takes_the_format_of_the_suffix(path: str, format: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", "models_of_mine:made", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == format
    assert (here / path).exists()


@pytest.mark.quick("command")
@pytest.mark.parametrize("measure", [False, True])
def test_show_measures_where_it_is_asked_to(measure: bool, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "models_of_mine:made", "model.json", *(["--measure"] if measure else [])]) == 0
    assert ("kept for the backward" in (here / "model.json").read_text(encoding="utf-8")) == measure


@pytest.mark.quick("command")
def test_what_a_model_prints_is_not_among_the_json(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "models_of_mine:talks", "--set", 'target_modules=["0"]', "--json"]) == 0
    printed = capsys.readouterr()
    (dead,) = json.loads(printed.out)["learning"]["dead"]
    assert (dead["site"], dead["tensors"]) == ("0", ["lora_A", "lora_B"])
    assert "zero whatever the adapters hold" in dead["reason"]
    assert {"made", "forward"} <= {*printed.err.split()}


# help


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("Usage: graphpeft [OPTIONS] COMMAND")


@pytest.mark.parametrize("name", sorted(command.commands))
def test_each_subcommand_has_an_example_in_its_help(name: str):
    shown = CliRunner().invoke(command, [name, "--help"])
    assert shown.exit_code == 0
    examples = [line for line in shown.output.splitlines() if line.strip().startswith(f"graphpeft {name} ")]
    assert examples
    for example in examples:
        words = example.split()[2:]
        # it is parsed as it stands
        command.commands[name].make_context(name, words, resilient_parsing=True)


def test_the_version_is_that_of_the_package():
    assert graphpeft.__version__ in CliRunner().invoke(command, ["--version"]).output


@pytest.mark.quick("__main__")
def test_python_runs_the_package():
    run = subprocess.run([sys.executable, "-m", "graphpeft", "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "explain" in run.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_its_script(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("_GRAPHPEFT_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit) as exited:
        main([])
    assert exited.value.code == 0
    assert f"_GRAPHPEFT_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("ex", {"plain,explain", "plain,export"}),
        ("export model.py:made --ada", {"plain,--adapters"}),
        ("export model.py:made --adapters b", {"plain,baked"}),
        ("explain timm:resnet18 --method LO", {"plain,LOHA", "plain,LOKR", "plain,LORA"}),
        ("info my-", {"file,my-"}),
        ("merge my-", {"dir,my-"}),
        ("merge adapter out", {"file,out"}),
        ("explain my-", {"file,my-"}),
        ("explain timm:resnet18 --config my-", {"file,my-"}),
    ],
)
def test_a_shell_completes_a_line(
    line: str, completions: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("_GRAPHPEFT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"graphpeft {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    with pytest.raises(SystemExit):
        main([])
    assert {*capsys.readouterr().out.splitlines()} == completions


def test_a_pipe_without_the_letters_is_written_to(tmp_path: Path):
    folder = tmp_path / "ä"
    saved(folder)

    def told(*options: str) -> str:
        arguments = [sys.executable, "-m", "graphpeft", "info", str(folder), *options]
        return subprocess.run(
            arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
        ).stdout.decode("ascii")

    assert "r=2, ?=3" in told()
    assert json.loads(told("--json"))["adapter"] == str(folder)


def test_a_warning_is_one_line_without_a_place_in_the_code(here: Path):
    saved(here / "adapter")
    file = here / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unknown": 1}))
    arguments = ["merge", "adapter", "m.safetensors", "--base", "models_of_mine:base"]
    answer = subprocess.run([sys.executable, "-m", "graphpeft", *arguments], capture_output=True, text=True, check=True)
    [line] = answer.stderr.splitlines()
    assert line.startswith("graphpeft merge: warning: adapter_config.json has keys that LoraConfig doesn't know")


# bases


def in_cache(hub: Path, repository: str, model: nn.Module) -> None:
    """Puts weights where the Hub's client keeps what it has loaded."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(model.state_dict(), snapshot / "model.safetensors")


def saved_of_timm(folder: Path) -> nn.Module:
    """Saves an adapter of a model with weights of its own, and returns the model with the adapter."""
    torch.manual_seed(77)
    model: Any = timm.create_model("resnet10t").eval()
    in_cache(folder / "hub", model.pretrained_cfg["hf_hub_id"], model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)).eval()
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("command", [["merge", "adapter", "m.safetensors"], ["convert", "adapter", "lora"]])
def test_an_adapter_is_not_merged_into_first_weights(
    command: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    saved_of_timm(here)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "none"))
    assert main([*command, "--base", "timm:resnet10t"]) == 2
    assert "the pretrained weights can't be loaded" in capsys.readouterr().err
    assert not (here / command[-1]).exists()


def test_an_adapter_is_merged_into_pretrained_weights(here: Path, monkeypatch: pytest.MonkeyPatch):
    model = saved_of_timm(here)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    assert main(["merge", "adapter", "m.safetensors", "--base", "timm:resnet10t"]) == 0
    merged, x = timm.create_model("resnet10t").eval(), torch.randn(1, 3, 64, 64)
    merged.load_state_dict(load_file(here / "m.safetensors"))
    torch.testing.assert_close(merged(x), model(x))
