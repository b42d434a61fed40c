"""A context's change, which each forward in training shortens, is trained in two processes as in one and as in PEFT.

What FSDP gathers for a forward is thrown away after it, so the shortening has to reach what each process keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from processes import close, run_in_two_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import graphpeft

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("there is no gloo", allow_module_level=True)

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
TYPES = torch.tensor([[1, 1, 2, 2, 3, 4, 4]] * 2)
# five rows, so that no process has whole ones alone
CONTEXT = {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 3, 4, 4]}


def adapted(library: Any = graphpeft) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))  # type: ignore[arg-type]
    return library.get_peft_model(base, library.CPTConfig(task_type="CAUSAL_LM", **CONTEXT)).train()


def train(model: Any, batches: int = 1) -> list[float]:
    """Trains with a weight decay, which depends on the parameter itself, and steps that go beyond the bounds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(4):
        with torch.no_grad():  # which leaves the root of a sharded model gathered for the next forward
            model(input_ids=IDS, labels=IDS, input_type_mask=TYPES)
        for _ in range(batches):
            loss = model(input_ids=IDS, labels=IDS, input_type_mask=TYPES).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def change(model: Any) -> Tensor:
    (parameter,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach().clone()


def distributed(model: Any) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Any, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def flattened(model: Any, **options: Any) -> nn.Module:
    policy, cpu = ModuleWrapPolicy({LlamaDecoderLayer}), torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu, **options)


def check(wrap: Callable[[Any], nn.Module], batches: int = 1) -> None:
    alone, model = adapted(), adapted()
    wrapper = wrap(model)
    close(train(wrapper, batches), train(alone, batches))
    if isinstance(wrapper, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapper):
            close(change(model), change(alone))
    else:
        close(change(model), change(alone))


def check_half_precision() -> None:
    alone, model = adapted(), adapted()
    half = MixedPrecision(param_dtype=torch.bfloat16)
    wrapper = flattened(model, mixed_precision=half)
    torch.testing.assert_close(torch.tensor(train(wrapper)), torch.tensor(train(alone)), rtol=0.02, atol=0)
    with FullyShardedDataParallel.summon_full_params(wrapper):
        torch.testing.assert_close(change(model).norm(dim=1), change(alone).norm(dim=1), rtol=0.05, atol=0.01)


def test_in_one_process_it_is_trained_as_in_peft() -> None:
    ours, theirs = adapted(), adapted(peft)
    close(train(ours), train(theirs))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert any(tuple(parameter.shape) == (5, 16) for parameter in trained)
    moved = change(ours)
    close(moved, next(parameter.detach() for parameter in trained if tuple(parameter.shape) == (5, 16)))
    assert moved.norm(dim=1)[0] > 2 * 0.1 * (16 / 2048) ** 0.5  # longer than its bound, until the next forward


def test_in_two_processes_it_is_trained_as_in_one() -> None:
    offloaded = functools.partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    wrappers: dict[str, Callable[[Any], nn.Module]] = {
        "DDP": distributed,
        "fully_shard": sharded,
        "fully_shard, offloaded": offloaded,
        "FSDP": flattened,
    }
    checks: dict[str, Callable[[], None]] = {name: functools.partial(check, wrap) for name, wrap in wrappers.items()}
    checks |= {f"{name}, two batches": functools.partial(check, wrap, 2) for name, wrap in wrappers.items()}
    run_in_two_processes(checks | {"FSDP in half precision": check_half_precision})
