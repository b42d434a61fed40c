"""Adapters as inputs: one graph serves any adapter of the same shapes, from whichever file it comes."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import peft
import pytest
import serving
import torch
from exports import BERT, HAND_WRITTEN, LLAMA, RESNET, SUFFIXES, TIMM_VIT, TOLERANCE, TORCHVISION_VIT
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental import proxy_tensor

import graphpeft
from graphpeft import ExportError
from graphpeft.exporting.carriers import CARRIERS
from graphpeft.exporting.example import Example
from graphpeft.graph import in_place


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=TOLERANCE, rtol=0)


def program(path) -> torch.nn.Module:
    return torch.export.load(path).module()


def session(path) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, settings)


def with_adapter(loaded: onnxruntime.InferenceSession, given: dict, path) -> Tensor:
    """Returns what a session gives with the adapter in a file."""
    # the options only point to the adapter, which has to live as long
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    [found] = loaded.run(None, given, options)
    return torch.from_numpy(found)


def feed(model, which: int = 0) -> dict:
    return {model.input: model.tensor(which).numpy()}


# in turn


def test_one_program_runs_adapters_in_turn(tmp_path):
    model = LLAMA.adapted()
    report = graphpeft.export(model, LLAMA.example(), tmp_path / "model.pt2", adapters="inputs", check=False)
    loaded = program(tmp_path / "model.pt2")
    outputs: dict[str, Tensor] = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        found = loaded(**LLAMA.inputs(), adapters=load_file(report.adapter_files[name]))["logits"]
        assert close(found, LLAMA.output(model))
        outputs[name] = found
    assert not close(outputs["first"], outputs["second"])


def test_one_session_runs_adapters_in_turn_and_the_active_one_unless_it_is_told_another(tmp_path):
    model = HAND_WRITTEN.adapted()
    report = graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.onnx", "onnx", "inputs", check=False)
    loaded = session(tmp_path / "m.onnx")
    assert [one.name for one in loaded.get_inputs()] == ["x"]
    [unless_told] = loaded.run(None, feed(HAND_WRITTEN))
    assert close(torch.from_numpy(unless_told), HAND_WRITTEN.output(model))
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        found = with_adapter(loaded, feed(HAND_WRITTEN), report.adapter_files[name])
        assert close(found, HAND_WRITTEN.output(model))


def test_rows_of_one_batch_have_adapters_of_their_own_in_one_session_and_in_one_program(tmp_path):
    model = HAND_WRITTEN.adapted()
    for format, path in (("pt2", tmp_path / "m.pt2"), ("onnx", tmp_path / "m.onnx")):
        graphpeft.export(model, HAND_WRITTEN.example(), path, format, "rows", check=False)
    adapters = [load_file(tmp_path / f"m.{name}.safetensors") for name in ("first", "second")]
    together = {key: torch.cat([one[key] for one in adapters]) for key in adapters[0]}
    loaded, running = program(tmp_path / "m.pt2"), session(tmp_path / "m.onnx")
    for which, rows in ((0, [1, 0, 1]), (1, [0, 1])):
        expected = HAND_WRITTEN.output(model, which, adapter_names=[("first", "second")[row] for row in rows])
        numbers = torch.tensor(rows)
        assert close(loaded(HAND_WRITTEN.tensor(which), adapters=together, adapter_rows=numbers), expected)
        [found] = running.run(None, {**feed(HAND_WRITTEN, which), "adapter_rows": numbers.numpy()})
        assert close(torch.from_numpy(found), expected)


class Hearing(nn.Module):
    """A convolution, a matrix and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.table = nn.Conv1d(4, 8, 3), nn.Linear(8, 6), nn.Embedding(5, 6)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(-1)) + self.table(kind)


@pytest.mark.parametrize(("way", "targets"), [("inputs", ["conv", "head", "table"]), ("rows", ["head"])])
def test_a_quantised_graph_takes_adapters_as_they_are(way, targets, tmp_path):
    model: Any = Hearing()
    for name in ("first", "second"):
        config = graphpeft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        graphpeft.get_peft_model(model, config, name)
    model.eval()
    x, kind = torch.randn(3, 4, 9), torch.tensor([1, 4, 2])
    report = graphpeft.export(model, (x, kind), tmp_path / "m.onnx", "onnx", way, check=False)
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "m8.onnx", weight_type=QuantType.QInt8)
    operators = {node.op_type for node in onnx.load(tmp_path / "m8.onnx").graph.node}
    assert "MatMulInteger" in operators
    loaded, outputs = session(tmp_path / "m8.onnx"), []
    for name in ("first", "second"):
        model.set_adapter(name)
        expected = model(x, kind).detach()
        rows = {"adapter_rows": torch.zeros(3, dtype=torch.long).numpy()} if way == "rows" else {}
        outputs.append(with_adapter(loaded, {"x": x.numpy(), "kind": kind.numpy(), **rows}, report.adapter_files[name]))
        assert (outputs[-1] - expected).abs().max() < 0.03 * expected.abs().max()
    assert (outputs[0] - outputs[1]).abs().max() > 0.3


