"""LoftQ on a model that is quantised already: A and B get what rounding has left out of the weight W.

    W − Q⁻¹(codes) = U S Vᵀ:     B = U_r √S_r,  A = √S_r V_rᵀ

W comes from the file of the model before it was quantised. The scale of the branch is ignored, as in PEFT. Source: Li
et al., "LoftQ", arXiv 2310.08659; the same numbers as PEFT's ``utils/loftq_utils.py``, on any device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.holders import tensor_at
from graphpeft.sites import quantisers
from graphpeft.transaction import remember, transaction
from graphpeft.wording import number_of

_FILE = "model.safetensors"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Gives an adapter on layers of 4 bits the values that make up best for what quantising has rounded away.

    The weights before quantising are read from a file, one after the other.

    Args:
        peft_model: The adapted model.
        model_path: The safetensors file of the model before it was quantised, or its folder, also with several files
            and an index. None means the files from which Transformers has loaded the model.
        adapter_name: The name of the adapter.
        callback: Called with the model and the path of each layer after its values were replaced; if it returns False,
            the layer gets its old values back.

    Raises:
        AdaptError: If the adapter has no layer of 4 bits, or a rank above its size.
        CheckpointError: If the file can't be read, or lacks a weight, or has it in another shape.
        FileNotFoundError: If there is no such file.
        ValueError: If `model_path` is needed and not given. After any error, the values are what they were.

    Examples:
        >>> from bitsandbytes.nn import LinearNF4
        >>> from safetensors.torch import save_file
        >>> plain = nn.Sequential(nn.Linear(64, 64))
        >>> save_file(plain.state_dict(), "model.safetensors")
        >>> model = nn.Sequential(LinearNF4(64, 64))
        >>> _ = model.load_state_dict(plain.state_dict())
        >>> model = get_peft_model(model.to("cpu"), LoraConfig(r=4, target_modules=["0"]))
        >>> replace_lora_weights_loftq(model, "model.safetensors")
        >>> bool(model[0].default.lora_B.any())
        True
    """
    adapter, modules = known_adapter(peft_model, adapter_name), modules_of(peft_model)
    sites = [adapted for adapted in adapter.coded_sites if _has_4_bits(modules[adapted.site.owner])]
    if not sites:
        raise AdaptError(f"{adapter_name!r} adapts no layer whose weight bitsandbytes has quantised to 4 bits")
    weights = _Weights(peft_model, model_path)
    with transaction(peft_model):
        for adapted in sites:
            path = adapted.site.owner
            A, B = (tensor_at(modules[path], adapted.names[name]) for name in ("lora_A", "lora_B"))
            before = A.clone(), B.clone()
            remember(A)
            remember(B)
            first = _factors(path, weights.of(path), quantisers.codes_of(modules[path]).numbers(), A.shape[0])
            _fill((A, B), first)
            if callback is not None and not callback(peft_model, path):
                _fill((A, B), before)


def _has_4_bits(layer: nn.Module) -> bool:
    return type(layer._parameters["weight"]).__name__ == "Params4bit"


def _fill(tensors: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _factors(path: str, weight: Tensor, rounded: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A and B whose product is the best approximation of what rounding has left out."""
    if weight.shape != rounded.shape:
        raise CheckpointError(
            f"the file has {path}.weight of shape {tuple(weight.shape)}, and the model has "
            f"{tuple(rounded.shape)}; give the file of the same model"
        )
    if rank > min(rounded.shape):
        raise AdaptError(
            f"{path}.weight has {number_of(min(rounded.shape), 'direction')}, and r is {rank}; choose a smaller r"
        )
    U, S, Vt = torch.linalg.svd(weight.to(rounded.device, torch.float32) - rounded, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root


class _Weights:
    """Reads weights from the file of a model, or from several with an index."""

    def __init__(self, model: Any, given: str | os.PathLike[str] | None) -> None:
        path = Path(_folder_of(model) if given is None else given)
        file = path if path.suffix == ".safetensors" else path / _FILE
        index = file.parent / f"{_FILE}.index.json"
        self._file: Path | None = file if file.exists() else None
        self._files: dict[str, str] = {}
        self._prefix = getattr(model, "base_model_prefix", "")
        if self._file is None and not index.exists():
            raise FileNotFoundError(f"there is neither {file} nor {index}; pass the model's safetensors as model_path")
        if self._file is None:
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._folder = index.parent

    def of(self, path: str) -> Tensor:
        """Returns the weight of a layer."""
        for name in self._names(f"{path}.weight"):
            file = self._file or (self._folder / self._files[name] if name in self._files else None)
            if file is None:
                continue
            try:
                with safe_open(file, "pt") as opened:
                    if name in opened.keys():  # noqa: SIM118 - it is no dictionary
                        return opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} can't be read: {error}") from error
        raise CheckpointError(f"the model's file has no {path}.weight; give the file of the same model")

    def _names(self, name: str) -> Iterator[str]:
        yield name
        if self._prefix and name.startswith(f"{self._prefix}."):
            yield name.removeprefix(f"{self._prefix}.")


def _folder_of(model: Any) -> str:
    """Returns the folder from which Transformers has loaded a model."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError("the model doesn't tell from where it was loaded; pass the safetensors file as model_path")
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name, local_files_only=True)
