"""Models that accelerate loads, places and offloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import tiny
import torch
import transformers
from loops import adapted, close, fit
from torch import Tensor
from workflow import Values, workflow

CPU = torch.device("cpu")
IDS = torch.arange(3, 17).reshape(2, 7)
PLACES: dict[str, Any] = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}

META = "PEFT puts the adapter on the meta device, where the offloaded weight is, so its values are lost"


@workflow("accelerate", "cpu_offload of the base, which is then adapted and trained", apart=META)
def cpu_offload(peft: Any, folder: Path) -> Values:
    return _trained_as_in_memory(peft, _adapted(peft, accelerate.cpu_offload(tiny.llama(), CPU)))


@workflow("accelerate", "cpu_offload of an adapted model")
def adapted_cpu_offload(peft: Any, folder: Path) -> Values:
    return _infers_as_in_memory(peft, accelerate.cpu_offload(_adapted(peft), CPU))


@workflow("accelerate", "disk_offload of the base, which is then adapted and trained", apart=META)
def disk_offload(peft: Any, folder: Path) -> Values:
    return _trained_as_in_memory(peft, _adapted(peft, accelerate.disk_offload(tiny.llama(), str(folder), CPU)))


@workflow("accelerate", "disk_offload of an adapted model")
def adapted_disk_offload(peft: Any, folder: Path) -> Values:
    return _infers_as_in_memory(peft, accelerate.disk_offload(_adapted(peft), str(folder), CPU))


@workflow("accelerate", "dispatch_model to memory and disk, then adapt, train, save and load", apart=META)
def dispatched(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, _dispatched(folder / "base"))
    values = _trained_as_in_memory(peft, model)
    model.save_pretrained(str(folder / "adapter"))
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder / "adapter"))
    close(_logits(loaded), _logits(model))
    return values


@workflow("accelerate", "a saved adapter is loaded onto a dispatched base")
def adapter_onto_dispatched(peft: Any, folder: Path) -> Values:
    _adapted(peft).save_pretrained(str(folder / "adapter"))
    options = {"offload_folder": str(folder / "again")}
    model = peft.PeftModel.from_pretrained(_dispatched(folder / "base"), str(folder / "adapter"), **options)
    return _infers_as_in_memory(peft, model)


@workflow("accelerate", "merge_and_unload of an adapter on a dispatched base", apart=META)
def merged(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, _dispatched(folder)).merge_and_unload()
    return _infers_as_in_memory(peft, model)


@workflow("accelerate", 'from_pretrained(device_map="cpu"), adapted and trained')
def device_map(peft: Any, folder: Path) -> Values:
    return _trained_as_in_memory(peft, _adapted(peft, _loaded(folder, device_map="cpu")))


@workflow("accelerate", 'device_map="auto" with max_memory and offload_folder, for the base and for the adapter')
def automatic(peft: Any, folder: Path) -> Values:
    _adapted(peft).save_pretrained(str(folder / "adapter"))
    options = {"device_map": "auto", "max_memory": {"cpu": 9000}, "offload_folder": str(folder / "offloaded")}
    base = _loaded(folder / "base", **options)
    assert "disk" in base.hf_device_map.values()
    model = peft.PeftModel.from_pretrained(base, str(folder / "adapter"), **options)
    return _infers_as_in_memory(peft, model)


@workflow("accelerate", "infer_auto_device_map of an adapted model, which is dispatched by it")
def inferred(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    places = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": 16000}, no_split_module_classes=["LlamaDecoderLayer"]
    )
    assert set(places.values()) == {"cpu", "disk"}
    model = accelerate.dispatch_model(model, places, main_device=CPU, offload_dir=str(folder))
    return _infers_as_in_memory(peft, model)


@workflow("accelerate", "init_empty_weights, load_checkpoint_and_dispatch, then adapt and train", apart=META)
def empty(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(str(folder / "base"))
    with accelerate.init_empty_weights():
        base = tiny.llama()
    base = accelerate.load_checkpoint_and_dispatch(
        base, str(folder / "base"), device_map=PLACES, offload_folder=str(folder / "offloaded")
    )
    return _trained_as_in_memory(peft, _adapted(peft, base))


@workflow("accelerate", "an adapter is loaded with low_cpu_mem_usage into a base in memory")
def low_memory(peft: Any, folder: Path) -> Values:
    _adapted(peft).save_pretrained(str(folder))
    model = peft.PeftModel.from_pretrained(tiny.llama(), str(folder), low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return _infers_as_in_memory(peft, model)


@workflow("accelerate", "generate with an adapted model that is offloaded to disk", apart=META)
def generating(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, accelerate.disk_offload(tiny.llama(), str(folder), CPU), task_type="CAUSAL_LM")
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(input_ids=IDS, **options).tolist()
    assert tokens == _adapted(peft).generate(input_ids=IDS, **options).tolist()
    return {"tokens": tokens}


def _adapted(peft: Any, base: Any = None, **options: Any) -> Any:
    return adapted(peft, tiny.llama() if base is None else base, "q_proj", "v_proj", "lm_head", **options)


def _dispatched(folder: Path) -> Any:
    return accelerate.dispatch_model(tiny.llama(), PLACES, main_device=CPU, offload_dir=str(folder))


def _loaded(folder: Path, **options: Any) -> Any:
    tiny.llama().save_pretrained(str(folder))
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _infers_as_in_memory(peft: Any, model: Any) -> Values:
    close(_logits(model), _logits(_adapted(peft)))
    return {"logits": _logits(model).square().sum().item()}


def _trained_as_in_memory(peft: Any, model: Any) -> Values:
    found, expected = (
        fit(each, lambda each=each: each(input_ids=IDS, labels=IDS).loss) for each in (model, _adapted(peft))
    )
    close(torch.tensor(found), torch.tensor(expected))
    return {"losses": found}
