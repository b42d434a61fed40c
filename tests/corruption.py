"""Saved adapters of every method, and random damage to their files: to a config's values, to tensors, to bytes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import reprlib
import shutil
import struct
import tempfile
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import experts
import torch
import transformers
from contracts import FIRST
from models import VOCABULARY
from oracle import perturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphpeft
from graphpeft.adapters import file_names
from graphpeft.adapters.state import adapters_of
from graphpeft.rules.registry import registered
from graphpeft.testing.laws import require_unchanged, snapshot

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CAUSAL_LM = "CAUSAL_LM"
_IDS = torch.arange(1, 9).view(2, 4)


class Layers(nn.Module):
    """One layer of each kind, a weight that no layer owns, and one with a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.qkv = nn.Linear(8, 24)
        self.w = nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Classifies each token."""
        x = self.norm(self.conv(self.embed(ids).mT)).mT
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.head(torch.tanh(nn.functional.linear(x, self.w)))


class Sequence(nn.Module):
    """A block over a sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Classifies the last token."""
        return self.head(self.block(self.embed(ids))[:, -1])


def _layers() -> nn.Module:
    return Layers()


def _traced() -> nn.Module:
    return graphpeft.trace(Layers().eval(), (_IDS,))


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=1, eos_token_id=2)
    )


def _llama() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, max_position_embeddings=32, pad_token_id=0)
    )


@functools.cache
def _base(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


class Saved(NamedTuple):
    """An adapter to be saved and damaged.

    Attributes:
        name: What it is called.
        make: Makes the model.
        config: Makes its config.
        arguments: Makes positional arguments for the model, where they are no tokens.
    """

    name: str
    make: Callable[[], nn.Module]
    config: Callable[[], graphpeft.PeftConfig]
    arguments: Callable[[], tuple[Any, ...]] | None = None

    def model(self) -> Any:
        """Returns a copy of the model; equal in each call."""
        return copy.deepcopy(_base(self.make))

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns arguments for the model."""
        if self.arguments is not None:
            return self.arguments(), {}
        if self.make in (_layers, _traced, Sequence):
            return (_IDS,), {}
        more = {"task_ids": torch.tensor([0, 1])} if "multitask" in self.name else {}
        return (), {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS), **more}

    def __str__(self) -> str:
        return self.name


def _prompt(cls: Any, **options: Any) -> Callable[[], graphpeft.PeftConfig]:
    return lambda: cls(task_type=CAUSAL_LM, num_virtual_tokens=3, **options)


def _cpt() -> graphpeft.PeftConfig:
    return graphpeft.CPTConfig(
        task_type=graphpeft.TaskType.CAUSAL_LM, cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4]
    )


def _poly() -> graphpeft.PeftConfig:
    return graphpeft.PolyConfig(
        task_type=graphpeft.TaskType.CAUSAL_LM, r=2, n_tasks=2, target_modules=["q_proj", "up_proj"]
    )


def _xlora(**options: Any) -> Callable[[], graphpeft.PeftConfig]:
    return lambda: experts.config(experts.TEXT, hidden_size=8, **options)


def _lora(**options: Any) -> Callable[[], graphpeft.PeftConfig]:
    return lambda: graphpeft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options})


_PATTERNS: dict[str, Any] = {"rank_pattern": {"qkv": 3}, "alpha_pattern": {"qkv": 5.0, "q.*": 7.0}}

