"""Shadow: a small model runs beside the layers of a large one, and what it says is put into each of them."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from models import GPT2, LLAMA, Example, llama_config
from oracle import assert_close
from processes import run_in_two_processes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache

import graphpeft
from graphpeft import (
    AdaptError,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftModel,
    ShadowConfig,
    TaskType,
    export,
    get_peft_model,
)
from graphpeft.testing import assert_copies_stay_adapted, assert_two_adapters_act_together, laws

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}")
    # of PEFT, which passes the cache by its former name; and of PyTorch, of a state that goes from one graph to another
    for begins in (
        "Could not find a config file in",
        "`past_key_values` is deprecated",
        "The .grad attribute of a Tensor",
    )
]

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])

OPTIONS: dict[str, tuple[Example, dict[str, Any]]] = {
    "default": (LLAMA, {}),
    "own embeddings": (LLAMA, {"share_embeddings": False}),
    "other sizes": (
        LLAMA,
        {
            "shadow_hidden_size": 8,
            "shadow_num_attention_heads": 4,
            "shadow_intermediate_size": 10,
            "shadow_num_hidden_layers": 2,
            "update_hidden_size": 5,
        },
    ),
    "one layer": (LLAMA, {"target_modules": ["layers.1"]}),
    "GPT-2": (GPT2, {}),
    "drawn": (LLAMA, {"init_weights": False, "shadow_dropout": 0.4, "shadow_alpha": 0.7}),
}
each_option = pytest.mark.parametrize(("example", "options"), OPTIONS.values(), ids=OPTIONS)


def fresh(library: Any, example: Example = LLAMA, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = example.build().to(dtype)
    torch.manual_seed(3)
    given = {"task_type": "CAUSAL_LM", "r": 3} | options
    return library.get_peft_model(base, library.ShadowConfig(**given))


def saved(folder: Path, example: Example = LLAMA, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Saves an adapter of PEFT's whose values all differ from those with which it begins."""
    fresh(peft, example, dtype, **options).save_pretrained(str(folder))
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(1)
    tensors = load_file(file)
    save_file({key: (torch.randn(t.shape, generator=generator) * 0.4).to(t.dtype) for key, t in tensors.items()}, file)
    return folder


def loaded(library: Any, folder: Path, example: Example = LLAMA, dtype: torch.dtype = torch.float32) -> Any:
    model = library.PeftModel.from_pretrained(example.build().to(dtype), str(folder), is_trainable=True)
    return model.eval()


def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    return loaded(graphpeft, saved(tmp_path / "saved"))


def frozen(model: Any) -> int:
    """Returns the number of elements of the networks behind the last layer, and of a table that nothing reads."""
    parts = ("shadow_transform_", "shadow_gate_", "backbone_wte")
    named = [(n, p) for n, p in model.named_parameters() if any(part in n for part in parts)]
    return sum(parameter.numel() for _, parameter in named if not parameter.requires_grad)


# PEFT's numbers and files


@each_option
def test_outputs_losses_gradients_and_files_are_pefts(
    example: Example, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "theirs", example, **options)
    model, other = loaded(graphpeft, folder, example), loaded(peft, folder, example)
    for inputs in ({}, {"attention_mask": MASK}):
        assert_close(logits(model, **inputs), logits(other, **inputs))
    assert (logits(model) - logits(example.build())).abs().max() > 1e-2
    losses = [each(input_ids=IDS, labels=IDS).loss for each in (model, other)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    sums = [
        sorted(float(p.grad.abs().sum()) for p in each.parameters() if p.grad is not None) for each in (model, other)
    ]
    torch.testing.assert_close(torch.tensor(sums[0]), torch.tensor(sums[1]))
    model.save_pretrained(tmp_path / "ours")
    again, first = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "ours", folder))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) and again[key].dtype == first[key].dtype for key in first)
    assert_close(logits(loaded(peft, tmp_path / "ours", example)), logits(model))


