"""PEFT's own API: which layers are adapted, how adapters begin, and what else an adapter trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from trainer_runs import adapted
from workflow import Values, part, workflow

TOOL = "PEFT: options of LoRA"
TOKENS = torch.arange(3, 12).view(1, 9)


def _out(model: Any) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.square().sum().item()


def _stepped(peft: Any, **options: Any) -> Values:
    """Returns what comes of an adapted model before a step, after it, merged, and from its file."""
    return _after_a_step(peft, adapted(peft, **options))


def _after_a_step(peft: Any, model: Any) -> Values:
    found = {"before": _out(model.train())}
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.3)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    found |= {"after": _out(model), "trained": sum(each.numel() for each in trained)}
    keys = {name: each.double().abs().sum().item() for name, each in peft.get_peft_model_state_dict(model).items()}
    found["tensors"] = dict(sorted(keys.items()))
    merged = _out(model.merge_and_unload())
    assert abs(merged - found["after"]) < 1e-2 * abs(found["after"])
    return found | {"merged": merged}


@workflow(TOOL, "all-linear")
def all_linear(peft: Any, _: Path) -> Values:
    return _stepped(peft, target_modules="all-linear")


@workflow(TOOL, "a regular expression, layers_to_transform, exclude_modules")
def chosen(peft: Any, _: Path) -> Values:
    one = adapted(peft, target_modules=r".*\.layers\.1\..*(up|down)_proj")
    other = adapted(peft, layers_to_transform=[1], layers_pattern="layers")
    third = adapted(peft, target_modules=["q_proj", "v_proj", "o_proj"], exclude_modules=r".*\.0\..*o_proj")
    models = {"pattern": one, "layers": other, "without": third}
    return {name: sorted(peft.get_peft_model_state_dict(model)) for name, model in models.items()}


@workflow(TOOL, "rank_pattern and alpha_pattern")
def patterns(peft: Any, _: Path) -> Values:
    options = {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 13}}
    return _stepped(peft, **options)


@workflow(TOOL, "rsLoRA")
def rslora(peft: Any, _: Path) -> Values:
    return _stepped(peft, use_rslora=True)


@workflow(TOOL, "DoRA, on linear layers and the embedding")
def dora(peft: Any, _: Path) -> Values:
    return _stepped(peft, use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"])


@workflow(TOOL, "biases of all layers; a bias of B")
def biases(peft: Any, _: Path) -> Values:
    base = tiny.llama(attention_bias=True, mlp_bias=True)
    return _after_a_step(peft, adapted(peft, base, bias="lora_only", lora_bias=False)) | {
        "of B": _after_a_step(peft, adapted(peft, tiny.llama(attention_bias=True), lora_bias=True))
    }


@workflow(TOOL, "modules_to_save and rows of tokens")
def also(peft: Any, _: Path) -> Values:
    return _stepped(peft, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])


@workflow(TOOL, "tied embeddings, kept tied (ensure_weight_tying)")
def tied(peft: Any, _: Path) -> Values:
    base = tiny.llama(tie_word_embeddings=True)
    model = adapted(peft, base, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    found = _after_a_step(peft, model)
    return {name: found[name] for name in ("before", "after", "trained")}


@workflow(TOOL, "stacked weights of experts (target_parameters)")
def experts(peft: Any, _: Path) -> Values:
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return _after_a_step(peft, adapted(peft, tiny.mixtral(), target_modules=[], target_parameters=targets))


@workflow(TOOL, "layers that are replicated")
def replicated(peft: Any, _: Path) -> Values:
    model = adapted(peft, layer_replication=[[0, 2], [1, 2]])
    keys = sorted(peft.get_peft_model_state_dict(model))
    return {"out": _out(model), "keys": keys, "layers": len(model.get_base_model().model.layers)}


@workflow(TOOL, "the first values: gaussian, orthogonal, OLoRA, PiSSA and its fast form")
def first_values(peft: Any, _: Path) -> Values:
    found = {}
    for init in ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_8"):
        model = adapted(peft, init_lora_weights=init)
        weight = model.get_base_model().model.layers[0].self_attn.q_proj.weight
        found[init] = {"out": _out(model), "base": weight.abs().sum().item()}
        values = peft.get_peft_model_state_dict(model)
        found[init] |= {"A and B": sum(each.abs().sum().item() for each in values.values())}
    return found


@workflow(TOOL, "PiSSA, saved as plain LoRA of twice the rank (path_initial_model_for_weight_conversion)")
def pissa_plain(peft: Any, folder: Path) -> Values:
    model = adapted(peft, init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "first")
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    after = _out(model)
    model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "first"))
    plain = peft.PeftModel.from_pretrained(tiny.llama(), folder / "plain")
    assert abs(_out(plain) - after) < 1e-3 * after
    return {"after": after, "rank": plain.peft_config["default"].r}


@workflow(TOOL, "LoftQ")
def loftq(peft: Any, _: Path) -> Values:
    quantised = {"loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=2)}
    model = adapted(peft, init_lora_weights="loftq", **quantised)
    return {"out": _out(model)}


@workflow(TOOL, "EVA, from data")
def eva(peft: Any, _: Path) -> Values:
    options = {
        "init_lora_weights": "eva",
        "eva_config": peft.EvaConfig(rho=1.0),
        "target_modules": ["q_proj", "o_proj"],
    }
    model = adapted(peft, **options)
    rows = torch.randint(3, 29, (8, 6), generator=torch.Generator().manual_seed(3))
    peft.initialize_lora_eva_weights(
        model, [{"input_ids": row[None].expand(8, -1)} for row in rows], show_progress_bar=False
    )
    values = peft.get_peft_model_state_dict(model)
    return {name: each.abs().sum().item() for name, each in values.items() if "lora_A" in name}


@workflow(TOOL, "CorDA, from data")
def corda(peft: Any, _: Path) -> Values:
    prepare = part(peft, "tuners.lora.corda.preprocess_corda")
    corda_config = part(peft, "tuners.lora.config.CordaConfig")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        init_lora_weights="corda",
        corda_config=corda_config(corda_method="kpm"),
    )
    model = tiny.llama()
    before = _out(model)

    def run() -> None:
        with torch.no_grad():
            for each in torch.randint(3, 29, (8, 1, 16), generator=torch.Generator().manual_seed(3)):
                model(input_ids=each)

    prepare(model, config, run_model=run)
    model = peft.get_peft_model(model, config)
    assert abs(_out(model) - before) < 1e-2 * before
    values = peft.get_peft_model_state_dict(model)
    return {
        "product": sum(
            (values[name.replace("lora_A", "lora_B")] @ each).abs().sum().item()
            for name, each in values.items()
            if "lora_A" in name
        )
    }


@workflow(TOOL, "LoRA-GA, from gradients")
def lora_ga(peft: Any, _: Path) -> Values:
    prepare = part(peft, "tuners.lora.loraga.preprocess_loraga")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    model = tiny.llama()
    before = _out(model)

    def step() -> None:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()

    prepare(model, config, step)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config)
    assert abs(_out(model) - before) < 1e-2 * before
    return {"out": _out(model)}


@workflow(TOOL, "convolutions, grouped ones too, and GPT-2's Conv1D")
def convolutions(peft: Any, _: Path) -> Values:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=2)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    stepped = _after_a_step(peft, adapted(peft, gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    return {"images": model(torch.ones(1, 3, 6, 6)).sum().item(), "gpt2": stepped}


@workflow(TOOL, "print_trainable_parameters; prepared for training on few bits, with gradient checkpointing")
def counted(peft: Any, _: Path) -> Values:
    base = peft.prepare_model_for_kbit_training(tiny.llama().bfloat16(), use_gradient_checkpointing=False)
    kinds = sorted({str(each.dtype) for each in base.parameters()})
    model = adapted(peft, base)
    model.print_trainable_parameters()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    norms = [each.grad.norm().item() for each in model.parameters() if each.requires_grad]
    return {
        "counts": [*model.get_nb_trainable_parameters()],
        "kinds": kinds,
        "norms": [round(norm, 2) for norm in norms],
    }


@workflow(TOOL, "two copies of one base, each with an adapter of its own")
def copies(peft: Any, _: Path) -> Values:
    base = tiny.llama()
    one = adapted(peft, copy.deepcopy(base))
    other = adapted(peft, copy.deepcopy(base), target_modules=["o_proj"])
    return {"one": _out(one), "other": _out(other), "base": _out(base)}
