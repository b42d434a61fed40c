"""The model card of an adapter, `README.md` in its folder, which the Hub shows."""

from __future__ import annotations

from graphpeft.rules.config import PeftConfig
from graphpeft.rules.peft_names import PeftType


def model_card(config: PeftConfig) -> str:
    """Returns the text of an adapter's model card."""
    from huggingface_hub import ModelCard, ModelCardData

    is_of_peft = config.method in list(PeftType)
    data = ModelCardData(
        base_model=config.base_model_name_or_path or None,
        library_name="peft" if is_of_peft else "graphpeft",
        tags=[config.method.lower()],
    )
    how = "in the format of Hugging Face PEFT" if is_of_peft else "which alone can load it: PEFT has no such method"
    text = f"A {config.method} adapter, saved by graphpeft{' ' if is_of_peft else ', '}{how}."
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))
