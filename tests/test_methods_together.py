"""Adapters of several methods on one model: what each of them is alone, it is beside others, in every way they go."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import CONTRACTS, FIRST
from contracts.contract import Contract
from models import LLAMA
from oracle import EMBEDDING, MATRICES, Case, outputs
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from graphpeft.testing import assert_two_adapters_act_together

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}") for begins in ("fan_in_fan_out is set", "adapters are merged")
]

NAMED = {str(contract): contract for contract in CONTRACTS}

# two at one weight: methods that change it in the same way are of one kind

KINDS: dict[str, tuple[str, ...]] = {
    "a branch beside the operation": (
        *("adalora", "adamss", "c3a", "delora", "frod", "gralora", "lora", "miss", "osf", "psoft", "randlora"),
        *("tinylora", "unilora", "vblora", "vera"),
    ),
    "a sum with the weight": (
        *("deft", "fourierft", "glora", "hira", "loha", "lokr", "peanut", "pvera", "shira", "supertuning", "waveft"),
    ),
    "a map of the outputs": ("beft", "ia3", "road"),
    "a map of the inputs": ("boft", "hra", "ia3-inputs", "oft"),
    "a product with the weight so far": ("dora", "miss-bat"),
    "another tensor in the place of the weight": ("ln-tuning",),
    "no change of a weight": ("lily",),
}
OF_TABLES = [("trainable-tokens", other) for other in ("trainable-tokens", "lora", "hira", "oft")]
"""Rows of an embedding, which few methods adapt."""
OF_VARIANTS = [(variant, "lora") for variant in ("bdlora-a", "bdlora-b", "kasa", "monteclora", "velora")]


def pairs() -> Iterator[tuple[str, str]]:
    """Yields pairs of methods: each two kinds, and each kind with itself, and each method in two pairs at least."""
    turns = {kind: itertools.cycle(methods) for kind, methods in KINDS.items()}
    seen: collections.Counter[str] = collections.Counter()
    waiting = [*itertools.combinations_with_replacement(KINDS, 2)]
    while waiting:
        pair = next(turns[waiting[0][0]]), next(turns[waiting[0][1]])
        yield pair
        seen.update(pair)
        # the kinds with the methods that were in the fewest pairs come next
        rare = [kind for kind, methods in KINDS.items() if min(seen[method] for method in methods) < 2]
        waiting = waiting[1:] or ([(rare[0], rare[-1])] if rare else [])


PAIRS = [*dict.fromkeys([*pairs(), *OF_TABLES, *OF_VARIANTS])]
OF_KINDS = PAIRS[: len([*itertools.combinations_with_replacement(KINDS, 2)])]
"""One pair of methods for each two kinds."""


def test_each_method_has_a_kind_and_each_two_kinds_meet() -> None:
    kind_of = {method: kind for kind, methods in KINDS.items() for method in methods}
    assert {*kind_of, "trainable-tokens"} >= {str(contract) for contract in FIRST}
    met = {frozenset((kind_of[first], kind_of[second])) for first, second in OF_KINDS}
    assert met == {frozenset(two) for two in itertools.combinations_with_replacement(KINDS, 2)}
    times = collections.Counter(itertools.chain(*PAIRS))
    assert min(times[method] for method in kind_of) >= 2


def refusal(first: Contract, second: Contract) -> str | None:
    """Returns why two can't be active at one weight in some order, as a pattern; None if they can."""
    if first is second and "together" in first.refuses:
        return first.refuses["together"]
    for one, other in itertools.permutations((first, second)):
        if "before dora" in one.refuses and str(other) in KINDS["a product with the weight so far"]:
            return one.refuses["before dora"]
    return None


def cases_of(first: str, second: str) -> list[Case]:
    """Returns the layers that both adapt, with one weight each."""
    each = [(*contract.cases, *contract.beyond) for contract in (NAMED[first], NAMED[second])]
    return [case for case in (*MATRICES, EMBEDDING) if all(case in cases for cases in each)]


def at_layers() -> Iterator[Any]:
    """Yields pairs with the layers that they adapt in turn, and those of two kinds in half precision, too."""
    for number, pair in enumerate(PAIRS):
        cases = cases_of(*pair)
        case = cases[number % len(cases)]
        yield pytest.param(*pair, case, torch.float32, id=f"{'-'.join(pair)}-{case}")
        if pair in OF_KINDS:
            yield pytest.param(*pair, cases[0], torch.bfloat16, id=f"{'-'.join(pair)}-{cases[0]}-bfloat16")


