"""Adapted models and configs are instances of PEFT's classes where PEFT is loaded, and inherit nothing from these."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.utils import is_peft_model
from models import CLASSIFIER, LLAMA, MLP, output
from torch import nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, TaskType, get_peft_model
from graphpeft.model.other_names import OtherNames
from graphpeft.rules.registry import registered

pytestmark = pytest.mark.quick("model", "peft_classes")

TASKS = {None: "PeftModel"} | {task: peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__ for task in TaskType}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_model_is_one_of_pefts_class_for_its_task_and_of_its_own(task: TaskType | None) -> None:
    model: Any = MLP.build()
    cls = type(model)
    model.can_generate, model.prepare_inputs_for_generation = (lambda: False), None
    get_peft_model(model, LoraConfig(target_modules=["up"], task_type=task))
    assert isinstance(model, getattr(peft, TASKS[task]))
    assert isinstance(model, peft.PeftModel)
    others = {"PeftModelForCausalLM", "PeftModelForSeq2SeqLM"} - {TASKS[task]}
    assert not any(isinstance(model, getattr(peft, other)) for other in others)
    assert isinstance(model, cls)
    assert isinstance(model, graphpeft.PeftModel)
    assert issubclass(model.__class__, cls)


def test_libraries_that_ask_see_a_model_of_pefts() -> None:
    model = get_peft_model(LLAMA.build(), LLAMA.config())
    assert is_peft_model(model)
    assert transformers.trainer_utils._is_peft_model(model)
    assert not is_peft_model(model.unload())


@pytest.mark.parametrize("method", [method for method in registered() if not method.startswith("GRAPHPEFT")])
def test_a_config_is_one_of_pefts_for_its_method(method: Any) -> None:
    config = object.__new__(registered()[method])
    assert isinstance(config, peft.PeftConfig) == (method in list(peft.PeftType))
    if method in list(peft.PeftType):
        assert isinstance(config, peft.PEFT_TYPE_TO_CONFIG_MAPPING[method])
        others = [cls for name, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items() if name != method]
        assert sum(isinstance(config, cls) for cls in others) <= 1  # one of PEFT's may be a base of another one


def test_a_method_of_ones_own_has_a_config_of_pefts_but_of_none_of_its_methods() -> None:
    config = graphpeft.LoraPerCallConfig(target_modules=["0"])
    assert isinstance(config, peft.PeftConfig)
    assert not isinstance(config, peft.LoraConfig)


def test_nothing_is_inherited_from_peft() -> None:
    model = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    config = LoraConfig(target_modules=["up"])
    for name in set(dir(peft.PeftModel)) - set(dir(graphpeft.PeftModel)) - set(dir(OtherNames)):
        assert not hasattr(model, name), name
    for name in ("forward", "__call__", "save_pretrained", "named_parameters", "__getattr__"):
        assert getattr(type(model), name) is not getattr(peft.PeftModel, name) or name in dir(nn.Module())
    assert not hasattr(config, "runtime_config")


def test_a_config_that_is_given_to_peft_says_what_to_pass() -> None:
    config: Any = LoraConfig(target_modules=["0"])
    with pytest.raises(AttributeError, match=r"LoraConfig has no attribute .*graphpeft\.get_peft_model"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)


def test_copies_pickles_and_other_objects_of_a_class_are_of_the_type() -> None:
    config = LoraConfig(r=3, target_modules=["up"])
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert type(other) is LoraConfig
        assert other == config
    assert type(config.__class__(r=5)) is LoraConfig
    model: Any = get_peft_model(MLP.build(), config)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, peft.PeftModel)
        assert torch.equal(output(other, MLP.inputs()), output(model, MLP.inputs()))
    assert type(model.__class__()) is type(MLP.build())


def test_a_class_that_others_derive_from_a_models_computes_as_before() -> None:
    model: Any = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"], init_lora_weights=False))
    expected = output(model, MLP.inputs())

    class Sharded:
        """As ``fully_shard`` exchanges a module's class for one that derives from it and from a class of its own."""

    model.__class__ = type("ShardedModel", (Sharded, model.__class__), {})
    assert isinstance(model, Sharded)
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(output(model, MLP.inputs()), expected)


