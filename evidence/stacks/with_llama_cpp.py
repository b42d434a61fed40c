"""Adapters in llama.cpp's files, with llama.cpp and its converters as the oracle, in an environment of its own."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapted import Row, adapted, base, compared, logits
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from graphpeft import CheckpointError, PeftModel, check_serving, save_adapter
from graphpeft.command import main

_ENVIRONMENT = Path(__file__).parents[2] / ".venv-stacks"
_MODELS = ("llama", "qwen3", "mixtral", "qwen3_moe")


def versions() -> str:
    """Returns the versions of the packages that ran."""
    code = "from importlib.metadata import version as v; print('llama-cpp-python', v('llama-cpp-python'))"
    return subprocess.run([_python(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def rows() -> Iterator[Row]:
    """Yields what comes of each kind of adapter on each model: of ours in llama.cpp, and of its converter's here."""
    for model in tqdm(_MODELS, "llama.cpp", unit="model"):
        with tempfile.TemporaryDirectory() as name:
            folder, kinds = Path(name), adapted(model)
            _write_base(model, folder)
            written = {kind: folder / kind for kind, each in kinds.items() if _is_written(each, folder, kind)}
            script = Path(__file__).with_name("llama_cpp_logits.py")
            files = [str(path / "adapter.gguf") for path in written.values()]
            subprocess.run([_python(), script, folder / "base.gguf", folder / "out.safetensors", *files], check=True)
            found = load_file(folder / "out.safetensors")
            for kind, each in kinds.items():
                yield compared(model, kind, logits(each), found.get(kind))
            yield from _of_its_converter(model, kinds, folder)


def _python() -> Path:
    return _ENVIRONMENT / "bin" / "python"


def _is_written(model: Any, folder: Path, kind: str) -> bool:
    try:
        save_adapter(model, folder / kind, stack="gguf", served_base=folder / "base.gguf")
    except CheckpointError:
        return False
    return True


def _write_base(model: str, folder: Path) -> None:
    """Writes a model's checkpoint, with a tokenizer of bytes, and its GGUF file by llama.cpp's converter."""
    base(model).save_pretrained(folder / "model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {letter: number for number, letter in enumerate([*letters, "th"])}
    tokenizer = Tokenizer(models.BPE(numbers, [("t", "h")]))  # llama.cpp loads none without merges
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_transformers = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=letters[0], eos_token=letters[0])
    of_transformers.save_pretrained(folder / "model")
    _convert("convert_hf_to_gguf.py", folder / "model", "--outfile", folder / "base.gguf", "--outtype", "f32")


def _convert(script: str, *arguments: str | Path) -> None:
    runner = Path(__file__).with_name("llama_cpp_converter.py")
    subprocess.run([_python(), runner, _ENVIRONMENT / "llama.cpp" / script, *arguments], check=True)


def _of_its_converter(model: str, kinds: dict[str, Any], folder: Path) -> Iterator[Row]:
    """Yields what an adapter computes here that llama.cpp's converter has written from PEFT's files."""
    for kind in kinds:
        saved = folder / f"peft-{kind}"
        save_adapter(kinds[kind], saved, stack="transformers4")
        if not check_serving(saved, "llama.cpp").is_served:
            continue
        file, again = folder / f"{kind}.gguf", folder / f"again-{kind}"
        _convert("convert_lora_to_gguf.py", saved, "--base", folder / "model", "--outfile", file, "--outtype", "f32")
        options = ["--base", f"hf:{folder / 'model'}", "--served-base", str(folder / "base.gguf")]
        assert main(["convert", str(file), str(again), "--to", "peft", *options]) == 0
        read = PeftModel.from_pretrained(base(model), again).eval()
        yield compared(model, f"{kind}, read", logits(kinds[kind]), logits(read))
