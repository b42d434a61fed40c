"""PEFT's own API: files of adapters, configs, cards, injection, and hot-swapping."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from trainer_runs import adapted
from workflow import Values, part, workflow

TOOL = "PEFT: files"
TOKENS = torch.arange(3, 12).view(1, 9)


def _out(model: Any) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.square().sum().item()


def _adapter_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@workflow(TOOL, "saved and loaded: names of files, keys, and the config")
def saved(peft: Any, folder: Path) -> Values:
    model = adapted(peft, modules_to_save=["lm_head"], use_rslora=True)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), folder)
    assert _out(loaded) == _out(model)
    options = json.loads((folder / "adapter_config.json").read_text())
    del options["peft_version"]
    options["target_modules"].sort()  # a set in PEFT
    return {"files": _adapter_files(folder), "keys": sorted(peft.load_peft_weights(str(folder))), "options": options}


@workflow(TOOL, "saved as .bin, chosen adapters, another folder for each")
def selected(peft: Any, folder: Path) -> Values:
    model = adapted(peft)
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder, safe_serialization=False, selected_adapters=["default", "third"])
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), folder, adapter_name="other")
    return {"files": _adapter_files(folder), "adapters": list(loaded.peft_config), "out": _out(loaded)}


@workflow(TOOL, "a config of its own, saved, edited and loaded; a kind found by the file")
def configs(peft: Any, folder: Path) -> Values:
    peft.LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2}).save_pretrained(folder)
    config = peft.PeftConfig.from_pretrained(folder)
    config.lora_alpha = 9
    torch.manual_seed(1)
    config.init_lora_weights = False
    model = peft.get_peft_model(tiny.llama(), config)
    ranks = {key: list(each.shape) for key, each in peft.get_peft_model_state_dict(model).items() if "lora_A" in key}
    return {"class": type(config).__name__, "out": _out(model), "ranks": ranks, "alpha": config.to_dict()["lora_alpha"]}


@workflow(TOOL, "another config than the file's")
def other_config(peft: Any, folder: Path) -> Values:
    adapted(peft).save_pretrained(folder)
    config = peft.LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    config.lora_dropout = 0.5
    model = peft.PeftModel.from_pretrained(tiny.llama(), folder, config=config)
    return {"out": _out(model), "dropout": model.peft_config["default"].lora_dropout}


@workflow(TOOL, "AutoPeftModel of each task")
def auto(peft: Any, folder: Path) -> Values:
    found = {}
    for task, kind in (("CAUSAL_LM", "CausalLM"), ("SEQ_CLS", "SequenceClassification")):
        cls = getattr(transformers, f"AutoModelFor{kind}")
        cls.from_config(tiny.llama().config).save_pretrained(folder / f"{task} base")
        base = cls.from_pretrained(folder / f"{task} base")
        adapted(peft, base, task_type=task).save_pretrained(folder / task)
        model = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(folder / task)
        found[task] = [_out(model) == _out(base), type(model.get_base_model()).__name__]
    return found


@workflow(TOOL, "by hand: the config, the base model that it names, the adapter on that")
def by_hand(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted(peft, base).save_pretrained(folder / "adapter")
    config = peft.PeftConfig.from_pretrained(folder / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    head = model.base_model.model.lm_head.weight  # by PEFT's two wrappers
    return {"out": _out(model), "head": head.sum().item(), "task": config.task_type == "CAUSAL_LM"}


@workflow(TOOL, "a model card with the base model, tags and the library")
def card(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted(peft, base).save_pretrained(folder / "adapter")
    head = (folder / "adapter" / "README.md").read_text().split("---")[1]
    lines = [line.replace(str(folder), "") for line in head.splitlines()]
    return {"lines": sorted(line for line in lines if "graphpeft" not in line)}


@workflow(TOOL, "embeddings beside the adapter, after the vocabulary has grown")
def grown(peft: Any, folder: Path) -> Values:
    def base() -> Any:
        model = tiny.llama()
        model.resize_token_embeddings(len(tiny.LETTERS) + 3, mean_resizing=False)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.constant_(table.weight[-3:].data, 0.01)
        return model

    model = adapted(peft, base(), modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(folder / "trained")
    adapted(peft, base()).save_pretrained(folder / "beside", save_embedding_layers=True)
    keys = {name: sorted(peft.load_peft_weights(str(folder / name))) for name in ("trained", "beside")}
    loaded = peft.PeftModel.from_pretrained(base(), folder / "trained")
    return {"keys": keys, "out": _out(loaded)}


@workflow(TOOL, "injected, without a PeftModel: keys, state dicts in and out")
def injected(peft: Any, _: Path) -> Values:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.inject_adapter_in_model(config, tiny.llama())
    state = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(config, tiny.llama(), state_dict=state)
    result = peft.set_peft_model_state_dict(other, state)
    assert _out(other) == _out(model)
    keys = sorted(key.removeprefix("base_model.model.") for key in state)
    return {"keys": keys, "unexpected": result.unexpected_keys, "out": _out(other)}


@workflow(TOOL, "a state dict taken and set, with other names of adapters")
def state_dicts(peft: Any, _: Path) -> Values:
    one, other = adapted(peft), adapted(peft, init_lora_weights=True)
    other.add_adapter("second", other.peft_config["default"])
    found = peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(one), adapter_name="second")
    other.set_adapter("second")
    assert not found.unexpected_keys
    return {"out": _out(other), "same": _out(other) == _out(one)}


@workflow(TOOL, "hot-swapped for another adapter of the same ranks")
def hotswapped(peft: Any, folder: Path) -> Values:
    swap = part(peft, "utils.hotswap.hotswap_adapter")
    adapted(peft).save_pretrained(folder / "one")
    torch.manual_seed(7)
    other = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny.llama(), other).save_pretrained(folder / "other")
    model = peft.PeftModel.from_pretrained(tiny.llama(), folder / "one")
    before = _out(model)
    swap(model, str(folder / "other"), adapter_name="default")
    return {"before": before, "after": _out(model)}


@workflow(TOOL, "low_cpu_mem_usage, torch_device, autocast_adapter_dtype, ephemeral options")
def options(peft: Any, folder: Path) -> Values:
    adapted(peft).save_pretrained(folder)
    given = {"low_cpu_mem_usage": True, "torch_device": "cpu", "autocast_adapter_dtype": False}
    model = peft.PeftModel.from_pretrained(tiny.llama().bfloat16(), folder, **given)
    kinds = {str(each.dtype) for name, each in model.named_parameters() if "lora" in name}
    return {"kinds": sorted(kinds)}


@workflow(TOOL, "a base with other names, mapped by key_mapping")
def key_mapping(peft: Any, folder: Path) -> Values:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = tiny.llama()

        def forward(self, input_ids: Any) -> Any:
            return self.language(input_ids=input_ids)

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.llama(), config)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(Around(), folder, key_mapping={"^model": "language.model"})
    assert _out(loaded) == _out(model)
    return {"out": _out(loaded)}


@workflow(TOOL, "Transformers' from_pretrained of the adapter's folder")
def by_folder(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = adapted(peft, base)
    model.save_pretrained(folder / "adapter")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "adapter")
    assert abs(_out(loaded) - _out(model)) < 1e-3
    return {"out": _out(loaded), "files": sorted(os.listdir(folder / "adapter"))}


@workflow(TOOL, "the base's own state dict, without adapters")
def base_state(peft: Any, _: Path) -> Values:
    model = adapted(peft)
    state = peft.get_base_model_state_dict(model)
    fresh = tiny.llama()
    fresh.load_state_dict(state)
    return {"keys": sorted(state), "out": _out(fresh)}