SAVED = [
    Saved("lora", _layers, _lora(target_modules=["embed", "conv", "qkv", "w"], modules_to_save=["norm"], **_PATTERNS)),
    Saved("lora-pattern", _layers, _lora(target_modules=r"(qkv|head)", bias="all", **_PATTERNS, use_rslora=True)),
    Saved("lora-parts", _layers, _lora(target_modules=["qkv", "head"], target_parts={"qkv": [[0, 8], [16, 24]]})),
    Saved("lora-pissa", _layers, _lora(target_modules=["qkv", "head"], init_lora_weights="pissa_niter_4")),
    Saved(
        "lora-loftq",
        _layers,
        _lora(target_modules=["qkv", "head"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    ),
    Saved("lora-dora", _layers, _lora(target_modules=["conv", "head"], use_dora=True, exclude_modules=["w"])),
    Saved(
        "lora-rows",
        _llama,
        _lora(target_modules=["q_proj"], trainable_token_indices=[1, 5], layers_to_transform=[0], task_type=CAUSAL_LM),
    ),
    Saved("lora-replicated", _llama, _lora(target_modules=["up_proj"], layer_replication=[(0, 2), (1, 2)])),
    Saved(
        "lora-per-call",
        _traced,
        lambda: graphpeft.LoraPerCallConfig(r=2, lora_alpha=3, target_modules=["qkv", "head"]),
    ),
    Saved("ia3", _llama, graphpeft.IA3Config),
    Saved(
        "loha",
        _layers,
        lambda: graphpeft.LoHaConfig(
            r=2, alpha=3, use_effective_conv2d=True, target_modules=["conv", "qkv", "head"], **_PATTERNS
        ),
    ),
    Saved(
        "weight-decomposed",
        _layers,
        lambda: graphpeft.WeightDecomposedConfig(
            direction=graphpeft.LoHaConfig(r=2, alpha=3, target_modules=["conv", "qkv", "head"], **_PATTERNS)
        ),
    ),
    Saved("ln-tuning", _layers, lambda: graphpeft.LNTuningConfig(target_modules=["norm", "head"])),
    Saved("trainable-tokens", _llama, lambda: graphpeft.TrainableTokensConfig(token_indices=[5, 1])),
    Saved(
        "lokr",
        _layers,
        lambda: graphpeft.LoKrConfig(
            r=1, alpha=3, decompose_both=True, target_modules=["conv", "qkv", "head"], alpha_pattern={"q.*": 7.0}
        ),
    ),
    Saved("prompt-tuning", _gpt2, _prompt(graphpeft.PromptTuningConfig)),
    Saved(
        "prompt-scope",
        Sequence,
        lambda: graphpeft.PromptTuningConfig(num_virtual_tokens=3, token_dim=8, prompt_scope=["block"]),
    ),
    Saved("p-tuning-mlp", _gpt2, _prompt(graphpeft.PromptEncoderConfig, encoder_hidden_size=12)),
    Saved(
        "p-tuning-lstm",
        _llama,
        _prompt(graphpeft.PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_num_layers=1),
    ),
    Saved("multitask", _gpt2, _prompt(graphpeft.MultitaskPromptTuningConfig, num_tasks=2, num_ranks=2)),
    Saved("prefix", _llama, _prompt(graphpeft.PrefixTuningConfig)),
    Saved("adaption-prompt", _llama, lambda: graphpeft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1)),
    Saved("cartridge", _llama, _prompt(graphpeft.CartridgeConfig)),
    Saved("prefix-projection", _gpt2, _prompt(graphpeft.PrefixTuningConfig, prefix_projection=True)),
    Saved("cpt", _gpt2, _cpt),
    Saved("multitask-poly", _llama, _poly),
    Saved("shadow", _llama, lambda: graphpeft.ShadowConfig(r=3, shadow_hidden_size=8)),
    Saved("x-lora", experts.Text, _xlora(layerwise_scalings=True, top_k_lora=1), lambda: (_IDS,)),
    Saved("x-lora-trained", experts.Text, _xlora(use_trainable_adapters=True), lambda: (_IDS,)),
]
_MORE = {contract.method for contract in FIRST} - {saved.config().peft_type for saved in SAVED}
SAVED += [
    Saved(contract.name, case.make, functools.partial(contract.our_config, case), case.inputs)
    for contract in FIRST
    for case in contract.cases[:1]
    if contract.method in _MORE
]


@functools.cache
def _folder(saved: Saved) -> Path:
    """Returns a folder with the adapter, whose values are none of those with which it begins."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(1)
    model = graphpeft.get_peft_model(saved.model(), saved.config())
    perturb(model)
    model.save_pretrained(folder)
    return folder


# damage


class Damage(NamedTuple):
    """What was done to a folder.

    Attributes:
        about: That in words.
        key: The option that was changed, if it was one.
        use_safetensors: Whether the folder has safetensors.
    """

    about: str
    key: str | None = None
    use_safetensors: bool = True


ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    10**9,
    10**30,
    10**400,
    0.0,
    0.5,
    -0.5,
    1e39,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "1",
    "x",
    ".*",
    "(",
    "(" * 5000,
    "(?:x{e<=9})",
    "(?:(?:[a-z0-9.]|[a-z.]{2})+)+[^a-z.0-9]",
    "((.|..|\\w)*)*[A-Z]",
    "a" * 100_000,
    "\x00",
    "\ud800",
    "pissa_niter_1000000000",
    "pissa_niter_" + "9" * 5000,
    "pissa",
    "olora",
    "eva",
    "gaussian",
    [],
    [[]],
    [1],
    [-1],
    [True],
    [None],
    ["x"],
    ["q", "q"],
    [[0, 1], [1, 2]],
    [[0, 1]] * 10_000,
    [0.5],
    list(range(1000)),
    [f"x{number}" for number in range(20_000)],
    {},
    {"a": 1},
    {"": 1},
    {".*": 0},
    {".*": -1},
    {".*": 4},
    {".*": float("nan")},
    {"(": 1},
    {"((.|..|\\w)*)*[A-Z]": 2},
    {"qkv": ["q", 3]},
    {"qkv": [[0, 8], [4, 9]]},
    {"qkv": [[0, 8, 9]]},
    {"qkv": [[-8, 800]]},
    {"qkv": [[8, 0]]},
    {"qkv": []},
    {"embed": [0, 0]},
    {"embed": [-1]},
    {"loftq_iter": 10**9},
    {"loftq_bits": 3},
    {"loftq_bits": "4", "loftq_iter": 1},
    {"rho": "x"},
    {"x": {}},
    {f"x{number}": 2 for number in range(20_000)},
]
"""Values for options, nearly all of which are wrong for nearly all of them."""


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def copy_of(saved: Saved, folder: Path) -> None:
    """Puts a copy of an adapter into an empty folder."""
    shutil.copytree(_folder(saved), folder, dirs_exist_ok=True)


def damage(saved: Saved, folder: Path, random: random.Random) -> Damage:
    """Puts a damaged copy of an adapter into an empty folder."""
    copy_of(saved, folder)
    kind = random.choices((_config, _config_bytes, _tensors, _tensor_bytes, _pickle, _files), (45, 10, 15, 12, 14, 4))[
        0
    ]
    return kind(folder, random)


def _config(folder: Path, random: random.Random) -> Damage:
    file = folder / CONFIG
    values = json.loads(file.read_text())
    key = random.choice(sorted(values))
    action = random.choices(
        ("another value", "no", "two", "more", "another peft_type", "nested", "neighbour"), (70, 6, 6, 4, 4, 3, 7)
    )[0]
    if action == "another value":
        values[key] = random.choice(ODD if random.random() < 0.4 else _fitting(values["peft_type"], key))
    elif action == "no":
        del values[key]
    elif action == "two":
        other = random.choice(sorted(values))
        values[key], values[other] = values[other], values[key]
    elif action == "more":
        key = random.choice(["x", "", "r ", "R", "__init__", "peft_type ", "rank_patterns"])
        values[key] = random.choice(ODD)
    elif action == "another peft_type":
        key = "peft_type"
        values[key] = random.choice([None, "", "lora", "IA3", "X", 3, [], {}, *registered()])
    elif action == "nested":
        values[key] = _nested(random.choice([5, 50, 400, 900]))
    else:
        values[key] = _near(values[key], random)
    file.write_text(json.dumps(values))
    return Damage(f"{action} {key}: {reprlib.repr(values.get(key))}", key)


@functools.cache
def _fitting(method: str, key: str) -> list[Any]:
    """Returns those odd values whose type may be that of an option."""
    kinds: dict[type, str] = {int: "int", float: "float", str: "str", list: "list", dict: "dict", bool: "bool"}
    cls = registered()[method]
    written = next((field.type for field in dataclasses.fields(cls) if field.name == key), "str")
    hint = str(typing.get_type_hints(cls).get(key, written))
    return [value for value in ODD if kinds.get(type(value), "None") in hint] or ODD


def _near(value: Any, random: random.Random) -> Any:
    """Returns a value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([value + 1, value - 1, 2 * value, -value, value / 3])
    if isinstance(value, str):
        return random.choice([value[:-1], value + "x", value.upper(), value[::-1]])
    if isinstance(value, list):
        return random.choice([value[:-1], value * 2, value[::-1], [*value, None], [value]])
    if isinstance(value, dict):
        return random.choice([{**value, "x": 1}, dict.fromkeys(value), {k: [v] for k, v in value.items()}, [*value]])
    return random.choice([0, "x", [], {}])


def _config_bytes(folder: Path, random: random.Random) -> Damage:
    file = folder / CONFIG
    content, text = file.read_bytes(), file.read_text()
    start = random.randrange(len(content))
    name, made = random.choice(
        [
            ("cut", content[:start]),
            ("empty", b""),
            ("one bit", _flipped(content, random)),
            ("bits", functools.reduce(lambda found, _: _flipped(found, random), range(20), content)),
            ("brackets", b"[" * 100_000),
            ("brackets in it", text.replace("{", '{"x": ' + "[" * 100_000 + "]" * 100_000 + ",", 1).encode()),
            ("not UTF-8", b"\xff\xfe" + content),
            ("UTF-16", text.encode("utf-16")),
            ("latin", text.replace("{", '{"é": 1,', 1).encode("latin-1")),
            ("a mark in front", b"\xef\xbb\xbf" + content),
            ("a list at top", f"[{text}]".encode()),
            ("a number at top", b"3"),
            ("null at top", b"null"),
            ("a text at top", b'"LORA"'),
            ("a key twice", text.replace("{", '{"peft_type": "X",', 1).encode()),
            ("digits", text.replace("{", '{"r": ' + "9" * 10_000 + ",", 1).encode()),
            ("noise", random.randbytes(500)),
            ("zeros", bytes(len(content))),
        ]
    )
    file.write_bytes(made)
    return Damage(f"the config's bytes: {name}")


def _flipped(content: bytes, random: random.Random) -> bytes:
    place = random.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << random.randrange(8))]) + content[place + 1 :]


