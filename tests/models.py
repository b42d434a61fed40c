"""Small models of every kind that a user may bring, each with inputs and with what LoRA is to adapt in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import graphpeft

VOCABULARY = 64
CLASSES = 5
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""The ways in which Transformers runs experts."""


@dataclass(frozen=True, eq=False)
class Example:
    """A small model of a kind that somebody adapts.

    Attributes:
        name: What the kind is called.
        make: Builds the model.
        arguments: The keyword arguments of a call, or the positional ones, with random values from a generator.
        lora: The options of a `LoraConfig` that name what to adapt; PEFT understands them as well.
        own_lora: Options that name the same in a way that only this library understands; `lora` if None.
    """

    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[torch.Generator], Any]
    lora: dict[str, Any]
    own_lora: dict[str, Any] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """Builds the model in evaluation mode; equal seeds give equal weights."""
        torch.manual_seed(seed)
        return self.make().eval()

    def inputs(self, seed: int = 0) -> Any:
        """Makes inputs: a tuple of positional or a dict of keyword arguments."""
        return self.arguments(torch.Generator().manual_seed(seed))

    def config(self, **options: Any) -> graphpeft.LoraConfig:
        """Returns this library's config."""
        targets = self.lora if self.own_lora is None else self.own_lora
        return graphpeft.LoraConfig(**targets | options)

    def __str__(self) -> str:
        return self.name


def call(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with the inputs of its `Example`."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def equal(found: Tensor, expected: Tensor) -> bool:
    """Returns whether two tensors are equal within 1e-6 of the largest value."""
    return bool((found - expected).abs().max() <= 1e-6 * max(1, expected.abs().max()))


def traced(example: Example, model: nn.Module) -> Any:
    """Traces a model of an example; skips the test where the installed Transformers has code that no trace follows."""
    if example in UNTRACED:
        pytest.skip(f"this version of Transformers draws a random number for each layer of {example}")
    return graphpeft.trace(model, example.inputs())


def output(model: nn.Module, inputs: Any) -> Tensor:
    """Returns the main result of a call of a model, without gradients."""
    with torch.no_grad():
        return result(call(model, inputs))


def result(called: Any) -> Tensor:
    """Returns the main tensor of what a model returned."""
    if isinstance(called, Tensor):
        return called
    return called["logits"] if "logits" in called else called["last_hidden_state"]


# inputs


def _pixels(size: int) -> Callable[[torch.Generator], Any]:
    return lambda generator: (torch.randn(2, 3, size, size, generator=generator),)


def _vectors(generator: torch.Generator) -> Any:
    return (torch.randn(3, 5, 8, generator=generator),)


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=generator)


def _text(generator: torch.Generator) -> Any:
    return {"input_ids": _tokens(generator)}


def _text_without_cache(generator: torch.Generator) -> Any:
    return {"input_ids": _tokens(generator), "use_cache": False}


def _text_pair(generator: torch.Generator) -> Any:
    return {"input_ids": _tokens(generator), "decoder_input_ids": _tokens(generator), "use_cache": False}


# Transformers


def llama_config(**options: Any) -> transformers.LlamaConfig:
    """Returns the config of a Llama with two layers."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.LlamaConfig(**sizes | options)


def tiny_llama() -> nn.Module:
    """Builds a Llama with grouped key and value heads."""
    return transformers.LlamaForCausalLM(llama_config())


def tiny_experts(implementation: str) -> Any:
    """Builds a Qwen3 whose experts run by one of `IMPLEMENTATIONS`."""
    sizes: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    routing: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(vocab_size=VOCABULARY, **sizes, **heads, **routing)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def _opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    )


def bert_config(**options: Any) -> transformers.BertConfig:
    """Returns the config of a BERT with two layers."""
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        **options,
    )


def _bert() -> nn.Module:
    return transformers.BertModel(bert_config())


def tiny_classifier() -> nn.Module:
    """Builds a BERT with a head that classifies sequences."""
    return transformers.BertForSequenceClassification(bert_config(num_labels=CLASSES))


def _t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes, **start))


# timm and torchvision


def _vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=4, num_classes=CLASSES
    )


def _swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=CLASSES,
    )


def _mixer() -> nn.Module:
    model = MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=CLASSES)
    # its head starts at zero, which would hide every difference
    nn.init.normal_(model.get_parameter("head.weight"))
    return model


def _torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
    )
    # its head starts at zero, which would hide every difference
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


# hand-written


class Block(nn.Module):
    """Two layers around a nonlinearity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the block's value to its input."""
        return x + self.down(F.gelu(self.up(x)))