@each_option
def test_equal_seeds_give_pefts_values_and_then_equal_numbers(
    example: Example, options: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for library in (peft, graphpeft):
        model = fresh(library, example, **options)
        trained, every = model.get_nb_trainable_parameters()
        found.append((torch.rand(2), torch.tensor([trained + frozen(model), every])))
        model.save_pretrained(str(tmp_path / library.__name__))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    theirs, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "graphpeft"))
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[key], own[key]) for key in theirs)


def test_a_base_in_half_precision_has_pefts_values_and_outputs(tmp_path: Path) -> None:
    for library in (peft, graphpeft):
        fresh(library, dtype=torch.bfloat16).save_pretrained(str(tmp_path / library.__name__))
    theirs, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "graphpeft"))
    assert {key: t.dtype for key, t in theirs.items()} == {key: t.dtype for key, t in own.items()}
    assert all(torch.equal(theirs[key], own[key]) for key in theirs)
    folder = saved(tmp_path / "moved", dtype=torch.bfloat16)
    models = [loaded(library, folder, dtype=torch.bfloat16) for library in (peft, graphpeft)]
    torch.testing.assert_close(*map(logits, models), atol=2e-2, rtol=1e-2)


def test_training_draws_as_peft_does(tmp_path: Path) -> None:
    folder = saved(tmp_path, shadow_dropout=0.5)
    found = []
    for library in (peft, graphpeft):
        model = loaded(library, folder).train()
        torch.manual_seed(2)
        found.append((logits(model), torch.rand(2)))
    assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_generated_tokens_are_those_of_whole_sequences_which_pefts_with_a_cache_are_not_always(
    ours: Any, tmp_path: Path
) -> None:
    other = loaded(peft, tmp_path / "saved")
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    found = ours.generate(IDS, **given)
    assert torch.equal(found, other.generate(input_ids=IDS, use_cache=False, **given))
    by_hand = IDS
    for _ in range(6):
        by_hand = torch.cat([by_hand, logits(ours, by_hand)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, by_hand)


# with a cache


@pytest.mark.parametrize("example", [LLAMA, GPT2], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2}])
def test_a_cache_gives_the_tokens_of_whole_sequences(example: Example, options: dict[str, Any], tmp_path: Path) -> None:
    model = loaded(graphpeft, saved(tmp_path / "one", example), example)
    model.load_adapter(saved(tmp_path / "two", example, shadow_num_hidden_layers=2), "second")
    ids, mask = (IDS[:1], MASK[1:]) if "prompt_lookup_num_tokens" in options else (IDS, MASK)
    for names in ("default", "second", ["default", "second"]):
        model.set_adapter(names)
        given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
        whole = {name: value for name, value in given.items() if name != "prompt_lookup_num_tokens"}
        assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **whole))


@pytest.mark.parametrize("is_set", [False, True])
def test_a_cache_without_room_for_the_small_model_is_not_kept(is_set: bool, ours: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = ours.generate(IDS, use_cache=False, **options)
    assert torch.equal(ours.generate(IDS, cache_implementation="dynamic", **options), expected)
    if is_set:
        ours.generation_config.cache_implementation = "static"
    else:
        options["cache_implementation"] = "static"
    assert torch.equal(ours.generate(IDS, **options), expected)


@pytest.mark.parametrize("config", ["of the model", None])
def test_calls_go_on_from_a_cache(config: Any, ours: Any) -> None:
    whole = logits(ours)
    cache = DynamicCache(config=ours.config) if config else DynamicCache()
    parts = [ours(input_ids=IDS[:, a:b], past_key_values=cache).logits for a, b in ((0, 3), (3, 4), (4, 6))]
    assert_close(torch.cat(parts, dim=1), whole, 1e-5)
    assert cache.get_seq_length() == 6
    with ours.disable_adapter():
        ours(input_ids=IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="a cache that it hasn't seen; give an empty DynamicCache"):
        ours(input_ids=IDS[:, :1], past_key_values=cache)


# classification


CLASSIFIED: dict[str, tuple[int, Tensor]] = {
    "classes": (3, torch.tensor([2, 0])),
    "a number": (1, torch.tensor([0.3, -1.0])),
    "several": (4, torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])),
}


