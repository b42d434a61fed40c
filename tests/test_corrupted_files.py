"""A file of anybody's is loaded as it says, or refused with its name and the key, and without a change."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import corruption
import pytest
import torch
from corruption import CONFIG, PICKLE, SAVED, WEIGHTS, Damage, Saved
from counting import counted
from models import MLP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, LoraConfig, PeftModel, get_peft_model
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.rules.options import Probability, Size
from graphpeft.rules.registry import registered
from graphpeft.targeting import pattern_values, targets
from graphpeft.targeting.patterns import Pattern
from graphpeft.testing import laws

pytestmark = [
    # of what files may hold, PyTorch warns where it is made or read
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]

BY_NAME = {saved.name: saved for saved in SAVED}


def faults(seeds: range, folder: Path) -> list[str]:
    """Returns what was wrong with loading damaged folders, one for each seed."""
    found = []
    for seed in seeds:
        saved, place = SAVED[seed % len(SAVED)], folder / str(seed)
        damage = corruption.damage(saved, place, random.Random(seed))
        verdict = corruption.verdict(saved, place, damage, is_trainable=bool(seed & 1))
        if verdict.fault is not None:
            found.append(f"{seed}: {saved}, {damage.about}: {verdict.fault}")
        shutil.rmtree(place)
    return found


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (graphpeft.ShiraConfig(r=1, target_modules=["0"]), "shira_indices"),
        (graphpeft.SupertuningConfig(sparsity=0.5, target_modules=["0"]), "supertuning_indices"),
    ],
    ids=["shira", "supertuning"],
)
@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (lambda places: places.fill_(-1), "beyond those of the weight"),
        (lambda places: places.fill_(64), "beyond those of the weight"),
        (lambda places: places.fill_(0), "place of an element twice"),
    ],
    ids=["before", "behind", "twice"],
)
def test_places_of_elements_that_can_not_be_are_refused(
    config: Any, key: str, damaged: Callable[[Any], Any], reason: str, tmp_path: Path
) -> None:
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / WEIGHTS)
    damaged(tensors[f"base_model.model.0.{key}"])
    save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(CheckpointError, match=reason):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    before = laws.snapshot(model)
    with pytest.raises(CheckpointError, match=reason):
        graphpeft.hotswap_adapter(model, tmp_path, "default")
    laws.require_unchanged(model, before, "a swap")


@pytest.mark.parametrize("damage", ["not json", "5", '{"graphpeft_operations": 5}'])
def test_what_is_noted_in_a_pickle_is_told_where_it_is_damaged(damage: str, tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    with zipfile.ZipFile(tmp_path / PICKLE) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content = {name: damage.encode() if name.endswith("graphpeft.json") else held for name, held in content.items()}
    with zipfile.ZipFile(tmp_path / PICKLE, "w") as archive:
        for name, held in content.items():
            archive.writestr(name, held)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is damaged"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)


def test_a_copied_projection_of_another_dtype_is_told(tmp_path: Path) -> None:
    config = graphpeft.RandLoraConfig(r=2, target_modules=["0", "1"])
    get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.randlora_A"] = tensors["base_model.randlora_A"].to(torch.float8_e5m2)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="other values in base_model"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path)


def test_sixty_damaged_folders_are_refused_clearly_or_loaded_right(tmp_path: Path) -> None:
    assert faults(range(60), tmp_path) == []


@pytest.mark.long
def test_a_thousand_damaged_folders_are_refused_clearly_or_loaded_right(tmp_path: Path) -> None:
    assert faults(range(1000), tmp_path) == []


def test_every_method_has_files_that_are_damaged() -> None:
    methods = {cls for cls in registered().values() if cls.__module__.startswith("graphpeft.methods.")}
    assert {type(saved.config()) for saved in SAVED} == methods


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_a_folder_without_damage_is_loaded_right(saved: Saved, is_trainable: bool, tmp_path: Path) -> None:
    corruption.copy_of(saved, tmp_path)
    verdict = corruption.verdict(saved, tmp_path, Damage("none"), is_trainable)
    assert verdict.error is None
    assert verdict.fault is None


# configs


def with_options(saved: Saved, folder: Path, **options: Any) -> None:
    """Writes an adapter into a folder, with other options in its config."""
    corruption.copy_of(saved, folder)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | options))


def refused(saved: Saved, folder: Path, *words: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    """Asserts that a folder is refused with these words, and that the model is as it was."""
    model = saved.model()
    before = corruption.state_of(model)
    with pytest.raises(error) as found:
        PeftModel.from_pretrained(model, folder, **options)
    assert type(found.value) in (error, *error.__subclasses__())
    for word in words:
        assert word in str(found.value)
    laws.require_unchanged(model, before[0], "a refused load")


@pytest.mark.parametrize(
    ("name", "option", "value", "wanted"),
    [
        ("prefix", "num_attention_heads", 0, "a positive integer"),
        ("prefix", "num_layers", -1, "a positive integer"),
        ("prefix", "num_layers", 10**9, "4096 at most"),
        ("prompt-tuning", "token_dim", -1, "a positive integer"),
        ("prompt-tuning", "token_dim", True, "int | None"),
        ("prompt-tuning", "num_virtual_tokens", "3", "int | None"),
        ("prompt-tuning", "num_transformer_submodules", 3, "2 at most"),
        ("multitask", "num_tasks", 0, "a positive integer"),
        ("multitask", "num_ranks", 10**9, "1048576 at most"),
        ("p-tuning-lstm", "encoder_dropout", 1.5, "a probability, 0 ≤ p ≤ 1"),
        ("p-tuning-lstm", "encoder_num_layers", 10**9, "100 at most"),
        ("cpt", "opt_projection_epsilon", float("nan"), "a finite number from 0 on"),
        ("cpt", "cpt_token_ids", 3, "list[int] | None"),
        ("lora", "r", 0, "a positive integer"),
        ("lora", "r", -1, "a positive integer"),
        ("lora", "r", 10**9, "1048576 at most"),
        ("lora", "lora_alpha", float("nan"), "a finite number of single precision"),
        ("lora", "lora_alpha", float("inf"), "a finite number of single precision"),
        ("lora", "lora_alpha", 10**400, "a finite number of single precision"),
        ("lora", "lora_dropout", 1.0, "a probability of dropping an element, 0 ≤ p < 1"),
        ("lora", "lora_dropout", float("nan"), "a probability of dropping an element, 0 ≤ p < 1"),
        ("lora-parts", "target_parts", {"qkv": [[0, 8, 9]]}, "dict[str, list[str | tuple[int, int]]] | None"),
        ("lora-parts", "target_parts", {"qkv": ["q", 3]}, "dict[str, list[str | tuple[int, int]]] | None"),
        ("lora-parts", "target_parts", {"qkv": [[0, None]]}, "dict[str, list[str | tuple[int, int]]] | None"),
        ("lora-replicated", "layer_replication", [[0]], "list[tuple[int, int]] | None"),
    ],
)
def test_an_option_outside_of_its_range_is_named_with_what_is_wanted(
    name: str, option: str, value: Any, wanted: str, tmp_path: Path
) -> None:
    saved = BY_NAME[name]
    with_options(saved, tmp_path, **{option: value})
    refused(saved, tmp_path, f"{tmp_path / CONFIG}: {option} must be {wanted}, not ")
    fields = saved.config().to_dict() | {option: value}
    with pytest.raises(ValueError, match=re.escape(f"{option} must be {wanted}, not ")) as found:
        type(saved.config())(**{key: value for key, value in fields.items() if key != "peft_type"})
    assert not isinstance(found.value, CheckpointError)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("rank_pattern", {"head": 0}, "rank_pattern['head'] must be a positive integer, not 0"),
        ("alpha_pattern", {"head": float("nan")}, "alpha_pattern['head'] must be a finite number"),
        ("target_modules", "x" * 10_000, "nothing in Layers matches"),
        ("layers_pattern", ["("], "layers_pattern"),
    ],
)
def test_an_entry_of_an_option_is_named(option: str, value: Any, words: str, tmp_path: Path) -> None:
    saved = BY_NAME["lora" if option == "layers_pattern" else "lora-pattern"]
    more = {"layers_to_transform": [0]} if option == "layers_pattern" else {}
    with_options(saved, tmp_path, **{option: value}, **more)
    kind = CheckpointError if "must be" in words else AdaptError
    refused(saved, tmp_path, words, option, error=kind)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}, "loftq_iter must be 100 at most"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": "4"}}, "loftq_config: loftq_bits must be int"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": "x"}}, "eva_config: rho must be float"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 2.0}}, "eva_config: tau must be a cosine"),
        ({"init_lora_weights": "corda", "corda_config": {"verbose": 1}}, "corda_config: verbose must be bool"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}}, "lora_ga_config: stable_gamma must"),
    ],
)
def test_an_option_within_an_option_is_named(options: Any, words: str, tmp_path: Path) -> None:
    with_options(BY_NAME["lora"], tmp_path, **options)
    refused(BY_NAME["lora"], tmp_path, CONFIG, words)


@pytest.mark.parametrize("kind", ["pissa_niter_1000000000", "pissa_niter_" + "9" * 5000, "pissa_niter_101"])
def test_more_steps_than_change_anything_are_refused(kind: str, tmp_path: Path) -> None:
    with_options(BY_NAME["lora-pissa"], tmp_path, init_lora_weights=kind)
    refused(BY_NAME["lora-pissa"], tmp_path, "init_lora_weights", error=AdaptError)


def test_a_method_of_ones_own_has_its_options_checked_by_their_annotations() -> None:
    @dataclass(kw_only=True)
    class OwnConfig(graphpeft.PeftConfig):
        peft_type: ClassVar[Any] = "OWN_OF_CORRUPTED_FILES"

        width: Size = 2
        drops: dict[str, Probability] | None = None

    with pytest.raises(ValueError, match="width must be a positive integer, not 0"):
        OwnConfig(width=0)
    with pytest.raises(ValueError, match=re.escape("drops['up'] must be a probability, 0 ≤ p ≤ 1, not nan")):
        OwnConfig(drops={"up": float("nan")})
    assert OwnConfig(width=3, drops={"up": 1}).width == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nests too deep"),
        (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}", "x nests deeper than 16 levels"),
        (b"[]", "holds a list, not the keys of a config"),
        (b"null", "holds a NoneType"),
        (b"", "isn't JSON"),
        (b'{"peft_type": "LORA", "r": "\xe9"}', "isn't JSON"),
        (b'{"peft_type": "LORA", "r": 2, "r": 4}', "it has the key 'r' twice"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 10_000 + b"}", "isn't JSON"),
        (b'{"peft_type": "LORA", "x": "' + b"x" * 2**24 + b'"}', "a config has 8388608 at most"),
        (b'{"peft_type": "LORA", "x": [' + b"1," * 10**6 + b"1]}", "x has more than 100000 entries"),
        (b'{"peft_type": ["LORA"]}', "peft_type is ['LORA']"),
        (b'{"peft_type": "LORA", "task_type": {}}', "task_type is {}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_config_is_refused_with_its_path(content: bytes, words: str, tmp_path: Path) -> None:
    saved = BY_NAME["lora"]
    corruption.copy_of(saved, tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    refused(saved, tmp_path, str(tmp_path / CONFIG), words)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corruption.copy_of(BY_NAME["lora"], tmp_path)

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    refused(BY_NAME["lora"], tmp_path, str(tmp_path / CONFIG), "Permission denied")


# configs beside the model


@pytest.mark.parametrize(("name", "sizes"), [("prefix", {"num_attention_heads": 1}), ("prefix-projection", {})])
def test_a_prefix_for_other_heads_or_layers_is_refused_by_name(
    name: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    saved = BY_NAME[name]
    sizes = sizes or {"num_layers": 1, "token_dim": 32}
    with_options(saved, tmp_path, **sizes)
    refused(saved, tmp_path, f"{next(iter(sizes))} is 1, and the model has 2", error=AdaptError)


def test_tokens_of_a_context_outside_of_the_vocabulary_are_refused_in_a_file_too(tmp_path: Path) -> None:
    with_options(BY_NAME["cpt"], tmp_path, cpt_token_ids=[5, 999, 7])
    refused(BY_NAME["cpt"], tmp_path, "cpt_token_ids", "999", error=AdaptError)


@pytest.mark.parametrize("option", ["modules_to_save", "exclude_modules", "rank_pattern", "target_modules"])
def test_more_names_than_a_model_can_have_are_refused(option: str, tmp_path: Path) -> None:
    names = [f"x{number}" for number in range(50_000)]
    with_options(BY_NAME["lora"], tmp_path, **{option: dict.fromkeys(names, 2) if "pattern" in option else names})
    reason = f"{option} has 50000 names; for a model of this size"
    cost = counted(lambda: refused(BY_NAME["lora"], tmp_path, reason, error=AdaptError))
    # a few for each name, and none for each pair of them
    assert cost.own < 30 * len(names)


def test_more_layers_than_anybody_makes_of_a_model_are_refused(tmp_path: Path) -> None:
    saved = BY_NAME["lora-replicated"]
    with_options(saved, tmp_path, layer_replication=[[0, 2]] * 10_000)
    refused(saved, tmp_path, "layer_replication makes 20000 layers of the model's 2", error=AdaptError)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({}, "auto_mapping of the adapter's config names no class"),
        ({"parent_library": 3, "base_model_class": "X"}, "auto_mapping of the adapter's config names no class"),
        ({"parent_library": "transformers.x", "base_model_class": "X"}, "transformers.x.X"),
        ({"parent_library": "transformers", "base_model_class": "X"}, "transformers.X"),
        ({"parent_library": "transformers", "base_model_class": "set_seed"}, "which loads no model"),
    ],
)
def test_an_auto_mapping_that_names_no_class_is_refused_by_name(mapping: Any, words: str, tmp_path: Path) -> None:
    with_options(BY_NAME["lora"], tmp_path, auto_mapping=mapping, base_model_name_or_path="x")
    with pytest.raises(AdaptError, match=re.escape(words)):
        graphpeft.AutoPeftModel.from_pretrained(tmp_path)


# patterns

ENDLESS = r"((.|..|\w)*)*[A-Z]"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_modules", ENDLESS),
        ("exclude_modules", ENDLESS),
        ("modules_to_save", [ENDLESS]),
        ("rank_pattern", {ENDLESS: 2}),
        ("alpha_pattern", {ENDLESS: 2}),
        ("layers_pattern", ENDLESS),
    ],
)
def test_a_pattern_that_takes_forever_is_refused_by_name(option: str, value: Any) -> None:
    more = {"layers_to_transform": [0]} if option == "layers_pattern" else {}
    inner = "a_block_with_a_long_name_0123456789_0123456789"
    model = nn.ModuleDict({inner: nn.ModuleDict({inner: MLP.build()})})
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=f"{option}.*too long"):
        get_peft_model(model, LoraConfig(**{"target_modules": ["down"], option: value, **more}))
    laws.require_unchanged(model, before, "a refused adaptation")


@pytest.mark.parametrize(
    "pattern",
    ["a{1000000000}", "(((a{1000}){1000}){1000})", "(a{,1000}){1000,}", "a{" + "9" * 9000 + "}"],
    ids=range(4),
)
@pytest.mark.parametrize("option", ["target_modules", "rank_pattern", "exclude_modules"])
def test_a_pattern_that_takes_all_memory_is_refused_by_name(option: str, pattern: str) -> None:
    value: Any = {pattern: 3} if option == "rank_pattern" else pattern
    with pytest.raises(ValueError, match=f"in {option}.* repeats a part too often"):
        get_peft_model(MLP.build(), LoraConfig(**{"target_modules": ["down"], option: value}))


def test_many_patterns_that_take_long_each_are_refused_together() -> None:
    patterns = {rf"(\w|\w\w)*(a|aa){{{number}}}[A-Z]": 2 for number in range(1, 800)}
    names = [f"layers.{number}.{'a' * 22}" for number in range(40)]
    with pytest.raises(ValueError, match="rank_pattern or alpha_pattern takes too long"):
        [pattern_values.pattern_value(patterns, name, 0) for name in names]


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{99999999999999}", "(" * 5000, "x{e<=1}", "[[:alpha:]]", r"\p{L}", "(?|a|b)", "a" * 2**19],
    ids=lambda pattern: pattern[:20],
)
def test_what_is_no_regular_expression_of_pythons_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="in target_modules"):
        targets.match(LoraConfig(target_modules=pattern).target_options, "a")


PATTERNS = [
    "a{5000}",
    r"layers\.\d+\.[a-z]{500,2000}",
    *(pattern for pattern in DEFAULT_TARGET_MODULES.values() if isinstance(pattern, str)),
    r".*\.layers\.(\d+)\.self_attn\.(q|v)_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj))|(?:\bmodel\.layers\.\d{1,}\.mlp\.up_proj)",
    r"^(?!.*vision).*\.(q_proj|up_proj)$",
    r"(?i)MODEL\.LAYERS\.[0-3]\..*",
    r"model\.layers\.(?:[0-9]|1[0-1])\.(?P<part>mlp|self_attn)\.\w+",
    r".*(?<!up)_proj",
]


def test_patterns_match_what_they_match_in_python() -> None:
    names = [
        f"{tower}.layers.{number}.{part}"
        for tower in ("model", "model.vision", "model.language_model", "decoder")
        for number in (0, 3, 11, 12)
        for part in ("self_attn.q_proj", "mlp.up_proj", "SelfAttention.q", "mlp", "norm")
    ]
    for pattern in PATTERNS:
        own, python = Pattern(pattern, pattern, "x"), re.compile(pattern)
        for name in names:
            for method in ("match", "fullmatch", "search"):
                found, expected = getattr(own, method)(name), getattr(python, method)(name)
                assert (found and found.span()) == (expected and expected.span())
        assert own.sub("x", names[0]) == python.sub("x", names[0])


def test_the_first_fitting_pattern_for_an_end_is_that_of_python() -> None:
    numbers = random.Random(0)
    parts = ["a", "b", "a.b", r"a\.b", "^a", "b$", ".*", "a|b", "0", "ab", "a.", r"\-", "-", "(a)", r"^a\.b$"]
    fitting = 0
    for _ in range(1500):
        keys = ["".join(numbers.choices(parts, k=numbers.randint(1, 3))) for _ in range(4)]
        patterns = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        name = "".join(numbers.choices("ab.0-", k=numbers.randint(1, 6)))
        expected = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)
        assert pattern_values.pattern_value(patterns, name, None) == (
            patterns.get(name) if expected is None else expected
        )
        fitting += expected is not None
    assert fitting > 200


def test_a_rank_for_each_of_many_sites_is_found_soon() -> None:
    names = [f"model.layers.{number}.{part}" for number in range(700) for part in ("q_proj", "mlp.up")]
    for spelled in (str, lambda name: f"^{re.escape(name)}$"):
        patterns = {spelled(name): place for place, name in enumerate(names)}
        places = [pattern_values.pattern_value(patterns, name, -1) for name in names]
        assert places == list(range(len(names)))
        cost = counted(lambda of=patterns: pattern_values.pattern_value(of, names[-1], -1))
        assert cost.calls < 30


# tensors


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("lora", ".lora_A.weight"),
        ("lora", "norm.weight"),
        ("lora-rows", "trainable_tokens_delta"),
        ("lora-dora", "lora_magnitude_vector"),
        ("prompt-tuning", "prompt_embeddings"),
        ("multitask", "prefix_task_cols"),
    ],
)
def test_numbers_of_another_kind_are_refused_by_name(
    name: str, ending: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = BY_NAME[name]
    corruption.copy_of(saved, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith(ending))
    save_file(tensors | {key: tensors[key].to(dtype)}, tmp_path / WEIGHTS)
    refused(saved, tmp_path, f"{key} of {dtype} where the model wants torch.float32")


def test_a_count_in_a_layer_fully_trained_stays_one(tmp_path: Path) -> None:
    corruption.copy_of(BY_NAME["lora"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("num_batches_tracked"))
    assert tensors[key].dtype is torch.int64
    save_file(tensors | {key: tensors[key].float()}, tmp_path / WEIGHTS)
    refused(BY_NAME["lora"], tmp_path, f"{key} of torch.float32 where the model wants torch.int64")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floating_point_numbers_of_any_precision_are_loaded_also_without_being_finite(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = BY_NAME["lora"]
    corruption.copy_of(saved, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith(".lora_A.weight"))
    changed = tensors[key].to(dtype)
    changed[0], changed[1] = float("nan"), float("inf")
    save_file(tensors | {key: changed}, tmp_path / WEIGHTS)
    model = PeftModel.from_pretrained(saved.model(), tmp_path)
    found = graphpeft.get_peft_model_state_dict(model)[key]
    assert found.dtype is torch.float32
    assert torch.equal(found.nan_to_num(), changed.float().nan_to_num())


class Foreign:
    """What no file of tensors holds."""


Content = Callable[[dict[str, torch.Tensor], str], Any]

CONTENTS: dict[str, tuple[Content, str]] = {
    "list": (lambda tensors, _: [*tensors.values()], "holds a list, not an adapter's tensors"),
    "tensor": (lambda tensors, key: tensors[key], "holds a Tensor, not an adapter's tensors"),
    "nothing": (lambda _, __: None, "holds a NoneType"),
    "nested": (lambda tensors, _: {"state_dict": tensors}, "state_dict is a dict"),
    "number": (lambda tensors, key: tensors | {key: 3}, "{key} is a int"),
    "name": (lambda tensors, key: tensors | {3: tensors[key]}, "the name 3, which is no text"),
    "sparse": (lambda tensors, key: tensors | {key: tensors[key].to_sparse()}, "{key} is a tensor in the layout"),
    "meta": (lambda tensors, key: tensors | {key: tensors[key].to("meta")}, "{key} is a tensor without data"),
    "quantised": (
        lambda tensors, key: tensors | {key: torch.quantize_per_tensor(tensors[key], 0.1, 0, torch.qint8)},
        "{key} is a quantised tensor of torch.qint8",
    ),
    "expanded": (
        lambda tensors, key: tensors | {key: torch.zeros(1).expand(10**9, 10**9)},
        "{key} of shape (1000000000, 1000000000) where the model wants",
    ),
    "conjugate": (
        lambda tensors, key: tensors | {key: tensors[key].to(torch.complex64).conj()},
        "{key} of torch.complex64 where the model wants torch.float32",
    ),
    "class": (lambda tensors, _: tensors | {"x": Foreign()}, "is damaged, or a pickle of more than tensors"),
}


@pytest.mark.parametrize(("content", "words"), CONTENTS.values(), ids=CONTENTS)
def test_a_pickle_of_anything_but_dense_tensors_is_refused_by_name(
    content: Content, words: str, tmp_path: Path
) -> None:
    saved = BY_NAME["lora"]
    corruption.copy_of(saved, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith(".lora_A.weight"))
    torch.save(content(tensors, key), tmp_path / PICKLE)
    refused(saved, tmp_path, words.format(key=key), use_safetensors=False)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_pickle_that_is_cut_is_refused(kept: float, tmp_path: Path) -> None:
    saved = BY_NAME["lora"]
    corruption.copy_of(saved, tmp_path)
    for is_zip in (True, False):
        torch.save(load_file(tmp_path / WEIGHTS), tmp_path / PICKLE, _use_new_zipfile_serialization=is_zip)
        content = (tmp_path / PICKLE).read_bytes()
        (tmp_path / PICKLE).write_bytes(content[: int(kept * len(content))])
        refused(saved, tmp_path, str(tmp_path / PICKLE), "damaged", use_safetensors=False)


@pytest.mark.parametrize("kind", ["huge header", "shape", "offsets", "brackets"])
def test_a_header_that_contradicts_itself_is_refused(kind: str, tmp_path: Path) -> None:
    saved = BY_NAME["lora"]
    corruption.copy_of(saved, tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    about, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    first = next(key for key in about if key.endswith("weight"))
    header = {
        "huge header": json.dumps(about),
        "shape": json.dumps(about | {first: about[first] | {"shape": [2**40, 2**40]}}),
        "offsets": json.dumps(about | {first: about[first] | {"data_offsets": [0, 2**60]}}),
        "brackets": "[" * 100_000,
    }[kind].encode()
    size = 2**62 if kind == "huge header" else len(header)
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", size) + header + data)
    refused(saved, tmp_path, str(tmp_path / WEIGHTS))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["gone", "a folder", "a broken link"])
def test_a_file_that_is_none_is_named(name: str, kind: str, tmp_path: Path) -> None:
    saved = BY_NAME["lora"]
    corruption.copy_of(saved, tmp_path)
    (tmp_path / name).unlink()
    if kind == "a folder":
        (tmp_path / name).mkdir()
    elif kind == "a broken link":
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    refused(saved, tmp_path, name, error=FileNotFoundError)


def test_a_file_that_a_multitask_prompt_begins_with_is_named_where_it_lacks_something(tmp_path: Path) -> None:
    for name, content in (("a.safetensors", b"x"), ("a.bin", b"x")):
        (tmp_path / name).write_bytes(content)
        refused_source(tmp_path / name, "damaged")
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    refused_source(tmp_path / "b.safetensors", "lacks prompt_embeddings, prefix_task_cols, prefix_task_rows")


def refused_source(path: Path, words: str) -> None:
    """Asserts that a multitask prompt doesn't begin with a file."""
    config = graphpeft.MultitaskPromptTuningConfig(
        task_type=graphpeft.TaskType.CAUSAL_LM,
        num_virtual_tokens=3,
        prompt_tuning_init="AVERAGE_SOURCE_TASKS",
        prompt_tuning_init_state_dict_path=str(path),
    )
    with pytest.raises(CheckpointError, match=re.escape(words)) as found:
        get_peft_model(BY_NAME["multitask"].model(), config)
    assert str(path) in str(found.value)
