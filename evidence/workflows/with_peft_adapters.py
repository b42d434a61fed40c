"""PEFT's own API: several adapters on a model, merged, combined and mixed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch
from trainer_runs import adapted, texts
from workflow import Values, part, workflow

TOOL = "PEFT: several adapters"
TOKENS = torch.arange(3, 12).view(1, 9)


def _two(peft: Any, **options: Any) -> Any:
    """Returns a model with two adapters of different ranks; the first one is active."""
    model = adapted(peft)
    torch.manual_seed(2)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    return model.eval()


def _out(model: Any, **options: Any) -> float:
    with torch.no_grad():
        return model(input_ids=TOKENS, **options).logits.square().sum().item()


@workflow(TOOL, "loaded from folders, switched, disabled, deleted")
def switched(peft: Any, folder: Path) -> Values:
    _two(peft).save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(tiny.llama(), folder)
    model.load_adapter(folder / "second", adapter_name="second")
    found = {"default": _out(model)}
    model.set_adapter("second")
    found["second"] = _out(model)
    with model.disable_adapter():
        found["base"] = _out(model)
    assert found["base"] == _out(tiny.llama())
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert model.active_adapters == ["second"]
    return found | {"after": _out(model)}


@workflow(TOOL, "both active at once (base_model.set_adapter)")
def both(peft: Any, _: Path) -> Values:
    model = _two(peft)
    model.base_model.set_adapter(["default", "second"])
    return {"both": _out(model), "active": model.active_adapters}


@workflow(TOOL, "merged and unmerged, one and several")
def merged(peft: Any, _: Path) -> Values:
    model = _two(peft)
    before = _out(model)
    model.merge_adapter()
    merged = _out(model)
    model.unmerge_adapter()
    assert abs(_out(model) - before) < 1e-3
    model.merge_adapter(["default", "second"])
    several = _out(model)
    model.unmerge_adapter()
    return {"merged": merged, "several": several, "after": _out(model)}


@workflow(TOOL, "merge_and_unload with safe_merge and adapter_names, then saved as a model")
def merge_and_unload(peft: Any, folder: Path) -> Values:
    model = _two(peft).merge_and_unload(progressbar=False, safe_merge=True, adapter_names=["default", "second"])
    model.save_pretrained(folder)
    alone = type(tiny.llama()).from_pretrained(folder)
    assert not any("lora" in name for name, _ in model.named_parameters())
    return {"merged": _out(alone), "keys": sorted(model.state_dict())}


@workflow(TOOL, "unload gives the base back")
def unload(peft: Any, _: Path) -> Values:
    model = _two(peft).unload()
    assert _out(model) == _out(tiny.llama())
    return {"class": type(model).__name__, "keys": sorted(model.state_dict())}


@workflow(TOOL, "adapters for each row of a batch, the base among them")
def rows(peft: Any, _: Path) -> Values:
    model = _two(peft)
    with torch.no_grad():
        names = ["default", "__base__", "second"]
        logits = model(input_ids=TOKENS.expand(3, -1), adapter_names=names).logits
    return {"rows": logits.square().sum((1, 2)).tolist(), "default": _out(model)}


@workflow(TOOL, "the second is trained while both act")
def trained_beside(peft: Any, _: Path) -> Values:
    model = _two(peft)
    model.base_model.set_adapter(["default", "second"])
    for name, each in model.named_parameters():
        each.requires_grad_(".second." in name)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    found = []
    for _step in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return {"losses": found}


@workflow(TOOL, "an adapter for inference stays frozen, one that is_trainable trains on")
def frozen(peft: Any, folder: Path) -> Values:
    adapted(peft).save_pretrained(folder)
    counts = {}
    for is_trainable in (False, True):
        model = peft.PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=is_trainable)
        counts[str(is_trainable)] = [*model.get_nb_trainable_parameters()]
    return counts


@workflow(TOOL, "status of layers and of the model")
def status(peft: Any, _: Path) -> Values:
    model = _two(peft)
    model.merge_adapter(["second"])
    whole = model.get_model_status()
    names = (
        "base_model_type",
        "num_adapter_layers",
        "trainable_params",
        "total_params",
        "enabled",
        "active_adapters",
    )
    names += ("merged_adapters", "available_adapters")
    layers = [[each.module_type, each.merged_adapters] for each in model.get_layer_status()]
    return {"model": {name: getattr(whole, name) for name in names}, "grads": whole.requires_grad, "layers": layers}


@workflow(TOOL, "scales: set by a context, and as generate uses them")
def scaled(peft: Any, _: Path) -> Values:
    rescaled = part(peft, "helpers.rescale_adapter_scale")
    model = _two(peft)
    found = {"before": _out(model)}
    with rescaled(model, 0.3):
        found["scaled"] = _out(model)
    assert _out(model) == found["before"]
    return found


@workflow(TOOL, "a copy has adapters of its own")
def copied(peft: Any, _: Path) -> Values:
    model = _two(peft)
    other = copy.deepcopy(model)
    other.delete_adapter("second")
    other.merge_and_unload()
    return {"of the first": _out(model), "adapters": sorted(model.peft_config)}


@workflow(TOOL, "trained by a loop of one's own, then on CPU in half precision")
def looped(peft: Any, _: Path) -> Values:
    model = _two(peft).train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for row in texts(3).rows:
        model(**{name: value[None] for name, value in row.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"trained": _out(model.eval()), "half": round(_out(model.to(torch.float16).float()), -2)}


def _combined(kind: str, **options: Any) -> Any:
    def combined(peft: Any, _: Path) -> Values:
        model = _two(peft, r=options.pop("rank", 4))
        torch.manual_seed(7)
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "new", combination_type=kind, **options)
        model.set_adapter("new")
        return {"combined": _out(model)}

    return workflow(TOOL, f"add_weighted_adapter: {kind}")(combined)


linear = _combined("linear")
svd = _combined("svd", rank=2, svd_rank=3)
cat = _combined("cat", rank=2)
ties = _combined("ties", density=0.5)
ties_svd = _combined("ties_svd", rank=2, svd_rank=4, density=0.5, majority_sign_method="frequency")
dare_linear = _combined("dare_linear", density=0.5)
dare_ties = _combined("dare_ties", density=0.5)
magnitude_prune = _combined("magnitude_prune", density=0.5)