def classifying(count: int) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(llama_config(num_labels=count, pad_token_id=0)).eval()


@pytest.mark.parametrize(("count", "labels"), CLASSIFIED.values(), ids=CLASSIFIED)
def test_a_classifier_has_pefts_values_losses_gradients_and_files(count: int, labels: Tensor, tmp_path: Path) -> None:
    folders = {}
    for library in (peft, graphpeft):
        torch.manual_seed(3)
        model = library.get_peft_model(classifying(count), library.ShadowConfig(task_type="SEQ_CLS", r=3))
        folders[library] = tmp_path / library.__name__
        model.save_pretrained(str(folders[library]))
    theirs, own = (load_file(folder / "adapter_model.safetensors") for folder in folders.values())
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[key], own[key]) for key in theirs)
    file = folders[peft] / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file({key: torch.randn(tensor.shape, generator=generator) * 0.4 for key, tensor in theirs.items()}, file)
    found = []
    for library in (peft, graphpeft):
        model = library.PeftModel.from_pretrained(classifying(count), str(folders[peft]), is_trainable=True).eval()
        for mask in (MASK, MASK.flip(1), None):
            output = model(input_ids=IDS, attention_mask=mask, labels=labels)
            output.loss.backward()
            sums = sorted(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
            found.append((output.loss, output.logits, torch.tensor(sums)))
    for ours, other in zip(found[3:], found[:3], strict=True):
        for one, expected in zip(ours, other, strict=True):
            torch.testing.assert_close(one, expected)
    model.save_pretrained(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in again.items()} == {key: t.shape for key, t in theirs.items()}


def test_a_classifier_of_several_layers_is_refused() -> None:
    model = classifying(2)
    model.score = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 2))
    with pytest.raises(AdaptError, match="the classifier of LlamaForSequenceClassification is a Sequential"):
        get_peft_model(model, ShadowConfig(task_type=TaskType.SEQ_CLS))


# in two processes


def trained_in_parts() -> None:
    """Trains on a half of the rows in each process, and compares with a training on all."""
    alone = fresh(graphpeft, init_weights=False, shadow_dropout=0.0).train()
    model = fresh(graphpeft, init_weights=False, shadow_dropout=0.0).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for wrapper, rows in ((DistributedDataParallel(model), IDS.chunk(2)[dist.get_rank()]), (alone, IDS)):
        optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            wrapper(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="there is no gloo")
def test_two_processes_train_without_a_search_for_unused_parameters() -> None:
    run_in_two_processes({"DistributedDataParallel": trained_in_parts})


# calls


def test_a_call_may_fill_a_cache_and_none_goes_on_from_one(ours: Any) -> None:
    found = ours(input_ids=IDS, use_cache=True)
    assert_close(found.logits, logits(ours, use_cache=False))
    with pytest.raises(ValueError, match="needs all tokens, and this call goes on from those in a cache"):
        ours(input_ids=IDS[:, :1], past_key_values=found.past_key_values)
    assert_close(logits(ours), ours(inputs_embeds=ours.get_input_embeddings()(IDS)).logits)
    with pytest.raises(ValueError, match="pass one of them"):
        ours()


def test_the_small_models_loss_is_a_part_of_the_loss(tmp_path: Path) -> None:
    weights = (0.0, 0.05, 1.0)
    found = []
    for weight in weights:
        folder = saved(tmp_path / str(weight), auxiliary_loss_weight=weight)
        found.append(loaded(graphpeft, folder)(input_ids=IDS, labels=IDS).loss)
    torch.testing.assert_close(found[1], found[0] + 0.05 * (found[2] - found[0]))
    assert found[2] > found[0] + 1
    inference = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "1.0")
    assert_close(inference(input_ids=IDS, labels=IDS).loss, found[0])


