"""Adapted models in two processes: trained, switched, merged, saved and loaded, they are what they are in one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from processes import (
    BATCH,
    CONFIGS,
    Block,
    Model,
    adapted,
    base,
    close,
    mean,
    refuses,
    rows,
    run_in_two_processes,
    train,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from graphpeft import (
    AdaptError,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("there is no gloo", allow_module_level=True)


# fully_shard


def sharded(model: Any, how: str = "blocks", **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    layers = [layer for block in model.blocks for layer in (block.up, block.down)]
    inner: dict[str, Any] = {"layers": layers, "blocks": model.blocks, "root": []}
    for module in (*inner[how], model):
        fully_shard(module, mesh=mesh, **options)
    return model


def reshard(model: nn.Module) -> None:
    """Lets a model have its sharded parameters again, which an optimizer has to get, after a forward alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_fully_shard(options: dict[str, Any], how: str) -> None:
    alone, model = adapted(options), sharded(adapted(options), how)
    close(mean(train(model, rows())), torch.tensor(train(alone, BATCH)))
    close(model(BATCH), alone(BATCH))
    for each in (model, alone):
        with each.disable_adapter():
            close(each(BATCH), base()(BATCH))
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))
    expected = alone(BATCH)
    model.save_pretrained("adapter", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    close(PeftModel.from_pretrained(base(), "adapter")(BATCH), expected)
    model.merge_adapter()
    close(model(BATCH), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_close(model(BATCH), base()(BATCH))
    reshard(model)
    close(mean(train(model, rows())), torch.tensor(train(alone, BATCH)))
    close(model.merge_and_unload()(BATCH), alone.merge_and_unload()(BATCH))


def check_unload() -> None:
    alone, model = adapted(CONFIGS["modules_to_save"]), sharded(adapted(CONFIGS["modules_to_save"]))
    train(model, rows())
    train(alone, BATCH)
    close(model.unload()(BATCH), alone.unload()(BATCH))
    close(get_model_state_dict(model, options=FULL), dict(alone.state_dict()))


FULL = StateDictOptions(full_state_dict=True)


def check_policies(**options: Any) -> None:
    alone, model = adapted({}), sharded(adapted({}), **options)
    losses = mean(train(model, rows()))
    torch.testing.assert_close(losses, torch.tensor(train(alone, BATCH)), rtol=0.1, atol=0.01)
    assert {value.dtype for value in get_peft_model_state_dict(model).values()} == {torch.float32}
    expected = model(BATCH)
    torch.testing.assert_close(model.merge_and_unload()(BATCH), expected, rtol=0.1, atol=0.02)


def check_two_adapters() -> None:
    alone, model = adapted({}), adapted({})
    for each in (alone, model):
        torch.manual_seed(5)
        config = LoraConfig(r=2, lora_alpha=9, target_modules=["head"], init_lora_weights=False)
        each.add_adapter("other", config)
    sharded(model, "layers")
    for active in ("other", ["default", "other"], "default"):
        for each, x in ((alone, BATCH), (model, rows())):
            each.set_adapter(active)
            each.zero_grad()
            each(x).square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        close({name: gradient.full_tensor() for name, gradient in gradients.items()}, expected)
    names = ["other", "default", "__base__", "other"]
    close(model(BATCH, adapter_names=names), alone(BATCH, adapter_names=names))
    for each in (alone, model):
        each.delete_adapter("other")
    close(model(BATCH), alone(BATCH))


def check_values_are_set() -> None:
    alone, model = adapted({}), sharded(adapted({}))
    train(alone, BATCH)
    model(BATCH)
    set_peft_model_state_dict(model, get_peft_model_state_dict(alone))
    close(model(BATCH), alone(BATCH))
    reshard(model)
    close(mean(train(model, rows())), torch.tensor(train(alone, BATCH)))


def check_pefts_functions_set_values() -> None:
    import peft

    alone, model = adapted({}), sharded(adapted({}))
    train(alone, BATCH)
    values = peft.get_peft_model_state_dict(alone)
    peft.set_peft_model_state_dict(model, values)
    close(peft.get_peft_model_state_dict(model), values)
    close(mean(train(model, rows())), torch.tensor(train(alone, BATCH)))


def check_a_base_that_is_sharded() -> None:
    alone = adapted({})
    alone.save_pretrained(f"of {dist.get_rank()}")
    refuses("was sharded before adapter 'default' came", lambda: adapted({}, sharded(base())))
    for how in ("layers", "root"):
        model = PeftModel.from_pretrained(sharded(base(), how), f"of {dist.get_rank()}")
        close(model(BATCH), alone(BATCH))
        with model.disable_adapter():
            assert_close(model(BATCH), base()(BATCH))
        refuses("was sharded before adapter 'default' came", lambda model=model: model.set_adapter("default"))
        model.merge_adapter()
        close(model(BATCH), alone(BATCH))
        assert_close(model.unload()(BATCH), base()(BATCH))
        assert isinstance(model, FSDPModule)


def check_a_base_without_values() -> None:
    alone = adapted({})
    alone.save_pretrained(f"of {dist.get_rank()}")
    with torch.device("meta"):
        loaded = PeftModel.from_pretrained(Model(), f"of {dist.get_rank()}")
        model = sharded(adapted({}, Model()))
    loaded.load_state_dict(base().state_dict(), strict=False, assign=True)
    close(loaded(BATCH), alone(BATCH))
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, alone.state_dict(), options=options)
    close(model(BATCH), alone(BATCH))


def check_distributed_checkpoint() -> None:
    alone, model, other = adapted({}), sharded(adapted({})), sharded(adapted({}), "root")
    train(alone, BATCH)
    train(model, rows())
    save(get_model_state_dict(model), checkpoint_id="distributed")
    state_dict = get_model_state_dict(other)
    load(state_dict, checkpoint_id="distributed")
    set_model_state_dict(other, state_dict)
    close(other(BATCH), alone(BATCH))
    close(get_peft_model_state_dict(model, get_model_state_dict(model)), get_peft_model_state_dict(alone))
    full = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        close(get_peft_model_state_dict(model, full), get_peft_model_state_dict(alone))


class Words(nn.Module):
    """Reads its input at a table's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def check_trained_rows(how: str) -> None:
    torch.manual_seed(0)
    plain = Words()
    alone, model = (
        adapted({"target_modules": ["head"], "trainable_token_indices": {"table": [1, 4, 6]}}, copy.deepcopy(plain))
        for _ in range(2)
    )
    words = torch.tensor([[1, 2, 4], [6, 6, 0], [3, 4, 5], [7, 1, 1]])
    own = words.chunk(dist.get_world_size())[dist.get_rank()]
    for module in ([model.table] if how == "table" else []) + [model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    close(mean(train(model, own)), torch.tensor(train(alone, words)))
    close(model(words), alone(words))
    with model.disable_adapter():
        close(model(words), plain(words))
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))
    full = get_model_state_dict(model, options=FULL)
    close(full, dict(alone.state_dict()) if dist.get_rank() == 0 or full else {})
    reshard(model)
    close(mean(train(model, own)), torch.tensor(train(alone, words)))


def check_saved_by_one_process() -> None:
    model = adapted({"target_modules": ["0"]}, nn.Sequential(nn.Linear(4, 4)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.merge_adapter()
    gathered = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    # without a collective that the other process would have to take part in
    model.save_pretrained("saved", state_dict=gathered, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    model.unmerge_adapter()
    saved = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), "saved")
    close(get_peft_model_state_dict(saved), get_peft_model_state_dict(model))


def test_fully_sharded_models() -> None:
    checks: dict[str, Callable[[], None]] = {
        f"{name}, {how} sharded": functools.partial(check_fully_shard, CONFIGS[name], how)
        for name, how in [
            *zip(CONFIGS, ["layers", "blocks"] * 2, strict=True),
            ("lora", "root"),
            ("bias", "root"),
        ]
    }
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    checks |= {
        "two adapters": check_two_adapters,
        "trained rows, the root sharded": functools.partial(check_trained_rows, "root"),
        "trained rows, the table sharded": functools.partial(check_trained_rows, "table"),
        "unloaded": check_unload,
        "saved while merged by one of two": check_saved_by_one_process,
        "mixed precision": functools.partial(check_policies, mp_policy=half),
        "offloaded to the CPU": functools.partial(check_policies, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "values set": check_values_are_set,
        "values set by PEFT": check_pefts_functions_set_values,
        "sharded base": check_a_base_that_is_sharded,
        "base without values": check_a_base_without_values,
        "distributed checkpoint": check_distributed_checkpoint,
    }
    run_in_two_processes(checks)


# wrappers


POLICIES: dict[str, Any] = {
    "root": None,
    "blocks": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}),
    "large modules": functools.partial(size_based_auto_wrap_policy, min_num_params=10),
}


def check_wrapped_by_fsdp(options: dict[str, Any], policy: Any) -> None:
    import peft

    alone, model = adapted(options), adapted(options)
    cpu = torch.device("cpu")
    wrapper = FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=cpu)
    close(mean(train(wrapper, rows())), torch.tensor(train(alone, BATCH)))
    expected = alone(BATCH)
    close(wrapper(BATCH), expected)
    with model.disable_adapter():
        close(wrapper(BATCH), base()(BATCH))
    close(get_peft_model_state_dict(wrapper), get_peft_model_state_dict(alone))
    close(peft.get_peft_model_state_dict(wrapper), get_peft_model_state_dict(alone))
    values = get_peft_model_state_dict(alone)
    setting = functools.partial(peft.set_peft_model_state_dict, wrapper, values)
    for read in (lambda: get_peft_model_state_dict(model), setting, model.merge_adapter):
        refuses("do this inside of FullyShardedDataParallel.summon_full_params(wrapper)", read)
    with FullyShardedDataParallel.summon_full_params(wrapper):
        close(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))
        model.merge_adapter()
    close(wrapper(BATCH), expected)
    with FullyShardedDataParallel.summon_full_params(wrapper):
        model.unmerge_adapter()
    with model.disable_adapter():
        assert_close(wrapper(BATCH), base()(BATCH))
    close(wrapper(BATCH), expected)


def check_data_parallel(distribute: Callable[[nn.Module], nn.Module]) -> None:
    for options in CONFIGS.values():
        alone, model = adapted(options), adapted(options)
        wrapper = distribute(model)
        close(mean(train(wrapper, rows())), torch.tensor(train(alone, BATCH)))
        close(get_peft_model_state_dict(wrapper), get_peft_model_state_dict(alone))
        set_peft_model_state_dict(wrapper, get_peft_model_state_dict(adapted(options)))
        close(wrapper(BATCH), adapted(options)(BATCH))
        with model.disable_adapter():
            assert_close(wrapper(BATCH), base()(BATCH))


def test_models_in_wrappers() -> None:
    checks: dict[str, Callable[[], None]] = {
        f"FSDP, {name}, {of}": functools.partial(check_wrapped_by_fsdp, CONFIGS[name], POLICIES[of])
        for name, of in [
            *zip(CONFIGS, [*POLICIES, "root"], strict=True),
            ("bias", "large modules"),
            ("lora", "blocks"),
        ]
    }
    checks["DDP"] = functools.partial(check_data_parallel, DistributedDataParallel)
    checks["replicate"] = functools.partial(check_data_parallel, replicate)
    run_in_two_processes(checks)


# tensor parallelism, and stages of a pipeline


def parallel(model: Any) -> Any:
    """Shards the first layer of each block by its rows, the second by its columns, and the head by its rows."""
    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())}
    for index in range(2):
        plan |= {f"blocks.{index}.up": ColwiseParallel(), f"blocks.{index}.down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def check_tensor_parallel(options: dict[str, Any]) -> None:
    alone, model = adapted(options), adapted(options, parallel(base()))
    close(torch.tensor(train(model, BATCH)), torch.tensor(train(alone, BATCH)))
    expected = alone(BATCH)
    close(model(BATCH), expected)
    with model.disable_adapter():
        close(model(BATCH), base()(BATCH))
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))
    if "init_lora_weights" not in options:
        model.save_pretrained("adapter", is_main_process=dist.get_rank() == 0)
        dist.barrier()
        close(PeftModel.from_pretrained(parallel(base()), "adapter")(BATCH), expected)
        model.merge_adapter()
        close(model(BATCH), expected)
        model.unmerge_adapter()
    close(model(BATCH), expected)
    close(model.merge_and_unload()(BATCH), expected)


def check_factors_are_sharded_as_their_weight() -> None:
    model = adapted({}, parallel(base()))
    placements = {name: parameter.placements[0] for name, parameter in model.blocks[0].named_parameters()}
    assert {name: placement for name, placement in placements.items() if "lora" in name} == {
        "up.default.lora_A": Replicate(),
        "up.default.lora_B": Shard(0),
        "down.default.lora_A": Shard(1),
        "down.default.lora_B": Replicate(),
    }


def check_processes_have_the_same_first_values() -> None:
    torch.manual_seed(dist.get_rank())
    config = LoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
    found = get_peft_model_state_dict(get_peft_model(parallel(base()), config))
    of_first = {name: value.clone() for name, value in found.items()}
    for value in of_first.values():
        dist.broadcast(value, 0)
    assert_close(found, of_first)


def check_adapted_before(options: dict[str, Any]) -> None:
    alone, model = adapted(options), adapted(options)
    assert parallel(model) is model
    assert model.blocks[0].up.default.lora_B.placements == (Shard(0),)
    assert model.blocks[0].down.default.lora_A.placements == (Shard(1),)
    assert model.blocks[0].down.default.lora_B.placements == (Replicate(),)
    close(torch.tensor(train(model, BATCH)), torch.tensor(train(alone, BATCH)))
    expected = alone(BATCH)
    close(model(BATCH), expected)
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))
    with model.disable_adapter():
        close(model(BATCH), base()(BATCH))
    model.merge_adapter()
    close(model(BATCH), expected)
    model.unmerge_adapter()
    close(model.unload()(BATCH), base()(BATCH))


def check_shared_tensors_stay_shared() -> None:
    def model_with(how: Callable[[Any], Any]) -> Any:
        torch.manual_seed(1)
        return how(get_peft_model(base(), VeraConfig(r=2, target_modules=["up", "down"], init_weights=False)))

    alone, model = model_with(lambda model: model), model_with(parallel)
    assert model.blocks[0].up.default.vera_A is model.blocks[1].down.default.vera_A
    assert hasattr(model.blocks[0].up.default.vera_A, "full_tensor")
    close(torch.tensor(train(model, BATCH)), torch.tensor(train(alone, BATCH)))


def check_an_adapted_model_is_refused() -> None:
    merged = adapted({})
    merged.merge_adapter()
    for model in (merged, adapted(CONFIGS["bias"]), adapted({"init_lora_weights": "pissa"})):
        refuses(
            "call parallelize_module with the base model and adapt it afterwards", functools.partial(parallel, model)
        )
        assert not any(hasattr(parameter, "full_tensor") for parameter in model.blocks.parameters())


def stages() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(), nn.Sequential(Block(), nn.Linear(6, 3))]


def check_stages() -> None:
    rank = dist.get_rank()
    alone, own = adapted({}, nn.Sequential(*stages())), adapted({}, stages()[rank])
    own.load_state_dict(alone[rank].state_dict())
    stage = PipelineStage(own, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda output, target: (output - target).square().mean())
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=0.05)
    found: list[float] = []
    for _ in range(3):
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(BATCH)
        else:
            schedule.step(target=torch.zeros(4, 3), losses=losses)
            found.append(torch.stack(losses).mean().item())
        optimizer.step()
        optimizer.zero_grad()
    expected = train(alone, BATCH)
    assert rank == 0 or found == pytest.approx(expected, rel=1e-4)
    close(dict(own.state_dict()), dict(alone[rank].state_dict()))


def test_models_that_are_divided() -> None:
    options = {**CONFIGS, "pissa": {"init_lora_weights": "pissa"}, "bias of B": {"lora_bias": True}}
    checks: dict[str, Callable[[], None]] = {
        f"tensor parallel, {name}": functools.partial(check_tensor_parallel, each) for name, each in options.items()
    }
    checks["placements"] = check_factors_are_sharded_as_their_weight
    checks["first values"] = check_processes_have_the_same_first_values
    for name in ("lora", "dora"):
        checks[f"adapted before, {name}"] = functools.partial(check_adapted_before, options[name])
    checks["shared"] = check_shared_tensors_stay_shared
    checks["adapted before, and refused"] = check_an_adapted_model_is_refused
    checks["pipeline"] = check_stages
    run_in_two_processes(checks)


# what can't be run here, and wrappers of one process


def test_a_parameter_that_zero_3_has_partitioned_is_refused() -> None:
    model = base()
    parameter: Any = model.blocks[0].up.weight
    parameter.data, parameter.ds_id = torch.empty(0), 1
    with pytest.raises(AdaptError, match=r"ZeRO-3 has partitioned blocks\.0\.up\.weight.*untried; adapt the model"):
        adapted({}, model)


def test_an_adapter_that_zero_3_has_partitioned_is_not_written() -> None:
    model = adapted({})
    parameter: Any = model.blocks[0].up.default.lora_A
    parameter.data, parameter.ds_id = torch.empty(0), 1
    with pytest.raises(AdaptError, match=r"blocks\.0\.up can't be read or written: DeepSpeed's ZeRO-3 has partitioned"):
        get_peft_model_state_dict(model)


def test_a_model_in_several_wrappers_is_looked_through() -> None:
    model = adapted({})
    wrapper = nn.DataParallel(cast(nn.Module, torch.compile(model, backend="eager")))
    close(get_peft_model_state_dict(wrapper), get_peft_model_state_dict(model))
    model.blocks[0] = CheckpointWrapper(model.blocks[0])
    expected = model(BATCH)
    with model.disable_adapter():
        close(model(BATCH), base()(BATCH))
    close(model(BATCH), expected)
    close(get_peft_model_state_dict(wrapper), get_peft_model_state_dict(adapted({})))


# Transformers' Trainer


class Regression(Model):
    """Returns a loss, as a Trainer asks for it."""

    def forward(self, x: Tensor, labels: Any = None) -> Any:
        return {"loss": (super().forward(x) - labels).square().mean()}


def trained_by_trainer(rows_of_a_step: int, folder: str) -> list[float]:
    """Trains an adapter, saves it as a checkpoint, and returns the loss of each step."""
    import transformers

    torch.manual_seed(0)
    data: Any = [
        {"x": row, "labels": row[:3]} for row in torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
    ]
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=rows_of_a_step, max_steps=3, logging_steps=1, report_to="none", use_cpu=True
    )
    trainer = transformers.Trainer(adapted({}, Regression()), arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(folder)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def check_trainer(expected: list[float], folder: str) -> None:
    import peft

    losses = trained_by_trainer(2, "of two")
    assert losses == pytest.approx(expected, rel=1e-3)
    dist.barrier()
    theirs = peft.PeftModel.from_pretrained(base(), "of two")
    ours = PeftModel.from_pretrained(base(), folder)
    torch.testing.assert_close(theirs(BATCH), ours(BATCH), rtol=1e-3, atol=1e-4)


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_in_two_processes_trains_as_in_one(tmp_path: Any) -> None:
    folder = str(tmp_path / "alone")
    run_in_two_processes({"Trainer": functools.partial(check_trainer, trained_by_trainer(4, folder), folder)})


# one process alone


class Attention(nn.Module):
    """A module whose own forward runs on changed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_a_forward_that_runs_on_changed_weights_does_so_inside_of_fsdps_wrapper() -> None:
    def model() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["attention"], init_lora_weights=False)
        return get_peft_model(Attention(), config)

    plain, x = model(), torch.randn(5, 8)
    dist.init_process_group(backend="gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
        for each in (plain, wrapped):
            each(x).square().sum().backward()
        close(wrapped(x), plain(x))
        own = {name.replace("_fsdp_wrapped_module.", ""): value.grad for name, value in wrapped.named_parameters()}
        close(own, {name: value.grad for name, value in plain.named_parameters()})
    finally:
        dist.destroy_process_group()
    assert (plain(x) - Attention()(x)).abs().max() > 1e-3
