"""Adapted models in two processes: trained, switched, merged, saved and loaded, they are what they are in one."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

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
from torch import nn
from torch.distributed import checkpoint
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from graphpeft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

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
    copied = copy.deepcopy(alone)
    close(model.merge_and_unload()(BATCH), copied.merge_and_unload()(BATCH))


def check_unload() -> None:
    alone, model = adapted(CONFIGS["modules_to_save"]), sharded(adapted(CONFIGS["modules_to_save"]))
    train(model, rows()), train(alone, BATCH)
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
    train(alone, BATCH), train(model, rows())
    checkpoint.save(get_model_state_dict(model), checkpoint_id="distributed")
    state_dict = get_model_state_dict(other)
    checkpoint.load(state_dict, checkpoint_id="distributed")
    set_model_state_dict(other, state_dict)
    close(other(BATCH), alone(BATCH))
    full = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        close(get_peft_model_state_dict(model, full), get_peft_model_state_dict(alone))


def test_fully_sharded_models() -> None:
    checks: dict[str, Callable[[], None]] = {
        f"{name}, {how} sharded": functools.partial(check_fully_shard, options, how)
        for (name, options), how in itertools.product(CONFIGS.items(), ("layers", "blocks", "root"))
    }
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    checks |= {
        "two adapters": check_two_adapters,
        "unloaded": check_unload,
        "mixed precision": functools.partial(check_policies, mp_policy=half),
        "offloaded to the CPU": functools.partial(check_policies, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "values set": check_values_are_set,
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
    alone, model = adapted(options), adapted(options)
    cpu = torch.device("cpu")
    wrapper = FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=cpu)
    close(mean(train(wrapper, rows())), torch.tensor(train(alone, BATCH)))
    expected = alone(BATCH)
    close(wrapper(BATCH), expected)
    with model.disable_adapter():
        close(wrapper(BATCH), base()(BATCH))
    close(get_peft_model_state_dict(wrapper), get_peft_model_state_dict(alone))
    for read in (lambda: get_peft_model_state_dict(model), model.merge_adapter):
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
        f"FSDP, {name}, {of}": functools.partial(check_wrapped_by_fsdp, options, policy)
        for (name, options), (of, policy) in itertools.product(CONFIGS.items(), POLICIES.items())
    }
    checks["DDP"] = functools.partial(check_data_parallel, DistributedDataParallel)
    checks["replicate"] = functools.partial(check_data_parallel, replicate)
    run_in_two_processes(checks)
