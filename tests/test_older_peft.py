"""LoRA of experts' stacks as PEFT wrote it before version 0.19: the factors are the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphpeft import CheckpointError, LoraConfig, PeftModel, get_peft_model

EXPERTS, RANK = 3, 2


class Experts(nn.Module):
    """A layer with a stack of matrices, each for its share of the features."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(EXPERTS, rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the products with all matrices."""
        return torch.einsum("eoi,bi->beo", self.stack, x)


def base(rows: int, columns: int) -> Any:
    """Returns a model with such a layer, the same in each call."""
    torch.manual_seed(0)
    return nn.Sequential(Experts(rows, columns)).eval()


def write(rows: int, columns: int, version: str | None) -> Tensor:
    """Writes an adapter as PEFT 0.18 did, and returns its change of the stack."""
    torch.manual_seed(1)
    A, B = torch.randn(EXPERTS * RANK, rows), torch.randn(columns, RANK * EXPERTS)
    Path("adapter").mkdir()
    names = ("base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight")
    save_file(dict(zip(names, (A, B), strict=True)), "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": [], "target_parameters": ["0.stack"]}
    config |= {} if version is None else {"peft_version": version}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    of_experts = A.reshape(EXPERTS, -1, rows), B.reshape(columns, -1, EXPERTS)
    return 4 / RANK * torch.einsum("ore,eri->eio", of_experts[1], of_experts[0])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.quick("stacks")
@pytest.mark.parametrize(
    ("rows", "columns", "version"),
    [(4, 6, "0.18.1"), (4, 6, None), (6, 4, "0.20.0"), (4, 4, "0.18.0"), (4, 4, "0.17.1")],
)
def test_factors_are_turned(rows: int, columns: int, version: str | None) -> None:
    change = write(rows, columns, version)
    merged = PeftModel.from_pretrained(base(rows, columns), "adapter").merge_and_unload()
    torch.testing.assert_close(merged[0].stack, base(rows, columns)[0].stack + change)


@pytest.mark.parametrize("version", ["0.19.0", "0.21.2", "1.0.0"])
def test_factors_of_a_later_version_stay(version: str) -> None:
    model = get_peft_model(base(4, 4), LoraConfig(r=RANK, target_parameters=["0.stack"], init_lora_weights=False))
    model.save_pretrained("adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
    again = PeftModel.from_pretrained(base(4, 4), "adapter")
    again.save_pretrained("again")
    given, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "again"))
    assert all(torch.equal(found[key], given[key]) for key in given)


def test_square_matrices_without_a_version_are_undecidable() -> None:
    write(4, 4, None)
    model = base(4, 4)
    with pytest.raises(CheckpointError, match=r"0\.stack has square matrices, .* Write that version as peft_version"):
        PeftModel.from_pretrained(model, "adapter")
    assert not hasattr(model, "peft_config")
