"""Methods that run a part of the model twice, draw, or change while they train, under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from experts import experts
from models import LLAMA, Example, llama_config
from oracle import assert_close, perturb
from torch import Tensor
from torch._inductor import config as inductor_config
from transformers import LlamaForCausalLM

from graphpeft import (
    AdaLoraConfig,
    LoraConfig,
    MontecloraConfig,
    PolyConfig,
    ShadowConfig,
    TaskType,
    XLoraConfig,
    get_peft_model,
)

SMALL = Example(
    "llama",
    lambda: LlamaForCausalLM(llama_config(num_hidden_layers=1)),
    LLAMA.arguments,
    LLAMA.lora,
)
"""What compiles in half the time."""

TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
TASKS = {"task_ids": torch.tensor([2, 0])}


class Method(NamedTuple):
    """A method, as it is tried.

    Attributes:
        config: Makes a config.
        inputs: Further arguments of a call.
    """

    config: Callable[[], Any]
    inputs: dict[str, Tensor] = {}  # noqa: RUF012


def _adalora() -> Any:
    return AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, lora_dropout=0.2, target_modules=TARGETS
    )


METHODS: dict[str, Method] = {
    "X-LoRA": Method(
        lambda: XLoraConfig(adapters=experts(SMALL, 0.2), xlora_dropout_p=0.3, use_trainable_adapters=True)
    ),
    "Shadow": Method(lambda: ShadowConfig(task_type=TaskType.CAUSAL_LM, r=3, init_weights=False, shadow_dropout=0.3)),
    "MonteCLoRA": Method(
        lambda: LoraConfig(
            r=4,
            lora_alpha=3,
            lora_dropout=0.2,
            target_modules=TARGETS,
            monteclora_config=MontecloraConfig(num_samples=3),
        )
    ),
    "AdaLoRA": Method(_adalora),
    "Poly": Method(lambda: PolyConfig(r=3, n_tasks=4, n_skills=3, n_splits=2, target_modules=TARGETS), TASKS),
}


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Draws the random numbers that are drawn without a compiler."""
    with inductor_config.patch(fallback_random=True):
        yield


def call(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    found = model(input_ids=IDS, labels=IDS, use_cache=False, **inputs)
    return found.logits, found.loss


def gradients(model: Any, adapted: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    adapted.zero_grad()
    call(model, inputs)[1].backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


# PyTorch's, of a tensor that goes from one graph to another
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_is_as_it_is_without(method: str, backend: str) -> None:
    torch._dynamo.reset()
    config, inputs = METHODS[method]
    model: Any = get_peft_model(SMALL.build(), config())
    perturb(model)
    model.add_adapter("second", config())
    model.set_adapter("second")
    perturb(model)
    compiled = torch.compile(model, backend=backend)
    both = ["default", "second"]
    for names, training in (("second", False), (both, True)):
        model.set_adapter(names)
        model.train(training)
        assert_close(call(compiled, inputs)[0], call(model, inputs)[0], 1e-5)
        if training:
            found, expected = gradients(compiled, model, inputs), gradients(model, model, inputs)
            assert found.keys() == expected.keys()
            assert expected
            for name, gradient in expected.items():
                assert_close(found[name], gradient, 1e-4)
    with model.eval().disable_adapter():
        assert_close(call(compiled, {})[0], call(SMALL.build(), {})[0], 1e-5)
