"""Adapters of other ranks and scales take each other's places in compiled code, which isn't compiled again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError

import graphpeft
from graphpeft import (
    AdaptError,
    CheckpointError,
    PeftModel,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from graphpeft.peft_errors import PeftWarning
from graphpeft.testing.snapshots import require_unchanged, snapshot

pytestmark = [
    pytest.mark.quick("adapters"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),  # PEFT's
]


@pytest.fixture(autouse=True)
def no_recompilation() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


class Network(nn.Module):
    """One with a layer of each kind that has factors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.kernel = nn.Conv1d(6, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 6, 1, groups=2)
        self.linear = nn.Linear(6, 5)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(F.gelu(self.kernel(self.table(ids).transpose(1, 2)))).transpose(1, 2)
        return torch.einsum("bti,eoi->bteo", self.linear(x), self.experts)


IDS = torch.arange(10).view(2, 5)
LAYERS = ["table", "kernel", "grouped", "linear"]


def base(build: Any = Network) -> Any:
    torch.manual_seed(0)
    return build().eval()


def options(rank: int, alpha: int, **others: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": alpha, "target_modules": LAYERS, "init_lora_weights": False, **others}


def saved(folder: Path, rank: int, alpha: int, build: Any = Network, library: Any = graphpeft, **others: Any) -> Path:
    """Saves an adapter, and returns its folder."""
    torch.manual_seed(rank)
    model = library.get_peft_model(base(build), library.LoraConfig(**options(rank, alpha, **others)))
    model.save_pretrained(folder / str(rank))
    return folder / str(rank)


def expected(folder: Path, build: Any = Network, inputs: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base(build), folder)(inputs)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def assert_swaps(folders: list[Path], backend: str, rank: int | None, build: Any = Network, inputs: Any = IDS) -> Any:
    model = PeftModel.from_pretrained(base(build), folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=rank)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(inputs), expected(folders[0], build, inputs))
        for folder in folders[1:]:
            hotswap_adapter(compiled, folder, "default")
            assert_close(compiled(inputs), expected(folder, build, inputs))
            assert_close(model(inputs), expected(folder, build, inputs))
    return model


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts": {"target_modules": [], "target_parameters": ["experts"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"linear": 4}, "alpha_pattern": {"kernel": 9}},
    "dora": {"use_dora": True, "target_modules": ["table", "kernel", "linear"]},
    "bias-of-b": {"lora_bias": True, "target_modules": ["kernel", "linear"]},
    "heads": {"modules_to_save": ["linear"], "target_modules": ["table", "kernel"]},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", VARIANTS.values(), ids=VARIANTS)
def test_ranks_and_scales_are_swapped(others: dict[str, Any], backend: str, tmp_path: Path):
    folders = [saved(tmp_path, rank, alpha, **others) for rank, alpha in [(2, 3), (6, 5), (4, 7)]]
    assert_swaps([*folders, folders[0]], backend, 8)


def test_scales_alone_are_swapped(tmp_path: Path):
    folders = [saved(tmp_path / str(alpha), 2, alpha) for alpha in (3, 7)]
    assert_swaps(folders, "eager", None)


def test_without_it_code_is_compiled_again(tmp_path: Path):
    model = PeftModel.from_pretrained(base(), saved(tmp_path, 2, 3))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IDS)
    hotswap_adapter(compiled, saved(tmp_path, 4, 3), "default")
    with pytest.raises(RecompileError):
        compiled(IDS)


def test_compilation_is_in_the_whole_as_in_peft(tmp_path: Path):
    """Both libraries swap each other's files."""
    others = {"target_modules": ["linear", "kernel"]}
    folders = [saved(tmp_path, rank, alpha, library=peft, **others) for rank, alpha in [(2, 3), (5, 4)]]
    theirs: Any = peft.PeftModel.from_pretrained(base(), str(folders[0]))
    peft_prepare(theirs, target_rank=7)
    peft_hotswap(theirs, str(folders[1]), "default", torch_device="cpu")
    ours = assert_swaps(folders, "eager", 7)
    with torch.no_grad():
        assert_close(ours(IDS), theirs(IDS))


