"""What tests of exports share: adapted models with inputs in two sizes, and jobs for a process that serves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import serving
import torch
from safetensors.torch import save_file
from torch import Tensor

import graphpeft

TOLERANCE = 1e-4
SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "safetensors": "", "state_dict": ""}


@dataclass(frozen=True)
class Exported:
    """A model that is exported.

    Attributes:
        name: Its name among `serving.MODELS`.
        input: The name of its input.
        shapes: Two shapes of that, of which the first is the example's.
        lora: The options of a config that name what to adapt.
        constants: Other arguments.
    """

    name: str
    input: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    lora: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)

    def base(self) -> Any:
        """Builds the model."""
        torch.manual_seed(0)
        return serving.MODELS[self.name]().eval()

    def adapted(self, names: tuple[str, ...] = ("first", "second"), **options: Any) -> Any:
        """Builds the model with adapters of different scales, whose changes are felt."""
        model = self.base()
        for number, name in enumerate(names):
            torch.manual_seed(number)
            config = graphpeft.LoraConfig(
                r=2, lora_alpha=2 + 2 * number, init_lora_weights=False, **self.lora, **options
            )
            graphpeft.get_peft_model(model, config, name)
        model.set_adapter(names[0])
        return model.eval()

    def tensor(self, which: int = 0) -> Tensor:
        """Returns the input in one of the two sizes."""
        generator = torch.Generator().manual_seed(which)
        shape = self.shapes[which]
        if self.input == "input_ids":
            return torch.randint(3, serving.VOCABULARY, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def inputs(self, which: int = 0) -> dict[str, Any]:
        """Returns the model's inputs in one of the two sizes."""
        return {self.input: self.tensor(which), **self.constants}

    def output(self, model: Any, which: int = 0, **options: Any) -> Tensor:
        """Returns what a model gives for them."""
        with torch.no_grad():
            return serving.result(model(**self.inputs(which), **options))

    def example(self) -> Any:
        """Returns the example inputs of an export: positional, but for constants."""
        return self.inputs() if self.constants else (self.tensor(),)

    def __str__(self) -> str:
        return self.name


PIXELS = ((2, 3, 32, 32), (5, 3, 32, 32))
TIMM_VIT = Exported("timm ViT", "x", PIXELS, {"target_modules": ["qkv", "attn.proj", "fc1", "fc2"]})
RESNET = Exported(
    "timm ResNet", "x", ((2, 3, 48, 48), (3, 3, 64, 64)), {"target_modules": r"conv1\.3|layer\d\.0\.conv[12]|fc"}
)
TORCHVISION_VIT = Exported("torchvision ViT", "x", PIXELS, {"target_modules": ["self_attention", "mlp.0", "mlp.3"]})
HAND_WRITTEN = Exported(
    "hand-written", "x", ((3, 4, 8), (2, 7, 8)), {"target_modules": ["head"], "target_parameters": ["body.w", "body.v"]}
)
TOKENS = ((2, 7), (3, 4))
BERT = Exported("BERT", "input_ids", TOKENS, {"target_modules": ["query", "value", "dense"]})
LLAMA = Exported(
    "Llama", "input_ids", TOKENS, {"target_modules": ["q_proj", "v_proj", "up_proj"]}, {"use_cache": False}
)
MODELS = [TIMM_VIT, RESNET, TORCHVISION_VIT, HAND_WRITTEN, BERT, LLAMA]


class Served:
    """Exports, with what their files have to compute in a process of their own.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs: list[dict[str, Any]] = []
        self._count = 0

    def export(self, model: Exported, format: str, way: str) -> None:
        """Exports a model, and notes what it computes; the process will check it, so nothing is checked here."""
        source = model.adapted()
        path = self.folder / f"{model.name} {format} {way}{SUFFIXES[format]}"
        report = graphpeft.export(source, model.example(), path, format, way, check=False)
        files = {name: str(file) for name, file in report.adapter_files.items()}
        if path.is_dir():
            files = {folder.name: str(folder) for folder in path.glob("adapters/*")}
        self._jobs.append(
            {
                "name": f"{model}, {format}, {way}",
                "model": model.name,
                "format": format,
                "path": str(path),
                "adapters": files,
                "constants": model.constants,
                "calls": list(self._calls(model, way, source)),
            }
        )

    def _calls(self, model: Exported, way: str, source: Any) -> Iterator[dict[str, Any]]:
        for which in (0, 1):
            if way == "rows":
                rows = [row % 2 for row in range(model.shapes[which][0])]
                names = list(source.peft_config)
                expected = model.output(source, which, adapter_names=[names[row] for row in rows])
                yield self._call(model, which, names, rows, expected)
            elif way == "inputs":
                for name in source.peft_config:
                    source.set_adapter(name)
                    yield self._call(model, which, [name], None, model.output(source, which))
            else:
                yield self._call(model, which, [], None, model.output(source, which))

    def _call(
        self, model: Exported, which: int, adapters: list[str], rows: list[int] | None, expected: Tensor
    ) -> dict[str, Any]:
        self._count += 1
        inputs, outputs = (self.folder / f"{kind}-{self._count}.safetensors" for kind in ("inputs", "outputs"))
        save_file({model.input: model.tensor(which)}, inputs)
        save_file({"expected": expected.contiguous()}, outputs)
        name = f"{' and '.join(adapters) or 'active'} at {model.shapes[which]}"
        files = {"inputs": str(inputs), "expected": str(outputs)}
        return {"name": name, "adapters": adapters, "rows": rows, **files}

    def differences(self) -> dict[str, float]:
        """Runs all that was exported in a fresh process, and returns the differences from what the models gave."""
        manifest = self.folder / "manifest.json"
        manifest.write_text(json.dumps(self._jobs))
        command = [sys.executable, "-W", "ignore", serving.__file__, str(manifest)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        differences = json.loads((self.folder / "differences.json").read_text())
        assert len(differences) == self._count
        return differences