def test_checkpoints_copies_and_compiled_code_give_the_same(ours: Any) -> None:
    expected = logits(ours)
    ours(input_ids=IDS, labels=IDS)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(logits(copied), expected)
    assert_close(torch.compile(ours, backend="aot_eager")(input_ids=IDS).logits, expected)

    def gradients() -> list[Tensor]:
        ours.zero_grad()
        torch.manual_seed(0)
        ours(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None]

    ours.train()
    plain = gradients()
    ours.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(plain) == len(checkpointed) > 20
    for own, other in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(own, other)


def test_threads_and_copies_share_no_values(ours: Any) -> None:
    other = copy.deepcopy(ours)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    calls = [(model, IDS[:, :length]) for length in range(2, 7) for model in (ours, other)] * 3
    expected = [logits(model, ids) for model, ids in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: logits(*call), calls))
    for own, alone in zip(found, expected, strict=True):
        assert torch.equal(own, alone)


def test_other_adapters_act_beside_it(ours: Any) -> None:
    alone = logits(ours)
    ours.add_adapter("second", ShadowConfig(task_type=TaskType.CAUSAL_LM, r=2, init_weights=False))
    ours.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ours.base_model.set_adapter(["default", "second", "lora"])
    assert (logits(ours) - alone).abs().max() > 1e-2
    ours.set_adapter("default")
    assert torch.equal(logits(ours), alone)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(LLAMA.build()))
    with pytest.raises(AdaptError, match="can't be merged"):
        ours.merge_adapter()
    assert torch.equal(logits(ours.unload()), logits(LLAMA.build()))


# the laws, and what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("example", [LLAMA, GPT2], ids=str)
def test_the_laws_hold(example: Example, dtype: torch.dtype) -> None:
    for law in (
        laws.assert_fresh_adapter_changes_no_output,
        laws.assert_only_the_adapter_is_trained,
        laws.assert_adapted_is_base_with_delta,
        laws.assert_saved_is_loaded,
        laws.assert_dry_runs_change_nothing,
        assert_copies_stay_adapted,
        assert_two_adapters_act_together,
    ):
        law(
            lambda: example.build().to(dtype),
            ShadowConfig(task_type=TaskType.CAUSAL_LM, r=3),
            {"input_ids": IDS, "use_cache": False},
        )


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_file_of_the_model_has_the_small_one_in_it(format: str, ours: Any, tmp_path: Path) -> None:
    inputs = {"input_ids": IDS, "use_cache": False, "return_dict": False}
    export(ours, inputs, tmp_path / f"model.{format}", format=format, adapters="baked")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a checkpoint": ({"shadow_model": "some/model"}, "a model from a checkpoint, which isn't supported"),
    "another task": ({"task_type": "SEQ_2_SEQ_LM"}, "for CAUSAL_LM and SEQ_CLS"),
    "other modules": ({"target_modules": ["q_proj"]}, r"none of the layers in model\.layers"),
    "a pattern with indices": (
        {"target_modules": r".*layers\.\d", "layers_to_transform": [0]},
        "layers_to_transform is",
    ),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdaptError, match=reason):
        fresh(graphpeft, **options)


def test_models_and_calls_that_cannot_be_are_refused(ours: Any) -> None:
    with pytest.raises(AdaptError, match="Linear is none"):
        get_peft_model(nn.Linear(2, 2), ShadowConfig())
    with pytest.raises(NoMatchingPeftModuleError):
        fresh(graphpeft, target_modules=["nothing"])
    with pytest.raises(TypeError, match="shadow_states in each call"):
        ours.get_decoder()(IDS)
    with pytest.raises(AdaptError, match="can't be one of several"):
        logits(ours, adapter_names=["default", "__base__"])