@pytest.mark.parametrize(("first", "second", "case", "dtype"), [*at_layers()])
def test_two_at_one_weight_act_in_either_order_as_they_are_merged_and_either_can_go(
    first: str, second: str, case: Case, dtype: torch.dtype
) -> None:
    one, other = NAMED[first], NAMED[second]
    reason = refusal(one, other)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    with pytest.raises(AdaptError, match=reason) if reason else contextlib.nullcontext():
        assert_two_adapters_act_together(
            lambda: case.build().to(dtype), one.our_config(case), inputs, other.our_config(case), tolerance=1e-5
        )


@pytest.mark.parametrize("order", [("default", "lora"), ("lora", "default")], ids=" then ".join)
@pytest.mark.parametrize("method", ["lily", "ln-tuning", "trainable-tokens"])
def test_one_that_cannot_be_merged_keeps_another_from_being_merged_and_all_as_it_is(
    method: str, order: tuple[str, ...]
) -> None:
    contract = NAMED[method]
    [case, *_] = cases_of(method, "lora")
    model: Any = get_peft_model(case.build(), contract.our_config(case))
    model.add_adapter("lora", NAMED["lora"].our_config(case))
    model.set_adapter([*order])
    moved(model, 0)
    active = outputs(model, case)
    with pytest.raises(AdaptError, match=contract.refuses.get("merge") or contract.refuses["merge beside"]):
        model.merge_adapter()
    assert torch.equal(outputs(model, case), active)


# three at two layers, by other ways


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def three_adapters() -> Any:
    """Two layers with LoRA, factors on top of it, and rotations on top of these."""
    model: Any = get_peft_model(two_layers(), LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"]))
    model.add_adapter("factors", IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]))
    model.add_adapter("turned", OFTConfig(oft_block_size=3, target_modules=["0"]))
    model.set_adapter(["default", "factors", "turned"])
    moved(model, 0)
    return model


def test_passes_let_them_compute_the_same() -> None:
    model = three_adapters()
    expected = model(X)
    graphpeft.optimize(model)
    torch.testing.assert_close(model(X), expected)
    model.train()(X).sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    plain = three_adapters().train()
    plain(X).sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
def test_compiled_they_compute_the_same(backend: str) -> None:
    model = three_adapters()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize("adapters", ["merged", "baked"])
def test_exported_they_compute_the_same(adapters: str, tmp_path: Path) -> None:
    model = three_adapters()
    graphpeft.export(model, (X,), tmp_path / "model.pt2", adapters=adapters)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(X), model(X), atol=1e-5, rtol=1e-5)


# three in a Transformers model, where prompts are in front of it, too

NAMES = ("default", "second", "third")
PROMPTS: dict[str, PeftConfig] = {
    "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "encoder": PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, encoder_hidden_size=8),
}
METHODS = [*map(str, FIRST), "dora", *PROMPTS]


def groups(seed: int, times: int = 1) -> list[Any]:
    """Returns generated groups of three methods, with each method in so many of them, or in one more."""
    chosen, found = random.Random(seed), list[tuple[str, ...]]()
    for _ in range(times):
        order = chosen.sample(METHODS, len(METHODS))
        found += zip(*[iter([*order, *order[: -len(order) % 3]])] * 3, strict=True)
    return [pytest.param(group, id="-".join(group)) for group in found]


class Together:
    """A Llama with an adapter of each of some methods, in evaluation, with values that differ from the first ones.

    Args:
        methods: The methods.

    Attributes:
        model: The model.
        names: The adapters' names.
        alone: What each computes alone, and the base, as ``"__base__"``.
    """

    def __init__(self, methods: tuple[str, ...]) -> None:
        self.methods, self.names = methods, NAMES[: len(methods)]
        self.alone = {"__base__": logits(LLAMA.build())}
        self.model: Any = LLAMA.build()
        for number, (name, method) in enumerate(zip(self.names, methods, strict=True)):
            torch.manual_seed(number)
            config = PROMPTS[method] if method in PROMPTS else NAMED[method].our_config()
            if number:
                self.model.add_adapter(name, copy.deepcopy(config))
            else:
                self.model = get_peft_model(self.model, copy.deepcopy(config))
            self.model.set_adapter(name)
            moved(self.model, number)
            self.alone[name] = logits(self.model)
            assert not torch.allclose(self.alone[name], self.alone["__base__"], atol=1e-4)

    def activated(self) -> bool:
        """Activates all; returns False if they can't act together, where the model stays as it is."""
        self.model.set_adapter("default")
        try:
            self.model.set_adapter([*self.names])
        except AdaptError:
            assert torch.equal(logits(self.model), self.alone["default"])
            return False
        return True