def test_preparing_changes_no_output_and_fewer_weights_are_zeros(tmp_path: Path):
    all_of_them, fewer = saved(tmp_path, 2, 3), saved(tmp_path, 4, 5, target_modules=["linear"])
    model = assert_swaps([all_of_them, fewer, all_of_them, fewer], "eager", 4)
    assert not model.kernel.default.lora_A.any()
    assert model.peft_config["default"].target_modules == {"linear"}
    model.save_pretrained(tmp_path / "again")
    for library in (graphpeft, peft):
        again = library.PeftModel.from_pretrained(base(), str(tmp_path / "again"))
        assert_close(again(IDS), model(IDS))
    names = {name.split(".")[2] for name in graphpeft.get_peft_model_state_dict(model)}
    assert names == {"linear"}


def test_dora_of_fewer_weights_is_swapped_as_a_whole(tmp_path: Path):
    """PEFT lets the lengths be zero, and so the weight."""
    dora = {"use_dora": True}
    first = saved(tmp_path, 2, 3, target_modules=["linear", "kernel"], **dora)
    second = saved(tmp_path, 4, 5, target_modules=["linear"], **dora)
    model = PeftModel.from_pretrained(base(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, second, "default")
    assert_close(model(IDS), expected(second))


def test_a_higher_rank_and_further_weights_are_swapped_and_prepared_again(tmp_path: Path):
    first, wider = saved(tmp_path, 2, 3, target_modules=["linear"]), saved(tmp_path, 6, 5)
    model = PeftModel.from_pretrained(base(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, wider, "default")
    assert_close(model(IDS), expected(wider))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IDS)
    for folder in (first, saved(tmp_path, 4, 9), wider):
        hotswap_adapter(compiled, folder, "default")
        assert_close(compiled(IDS), expected(folder))


def test_files_have_the_own_rank(tmp_path: Path):
    first, second = saved(tmp_path, 2, 3), saved(tmp_path, 4, 5)
    model = PeftModel.from_pretrained(base(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    prepare_model_for_compiled_hotswap(model, target_rank=10)
    for folder in (first, second):
        hotswap_adapter(model, folder, "default")
        model.save_pretrained(tmp_path / "again")
        stored = graphpeft.get_peft_model_state_dict(PeftModel.from_pretrained(base(), folder))
        found = graphpeft.get_peft_model_state_dict(PeftModel.from_pretrained(base(), tmp_path / "again"))
        assert found.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())
        theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "again")).eval()
        assert_close(theirs(IDS), expected(folder))