class Mlp(nn.Module):
    """Nested modules, one of which stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block(8)
        self.blocks = nn.Sequential(Block(8), self.first, nn.Sequential(nn.LayerNorm(8), Block(8)))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies."""
        return self.head(self.blocks(self.first(x)))


class Functional(nn.Module):
    """Weights that no layer owns, beside a layer, in every spelling that multiplies by a weight as (out, in)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.b = nn.Parameter(torch.randn(size))
        self.v = nn.Parameter(torch.randn(size, 2 * size) / size**0.5)
        self.e = nn.Parameter(torch.randn(size, 2 * size) / size**0.5)
        self.inner = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Runs through all weights."""
        x = torch.tanh(F.linear(x, self.w, self.b))
        x = torch.tanh(self.inner(x))
        return torch.einsum("bti,oi->bto", torch.tanh(x @ self.v), self.e)


class FunctionalModel(nn.Module):
    """Functional weights in two submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Functional(8)
        self.two = Functional(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies."""
        return self.head(self.two(torch.relu(self.one(x))))


class Scaled(nn.Module):
    """A layer of the user's own: it has a `weight` and is no ``nn.Linear``."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inside) / inside**0.5)
        self.scale = nn.Parameter(torch.rand(out) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies and scales."""
        return F.linear(x, self.weight) * self.scale


class Transposed(nn.Module):
    """A layer of the user's own whose weight is (in, out)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, out) / inside**0.5)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies and adds the bias."""
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Experts(nn.Module):
    """Two experts, whose weights are a stack of matrices that are stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Gives each expert its rows."""
        return torch.bmm(x, self.up)


class CustomModel(nn.Module):
    """The user's own layers beside one of ``torch.nn``."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(8, 12)
        self.transposed = Transposed(12, 10)
        self.plain = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies."""
        return self.plain(torch.tanh(self.transposed(torch.tanh(self.scaled(x)))))


LLAMA = Example("llama", tiny_llama, _text_without_cache, {"target_modules": ["q_proj", "v_proj"]})
OPT = Example("opt", _opt, _text_without_cache, {"target_modules": ["q_proj", "v_proj", "fc1"]})
GPT2 = Example("gpt2", _gpt2, _text_without_cache, {"target_modules": ["c_attn", "c_fc"]})
CLASSIFIER = Example("bert-classifier", tiny_classifier, _text, {"target_modules": ["query", "value"]})
BERT = Example("bert", _bert, _text, {"target_modules": ["query", "value", "dense"]})
T5 = Example("t5", _t5, _text_pair, {"target_modules": ["q", "v", "wo"]})
VIT = Example("timm-vit", _vit, _pixels(32), {"target_modules": ["qkv", "attn.proj", "fc1", "fc2"]})
SWIN = Example("timm-swin", _swin, _pixels(32), {"target_modules": ["qkv", "fc1", "reduction"]})
MIXER = Example("timm-mixer", _mixer, _pixels(32), {"target_modules": r".*mlp_(tokens|channels)\.fc[12]"})
TORCHVISION_VIT = Example("torchvision-vit", _torchvision_vit, _pixels(32), {"target_modules": ["mlp.0", "mlp.3"]})
MLP = Example("mlp", Mlp, _vectors, {"target_modules": ["up", "down", "head"]})
FUNCTIONAL = Example(
    "functional",
    FunctionalModel,
    _vectors,
    {"target_modules": ["inner", "head"], "target_parameters": ["one.w", "one.v", "two.e", "two.w", "two.v"]},
    own_lora={"target_modules": ["inner", "head", "one.w", "one.v", "two.e", "two.w", "two.v"]},
)
CUSTOM = Example(
    "custom",
    CustomModel,
    _vectors,
    {"target_modules": ["plain"], "target_parameters": ["scaled.weight", "transposed.weight"]},
    own_lora={"target_modules": ["plain", "scaled", "transposed"]},
)

_OPT_FORWARD = inspect.getsource(transformers.models.opt.modeling_opt.OPTDecoder.forward)
UNTRACED = frozenset() if "self.layerdrop >" in _OPT_FORWARD else frozenset({OPT})
"""Examples whose layers are drawn in training, whatever the config says: Transformers before 5.23."""

CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""What Transformers calls a decoder's cache: ``cache`` since 5.24."""

EXAMPLES = [LLAMA, OPT, GPT2, BERT, T5, VIT, SWIN, MIXER, TORCHVISION_VIT, MLP, FUNCTIONAL, CUSTOM]
