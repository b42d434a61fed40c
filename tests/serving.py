"""Runs exported models as those do who serve them: in a process that knows nothing of this library.

``python tests/serving.py manifest.json`` computes each job of the manifest and writes the greatest difference from what
is expected. The models are here, too, since weights alone need the code of their models.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSES = 5
VOCABULARY = 64

# models


class Functional(nn.Module):
    """Weights that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 8) / 8**0.5)
        self.b = nn.Parameter(torch.randn(12))
        self.v = nn.Parameter(torch.randn(8, 12) / 12**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.v))


class HandWritten(nn.Module):
    """Such weights beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Functional()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def timm_vit(_: Path | None = None) -> Any:
    import timm

    sizes: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)


def timm_resnet(_: Path | None = None) -> Any:
    import timm

    return timm.create_model("resnet10t", num_classes=CLASSES)


def torchvision_vit(_: Path | None = None) -> Any:
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
    )
    # its head starts at zero, which would hide every difference
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


def hand_written(_: Path | None = None) -> Any:
    return HandWritten()


def bert(folder: Path | None = None) -> Any:
    import transformers

    if folder is not None:
        return transformers.AutoModel.from_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=32, **sizes)
    )


def llama(folder: Path | None = None) -> Any:
    import transformers

    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes, **heads)
    )


MODELS: dict[str, Callable[..., Any]] = {
    "timm ViT": timm_vit,
    "timm ResNet": timm_resnet,
    "torchvision ViT": torchvision_vit,
    "hand-written": hand_written,
    "BERT": bert,
    "Llama": llama,
}

# runtimes


def result(returned: Any) -> Tensor:
    """Returns the main tensor of what a model returned."""
    if isinstance(returned, dict):
        return returned["logits"] if "logits" in returned else returned["last_hidden_state"]
    return returned if isinstance(returned, Tensor) else returned[0]


def pt2(job: Any) -> Callable[..., Tensor]:
    model = torch.export.load(job["path"]).module()
    return lambda inputs, adapters, rows: _called(model, job, inputs, _given(job, adapters, rows))


def aoti(job: Any) -> Callable[..., Tensor]:
    # PyTorch 2.10 doesn't import it by itself, and needs it to load a package
    importlib.import_module("torch._inductor.codecache")
    package: Any = torch._inductor
    model = package.aoti_load_package(job["path"])
    return lambda inputs, adapters, rows: _called(model, job, inputs, _given(job, adapters, rows))


def _called(model: Any, job: Any, inputs: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
    # as the example was: by place, or by name
    if job["constants"]:
        return result(model(**inputs, **job["constants"], **more))
    return result(model(*inputs.values(), **more))


def _given(job: Any, adapters: list[str], rows: list[int] | None) -> dict[str, Any]:
    loaded = [dict(sorted(load_file(job["adapters"][name]).items())) for name in adapters]
    if rows is not None:
        together = {key: torch.cat([one[key] for one in loaded]) for key in loaded[0]}
        return {"adapters": together, "adapter_rows": torch.tensor(rows)}
    return {"adapters": loaded[0]} if loaded else {}


def onnx(job: Any) -> Callable[..., Tensor]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(job["path"], settings)

    def run(inputs: dict[str, Tensor], adapters: list[str], rows: list[int] | None) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        options = onnxruntime.RunOptions()
        if rows is not None:
            # the file has all adapters as defaults
            feed["adapter_rows"] = torch.tensor(rows).numpy()
        else:
            for name in adapters:
                adapter = onnxruntime.LoraAdapter()
                adapter.Load(job["adapters"][name])
                options.add_active_adapter(adapter)
        [output, *_] = session.run(None, feed, options)
        return torch.from_numpy(output)

    return run


def weights(job: Any) -> Callable[..., Tensor]:
    path = Path(job["path"])
    read = torch.load if job["format"] == "state_dict" else load_file
    tensors = read(path / ("pytorch_model.bin" if job["format"] == "state_dict" else "model.safetensors"))
    model = MODELS[job["model"]](path if (path / "config.json").exists() else None).eval()
    if not (path / "config.json").exists():
        model.load_state_dict(tensors)
    if not job["adapters"]:
        return lambda inputs, adapters, rows: _called(model, job, inputs, {})
    import peft

    [first, *others] = job["adapters"]
    adapted: Any = peft.PeftModel.from_pretrained(model, path / "adapters" / first, first)
    for name in others:
        adapted.load_adapter(path / "adapters" / name, name)

    def run(inputs: dict[str, Tensor], adapters: list[str], rows: list[int] | None) -> Tensor:
        adapted.set_adapter(adapters[0] if adapters else first)
        return _called(adapted.base_model.model.eval(), job, inputs, {})

    return run


RUNTIMES = {"pt2": pt2, "aoti": aoti, "onnx": onnx, "safetensors": weights, "state_dict": weights}


def main(manifest: str) -> None:
    """Computes all jobs."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(manifest).read_text())
    differences = {}
    with torch.no_grad():
        for job in jobs:
            run = RUNTIMES[job["format"]](job)
            for call in job["calls"]:
                found = run(load_file(call["inputs"]), call["adapters"], call["rows"])
                expected = load_file(call["expected"])["expected"]
                assert found.shape == expected.shape, (job["name"], call, found.shape, expected.shape)
                differences[f"{job['name']}, {call['name']}"] = float((found - expected).abs().max())
    assert "graphpeft" not in sys.modules
    Path(manifest).with_name("differences.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    main(sys.argv[1])
