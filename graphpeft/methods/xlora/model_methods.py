"""The methods of a model in which X-LoRA acts: they tell its scalings, and set how these are used."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class XLoraMethods:
    """Methods of PEFT's that a model has while an adapter of X-LoRA is active.

    Args:
        config: The adapter's config.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    def get_latest_scalings(self) -> Tensor | None:
        """Returns the scalings of the last call, (rows, positions, layers, experts); None before any."""
        return self._config.log.latest

    def enable_scalings_logging(self) -> None:
        """Lets the scalings of each call be logged."""
        self._config.log.is_on = True

    def disable_scalings_logging(self) -> None:
        """Ends that; the log stays."""
        self._config.log.is_on = False

    def clear_scalings_log(self) -> None:
        """Empties the log."""
        self._config.log.every.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """Returns the logged scalings of all calls, each of shape (rows, positions, layers, experts)."""
        return list(self._config.log.every)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Returns the logged scalings, each with its place in the log, by their number of positions."""
        return self._config.log.by_length()

    def set_topk_lora(self, value: int | None) -> None:
        """Sets how many experts a token keeps at a layer.

        Args:
            value: The number; None for all.

        Raises:
            ValueError: If there are fewer.
        """
        self._config.check_count(value)
        self._config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Sets by what all experts are multiplied.

        Args:
            weight: The number.
        """
        self._config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """Returns by what all experts are multiplied."""
        return self._config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Sets all scalings of the first run.

        Args:
            value: The number; None for the same share of each expert.
        """
        self._config.scaling_pass_value = 1 / len(self._config.adapters or ("",)) if value is None else value
