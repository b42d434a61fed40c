"""OpenVINO and ExecuTorch run what is exported for them, with adapters given by a caller."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import graphpeft
from graphpeft import ExportError, LoraConfig

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.integrations]


class Residual(nn.Module):
    """A network whose matrices no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(24, 12) / 4), nn.Parameter(torch.randn(24, 12) / 5)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + F.gelu(F.linear(x, self.up)) @ self.down)


def wav2vec2() -> nn.Module:
    options: dict[str, Any] = {
        "conv_dim": (24, 24),
        "conv_kernel": (16, 4),
        "conv_stride": (8, 2),
        "num_feat_extract_layers": 2,
        "feat_extract_norm": "layer",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "classifier_proj_size": 24,
        "num_labels": 5,
    }
    return transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**options))


def vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=5
    )


MODELS: dict[str, tuple[Any, tuple[int, ...], list[str]]] = {
    "hand-written": (Residual, (3, 12), ["up", "down", "head"]),
    "timm": (vit, (2, 3, 16, 16), ["qkv", "fc1"]),
    "audio": (wav2vec2, (2, 512), ["q_proj", "v_proj", "intermediate_dense"]),
}


def adapted(name: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    make, shape, targets = MODELS[name]
    model: Any = make().eval()
    for adapter, alpha in (("first", 12), ("second", 3)):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        graphpeft.get_peft_model(model, config, adapter)
    return model, torch.randn(shape)


def output(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the greatest difference, relative to the greatest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert deviation(found, expected) <= 1e-4


def by_openvino(path: Path, x: torch.Tensor, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    openvino = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    name = next(iter({port.get_any_name() for port in compiled.inputs} - adapter.keys()))
    given = {name: x.numpy(), **{key: value.numpy() for key, value in adapter.items()}}
    return torch.from_numpy(compiled(given)[0].copy())


def by_executorch(path: Path, x: torch.Tensor, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    runtime = importlib.import_module("executorch.runtime")
    program = runtime.Runtime.get().load_program(path)
    return program.load_method("forward").execute([x, *dict(sorted(adapter.items())).values()])[0].clone()


FORMATS: dict[str, tuple[str, str, Any]] = {
    "openvino": ("openvino", ".xml", by_openvino),
    "executorch": ("executorch.runtime", ".pte", by_executorch),
}
each_format = pytest.mark.parametrize("format", FORMATS)


def sizes_may_change(format: str, name: str) -> bool:
    # XNNPACK lets one size of a tensor change
    return (format, name) != ("executorch", "audio")


@each_format
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["merged", "baked"])
def test_what_is_exported_computes_what_the_model_does(format: str, name: str, way: str, tmp_path: Path) -> None:
    _, suffix, run = FORMATS[format]
    model, x = adapted(name)
    path = tmp_path / f"model{suffix}"
    report = graphpeft.export(model, (x,), path, format, way, dynamic=sizes_may_change(format, name))
    assert_near(run(path, x, {}), output(model, x))
    assert {file.name for file in report.files} == {file.name for file in tmp_path.iterdir()}


@each_format
@pytest.mark.parametrize("name", MODELS)
def test_one_file_serves_all_adapters(format: str, name: str, tmp_path: Path) -> None:
    _, suffix, run = FORMATS[format]
    model, x = adapted(name)
    path = tmp_path / f"model{suffix}"
    graphpeft.export(model, (x,), path, format, "inputs", dynamic=sizes_may_change(format, name))
    model.add_adapter("third", LoraConfig(r=2, lora_alpha=7, target_modules=MODELS[name][2], init_lora_weights=False))
    graphpeft.export_adapter(model, "third", path)
    outputs = []
    for adapter in ("first", "second", "third"):
        model.set_adapter(adapter)
        outputs.append(run(path, x, load_file(tmp_path / f"model.{adapter}.safetensors")))
        assert_near(outputs[-1], output(model, x))
    assert deviation(outputs[0], outputs[1]) > 1e-2


@each_format
def test_rows_of_a_batch_have_adapters_of_their_own(format: str, tmp_path: Path) -> None:
    _, suffix, _ = FORMATS[format]
    model, x = adapted("hand-written")
    report = graphpeft.export(model, (x,), tmp_path / f"model{suffix}", format, "rows")
    assert max(one.difference for one in report.checked) <= 1e-4


@each_format
def test_an_adapter_of_other_ranks_is_refused(format: str, tmp_path: Path) -> None:
    _, suffix, _ = FORMATS[format]
    model, x = adapted("hand-written")
    path = tmp_path / f"model{suffix}"
    graphpeft.export(model, (x,), path, format, "inputs")
    model.add_adapter("wide", LoraConfig(r=4, target_modules=MODELS["hand-written"][2]))
    with pytest.raises(ExportError, match="'wide' doesn't fit the inputs"):
        graphpeft.export_adapter(model, "wide", path)


def test_executorch_takes_sizes_up_to_the_example_s_or_to_a_given_limit(tmp_path: Path) -> None:
    model, x = adapted("hand-written")
    graphpeft.export(model, (x,), tmp_path / "own.pte", "executorch")
    assert by_executorch(tmp_path / "own.pte", x[:1], {}).shape == (1, 5)
    with pytest.raises(RuntimeError):
        by_executorch(tmp_path / "own.pte", torch.randn(9, 12), {})
    limit = {"x": {0: torch.export.Dim("rows", max=16)}}
    graphpeft.export(model, (x,), tmp_path / "limited.pte", "executorch", dynamic=limit)
    more = torch.randn(9, 12)
    assert_near(by_executorch(tmp_path / "limited.pte", more, {}), output(model, more))


class Options(nn.Module):
    """Takes arguments of all kinds beside tensors, also inside of others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: Any, pair: Any, *, negative: bool = True, more: Any = None) -> Any:
        scale, bias = pair
        y = self.layer(x) * scale + bias
        y = y if mask is None else y * mask
        return (-y if negative else y) + (more["bias"] if more["kind"] == "sum" else 0)


@each_format
@pytest.mark.parametrize("way", ["merged", "inputs"])
def test_arguments_that_are_no_tensors_are_fixed_and_the_file_takes_the_tensors(
    format: str, way: str, tmp_path: Path
) -> None:
    _, suffix, _ = FORMATS[format]
    model = graphpeft.get_peft_model(Options(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    bias, more = torch.randn(3, 8), {"kind": "sum", "unread": 7, "bias": torch.randn(3, 8)}
    example = {"x": torch.randn(3, 8), "mask": None, "pair": (2.5, bias), "negative": False, "more": more}
    report = graphpeft.export(model, example, tmp_path / f"model{suffix}", format, way)
    assert list(report.inputs) == ["x", "pair.1", "more.bias"]
    assert max(one.difference for one in report.checked) <= 1e-5


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deep(self.wide(x).relu()).mean((2, 3))


@each_format
def test_kernels_of_convolutions_are_inputs_of_the_sizes_that_the_program_fixes(format: str, tmp_path: Path) -> None:
    _, suffix, run = FORMATS[format]
    config = LoraConfig(r=2, target_modules=["wide", "deep"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(Convolutions(), config)
    graphpeft.export(model, (torch.randn(2, 3, 8, 8),), tmp_path / f"model{suffix}", format, "inputs")
    x, adapter = torch.randn(1, 3, 8, 8), load_file(tmp_path / "model.default.safetensors")
    assert_near(run(tmp_path / f"model{suffix}", x, adapter), output(model, x))


def test_openvino_s_inputs_have_the_sizes_that_the_program_fixes(tmp_path: Path) -> None:
    model, x = adapted("hand-written")
    graphpeft.export(model, (x,), tmp_path / "model.xml", "openvino", "inputs")
    inputs = importlib.import_module("openvino").Core().read_model(tmp_path / "model.xml").inputs
    shapes = {port.get_any_name(): str(port.partial_shape) for port in inputs}
    adapter = load_file(tmp_path / "model.first.safetensors")
    assert shapes == {"x": "[?,12]", **{key: str(list(one.shape)).replace(" ", "") for key, one in adapter.items()}}


def test_the_batches_of_ids_and_their_mask_are_one_dim_in_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=40, num_attention_heads=2, **sizes))
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(base, config).eval()
    example = {"input_ids": torch.randint(1, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with pytest.raises(ExportError, match=r"right where input_ids\.shape\[0\] == attention_mask\.shape\[0\]") as error:
        graphpeft.export(model, example, tmp_path / "model.xml", "openvino")
    dynamic = eval(str(error.value).partition("dynamic=")[2].partition(", or use")[0])
    report = graphpeft.export(model, example, tmp_path / "model.xml", "openvino", dynamic=dynamic)
    assert report.inputs == {"input_ids": "(a, b ≤ 512)", "attention_mask": "(a, b)"}


def generating() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes))
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(base, config).eval()
    return model, graphpeft.generation_inputs(model, torch.randint(1, 40, (2, 6)))


@pytest.mark.parametrize("way", ["merged", "baked", "inputs", "rows"])
def test_openvino_generates_with_a_cache(way: str, tmp_path: Path) -> None:
    model, inputs = generating()
    report = graphpeft.export(model, inputs, tmp_path / "model.xml", "openvino", way)
    assert report.checked[-1].case.endswith(", 10 tokens")
    assert report.checked[-1].difference < 1e-4


def test_a_cache_that_grows_beyond_what_executorch_has_planned_is_refused(tmp_path: Path) -> None:
    model, inputs = generating()
    with pytest.raises(ExportError, match="can't be run for the model on inputs of the shapes"):
        graphpeft.export(model, inputs, tmp_path / "model.pte", "executorch")
    assert not list(tmp_path.iterdir())


class Halves(nn.Module):
    """Calls an operator that returns a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layer(x).chunk(2, -1)
        return first * second


@pytest.mark.parametrize("rows", [1, 2])
def test_executorch_takes_batches_from_one_to_the_limit(rows: int, tmp_path: Path) -> None:
    model: Any = graphpeft.get_peft_model(Halves(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    limit = {"x": {0: torch.export.Dim("batch", max=6)}}
    report = graphpeft.export(model, (torch.randn(rows, 8),), tmp_path / "model.pte", "executorch", dynamic=limit)
    assert report.inputs == {"x": "(a ≤ 6, 8)"}
    for batch in range(1, 7):
        x = torch.randn(batch, 8)
        assert_near(by_executorch(tmp_path / "model.pte", x, {}), output(model, x))


class Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.layer(x), size=(5, 5), mode="bicubic", antialias=True)


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("openvino", "has nothing for aten._upsample_bicubic2d_aa"),
        ("executorch", "its runtime has nothing for aten::_upsample_bicubic2d_aa.out"),
    ],
)
def test_an_operator_that_is_missing_is_named_and_nothing_is_written(format: str, reason: str, tmp_path: Path) -> None:
    _, suffix, _ = FORMATS[format]
    model = graphpeft.get_peft_model(Resizing(), LoraConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ExportError, match=reason):
        graphpeft.export(model, (torch.randn(2, 3, 8, 8),), tmp_path / f"model{suffix}", format)
    assert not list(tmp_path.iterdir())


@each_format
def test_without_the_package_it_is_told_what_to_install(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, suffix, _ = FORMATS[format]
    for module in ("openvino", "executorch", "executorch.exir", package):
        monkeypatch.setitem(sys.modules, module, None)
    model, x = adapted("hand-written")
    with pytest.raises(ExportError, match=rf"pip install graphpeft\[{format}\]"):
        graphpeft.export(model, (x,), tmp_path / f"model{suffix}", format)


def test_openvino_s_own_reader_of_onnx_takes_merged_adapters(tmp_path: Path) -> None:
    model, x = adapted("timm")
    graphpeft.export(model, (x,), tmp_path / "model.onnx", "onnx")
    assert_near(by_openvino(tmp_path / "model.onnx", x, {}), output(model, x))
