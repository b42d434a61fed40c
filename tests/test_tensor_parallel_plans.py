"""Models that Transformers shards by ``tp_plan``: equal losses, gradients and files to those of one process."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import transformers
from processes import Check, close, refuses, run_in_two_processes
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

from graphpeft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, methods

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(2))

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"init_lora_weights": False}),
    "dora": ("LoraConfig", {"init_lora_weights": False, "use_dora": True}),
    "bias and head": ("LoraConfig", {"init_lora_weights": False, "bias": "all", "modules_to_save": ["lm_head"]}),
    "embedding": ("LoraConfig", {"init_lora_weights": False, "target_modules": ["embed_tokens", "up_proj", "lm_head"]}),
    "rows of the embedding": ("LoraConfig", {"init_lora_weights": False, "trainable_token_indices": [4, 20]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0, "target_modules": TARGETS}),
    "psoft": ("PsoftConfig", {"r": 3, "target_modules": TARGETS}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "fourier": ("FourierFTConfig", {"n_frequency": 9, "target_modules": TARGETS}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
}


def written() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 30}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if dist.get_rank() == 0:
        model.save_pretrained("base")
    dist.barrier()


def base(is_sharded: bool = True) -> Any:
    options: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")} if is_sharded else {}
    return transformers.AutoModelForCausalLM.from_pretrained("base", **options).eval()


def adapted(name: str, model: Any) -> Any:
    cls, options = CONFIGS[name]
    torch.manual_seed(1)
    if cls == "LoraConfig":
        options = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, **options}
    model = get_peft_model(model, getattr(methods, cls)(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for _, p in sorted(model.named_parameters()) if p.requires_grad):
            noise = torch.rand(parameter.shape, generator=generator) / 9
            if hasattr(parameter, "full_tensor"):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(noise)
    return model


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(model: Any) -> tuple[list[float], dict[str, Any]]:
    """Returns the losses of some steps, and the gradients of the first."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    losses: list[float] = []
    gradients: dict[str, Any] = {}
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = gradients or {name: whole(p.grad).clone() for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def logits(model: Any) -> Any:
    found = whole(model(input_ids=IDS).logits)
    with torch.no_grad():
        close(whole(model(input_ids=IDS).logits), found)
    return found


def check(name: str) -> None:
    alone, model = adapted(name, base(False)), adapted(name, base())
    (losses, gradients), (expected_losses, expected_gradients) = trained(model), trained(alone)
    close(torch.tensor(losses), torch.tensor(expected_losses))
    assert gradients.keys() == expected_gradients.keys()
    close(gradients, expected_gradients)
    expected = logits(alone)
    close(logits(model), expected)
    with model.disable_adapter():
        close(logits(model), logits(base(False)))
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(alone))
    model.save_pretrained(name, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    for is_sharded in (True, False):
        close(logits(PeftModel.from_pretrained(base(is_sharded), name)), expected)
    if name == "prompt":
        return
    if CONFIGS[name][0] != "LNTuningConfig" and "trainable_token_indices" not in CONFIGS[name][1]:
        model.merge_adapter()
        close(logits(model), expected)
        model.unmerge_adapter()
    close(logits(model), expected)
    close(logits(model.merge_and_unload()), expected)


def check_factors_are_sharded_as_their_weight() -> None:
    model = adapted("lora", base())
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.default.lora_A.placements == (Replicate(),)
    assert attention.q_proj.default.lora_B.placements == (Shard(0),)
    assert attention.o_proj.default.lora_A.placements == (Shard(1),)
    assert attention.o_proj.default.lora_B.placements == (Replicate(),)


def check_generation_and_two_adapters() -> None:
    found = []
    for is_sharded in (True, False):
        model = adapted("lora", base(is_sharded))
        torch.manual_seed(3)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        texts = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
        rows = model(input_ids=IDS, adapter_names=["second", "__base__"]).logits
        found.append([texts, whole(rows), logits(model)])
    close(*found)


def check_the_forwards_come_back() -> None:
    model = base()
    before = {path: vars(module).get("forward") for path, module in model.named_modules()}
    expected = logits(model)
    unloaded = adapted("bias and head", model).unload()
    after = {path: vars(module).get("forward") for path, module in unloaded.named_modules()}
    changed = {path for path in before if after[path] is not before[path]}
    assert changed <= {"lm_head"}  # the trained copy of the head stays, as in PEFT
    assert sum(forward is not None for forward in before.values()) > 10
    model = adapted("lora", base())
    close(logits(model.unload()), expected)


def check_a_mixture_of_experts() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "vocab_size": 30}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2)
    if dist.get_rank() == 0:
        transformers.Qwen3MoeForCausalLM(config).save_pretrained("experts")
    dist.barrier()

    def loaded(**options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained("experts", **options).eval()

    def sharded(ep_size: int | None = None) -> Any:
        return loaded(distributed_config=DistributedConfig(tp_plan="auto", tp_size=2, ep_size=ep_size))

    experts = LoraConfig(r=3, target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False)
    attention = LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    for config, models in [(attention, (loaded(), sharded(ep_size=2))), (experts, (loaded(), sharded()))]:
        found = []
        for model in models:
            torch.manual_seed(1)
            found.append(trained(get_peft_model(model, config)))
        close(*found)
    for config, reason in [
        (experts, "Transformers' plan (tp_plan or ep_plan) runs it by EpDispatchExpertsParallel"),
        (
            LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["experts"]),
            "model.layers.0.mlp.experts can't be adapted: Transformers' plan (tp_plan or ep_plan) runs it by",
        ),
        (LNTuningConfig(target_modules=["q_norm"]), "(tp_plan) sums up the gradients of its own parameters alone"),
    ]:
        model = sharded(ep_size=2)
        names = set(dict(model.named_parameters()))
        refuses(reason, functools.partial(get_peft_model, model, config))
        assert set(dict(model.named_parameters())) == names


def test_a_plan_of_transformers() -> None:
    checks: dict[str, Check] = {"the base": written}
    checks |= {name: functools.partial(check, name) for name in CONFIGS}
    checks["placements"] = check_factors_are_sharded_as_their_weight
    checks["generation"] = check_generation_and_two_adapters
    checks["experts"] = check_a_mixture_of_experts
    checks["unloading"] = check_the_forwards_come_back
    run_in_two_processes(checks)