def test_merging_unmerging_and_unloading_are_as_without_room(tmp_path: Path):
    others = {"target_modules": ["table", "kernel", "linear"]}
    first, second = saved(tmp_path, 2, 3, **others), saved(tmp_path, 4, 5, **others)
    model = PeftModel.from_pretrained(base(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, second, "default")
    before = snapshot(model)
    model.merge_adapter()
    assert_close(model(IDS), expected(second))
    with pytest.raises(AdaptError, match=r"call unmerge_adapter\(\) before you swap it"):
        hotswap_adapter(model, first, "default")
    model.unmerge_adapter()
    require_unchanged(model, before, "the call")
    copied = copy.deepcopy(model)
    assert_close(copied.merge_and_unload()(IDS), expected(second))
    assert torch.equal(model.unload()(IDS), base()(IDS))


def test_training_leaves_the_room_empty(tmp_path: Path):
    config = graphpeft.LoraConfig(**options(2, 3))
    models = [graphpeft.get_peft_model(base(), copy.deepcopy(config)) for _ in range(2)]
    values = graphpeft.get_peft_model_state_dict(models[0])
    graphpeft.set_peft_model_state_dict(models[1], values)
    prepare_model_for_compiled_hotswap(models[1], target_rank=6)
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            model(IDS).square().mean().backward()
            optimizer.step()
    found, wanted = (graphpeft.get_peft_model_state_dict(model) for model in models)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_close(wanted[name], tensor)
    assert not models[1].linear.default.lora_A[2:].any()


def test_rows_of_a_batch_have_their_scales_after_a_swap(tmp_path: Path):
    others = {"target_modules": ["linear"]}
    folders = [saved(tmp_path, rank, alpha, **others) for rank, alpha in [(2, 3), (4, 9), (3, 7)]]
    model = PeftModel.from_pretrained(base(), folders[0])
    model.load_adapter(folders[1], "other")
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    for folder in (folders[0], folders[2]):
        hotswap_adapter(model, folder, "default")
        found = model(IDS, adapter_names=["default", "other"])
        assert_close(found[:1], expected(folder)[:1])
        assert_close(found[1:], expected(folders[1])[1:])
    with pytest.raises(AdaptError, match="the factors of 'default' have room for other adapters' ranks"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")


def test_half_precision_keeps_the_scale_and_the_dtype(tmp_path: Path):
    folders = [saved(tmp_path, rank, alpha, target_modules=["linear"]) for rank, alpha in [(3, 7), (7, 3)]]
    for casts in (True, False):
        model, wanted = (
            PeftModel.from_pretrained(base().bfloat16(), folder, autocast_adapter_dtype=casts) for folder in folders
        )
        prepare_model_for_compiled_hotswap(model, target_rank=7)
        dtype = model.linear.default.lora_A.dtype
        hotswap_adapter(model, folders[1], "default")
        assert model.linear.default.lora_A.dtype == dtype
        assert torch.equal(model(IDS), wanted(IDS))


def test_passes_take_scales_in_tensors(tmp_path: Path):
    folders = [saved(tmp_path, rank, alpha) for rank, alpha in [(2, 3), (4, 9)]]
    model = PeftModel.from_pretrained(base(), folders[0])
    graphpeft.optimize(model)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, folders[1], "default")
    assert_close(model(IDS), expected(folders[1]))


def test_a_prepared_model_is_copied_and_exported(tmp_path: Path):
    model = PeftModel.from_pretrained(base(), saved(tmp_path, 2, 3))
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    copied = copy.deepcopy(model)
    hotswap_adapter(copied, saved(tmp_path, 4, 9), "default")
    assert_close(copied(IDS), expected(tmp_path / "4"))
    assert_close(model(IDS), expected(tmp_path / "2"))
    program = torch.export.export(copied, (IDS,))
    assert_close(program.module()(IDS), expected(tmp_path / "4"))


class Tied(nn.Module):
    """One whose head has the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def test_shared_factors_have_room_and_remain_shared(tmp_path: Path):
    others = {"target_modules": ["table", "head"], "ensure_weight_tying": True}
    folders = [saved(tmp_path, rank, alpha, Tied, **others) for rank, alpha in [(2, 3), (4, 7)]]
    model = assert_swaps([*folders, folders[0]], "eager", 5, Tied)
    assert model.table.default.lora_A is model.head.default.lora_B
    assert model.table.default.lora_A.shape == (5, 11)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


def test_parts_of_a_projection_have_room(tmp_path: Path):
    others = {"target_modules": ["qkv"], "target_parts": {"qkv": [[0, 4], [8, 12]]}}
    folders = [saved(tmp_path, rank, alpha, Fused, **others) for rank, alpha in [(2, 3), (4, 7)]]
    assert_swaps([*folders, folders[0]], "eager", 5, Fused, torch.randn(3, 6))


def test_values_of_a_prepared_adapter_are_loaded_and_pickled(tmp_path: Path):
    first, other = saved(tmp_path, 2, 3), tmp_path / "other"
    doubled = PeftModel.from_pretrained(base(), first)
    values = {name: 2 * tensor for name, tensor in graphpeft.get_peft_model_state_dict(doubled).items()}
    graphpeft.set_peft_model_state_dict(doubled, values)
    doubled.save_pretrained(other)
    model = PeftModel.from_pretrained(base(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    model.load_adapter(other, "default")
    assert_close(model(IDS), expected(other))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    hotswap_adapter(again, saved(tmp_path, 4, 7), "default")
    assert_close(again(IDS), expected(tmp_path / "4"))
    assert_close(model(IDS), expected(other))


# from a state dict


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("library", [graphpeft, peft])
def test_a_state_dict_is_swapped_in_by_names_with_the_adapter_in_them(prefix: str, library: Any, tmp_path: Path):
    folders = [saved(tmp_path, rank, alpha) for rank, alpha in [(2, 3), (4, 9)]]
    model = PeftModel.from_pretrained(base(), folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IDS)
    stored = graphpeft.get_peft_model_state_dict(PeftModel.from_pretrained(base(), folders[1]))
    named = {}
    for name, tensor in stored.items():
        module, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        factor, *weight = rest.split(".")
        named[prefix + ".".join([f"{module}.lora_{factor}", "default", *weight])] = tensor
    config = library.LoraConfig(**options(4, 9))
    hotswap_adapter_from_state_dict(compiled, named, "default", config)
    assert_close(compiled(IDS), expected(folders[1]))
    fewer = {name: tensor for name, tensor in named.items() if ".linear." in f".{name}"}
    hotswap_adapter_from_state_dict(compiled, fewer, "default", config)
    wanted = graphpeft.get_peft_model(base(), graphpeft.LoraConfig(**options(4, 9, target_modules=["linear"])))
    graphpeft.set_peft_model_state_dict(wanted, {n: t for n, t in stored.items() if ".linear." in n})
    assert_close(compiled(IDS), wanted(IDS))


def test_a_state_dict_that_does_not_fit_changes_nothing(tmp_path: Path):
    model = PeftModel.from_pretrained(base(), saved(tmp_path, 2, 3))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    stored, before = graphpeft.get_peft_model_state_dict(model), snapshot(model)
    for values, reason in [
        ({**stored, "linear.lora_C.weight": torch.ones(2)}, "has what the model has no place for"),
        ({**stored, "base_model.model.linear.lora_A.weight": torch.ones(3, 6)}, r"lora_A.weight of shape \(3, 6\)"),
        ({name: t for name, t in stored.items() if "linear.lora_A" not in name}, "lacks .*linear.lora_A.weight"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            hotswap_adapter_from_state_dict(model, values, "default", graphpeft.LoraConfig(**options(2, 3)))
    require_unchanged(model, before, "the call")


# refused


def test_what_cannot_be_prepared_is_refused_and_unchanged(tmp_path: Path):
    with pytest.raises(AdaptError, match="has no adapters"):
        prepare_model_for_compiled_hotswap(base(), target_rank=4)
    model = PeftModel.from_pretrained(base(), saved(tmp_path, 4, 3))
    before = snapshot(model)
    with pytest.raises(AdaptError, match="table can't have room for target_rank=2: the adapter has the rank 4 there"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(AdaptError, match="grouped can't have room for target_rank=5: its features are in 2 groups"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    with pytest.raises(ValueError, match="check_compiled is 'no'; choose"):
        prepare_model_for_compiled_hotswap(model, check_compiled="no")  # type: ignore[arg-type]
    require_unchanged(model, before, "a refusal")
    replaced = copy.deepcopy(model)
    replaced._modules["linear"] = nn.Linear(6, 5)
    with pytest.raises(AdaptError, match=r"linear\.default\.lora_A of adapter 'default' is gone"):
        prepare_model_for_compiled_hotswap(replaced, target_rank=6)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(AdaptError, match="prepare it before you compile it"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4)
    with pytest.warns(PeftWarning, match="prepare it before you compile it"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="ignore")
    assert model.linear.default.lora_A.shape == (6, 6)


def test_a_swap_that_fails_leaves_room_and_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = saved(tmp_path, 2, 3), saved(tmp_path, 4, 5)
    model = PeftModel.from_pretrained(base(), first)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    before, outputs = snapshot(model), model(IDS)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphpeft.adapters.state.Adapter.exchange_sites", fails)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, second, "default")
    require_unchanged(model, before, "the call")
    assert torch.equal(model(IDS), outputs)
