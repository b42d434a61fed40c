"""Adapters in mlx-lm's files, with mlx-lm itself as the oracle: it runs in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapted import Row, adapted, base, compared, logits
from safetensors.torch import load_file
from tqdm import tqdm

from graphpeft import save_adapter

_PYTHON = Path(__file__).parents[2] / ".venv-stacks" / "bin" / "python"
_MODELS = ("llama", "qwen3", "mixtral")


def versions() -> str:
    """Returns the versions of the packages that ran."""
    code = "from importlib.metadata import version as v; print('mlx-lm', v('mlx-lm') + ',', 'mlx', v('mlx'))"
    return subprocess.run([_PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def rows() -> Iterator[Row]:
    """Yields what comes of each kind of adapter on each model."""
    for model in tqdm(_MODELS, "mlx-lm", unit="model"):
        models = adapted(model)
        with tempfile.TemporaryDirectory() as folder:
            _write_base(model, Path(folder, "model"))
            for kind, each in models.items():
                save_adapter(each, Path(folder, kind), stack="mlx")
            script = Path(__file__).with_name("mlx_logits.py")
            adapters = [str(Path(folder, kind)) for kind in models]
            subprocess.run([_PYTHON, script, f"{folder}/model", f"{folder}/out.safetensors", *adapters], check=True)
            found = load_file(f"{folder}/out.safetensors")
        for kind, each in models.items():
            yield compared(model, kind, logits(each), found[kind])


def _write_base(model: str, folder: Path) -> None:
    base(model).save_pretrained(folder)
    file = folder / "config.json"  # as mlx-lm reads it
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"rope_theta": config.get("rope_parameters", {}).get("rope_theta", 10000.0), **config}))