def test_rows_can_have_more_adapters_than_the_model_had(tmp_path):
    model = HAND_WRITTEN.adapted(("first",))
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="rows")
    third = HAND_WRITTEN.adapted(("x", "y", "third"))
    file = graphpeft.export_adapter(third, "third", tmp_path / "m.pt2")
    first, other = load_file(tmp_path / "m.first.safetensors"), load_file(file)
    together = {key: torch.cat([first[key], other[key], first[key], other[key]]) for key in first}
    found = program(tmp_path / "m.pt2")(HAND_WRITTEN.tensor(), adapters=together, adapter_rows=torch.tensor([0, 3, 2]))
    third.set_adapter("third")
    expected = torch.stack(
        [HAND_WRITTEN.output(model)[0], HAND_WRITTEN.output(third)[1], HAND_WRITTEN.output(model)[2]]
    )
    assert close(found, expected)


# their files


def test_pefts_own_file_can_be_given_as_it_is(tmp_path):
    theirs = peft.get_peft_model(
        BERT.base(), peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, **BERT.lora)
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    report = graphpeft.export(BERT.adapted(), BERT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    # the scale is that of the adapter that was exported: the file has none
    scales = {key: one for key, one in load_file(report.adapter_files["first"]).items() if not one.ndim}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = program(tmp_path / "m.pt2")(BERT.tensor(), adapters={**scales, **tensors})
    with torch.no_grad():
        expected = theirs(BERT.tensor()).last_hidden_state
    assert close(serving.result(found), expected)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_folder_of_pefts_files_becomes_a_file_for_an_export(suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    graphpeft.export(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), path, suffix[1:], "inputs", check=False)
    later = HAND_WRITTEN.adapted(("one", "two", "later"))
    later.save_pretrained(tmp_path, selected_adapters=["later"])
    later.set_adapter("later")
    base = HAND_WRITTEN.base()
    file = graphpeft.export_adapter(base, tmp_path / "later", path)
    assert not hasattr(base, "peft_config")
    if suffix == ".onnx":
        assert file == tmp_path / "m.later.onnx_adapter"
        found = with_adapter(session(path), feed(HAND_WRITTEN), file)
    else:
        assert file == tmp_path / "m.later.safetensors"
        found = program(path)(HAND_WRITTEN.tensor(), adapters=load_file(file))
    assert close(found, HAND_WRITTEN.output(later))


def test_a_file_with_other_values_of_the_models_own_leaves_them_as_they_are(tmp_path):
    graphpeft.export(BERT.adapted(), BERT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    trained = BERT.adapted(("trained",))
    with torch.no_grad():
        trained.get_parameter("embeddings.word_embeddings.weight").add_(1)
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    base = BERT.base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ExportError, match=r"has brought other values of .*embeddings\.word_embeddings\.weight"):
        graphpeft.export_adapter(base, tmp_path / "trained", tmp_path / "m.pt2")
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_folder_may_have_dots_in_its_name(tmp_path):
    graphpeft.export(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    HAND_WRITTEN.adapted(("default",)).save_pretrained(tmp_path / "v1.2")
    for model in (HAND_WRITTEN.base(), HAND_WRITTEN.adapted()):
        file = graphpeft.export_adapter(model, tmp_path / "v1.2", tmp_path / "m.pt2")
        assert file == tmp_path / "m.v1_2.safetensors"


@pytest.mark.parametrize("adapter", ["thrid", "no/such/folder"])
def test_an_adapter_that_isnt_there_is_named_with_those_that_are(adapter, tmp_path):
    model = HAND_WRITTEN.adapted()
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    with pytest.raises(
        ExportError, match=f"'{adapter}' is no adapter of the model, which has 'first', 'second', and no"
    ):
        graphpeft.export_adapter(model, adapter, tmp_path / "m.pt2")


@pytest.mark.parametrize("way", ["inputs", "rows"])
def test_an_adapter_of_other_ranks_is_refused_with_its_shapes_and_the_graphs(way, tmp_path):
    path = tmp_path / "m.onnx"
    graphpeft.export(HAND_WRITTEN.adapted(), HAND_WRITTEN.example(), path, "onnx", way, check=False)
    wide = graphpeft.get_peft_model(HAND_WRITTEN.base(), graphpeft.LoraConfig(r=4, **HAND_WRITTEN.lora), "wide")
    files = sorted(tmp_path.iterdir())
    with pytest.raises(
        ExportError,
        match=r"'wide' doesn't fit the inputs of m\.onnx: .*"
        r"body\.lora_A\.weight of the shape \(4, \d+\) in place of \(2, \d+\)",
    ):
        graphpeft.export_adapter(wide, "wide", path)
    assert sorted(tmp_path.iterdir()) == files


def test_an_adapter_in_single_precision_is_rounded_for_an_export_in_half(tmp_path):
    model = HAND_WRITTEN.adapted(("first",)).to(torch.bfloat16)
    example = (HAND_WRITTEN.tensor().to(torch.bfloat16),)
    graphpeft.export(model, example, tmp_path / "m.pt2", adapters="inputs")
    file = graphpeft.export_adapter(HAND_WRITTEN.adapted(("single",)), "single", tmp_path / "m.pt2")
    written, own = load_file(file), load_file(tmp_path / "m.first.safetensors")
    assert {key: one.dtype for key, one in written.items()} == {key: one.dtype for key, one in own.items()}


def test_an_adapter_with_other_targets_is_refused(tmp_path):
    graphpeft.export(BERT.adapted(), BERT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    fewer = graphpeft.get_peft_model(BERT.base(), graphpeft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ExportError, match=r"lacks .*value\.lora_A\.weight"):
        graphpeft.export_adapter(fewer, "default", tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("options", "others"),
    [
        (
            {"trainable_token_indices": {"word_embeddings": [3, 5]}},
            {"trainable_token_indices": {"word_embeddings": [3, 6]}},
        ),
        ({"target_parts": {"query": [[0, 8], [8, 16]]}}, {"target_parts": {"query": [[0, 8], [16, 24]]}}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_adapter_of_equal_shapes_that_means_other_places_is_refused(options, others, tmp_path):
    model = BERT.adapted(("first",), **options)
    graphpeft.export(model, BERT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    same, other = BERT.adapted(("same",), **options), BERT.adapted(("other",), **others)
    graphpeft.export_adapter(same, "same", tmp_path / "m.pt2")
    with pytest.raises(ExportError, match=r"'other' doesn't fit m\.pt2, though its tensors do: .*other rows, parts"):
        graphpeft.export_adapter(other, "other", tmp_path / "m.pt2")
    # nor beside another one in one model, whether the file would be checked or not
    both = BERT.adapted(("first",), **options)
    both.add_adapter("other", graphpeft.LoraConfig(r=2, **BERT.lora, **others))
    with pytest.raises(ExportError, match=r"'other' doesn't fit a graph for adapter 'first'"):
        graphpeft.export(both, BERT.example(), tmp_path / "both.pt2", adapters="inputs", check=False)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_with_and_without_dropout_fit_one_graph(use_dora, tmp_path):
    models = [BERT.adapted(("own",), lora_dropout=p, use_dora=use_dora) for p in (0.0, 0.2)]
    for model, other in (models, models[::-1]):
        graphpeft.export(model, BERT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
        file = graphpeft.export_adapter(other, "own", tmp_path / "m.pt2", tmp_path / "other.safetensors")
        found = program(tmp_path / "m.pt2")(BERT.tensor(), adapters=load_file(file))
        assert close(serving.result(found), BERT.output(other))


def test_an_export_without_inputs_for_adapters_takes_none(tmp_path):
    model = HAND_WRITTEN.adapted()
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", check=False)
    with pytest.raises(ExportError, match="takes no adapters"):
        graphpeft.export_adapter(model, "first", tmp_path / "m.pt2")
    (tmp_path / "other.pt2").write_text("no archive")
    with pytest.raises(ExportError, match="takes no adapters"):
        graphpeft.export_adapter(model, "first", tmp_path / "other.pt2")
    with pytest.raises(ExportError, match=r"there is no .*none\.pt2"):
        graphpeft.export_adapter(model, "first", tmp_path / "none.pt2")


# what an adapter can be made of


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_dropout": 0.3},
        {"use_rslora": True, "alpha_pattern": {"query": 7}},
        {"bias": "lora_only"},
        {"modules_to_save": ["pooler"]},
        {"trainable_token_indices": {"word_embeddings": [3, 5]}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_that_an_adapter_has_is_an_input(options, tmp_path):
    model = BERT.adapted(("only",), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_only"):
                parameter += 0.05
    graphpeft.export(model, BERT.example(), tmp_path / "m.pt2", adapters="inputs")
    given = load_file(tmp_path / "m.only.safetensors")
    assert graphpeft.get_peft_model_state_dict(model, adapter_name="only").keys() <= given.keys()
    assert not any("dropout" in key for key in given)
    # nothing of the adapter is among the weights
    assert torch.export.load(tmp_path / "m.pt2").state_dict.keys() == BERT.base().state_dict().keys()


@pytest.mark.parametrize(
    "config",
    [
        graphpeft.PromptTuningConfig(num_virtual_tokens=2, task_type=graphpeft.TaskType.FEATURE_EXTRACTION),
        graphpeft.PromptEncoderConfig(
            num_virtual_tokens=2, encoder_hidden_size=8, task_type=graphpeft.TaskType.FEATURE_EXTRACTION
        ),
    ],
    ids=lambda config: config.method,
)
@pytest.mark.parametrize("way", ["baked", "inputs"])
def test_prompts_are_exported(config, way, tmp_path):
    model = graphpeft.get_peft_model(BERT.base(), config)
    graphpeft.export(model, BERT.example(), tmp_path / "m.pt2", adapters=way)


def test_an_adapter_that_has_taken_a_part_of_the_weights_is_no_input(tmp_path):
    model = graphpeft.get_peft_model(BERT.base(), graphpeft.LoraConfig(r=2, init_lora_weights="pissa", **BERT.lora))
    with pytest.raises(ExportError, match=r"has taken a part of .*adapters='baked'"):
        graphpeft.export(model, BERT.example(), tmp_path / "m.pt2", adapters="inputs")
    graphpeft.export(model, BERT.example(), tmp_path / "m.pt2", adapters="baked")


@pytest.mark.parametrize("model", [RESNET, TORCHVISION_VIT], ids=str)
def test_what_runs_rows_in_turn_is_refused_with_the_rule(model, tmp_path):
    with pytest.raises(
        ExportError, match=r"rows of a batch run in turn in .*: Lora\w+ has no by_row.*adapters='inputs'"
    ):
        graphpeft.export(model.adapted(), model.example(), tmp_path / "m.pt2", adapters="rows")


def test_several_active_adapters_are_baked_or_merged_and_no_inputs(tmp_path):
    model = HAND_WRITTEN.adapted()
    model.set_adapter(["first", "second"])
    with pytest.raises(ExportError, match=r"one adapter at a time, and \['first', 'second'\] act"):
        graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="inputs")
    for way in ("baked", "merged"):
        graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / f"{way}.pt2", adapters=way)


def test_what_is_merged_in_place_is_exported_so_and_is_no_input(tmp_path):
    model = HAND_WRITTEN.adapted()
    expected = HAND_WRITTEN.output(model)
    model.merge_adapter(["first"])
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for way in ("merged", "baked"):
        graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / f"{way}.pt2", adapters=way)
        assert close(program(tmp_path / f"{way}.pt2")(HAND_WRITTEN.tensor()), expected)
    with pytest.raises(ExportError, match=r"merged into the weights; call unmerge_adapter\(\)"):
        graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="inputs")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_an_optimized_model_is_exported_as_it_was_written(tmp_path):
    model = HAND_WRITTEN.adapted()
    graphpeft.optimize(model)
    for way in ("baked", "inputs", "rows"):
        graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / f"{way}.pt2", adapters=way)


def test_each_call_of_a_shared_weight_has_inputs_of_its_own(tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    x = torch.randn(3, 4)
    model = graphpeft.trace(Twice().eval(), (x,))
    graphpeft.get_peft_model(model, graphpeft.LoraPerCallConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    graphpeft.export(model, (x,), tmp_path / "m.pt2", adapters="inputs")
    named = load_file(tmp_path / "m.default.safetensors")
    assert {
        "base_model.model.layer.lora_A.weight.call_1",
        "base_model.model.layer.lora_A.weight.call_2",
    } <= named.keys()


@pytest.mark.quick("exporting")
def test_disabled_adapters_are_left_out(tmp_path):
    model = HAND_WRITTEN.adapted()
    model.disable_adapters()
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2")
    assert close(program(tmp_path / "m.pt2")(HAND_WRITTEN.tensor()), HAND_WRITTEN.output(HAND_WRITTEN.base()))
    graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "baked.pt2", adapters="baked")
    held = torch.export.load(tmp_path / "baked.pt2")
    assert not any("lora_" in name for name in (*held.state_dict, *held.constants))
    with pytest.raises(ExportError, match="none act"):
        graphpeft.export(model, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="inputs")


@pytest.mark.quick("exporting")
def test_an_export_by_rows_is_checked_with_rows_of_different_adapters():
    case = next(case for case in CARRIERS["rows"](HAND_WRITTEN.adapted()).cases if case.name == "a batch of adapters")
    given = case.given(Example.of((torch.randn(4, 4, 8),)))
    assert given["adapter_rows"].tolist() == [1, 0, 1, 0]


# compiled


def test_what_is_compiled_is_exported_as_the_model_inside(tmp_path):
    model = HAND_WRITTEN.adapted()
    compiled: Any = torch.compile(model, backend="eager")
    report = graphpeft.export(compiled, HAND_WRITTEN.example(), tmp_path / "m.pt2", adapters="inputs")
    assert list(report.inputs) == ["x"]
    again = graphpeft.export_adapter(compiled, "second", tmp_path / "m.pt2", tmp_path / "again.safetensors")
    assert again.read_bytes() == report.adapter_files["second"].read_bytes()


def test_a_compiled_program_isnt_compiled_again_for_another_adapter(tmp_path):
    model = TIMM_VIT.adapted()
    report = graphpeft.export(model, TIMM_VIT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    counter = CompileCounter()
    compiled = torch.compile(program(tmp_path / "m.pt2"), fullgraph=True, backend=counter)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        with torch.no_grad():
            found = compiled(TIMM_VIT.tensor(), adapters=load_file(report.adapter_files[name]))
        assert close(found, TIMM_VIT.output(model))
    assert counter.frame_count == 1


def test_a_compiled_model_keeps_the_code_of_each_adapter_that_it_has_had():
    model = TIMM_VIT.adapted()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    with torch.no_grad():
        for name in ("first", "second", "first", "second", "first"):
            model.set_adapter(name)
            assert close(compiled(TIMM_VIT.tensor()), TIMM_VIT.output(model))
            counts.append(counter.frame_count)
    assert counts[2:] == [counts[2]] * 3


def test_a_compiled_model_isnt_compiled_again_where_values_are_swapped_in_place(tmp_path):
    model = TIMM_VIT.adapted(("first",))
    other = TIMM_VIT.adapted(("other",))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * parameter.requires_grad
    other.save_pretrained(tmp_path)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        compiled(TIMM_VIT.tensor())
        before = counter.frame_count
        graphpeft.hotswap_adapter(model, tmp_path / "other", "first")
        assert close(compiled(TIMM_VIT.tensor()), TIMM_VIT.output(other))
    assert counter.frame_count == before


def test_inputs_are_sorted_by_name_since_compiled_packages_go_by_order(tmp_path):
    report = graphpeft.export(BERT.adapted(), BERT.example(), tmp_path / "m.pt2", adapters="inputs", check=False)
    spec = torch.export.load(tmp_path / "m.pt2").call_spec.in_spec
    assert spec is not None
    [adapters] = [child for child in spec.child(1).children() if child.context]
    assert list(adapters.context) == sorted(load_file(report.adapter_files["first"]))


class OnChangedWeights(nn.Module):
    """Can't be traced, and reads weights of its own and of a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.inside = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x, **options):
        y = torch.nn.functional.linear(x, self.w) if type(x) is torch.Tensor or options.get("any", True) else x
        return torch.nn.functional.linear(y, self.inside.weight)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OnChangedWeights()])

    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize(("format", "way"), [("pt2", "baked"), ("pt2", "inputs"), ("onnx", "inputs")])
def test_a_module_that_runs_on_changed_weights_is_exported_inside_others(format, way, tmp_path):
    config = graphpeft.LoraConfig(r=2, lora_alpha=3, target_parameters=["w", "inside.weight"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(Around(), config)
    assert any(row.site.own_code for row in model.adapter_report().adapted)
    report = graphpeft.export(model, (torch.randn(3, 4),), tmp_path / f"m{SUFFIXES[format]}", format, way)
    assert len(report.checked) == 3


def test_an_adapted_module_is_known_by_the_object_that_the_exporter_gives_for_it():
    model: Any = graphpeft.get_peft_model(Around(), graphpeft.LoraConfig(r=2, target_parameters=["w"]))
    block = model.layers[0]
    # as PyTorch's exporter makes it for code that reads a submodule
    derived: Any = type(type(block).__name__, (proxy_tensor._AttrProxy, type(block)), {})
    seen = object.__new__(derived)
    seen.__dict__ = block.__dict__
    assert in_place.layers_of(seen) == in_place.layers_of(block) != ()
    assert in_place.original_class(seen) is OnChangedWeights