def moved(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    model.eval()


def logits(model: nn.Module, ids: Tensor | None = None, **options: Any) -> Tensor:
    given = torch.randint(3, 20, (4, 5), generator=torch.Generator().manual_seed(0)) if ids is None else ids
    with torch.no_grad():
        # a prompt has positions in front
        return model(input_ids=given, **options).logits[:, -given.shape[1] :]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def assert_each_is_what_it_was(together: Together, model: Any) -> None:
    for name in together.names:
        model.set_adapter(name)
        assert torch.equal(logits(model), together.alone[name]), name
    with model.disable_adapter():
        assert torch.equal(logits(model), together.alone["__base__"])


@pytest.mark.parametrize("methods", groups(0, times=2))
def test_they_act_together_and_each_stays_what_it_is(methods: tuple[str, ...], tmp_path: Path) -> None:
    together = Together(methods)
    model = together.model
    assert_each_is_what_it_was(together, model)
    active = logits(model) if together.activated() else None
    with model.disable_adapter():
        assert torch.equal(logits(model), together.alone["__base__"])
    assert_each_is_what_it_was(together, model)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    for name in together.names[1:]:
        again.load_adapter(tmp_path / name, name)
    assert_each_is_what_it_was(together, again.eval())
    if active is not None:
        for each in (model, again):
            each.set_adapter([*together.names])
            assert torch.equal(logits(each), active)
    for gone, left in itertools.pairwise(together.names):
        again.set_adapter(left)
        again.delete_adapter(gone)
        assert torch.equal(logits(again), together.alone[left])
    assert torch.equal(logits(again.unload()), together.alone["__base__"])


@pytest.mark.parametrize("methods", groups(1, times=2))
def test_merged_they_are_what_they_are_active(methods: tuple[str, ...]) -> None:
    together = Together(methods)
    model = together.model
    if not together.activated():
        return
    active = logits(model)
    try:
        model.merge_adapter()
    except AdaptError:
        assert torch.equal(logits(model), active)
    else:
        assert_close(logits(model), active)
        model.unmerge_adapter()
        assert torch.equal(logits(model), active)
    assert_each_is_what_it_was(together, model)
    model.set_adapter([*together.names])
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except AdaptError:
        return
    assert_close(logits(merged), active)


@pytest.mark.parametrize("methods", groups(2))
def test_rows_of_a_batch_have_those_of_different_methods(methods: tuple[str, ...]) -> None:
    together = Together(methods)
    rows = [*together.names, "__base__", "default"][-4:]
    if any(method in PROMPTS or "rows" in NAMED[method].refuses for method in methods):
        with pytest.raises(AdaptError, match=r"one of several in a batch|depends on all rows"):
            logits(together.model, adapter_names=rows)
        assert_each_is_what_it_was(together, together.model)
        return
    found = logits(together.model, adapter_names=rows)
    for row, name in enumerate(rows):
        assert_close(found[row], together.alone[name][row])


@pytest.mark.parametrize("methods", groups(3))
def test_all_that_act_are_trained(methods: tuple[str, ...]) -> None:
    together = Together(methods)
    if not together.activated():
        return
    model = together.model.train()
    torch.manual_seed(0)
    ids = torch.randint(3, 20, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    for name in together.names:
        own = [p for path, p in model.named_parameters() if p.requires_grad and f".{name}." in f".{path}."]
        assert own
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in own), name


PREFIXES: dict[str, PeftConfig] = {
    "short": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
    "cartridge": CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
}


@pytest.mark.parametrize("last", [*PROMPTS, *PREFIXES])
@pytest.mark.parametrize("first", ["prefix", "cartridge"])
def test_nothing_comes_behind_a_prefix_that_reads_the_cache_which_it_has_filled(first: str, last: str) -> None:
    configs = PROMPTS | PREFIXES
    model: Any = get_peft_model(LLAMA.build(), copy.deepcopy(configs[first]))
    model.add_adapter("second", copy.deepcopy(configs[last]))
    expected = logits(model)
    with pytest.raises(AdaptError, match=r"'second' can't act behind 'default', which changes .*; name 'default' last"):
        model.set_adapter(["default", "second"])
    assert torch.equal(logits(model), expected)
    if last not in ("prompt", "encoder"):
        return
    model.set_adapter(["second", "default"])
    moved(model, 0)
    active = logits(model)
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model), active, atol=1e-4)
