"""Bases that bitsandbytes or torchao has quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from loops import adapted, close, fit, trained
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from workflow import Values, workflow

IDS = torch.arange(3, 17).reshape(2, 7)
ALL = ("q_proj", "v_proj", "up_proj", "down_proj")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}
LOFTQ = "PEFT's needs an NVIDIA GPU"


@workflow("bitsandbytes", "nf4: prepared for k-bit training, adapted, trained, saved, loaded")
def nf4(peft: Any, folder: Path) -> Values:
    return _trained_saved_and_loaded(peft, folder, NF4)


@workflow("bitsandbytes", "fp4: the same")
def fp4(peft: Any, folder: Path) -> Values:
    return _trained_saved_and_loaded(peft, folder, FP4)


@workflow("bitsandbytes", "int8: the same")
def int8(peft: Any, folder: Path) -> Values:
    return _trained_saved_and_loaded(peft, folder, INT8)


@workflow("bitsandbytes", "nf4 with gradient checkpointing, all linear layers and a head that is trained")
def checkpointing(peft: Any, folder: Path) -> Values:
    base = peft.prepare_model_for_kbit_training(_bnb(folder, NF4), use_gradient_checkpointing=True)
    model = adapted(peft, base, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model.config.use_cache = False
    counts = model.get_nb_trainable_parameters()
    return {"losses": fit(model.train(), lambda: _loss(model)), "counts": list(counts)}


@workflow("bitsandbytes", "nf4 with DoRA")
def dora(peft: Any, folder: Path) -> Values:
    base = peft.prepare_model_for_kbit_training(_bnb(folder, NF4), use_gradient_checkpointing=False)
    model = adapted(peft, base, *ALL, use_dora=True, task_type="CAUSAL_LM")
    return {"losses": fit(model, lambda: _loss(model))}


@workflow("bitsandbytes", "nf4: merge_and_unload, and the merged model is saved and loaded")
def merged_nf4(peft: Any, folder: Path) -> Values:
    merged = adapted(peft, _bnb(folder / "base", NF4), *ALL).eval().merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, Linear4bit)
    merged.save_pretrained(str(folder / "merged"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "merged"))
    close(_logits(_unpacked(loaded)), _logits(merged))
    return _summed(merged)


@workflow("bitsandbytes", "fp4: merge_adapter, unmerge_adapter")
def merged_fp4(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _bnb(folder, FP4), *ALL).eval()
    model.merge_adapter()
    merged = _logits(model).square().sum().item()
    model.unmerge_adapter()
    return {"merged": merged}


@workflow("bitsandbytes", "int8: merge_and_unload")
def merged_int8(peft: Any, folder: Path) -> Values:
    merged = adapted(peft, _bnb(folder, INT8), *ALL).eval().merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, Linear8bitLt)
    return _summed(merged)


@workflow("bitsandbytes", "nf4 with two adapters: one is trained, the other unchanged; switched, disabled, deleted")
def two_adapters(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _bnb(folder, NF4), *ALL)
    torch.manual_seed(8)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    first = _logits(model)
    model.set_adapter("other")
    losses = fit(model, lambda: _loss(model))
    other = _logits(model)
    model.set_adapter("default")
    close(_logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    close(_logits(model), other)
    with model.disable_adapter():
        base = _logits(model)
    return {"losses": losses, "base": base.square().sum().item()}


@workflow("bitsandbytes", "nf4 with the Trainer, whose checkpoint is loaded onto the base anew")
def trainer(peft: Any, folder: Path) -> Values:
    base = peft.prepare_model_for_kbit_training(_bnb(folder / "base", NF4))
    model = adapted(peft, base, *ALL, task_type="CAUSAL_LM")
    arguments = transformers.TrainingArguments(
        str(folder / "run"), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1
    )
    rows: Any = [{name: torch.arange(6) + start for name in ("input_ids", "labels")} for start in range(3, 19)]
    found = transformers.Trainer(model, arguments, train_dataset=rows)
    found.train()
    found.save_model(str(folder / "adapter"))
    base = peft.prepare_model_for_kbit_training(_bnb(folder / "again", NF4))
    loaded = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
    close(_logits(loaded.eval()), _logits(model.eval()), 1e-2)
    return {"losses": [entry["loss"] for entry in found.state.log_history if "loss" in entry]}


@workflow("bitsandbytes", "LoftQ of a float base, which becomes an adapter and a rounded base", apart=LOFTQ)
def loftq(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    options = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=2)}
    model = peft.get_peft_model(_wide(), peft.LoraConfig(r=4, target_modules=list(ALL), **options))
    return {"losses": fit(model, lambda: _loss(model)), **_summed(model)}


@workflow("bitsandbytes", "replace_lora_weights_loftq on an nf4 base takes up what was rounded away", apart=LOFTQ)
def loftq_afterwards(peft: Any, folder: Path) -> Values:
    base = _bnb(folder, NF4)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = (_logits(model) - _logits(_wide())).square().mean().item()
    peft.replace_lora_weights_loftq(model, str(next(folder.glob("*.safetensors"))))
    after = (_logits(model) - _logits(_wide())).square().mean().item()
    assert after < before
    return {"before": before, "after": after}


@workflow("torchao", "int8 weights: adapted, trained, saved, loaded")
def torchao_int8(peft: Any, folder: Path) -> Values:
    return _trained_by_torchao(peft, folder, Int8WeightOnlyConfig())


@workflow("torchao", "int4 weights in groups: the same")
def torchao_int4(peft: Any, folder: Path) -> Values:
    return _trained_by_torchao(peft, folder, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))  # type: ignore[attr-defined]


@workflow("torchao", "float8 weights: the same")
def torchao_float8(peft: Any, folder: Path) -> Values:
    return _trained_by_torchao(peft, folder, Float8WeightOnlyConfig())


@workflow("torchao", "int8 weights: merge_and_unload")
def torchao_merged(peft: Any, folder: Path) -> Values:
    model = adapted(peft, _torchao(folder, Int8WeightOnlyConfig()), *ALL).eval()
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    return _summed(merged)


def _wide() -> Any:
    return tiny.llama(hidden_size=64, intermediate_size=128).eval()


def _bnb(folder: Path, options: dict[str, Any]) -> Any:
    return _unpacked(_quantised(folder, transformers.BitsAndBytesConfig(**options)))


def _torchao(folder: Path, kind: Any) -> Any:
    return _quantised(folder, transformers.TorchAoConfig(kind))


def _quantised(folder: Path, config: Any) -> Any:
    _wide().save_pretrained(str(folder))
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=config).eval()


def _unpacked(model: Any) -> Any:
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # else some CPUs pack 4 bits anew in the first evaluation, and give no gradients from then on
            vars(layer)["support_avx512bf16_for_cpu"] = False
    return model


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _loss(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def _summed(model: Any) -> Values:
    return {"logits": _logits(model).square().sum().item()}


def _trained_saved_and_loaded(peft: Any, folder: Path, options: dict[str, Any]) -> Values:
    def prepared(place: str) -> Any:
        base = _bnb(folder / place, options)
        return peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)

    model = adapted(peft, prepared("base"), *ALL, task_type="CAUSAL_LM")
    losses = fit(model, lambda: _loss(model))
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    model.save_pretrained(str(folder / "adapter"))
    loaded = peft.PeftModel.from_pretrained(prepared("again"), str(folder / "adapter"))
    close(_logits(loaded), _logits(model), 1e-2)
    return {"losses": losses, **_summed(model)}


def _trained_by_torchao(peft: Any, folder: Path, kind: Any) -> Values:
    model = adapted(peft, _torchao(folder / "base", kind), *ALL, task_type="CAUSAL_LM")
    losses = fit(model, lambda: _loss(model))
    model.save_pretrained(str(folder / "adapter"))
    loaded = peft.PeftModel.from_pretrained(_torchao(folder / "again", kind), str(folder / "adapter"))
    close(_logits(loaded), _logits(model), 1e-3)
    return {"losses": losses}