DTYPES = [
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.uint16,
]


def _tensors(folder: Path, random: random.Random) -> Damage:
    file = folder / WEIGHTS
    tensors = load_file(file)
    key = random.choice(sorted(tensors))
    tensor = tensors[key]
    dtype = random.choice(DTYPES)
    changes: dict[str, Callable[[], dict[str, Tensor]]] = {
        f"dtype {dtype}": lambda: {key: tensor.to(dtype)},
        "a dimension more": lambda: {key: tensor[None].contiguous()},
        "turned": lambda: {key: tensor.permute(*reversed(range(tensor.ndim))).contiguous()},
        "flat": lambda: {key: tensor.flatten()},
        "a row less": lambda: {key: tensor[1:].contiguous() if tensor.ndim else tensor},
        "no rows": lambda: {key: tensor[:0] if tensor.ndim else tensor},
        "no dimension": lambda: {key: torch.tensor(1.0)},
        "no numbers": lambda: {key: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor},
        "gone": dict,
        "another name": lambda: {key[:-1]: tensor},
        "a prefix less": lambda: {key.removeprefix("base_model.model."): tensor},
        "one more": lambda: {key: tensor, key + ".x": tensor.clone()},
        "an empty name": lambda: {key: tensor, "": tensor.clone()},
        "a long name": lambda: {key: tensor, "x." * 50_000: tensor.clone()},
    }
    name = random.choice(sorted(changes))
    others = {other: value for other, value in tensors.items() if other != key}
    if random.random() < 0.05:
        name, others, changes = "no tensors", {}, {"no tensors": dict}
    save_file(others | changes[name](), file, metadata={"format": "pt"})
    return Damage(f"tensor {key}: {name}")


