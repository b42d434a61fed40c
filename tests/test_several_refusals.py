"""What several adapters on one model can't do has its reason, loses nothing, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import MLP, llama_config, output
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, CheckpointError, LoraConfig, get_peft_model
from graphpeft.testing import laws
from graphpeft.testing.snapshots import require_restored

pytestmark = pytest.mark.quick("adapters", "rules")

IDS = {"input_ids": torch.arange(3, 10)[None].repeat(2, 1), "use_cache": False}


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], reason: str) -> Iterator[None]:
    before = laws.snapshot(model)
    with pytest.raises(error, match=reason):
        yield
    laws.require_unchanged(model, before, "what is refused")


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | options)


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).eval()


def with_plain(odd: LoraConfig, base: nn.Module | None = None, **plain: Any) -> Any:
    """Returns a model with the adapters "plain", which is active, and "odd"."""
    model = get_peft_model(llama() if base is None else base, lora(**plain), "plain")
    model.add_adapter("odd", odd)
    return model.eval()


class Fused(nn.Module):
    """A fused projection before another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Rounded(nn.Module):
    """A linear layer whose weight is no floating-point number."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("numbers", torch.randint(-4, 4, (8, 8), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers.float() / 8)  # type: ignore[operator]


X = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),)
QV = {"qkv": [[0, 8], [16, 24]]}

# combined


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (lora(init_lora_weights="pissa"), r"'odd' has taken a part of .*path_initial_model_for_weight_conversion"),
        (lora(lora_bias=True, target_modules=["q_proj"]), "has factors of parts, or other ones than A and B"),
        (lora(rank_pattern={"q_proj": 1}), r"has A of the shapes \[\(2, 32\), \(1, 32\)\]; choose 'cat' or 'svd'"),
    ],
)
def test_what_has_no_sum_is_not_combined(odd: LoraConfig, reason: str) -> None:
    model = with_plain(odd)
    with refused(model, AdaptError, reason):
        model.add_weighted_adapter(["plain", "odd"], [1, 1], "new", "linear")


def test_rows_are_combined_where_all_name_the_embedding_alike() -> None:
    model = with_plain(lora(trainable_token_indices=[3]), trainable_token_indices={"embed_tokens": [1]})
    with refused(model, AdaptError, "trainable_token_indices names the embedding in some of them alone"):
        model.add_weighted_adapter(["plain", "odd"], [1, 1], "new", "cat")


def test_the_change_of_a_call_without_a_known_weight_is_not_decomposed() -> None:
    layers = nn.Sequential(Rounded(), nn.Tanh(), nn.Linear(8, 3))
    model = with_plain(lora(target_modules=["0", "2"]), layers, target_modules=["2"])
    with refused(model, AdaptError, "the change of 0 can't be decomposed: .*choose 'linear' or 'cat'"):
        model.add_weighted_adapter(["plain", "odd"], [1, 1], "new", "svd")


def test_parts_are_not_combined() -> None:
    model = with_plain(lora(target_modules=["qkv"], target_parts=QV), Fused(), target_modules=["qkv"])
    with refused(model, AdaptError, "target_parts has factors for each part, which can't be combined yet"):
        model.add_weighted_adapter(["plain", "odd"], [1, 1], "new", "cat")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"adapters": "plain"}, TypeError, r"adapters is the text 'plain'; pass a list of names, \['plain'\]"),
        ({"weights": [1, "2"]}, TypeError, "weights has '2', which is no number"),
        ({"weights": [1, float("nan")]}, AdaptError, "weights has nan; give finite numbers"),
        ({"adapter_name": "a.b"}, AdaptError, "'a.b' can't be an adapter's name"),
        ({"svd_rank": 0}, AdaptError, "svd_rank must be a positive integer, not 0"),
        ({"svd_clamp": 3.0}, AdaptError, "svd_clamp is a quantile: 0 ≤ q ≤ 1, not 3.0"),
        ({"combination_type": "ties", "density": 1.5}, AdaptError, "0 < density ≤ 1, not 1.5"),
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"},
            AdaptError,
            "majority_sign_method is 'most'; choose 'total' or 'frequency'",
        ),
    ],
)
def test_how_adapters_are_combined_is_checked(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    model = with_plain(lora())
    with refused(model, error, reason):
        model.add_weighted_adapter(
            **{"adapters": ["plain", "odd"], "weights": [1, 1], "adapter_name": "new", **options}
        )


def test_what_is_gone_from_the_model_is_neither_combined_nor_mixed_nor_merged() -> None:
    base = MLP.build()
    model = with_plain(lora(target_modules=["up"]), base, target_modules=["up"])
    model.first._modules["up"] = nn.Linear(8, 16)
    for use in (
        lambda: model.add_weighted_adapter(["plain", "odd"], [1, 1], "new", "cat"),
        lambda: model(*MLP.inputs(), adapter_names=["plain", "odd", "odd"]),
        lambda: model.merge_adapter(),
    ):
        with refused(model, AdaptError, "of adapter '(plain|odd)' is gone, since it or its module was replaced"):
            use()


# mixed


def test_copies_of_data_parallel_are_not_mixed() -> None:
    model = with_plain(lora())
    model._is_replica = True
    with refused(model, AdaptError, "DataParallel's copies of a model can't have adapter_names"):
        model(**IDS, adapter_names=["plain", "odd"])


class Masked(nn.Module):
    """Takes a tensor beside that of the rows, and may add all rows up."""

    def __init__(self, sums: bool) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.randn(8, 8))
        self.sums = sums

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x @ torch.softmax(self.e, 0) + mask
        return y.sum(0) if self.sums else y


class Around(nn.Module):
    def __init__(self, sums: bool) -> None:
        super().__init__()
        self.inner = Masked(sums)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.ones_like(x) if self.inner.sums else torch.ones(5, 8))


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (False, r"inner is given tensors of the shapes \[\(3, 5, 8\), \(5, 8\)\], of which it isn't known which"),
        (True, r"inner returns a tensor of the shape \(5, 8\) for \d rows?, which can't be put together"),
    ],
)
def test_rows_that_cannot_be_told_are_an_error_and_forgotten(sums: bool, reason: str) -> None:
    x = torch.randn(3, 5, 8)
    model = get_peft_model(Around(sums), lora(target_modules=["inner.e"]), "plain")
    before = model(x)
    for _ in range(2):
        with pytest.raises(ValueError, match=reason):
            model(x, adapter_names=["plain", "__base__", "plain"])
        assert torch.equal(model(x), before)
    require_restored(model.unload(), Around(sums))


def test_parts_are_mixed_as_rows_by_themselves() -> None:
    model = with_plain(lora(target_modules=["qkv"], target_parts=QV), Fused(), target_modules=["qkv", "out"])
    x, names = torch.randn(3, 5, 8), ["odd", "plain", "__base__"]
    with torch.no_grad():
        found = model(x, adapter_names=names)
        for row, name in enumerate(names):
            model.set_adapter([] if name == "__base__" else name)
            assert (model(x)[row] - found[row]).abs().max() < 1e-6


# merged in place, beside rows of embeddings


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("active", [["odd"], ["plain", "odd"], ["odd", "plain"]], ids=" and ".join)
def test_rows_are_merged_in_place_and_unmerged_bit_for_bit(tied: bool, active: list[str]) -> None:
    model = with_plain(lora(target_modules=["q_proj"], trainable_token_indices=[3, 5]), llama(tied))
    model.set_adapter(active)
    laws.perturbed(model)
    expected, before = output(model, IDS), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert model.merged_adapters == sorted(active, reverse=True) or model.merged_adapters == active
    assert (output(model, IDS) - expected).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(output(model, IDS), expected)
    laws.require_equal(dict(model.state_dict()), before, "unmerging leaves other weights")
    require_restored(model.unload(), llama(tied))


def test_one_is_merged_beside_rows_that_go_on_acting() -> None:
    model = with_plain(lora(trainable_token_indices=[3, 5]), llama(tied=True))
    model.set_adapter(["plain", "odd"])
    laws.perturbed(model)
    expected = output(model, IDS)
    model.merge_adapter(["plain"])
    assert model.merged_adapters == ["plain"]
    assert (output(model, IDS) - expected).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(output(model, IDS), expected)


def test_what_would_have_no_effect_is_not_merged_in_place() -> None:
    model = with_plain(lora(trainable_token_indices=[3, 5]))
    with refused(model, AdaptError, "'odd' trains model.embed_tokens fully or by rows, .*activate it with set_adapter"):
        model.merge_adapter(["odd"])
    model = with_plain(lora(trainable_token_indices=[3, 5]), target_modules=["embed_tokens"])
    model.set_adapter(["plain", "odd"])
    with refused(model, AdaptError, "an active adapter has another tensor, or other rows, in the place of"):
        model.merge_adapter(["plain"])
    model = with_plain(lora(trainable_token_indices={"embed_tokens": [3], "lm_head": [4]}), llama(tied=True))
    model.set_adapter("odd")
    with refused(model, AdaptError, r"model\.embed_tokens\.weight is tied to lm_head\.weight, which merging would"):
        model.merge_adapter()


def test_a_state_dict_of_other_weights_is_not_loaded_where_unmerging_would_lose_it() -> None:
    model = with_plain(lora())
    trained = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    with refused(model, AdaptError, r"another model\.layers\.0\.self_attn\.q_proj\.weight .* call unmerge_adapter\(\)"):
        model.load_state_dict(trained)
    merged = model.state_dict()
    model.load_state_dict(merged)
    model.unmerge_adapter()
    model.load_state_dict(trained)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_a_vocabulary_that_was_resized_since_is_not_merged_into() -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj", "embed_tokens"]))
    model.model.resize_token_embeddings(70)  # a part of the model knows of no adapters
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, AdaptError, r"embed_tokens\.weight has the shape \(70, 32\) now, and had \(64, 32\)"):
            merge()


def test_merging_twice_is_a_no_op_with_a_warning() -> None:
    model = with_plain(lora())
    model.merge_adapter()
    before = laws.snapshot(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do: plain"):
        model.merge_adapter()
    laws.require_unchanged(model, before, "merging twice")
    model.unmerge_adapter()
    before = laws.snapshot(model)
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()
    laws.require_unchanged(model, before, "unmerging twice")


# swapped


def saved(folder: Path, base: Any = None, **options: Any) -> Path:
    """Saves an adapter, and returns its folder."""
    model = get_peft_model(llama() if base is None else base, lora(**options))
    model.save_pretrained(folder, save_embedding_layers=options.pop("tables", "auto"))
    return folder


def test_a_swap_needs_a_file_that_fits(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    with refused(model, FileNotFoundError, "nowhere"):
        graphpeft.hotswap_adapter(model, tmp_path / "nowhere", "default")
    others = saved(tmp_path / "others", MLP.build(), target_modules=["up"])
    with refused(model, AdaptError, r"matches \['up'\]"):
        graphpeft.hotswap_adapter(model, others, "default")
    wide = transformers.LlamaForCausalLM(llama_config(hidden_size=64))
    with refused(model, CheckpointError, r"of shape \(2, 64\)"):
        graphpeft.hotswap_adapter(model, saved(tmp_path / "wide", wide), "default")
    layers = saved(tmp_path / "layers", layer_replication=[(0, 2), (0, 2)])
    with refused(model, AdaptError, "changes the layers of a model that has adapters"):
        graphpeft.hotswap_adapter(model, layers, "default")
    with refused(llama(), AdaptError, "has no adapters; adapt it with get_peft_model first"):
        graphpeft.hotswap_adapter(llama(), others, "default")


def test_where_warnings_are_errors_nothing_is_swapped_beside_what_is_merged(tmp_path: Path) -> None:
    other = saved(tmp_path, r=3)
    model = with_plain(lora(target_modules=["v_proj"]))
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused(model, UserWarning, "plain are merged, and are unmerged first"):
            graphpeft.hotswap_adapter(model, other, "odd")
    assert model.merged_adapters == ["plain"]
    with pytest.warns(UserWarning, match="plain are merged, and are unmerged"):
        graphpeft.hotswap_adapter(model, other, "odd")
    assert model.active_adapters == ["plain"]


def test_a_file_with_tables_of_the_base_is_not_swapped(tmp_path: Path) -> None:
    base = llama()
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(1)
    theirs = get_peft_model(base, lora())
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = get_peft_model(llama(), lora())
    with refused(model, AdaptError, r"has other values of the model's own model\.embed_tokens\.weight"):
        graphpeft.hotswap_adapter(model, tmp_path, "default")


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [3, 5]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"bias": "all"},
        {"use_rslora": True, "rank_pattern": {"0.self_attn.q_proj": 1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_any_adapter_is_swapped_for_another_and_back(options: dict[str, Any], tmp_path: Path) -> None:
    plain, odd = saved(tmp_path / "plain"), saved(tmp_path / "odd", **options)
    expected = {folder: output(graphpeft.PeftModel.from_pretrained(llama(), folder), IDS) for folder in (plain, odd)}
    model = graphpeft.PeftModel.from_pretrained(llama(), plain)
    for folder in (odd, odd, plain):
        graphpeft.hotswap_adapter(model, folder, "default")
        assert torch.equal(output(model, IDS), expected[folder])
    require_restored(model.unload(), llama())


# slices and groups


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([[0, 8], [4, 12]], "its parts overlap: row 4 is in two of them"),
        ([[16, 25]], "rows 16 to 25 of a part aren't among its 24"),
        ([[8, 8]], "rows 8 to 8 of a part aren't among its 24"),
        ([[8, 4]], "rows 8 to 4 of a part aren't among its 24"),
        ([[-8, 8]], "rows -8 to 8 of a part aren't among its 24"),
        (["x"], "there is no part 'x'"),
    ],
)
def test_slices_that_do_not_fit_are_refused(parts: Any, reason: str) -> None:
    model = Fused()
    with refused(model, AdaptError, reason):
        get_peft_model(model, lora(target_modules=["qkv"], target_parts={"qkv": parts}), example_inputs=X)


def test_a_projection_that_is_not_parted_in_three_has_no_named_parts() -> None:
    class Halves(Fused):
        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.qkv(x).chunk(2, -1)
            return gate * value

    model = Halves()
    with refused(model, AdaptError, "isn't parted into q, k, v by views alone, but into 2 parts of"):
        get_peft_model(model, lora(target_modules=["qkv"], target_parts={"qkv": ["q"]}), example_inputs=X)


# names


def test_where_warnings_are_errors_the_active_adapter_stays_as_it_is() -> None:
    model = with_plain(lora())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused(model, UserWarning, "'plain' was active and is deleted; 'odd' is active now"):
            model.delete_adapter("plain")
    assert model.active_adapters == ["plain"]


def test_nothing_is_lost_when_the_active_adapter_is_deleted() -> None:
    model = with_plain(lora(r=3))
    model.set_adapter("odd")
    expected = output(model, IDS)
    with pytest.warns(UserWarning, match=re.escape("'odd' was active and is deleted; 'plain' is active now")):
        model.delete_adapter("odd")
    assert model.active_adapters == ["plain"]
    assert not torch.equal(output(model, IDS), expected)
    with refused(model, AdaptError, r"Adapter odd does not exist; the model has \['plain'\]"):
        model.delete_adapter("odd")
    model.delete_adapter("plain")
    assert model.active_adapters == []
    assert torch.equal(output(model, IDS), output(llama().requires_grad_(False), IDS))
    require_restored(model.unload(), llama())


@pytest.mark.parametrize("names", [["odd", "nobody"], ["nobody"], [3]], ids=str)
def test_names_that_are_not_there_are_refused_everywhere(names: list[Any]) -> None:
    model = with_plain(lora())
    for use in (
        lambda: model(**IDS, adapter_names=names),
        lambda: model.generate(**IDS, adapter_names=names, max_new_tokens=1),
        lambda: model.set_adapter(names),
        lambda: model.merge_adapter(names),
        lambda: model.merge_and_unload(adapter_names=names),
        lambda: model.add_weighted_adapter(names, [1] * len(names), "new"),
    ):
        with refused(model, AdaptError, f"Adapter {names[-1]} does not exist"):
            use()


@pytest.mark.parametrize("target", ["layers.0.self_attn", "layers.0.linear1"])
def test_rows_of_a_batch_that_is_the_second_dimension_are_refused(target: str) -> None:
    def adapted(batch_first: bool) -> Any:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
        options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": [target], "init_lora_weights": False}
        get_peft_model(model, graphpeft.LoraConfig(**options), "one")
        return model

    x = torch.randn(3, 3, 8)
    names = ["one", "__base__", "one"]
    with pytest.raises(
        AdaptError, match=r"layers\.0.* is built with batch_first=False.*build it with batch_first=True"
    ):
        adapted(batch_first=False)(x, adapter_names=names)
    model = adapted(batch_first=True)
    with model.disable_adapter():
        base = model(x)
    mixed = model(x, adapter_names=names)
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(mixed[[0, 2]], model(x)[[0, 2]])