def test_peft_is_never_imported_and_may_be_loaded_later() -> None:
    code = """
import sys
from torch import nn
from graphpeft import LoraConfig, get_peft_model
config = LoraConfig(target_modules=["0"])
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
assert model.__class__ is type(model) and config.__class__ is type(config)
assert not isinstance(model, str)
assert "peft" not in sys.modules
import peft
assert isinstance(model, peft.PeftModel) and isinstance(config, peft.LoraConfig)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# adapters that are loaded again


def test_an_adapter_is_loaded_again_in_place(tmp_path: Any) -> None:
    model: Any = get_peft_model(CLASSIFIER.build(), LoraConfig(target_modules=["query"], task_type=TaskType.SEQ_CLS))
    model.save_pretrained(tmp_path)
    expected = output(model.eval(), CLASSIFIER.inputs())
    before = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert not torch.equal(output(model, CLASSIFIER.inputs()), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output(model, CLASSIFIER.inputs()), expected)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 5}, {"r": 3}, {"target_modules": ["up", "down"]}, {"use_dora": True}]
)
def test_another_adapter_is_not_loaded_in_the_place_of_one(options: dict[str, Any], tmp_path: Any) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["up"]}
    get_peft_model(MLP.build(), LoraConfig(**settings | options)).save_pretrained(tmp_path)
    model: Any = get_peft_model(MLP.build(), LoraConfig(**settings))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdaptError, match=r"with other options than those of .*hotswap_adapter"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_merged_adapter_is_not_loaded_again(tmp_path: Any) -> None:
    model: Any = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(AdaptError, match="'default' is merged"):
        model.load_adapter(tmp_path, "default")


def test_options_that_must_be_false_are_refused_when_an_adapter_is_loaded_again(tmp_path: Any) -> None:
    model: Any = get_peft_model(MLP.build(), LoraConfig(target_modules=["up"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ephemeral_gpu_offload"):
        model.load_adapter(tmp_path, "default", ephemeral_gpu_offload=True)


# Transformers' Trainer and a model of one's own


class Own(nn.Module):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.b(torch.tanh(self.a(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def own(library: Any) -> Any:
    torch.manual_seed(0)
    base = Own()
    torch.manual_seed(1)
    config = library.LoraConfig(r=3, lora_alpha=5, target_modules=["a"], modules_to_save=["b"])
    return library.get_peft_model(base, config)


def trainer_of(model: Any, folder: Any) -> transformers.Trainer:
    chance = torch.Generator().manual_seed(0)
    rows: Any = [{"x": torch.randn(8, generator=chance), "labels": torch.tensor(row % 3)} for row in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        logging_steps=1,
        learning_rate=0.05,
        load_best_model_at_end=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=3,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.filterwarnings("ignore:::peft")
def test_a_trainer_saves_resumes_and_evaluates_a_model_of_ones_own_as_pefts(tmp_path: Any) -> None:
    losses = {}
    for library in (peft, graphpeft):
        folder = tmp_path / library.__name__
        trainer = trainer_of(own(library), folder)
        trainer.train()
        resumed = trainer_of(own(library), tmp_path / f"{library.__name__} again")
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        losses[library] = [
            [entry.get("loss", entry.get("eval_loss")) for entry in each.state.log_history]
            for each in (trainer, resumed)
        ]
        assert losses[library][0] == losses[library][1]
    torch.testing.assert_close(losses[peft][0][:-1], losses[graphpeft][0][:-1], rtol=1e-5, atol=1e-6)
    checkpoint = tmp_path / "graphpeft" / "checkpoint-4"
    loaded = peft.PeftModel.from_pretrained(Own(), str(checkpoint))
    names = {name.replace("base_model.model.", "") for name in peft.get_peft_model_state_dict(loaded)}
    assert names == {"a.lora_A.weight", "a.lora_B.weight", "b.weight", "b.bias"}
    for file in checkpoint.glob("*.safetensors"):
        assert file.stat().st_size == (checkpoint / "adapter_model.safetensors").stat().st_size