def _tensor_bytes(folder: Path, random: random.Random) -> Damage:
    file = folder / WEIGHTS
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    about = json.loads(header)
    first = next(key for key in about if key != "__metadata__")

    def with_header(made: bytes) -> bytes:
        return struct.pack("<Q", len(made)) + made + data

    def with_entry(**entry: Any) -> bytes:
        return with_header(json.dumps(about | {first: about[first] | entry}).encode())

    twice = header.rstrip()[:-1] + f', "{first}": {json.dumps(about[first])}}}'.encode()
    name, made = random.choice(
        [
            ("cut", content[: random.randrange(len(content))]),
            ("data cut", content[:-3]),
            ("empty", b""),
            ("a bit of the header", struct.pack("<Q", length) + _flipped(header, random) + data),
            ("a bit of the data", content[: 8 + length] + _flipped(data, random)),
            ("a huge header", struct.pack("<Q", 2**63 - 1) + content[8:]),
            ("a long header", struct.pack("<Q", 2**40) + content[8:]),
            ("no header", struct.pack("<Q", 0) + content[8:]),
            ("brackets", with_header(b"[" * 100_000)),
            ("a name twice", with_header(twice)),
            ("a huge shape", with_entry(shape=[2**40, 2**40])),
            ("a negative shape", with_entry(shape=[-1])),
            ("no shape", with_entry(shape=None)),
            ("offsets", with_entry(data_offsets=[0, 2**60])),
            ("offsets turned", with_entry(data_offsets=[8, 0])),
            ("a dtype", with_entry(dtype="X9")),
            ("a small dtype", with_entry(dtype="F4")),
            ("noise", random.randbytes(500)),
            ("more behind", content + b"x" * 100),
        ]
    )
    file.write_bytes(made)
    return Damage(f"the weights' bytes: {name}")


