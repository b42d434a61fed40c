"""The model card in an adapter's folder has the metadata that PEFT gives it, and keeps what somebody has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import ModelCard
from models import BERT, GPT2, LLAMA, MLP, Example
from transformers import Trainer, TrainingArguments

import graphpeft
from graphpeft import CheckpointError, trace

pytestmark = [
    # what PEFT warns of is PEFT's
    pytest.mark.filterwarnings("ignore:::peft"),
    # the bases here are on no Hub
    pytest.mark.filterwarnings("ignore:the config of owner/.* can't be read"),
    pytest.mark.quick("model", "files"),
]

MINE = """\
---
license: mit
tags:
- mine
- 7
datasets:
- my/data
pipeline_tag: text2text-generation
key: [1, 2.5]
---

# Mine

Words.

### Framework versions

- Transformers 5.0
"""


def named(example: Example, name: str = "owner/base") -> Any:
    model: Any = example.build()
    model.name_or_path = model.config._name_or_path = name
    return model


def adapted(library: Any, model: Any, **options: Any) -> Any:
    return library.get_peft_model(model, library.LoraConfig(r=2, **options))


def card_in(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def metadata(folder: Path) -> dict[str, Any]:
    return card_in(folder).data.to_dict()


def saved(model: Any, folder: Path, readme: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if readme is not None:
        (folder / "README.md").write_text(readme, newline="")
    model.save_pretrained(str(folder))
    return folder


def tagged(example: Example) -> Any:
    model = named(example)
    model.add_model_tags(["of-the-model", "a-tag"])
    return model


CASES: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
    ("a model of one's own", MLP.build, {"target_modules": ["up"]}),
    ("a Llama that generates", lambda: named(LLAMA), {"task_type": "CAUSAL_LM"}),
    ("a Llama without a task", lambda: named(LLAMA), {}),
    ("a Llama with tags", lambda: tagged(LLAMA), {"task_type": "CAUSAL_LM"}),
    ("a BERT", lambda: named(BERT), {"task_type": "FEATURE_EXTRACTION"}),
    ("a GPT-2", lambda: named(GPT2), {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
]
each_case = pytest.mark.parametrize(("build", "options"), [pytest.param(*case[1:], id=case[0]) for case in CASES])


@each_case
def test_a_new_card_has_pefts_metadata(build: Callable[[], Any], options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (
        metadata(saved(adapted(library, build(), **options), tmp_path / library.__name__))
        for library in (graphpeft, peft)
    )
    assert ours == theirs


@each_case
def test_a_card_that_is_there_gets_pefts_metadata_and_keeps_its_own(
    build: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = (
        metadata(saved(adapted(library, build(), **options), tmp_path / library.__name__, MINE))
        for library in (graphpeft, peft)
    )
    assert ours.pop("tags") == ["mine", 7, *theirs.pop("tags")]  # which PEFT replaces
    assert ours == theirs
    assert ours["license"] == "mit"
    assert ours["key"] == [1, 2.5]
    assert ours["pipeline_tag"] == "text2text-generation"


def test_the_texts_are_pefts_with_a_sentence_of_what_it_is(tmp_path: Path) -> None:
    ours, theirs = (
        card_in(saved(adapted(library, named(LLAMA)), tmp_path / library.__name__)).text
        for library in (graphpeft, peft)
    )
    lines, expected = ([line for line in text.splitlines() if line] for text in (ours, theirs))
    assert set(lines) - set(expected) == {"A LORA adapter, saved by graphpeft in the format of Hugging Face PEFT."}
    assert [line for line in lines if line in expected] == expected


def test_the_text_of_a_card_stays_but_for_the_version(tmp_path: Path) -> None:
    text = card_in(saved(adapted(graphpeft, named(LLAMA)), tmp_path, MINE)).text
    assert text == MINE.partition("---\n\n")[2].join(["\n", ""]).replace(
        "- Transformers 5.0", f"- PEFT {peft.__version__}\n- Transformers 5.0"
    )


@pytest.mark.parametrize("text", ["mine", "", "# Mine\r\n\r\nWords.\r\n", "ü 模型\n---\nrest\n"])
def test_a_text_without_metadata_gets_them(text: str, tmp_path: Path) -> None:
    saved(adapted(graphpeft, named(LLAMA)), tmp_path, text)
    card = card_in(tmp_path)
    assert card.data.base_model == "owner/base"
    assert card.text.strip().startswith(text.strip())


@pytest.mark.parametrize("readme", [None, MINE, "mine", MINE.replace("\n", "\r\n")])
def test_a_card_that_is_completed_again_is_the_same(readme: str | None, tmp_path: Path) -> None:
    model = adapted(graphpeft, named(LLAMA), task_type="CAUSAL_LM")
    saved(model, tmp_path, readme)
    first = (tmp_path / "README.md").read_bytes()
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first
    returns, ends = first.count(b"\r"), first.count(b"\n")
    assert returns == (ends if readme is not None and "\r" in readme else 0)


def test_the_card_alone_is_written_by_its_method(tmp_path: Path) -> None:
    adapted(graphpeft, named(LLAMA)).create_or_update_model_card(str(tmp_path / "new"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["README.md"]
    assert metadata(tmp_path / "new")["base_model"] == "owner/base"


def test_another_base_and_another_method_take_the_places_of_the_old_ones(tmp_path: Path) -> None:
    saved(adapted(graphpeft, named(LLAMA)), tmp_path, MINE)
    config = graphpeft.PromptTuningConfig(task_type=graphpeft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    other: Any = graphpeft.get_peft_model(named(LLAMA, "owner/other"), config)
    tags = ["mine", 7, "base_model:adapter:owner/other", "prompt_tuning", "transformers"]
    assert metadata(saved(other, tmp_path))["tags"] == tags
    assert metadata(tmp_path)["base_model"] == "owner/other"


def test_a_card_has_the_methods_of_all_adapters_in_the_folder(tmp_path: Path) -> None:
    model = adapted(graphpeft, named(LLAMA))
    model.add_adapter(
        "other", graphpeft.PromptTuningConfig(task_type=graphpeft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    )
    assert {"lora", "prompt_tuning"} < set(metadata(saved(model, tmp_path / "both"))["tags"])
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert "lora" not in metadata(tmp_path / "one")["tags"]


def test_a_base_without_a_name_is_not_named(tmp_path: Path) -> None:
    """PEFT writes an empty name, and a tag that ends behind its colon."""
    found = metadata(saved(adapted(graphpeft, LLAMA.build()), tmp_path, "---\nbase_model: mine\n---\n"))
    assert found["base_model"] == "mine"
    assert found["tags"] == ["lora", "transformers"]


@pytest.mark.quick("model")
@pytest.mark.parametrize(
    "name",
    [
        "meta/llama",
        "x\nlicense: mit\ntags:\n- evil",
        "x\n---\n# A title",
        "a: b # no comment",
        "'\"`*[x](y)",
        "- x",
        "null",
        "1.5",
        "ü 模型",
    ],
)
def test_a_model_card_names_any_base_and_nothing_else(name: str, tmp_path: Path) -> None:
    base: Any = MLP.build()
    unnamed_base: Any = MLP.build()
    base.config, unnamed_base.config = {"hidden_size": 8}, {"hidden_size": 8}
    model = adapted(graphpeft, base, target_modules=["up"], base_model_name_or_path=name)
    unnamed = adapted(graphpeft, unnamed_base, target_modules=["up"])
    card, other = card_in(saved(model, tmp_path / "named")), card_in(saved(unnamed, tmp_path / "unnamed"))
    tags = sorted([f"base_model:adapter:{name}", "lora"])
    assert card.data.to_dict() == {"base_model": name, "library_name": "peft", "tags": tags}
    assert other.data.to_dict() == {"library_name": "peft", "tags": ["lora"]}
    assert card.text == other.text


@pytest.mark.parametrize("library", [graphpeft, peft])
def test_the_card_of_a_model_without_a_config_names_no_base(library: Any, tmp_path: Path) -> None:
    model = adapted(library, MLP.build(), target_modules=["up"], base_model_name_or_path="my model")
    assert metadata(saved(model, tmp_path)) == {"library_name": "peft", "tags": ["lora"]}


def test_a_traced_model_has_the_card_of_its_model(tmp_path: Path) -> None:
    model = adapted(graphpeft, named(LLAMA), target_modules=["q_proj"])
    traced = trace(named(LLAMA), LLAMA.inputs())
    of_traced = adapted(graphpeft, traced, target_modules=["q_proj"], base_model_name_or_path="owner/base")
    assert metadata(saved(of_traced, tmp_path / "traced")) == metadata(saved(model, tmp_path / "model"))


@pytest.mark.parametrize("metadata", ["a: [", "- a", "tags: 3", "1: 2", "model-index: 3", "a: \x00"])
def test_a_card_whose_metadata_cannot_be_read_is_refused_and_nothing_is_written(metadata: str, tmp_path: Path) -> None:
    model, text = adapted(graphpeft, named(LLAMA)), f"---\n{metadata}\n---\nmine"
    with pytest.raises(
        CheckpointError, match=r"README\.md isn't a model card that can be completed: .*mend or move it"
    ):
        saved(model, tmp_path, text)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("README.md", text)]


def test_the_card_of_a_trainer_is_completed_as_pefts_is(tmp_path: Path) -> None:
    cards = []
    for library in (graphpeft, peft):
        folder = str(tmp_path / library.__name__)
        model = adapted(library, named(LLAMA), task_type="CAUSAL_LM")
        trainer = Trainer(model, TrainingArguments(folder, report_to=[], use_cpu=True))
        model.save_pretrained(folder)
        trainer.create_model_card(model_name="name", tags="of-the-trainer")
        cards.append(metadata(Path(folder)))
    ours, theirs = cards
    assert set(ours.pop("tags")) == {*theirs.pop("tags"), "of-the-trainer", "generated_from_trainer"}
    assert ours == theirs
