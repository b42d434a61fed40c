"""The principal directions of rows that come in batches.

    [S V; X − mean(X); shift of the mean] = U S' V'ᵀ           S, V: before;  S', V': with the rows X of one more batch

Source: Ross et al., "Incremental Learning for Robust Visual Tracking"; the same numbers as PEFT's
``utils/incremental_pca.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SEED = 42


class IncrementalPca:
    """The principal directions of all rows so far.

    Attributes:
        components: The directions, (count, features); None before the first rows.
        singular_values: Their singular values, (count,).
        explained: The share of the variance that each explains, (count,).
        is_stable: Whether each was the same before the last rows, (count,).
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.components: Tensor | None = None
        self.singular_values = self.explained = torch.zeros(0)
        self.is_stable = torch.zeros(count, dtype=torch.bool)
        self._mean = self._variance = self._seen = torch.zeros(1)

    def add(self, rows: Tensor) -> bool:
        """Adds rows, (number, features), and returns whether they were enough: as many as directions."""
        if len(rows) < self.count:
            return False
        before = self.components
        self._fit(rows.to(torch.float32, copy=True))
        if before is not None and self.components is not None:
            self.is_stable = F.cosine_similarity(self.components, before) >= self.tau
        return True

    def _fit(self, rows: Tensor) -> None:
        added = torch.tensor([len(rows)], device=rows.device)
        sums = rows.sum(dim=0, dtype=torch.float64)
        centred = rows - sums / added
        correction = centred.sum(dim=0, dtype=torch.float64).square()
        spread = centred.square().sum(dim=0, dtype=torch.float64) - correction / added
        if self.components is None:
            total, mean, variance = added, sums / added, spread / added
            # in single precision, and later in double: the random numbers of a decomposition depend on that
            stacked = (rows - mean).to(rows.dtype)
        else:
            seen = self._seen
            total = seen + added
            old_sums, ratio = self._mean * seen, seen.double() / added
            spread = self._variance * seen + spread + ratio / total * (old_sums / ratio - sums).square()
            mean, variance = (old_sums + sums) / total, spread / total
            own_mean = rows.mean(dim=0)
            shift = torch.sqrt((seen.double() / total) * len(rows)) * (self._mean - own_mean)
            stacked = torch.vstack((self.singular_values.view(-1, 1) * self.components, rows - own_mean, shift))
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(_SEED)
            _, S, V = torch.svd_lowrank(stacked, q=2 * self.count, niter=4)
        Vt = V.mH
        signs = torch.sign(Vt[torch.arange(len(Vt)), Vt.abs().argmax(dim=1)])
        self.components = (Vt * signs.view(-1, 1))[: self.count]
        self.singular_values = S[: self.count]
        self.explained = (S**2 / torch.sum(variance * total))[: self.count]
        self._mean, self._variance, self._seen = mean, variance, total