class _Foreign:
    """What no file of tensors holds."""


def _pickle(folder: Path, random: random.Random) -> Damage:
    tensors: dict[str, Any] = dict(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    file = folder / PICKLE
    key = random.choice(sorted(tensors))
    tensor = tensors[key]
    flat = tensor.float().flatten() if tensor.ndim else tensor.float()[None]
    changes: dict[str, Callable[[], Any]] = {
        "as it is": lambda: tensors,
        "a list": lambda: list(tensors.values()),
        "a tensor": lambda: tensor,
        "None": lambda: None,
        "a training run's": lambda: {"state_dict": tensors, "epoch": 3},
        "nested": lambda: tensors | {key: {"x": tensor}},
        "a number": lambda: tensors | {key: 3},
        "None inside": lambda: tensors | {key: None},
        "a list inside": lambda: tensors | {key: tensor.tolist()},
        "a number as a name": lambda: tensors | {3: tensor},
        "a parameter": lambda: tensors | {key: nn.Parameter(tensor.float())},
        "sparse": lambda: tensors | {key: tensor.float().to_sparse()},
        "sparse rows": lambda: tensors | {key: torch.eye(3).to_sparse_csr()},
        "meta": lambda: tensors | {key: tensor.to("meta")},
        "quantised": lambda: tensors | {key: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)},
        "expanded": lambda: tensors | {key: torch.zeros(1).expand(10**9, 10**9)},
        "expanded to its shape": lambda: tensors | {key: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)},
        "turned": lambda: tensors | {key: flat.as_strided((len(flat), 1), (1, 10**6))},
        "whole numbers": lambda: tensors | {key: tensor.long()},
        "complex, conjugate": lambda: tensors | {key: tensor.to(torch.complex64).conj()},
        "negated": lambda: tensors | {key: torch.imag(torch.complex(tensor.float(), tensor.float()).conj())},
        "gone": lambda: {other: value for other, value in tensors.items() if other != key},
    }
    name = random.choice([*sorted(changes), "foreign", "foreign", "cut", "cut", "a bit", "noise", "legacy"])
    if name in changes:
        torch.save(changes[name](), file)
    elif name == "foreign":
        torch.save({**tensors, "x": _Foreign()}, file)
    elif name == "noise":
        file.write_bytes(random.randbytes(500))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=name != "legacy" and random.random() < 0.7)
        content = file.read_bytes()
        if name == "cut":
            file.write_bytes(content[: random.randrange(len(content))])
        elif name == "a bit":
            file.write_bytes(_flipped(content, random))
    return Damage(f"pickled {key}: {name}", use_safetensors=False)


