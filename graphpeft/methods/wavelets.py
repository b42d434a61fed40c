"""Wavelets: the filters of each, and one step of synthesis, which makes matrices of coefficients.

L D Lᵀ        D: coefficients of averages and of differences of rows and of columns, in four bands
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from graphpeft.graph.recorded import recorded
from graphpeft.methods.placed import placed


def band(size: int, length: int) -> int:
    """Returns the number of coefficients from which a step of synthesis makes one dimension of a matrix."""
    return (size + length - 1) // 2


def filters_of(wavelet: str) -> tuple[list[float], list[float]]:
    """Returns the filters by which coefficients of averages and of differences become values."""
    if wavelet == "db1":
        half = 0.5**0.5
        return [half, half], [half, -half]
    pywt: Any = importlib.import_module("pywt")
    made = pywt.Wavelet(wavelet)
    return made.rec_lo, made.rec_hi


@recorded
def synthesised(spectrum: Tensor, places: Tensor, filters: Tensor | None, rows: int, columns: int) -> Tensor:
    """Returns matrices that have coefficients of wavelets, or elements, at some places.

    Args:
        spectrum: The coefficients, (…, n).
        places: Their places, counted row by row, and band by band if there are filters, (n,).
        filters: The filters, (2, length); None for elements.
        rows: The number of the matrices' rows.
        columns: The number of their columns.
    """
    if filters is None:
        return placed(spectrum, places, rows * columns)
    length = filters.shape[1]
    high, wide = band(rows, length), band(columns, length)
    bands = placed(spectrum.reshape(-1, spectrum.shape[-1]), places, 4 * high * wide).view(-1, 2, high, wide)
    # as PEFT has it: two bands beside each other are averages and differences of rows, two below each other of columns
    kernel = filters.view(2, length // 2, 2).flip(1)
    made = torch.einsum("nbqwj,bjp->nqpw", bands.unfold(2, length // 2, 1), kernel).flatten(1, 2)[:, :rows]
    made = made.reshape(-1, 2, rows, wide)
    made = torch.einsum("narqj,ajp->nrqp", made.unfold(3, length // 2, 1), kernel).flatten(2)
    return made[..., :columns]