def _files(folder: Path, random: random.Random) -> Damage:
    name = random.choice([CONFIG, WEIGHTS])
    action = random.choice(["gone", "a folder", "a broken link"])
    (folder / name).unlink()
    if action == "a folder":
        (folder / name).mkdir()
    elif action == "a broken link":
        (folder / name).symlink_to(folder / "nowhere")
    return Damage(f"{name}: {action}")


# what becomes of it


class Verdict(NamedTuple):
    """What loading a damaged folder came to.

    Attributes:
        fault: What is wrong with it; None if there was a clear error or a right load.
        error: The error, if there was one.
        seconds: How long it took.
    """

    fault: str | None
    error: Exception | None
    seconds: float


def verdict(saved: Saved, folder: Path, damage: Damage, is_trainable: bool) -> Verdict:
    """Loads a folder onto a model, and judges what comes of it."""
    model = saved.model()
    before = state_of(model)
    began, found = time.process_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graphpeft.PeftModel.from_pretrained(
                model, folder, is_trainable=is_trainable, use_safetensors=damage.use_safetensors
            )
    except Exception as error:
        found = error
    seconds = time.process_time() - began
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fault = _fault_of_load(saved, model, folder, damage) if found is None else _fault_of_error(found, model, before)
    return Verdict(fault if fault or seconds < _SECONDS else f"it took {seconds:.1f} s", found, seconds)


_SECONDS = 2.0
_CLEAR = (graphpeft.CheckpointError, graphpeft.AdaptError, graphpeft.NoMatchingPeftModuleError, FileNotFoundError)
_LONGEST_ERROR = 3000


def state_of(model: Any) -> Any:
    """Returns all that loading could change: in the model, and in its config."""
    config = getattr(model, "config", None)
    return snapshot(model), copy.deepcopy(config.to_dict()) if config is not None else None


def _fault_of_error(error: Exception, model: Any, before: Any) -> str | None:
    text = str(error)
    if type(error) not in _CLEAR:
        return f"it is a raw {type(error).__name__}: {text[:200]}"
    named = {"adapter_config.json", "adapter_model.", "adapter's file", "targets", "can't adapt", *_options()}
    if not any(name in text for name in named):
        return f"the error names neither a file nor a key: {text[:200]}"
    if len(text) > _LONGEST_ERROR:
        return f"the error has {len(text)} letters"
    try:
        require_unchanged(model, before[0], "a refused load")
    except AssertionError as changed:
        return str(changed)
    config = getattr(model, "config", None)
    return "the model's config is changed" if config is not None and config.to_dict() != before[1] else None


@functools.cache
def _options() -> frozenset[str]:
    return frozenset(field.name for cls in registered().values() for field in dataclasses.fields(cls))


def _fault_of_load(saved: Saved, model: Any, folder: Path, damage: Damage) -> str | None:
    """Returns what is wrong with a model that has the adapter: its tensors must be the file's, and it must run."""
    adapter = adapters_of(model).by_name["default"]  # type: ignore[union-attr]
    named = file_names.keys(adapter, "default", dict(model.named_modules()))
    state = graphpeft.get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {key: value for key, value in state.items() if key in named}
    file = load_file(folder / WEIGHTS) if damage.use_safetensors else torch.load(folder / PICKLE, weights_only=True)
    for key, tensor in own.items():
        value = file[key]
        if value.is_complex() or value.is_floating_point() != tensor.is_floating_point():
            return f"{key} of {value.dtype} is read as {tensor.dtype}"
        if not torch.equal(tensor.double().nan_to_num(), value.to(tensor.dtype).double().nan_to_num()):
            return f"{key} has other values than in the file"
    positional, named_arguments = saved.inputs()
    try:
        for training in (False, True):
            model.train(training)(*positional, **named_arguments)
    except Exception as error:
        return f"the forward fails: {type(error).__name__}: {str(error)[:200]}"
    return None
