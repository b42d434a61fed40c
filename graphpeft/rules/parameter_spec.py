"""A rule's descriptions of the parameters that it creates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class FileForm(NamedTuple):
    """The form of a parameter in files, where it differs from the form in the model.

    Attributes:
        shape: The shape in files.
        pack: Converts the parameter to the tensor for the file.
        unpack: Converts the file's tensor to the parameter; raises ValueError for a tensor that can't be one.
        other_shapes: Further shapes in files that `unpack` takes.

    Examples:
        >>> halves = FileForm((2,), pack=lambda tensor: tensor / 2, unpack=lambda tensor: tensor * 2)
        >>> halves.unpack(halves.pack(torch.ones(2)))
        tensor([1., 1.])
    """

    shape: tuple[int, ...]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    other_shapes: tuple[tuple[int, ...], ...] = ()


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that is packed as it is."""
    return tensor


class RankAxis(NamedTuple):
    """Where a factor of a product has the rank: which of its dimensions, and in how many blocks.

    Attributes:
        axis: The dimension.
        blocks: How many products have their ranks in it, each as many.
        interleaved: Whether the first ranks of all blocks come first, then all second ones; else block follows block.

    Examples:
        >>> RankAxis(1).first(torch.ones(6, 2)).shape
        torch.Size([1, 2, 6])
    """

    axis: int
    blocks: int = 1
    interleaved: bool = False

    @property
    def plain(self) -> tuple[int, int, bool]:
        """The same as a plain tuple, which a file may hold."""
        return self.axis, self.blocks, self.interleaved

    def first(self, factor: torch.Tensor) -> torch.Tensor:
        """Returns a view of a factor with the blocks as its first dimension, and the rank as its second.

        Args:
            factor: The factor, or its gradient.
        """
        sizes = (-1, self.blocks) if self.interleaved else (self.blocks, -1)
        parted = factor.unflatten(self.axis, sizes)
        return parted.movedim((self.axis + self.interleaved, self.axis + (not self.interleaved)), (0, 1))

    def resized(self, factor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Returns a factor in a shape of another rank, without its last ranks or with zeros behind them.

        Args:
            factor: The factor.
            shape: The new shape.
        """
        made = factor.new_zeros(shape)
        to, of = self.first(made), self.first(factor)
        kept = min(to.shape[1], of.shape[1])
        to[:, :kept] = of[:, :kept]
        return made


class ParameterSpec(NamedTuple):
    """A parameter that a rule creates at a site.

    Attributes:
        shape: The shape in the model.
        key: The name in PEFT's files, after the name of the module.
        is_trained: Whether the parameter is trained when the adapter is. If not, it is a buffer, unless it is counted.
        form: The form in files, if it differs.
        scope: A name for a tensor that sites of one adapter share: sites with the same scope hold one tensor. At each
            such site but the first, `initialise` gets the tensor with its values. In files, each site may have a key
            and a form of its own.
        written_once: Whether a file has the parameter once for all sites, as ``base_model.<key>``.
        copied: Whether a file has a copy at each site, too, of a parameter that is written once. Files without copies
            are read as well.
        is_saved: Whether files have the parameter; if not, `initialise` computes it again after loading.
        dtype: The dtype, if it isn't the adapter's; integers aren't trained, and ``.half()`` doesn't convert them.
        rank: Where the rank is, if the parameter is a factor of a product whose rank the config chooses: more ranks,
            with zeros in them, would change nothing.
        is_counted: Whether it is counted among the model's parameters though it isn't trained, as PEFT counts it; a
            frozen factor with a `rank` always is.
        path: Its path in the module that holds the adapter's tensors there, as ``embedding.weight``; the rule's name
            for it if None.

    Examples:
        >>> ParameterSpec((8, 64), "lora_A.weight").is_trained
        True
    """

    shape: tuple[int, ...]
    key: str
    is_trained: bool = True
    form: FileForm | None = None
    scope: str | None = None
    written_once: bool = False
    copied: bool = False
    is_saved: bool = True
    dtype: torch.dtype | None = None
    rank: RankAxis | None = None
    is_counted: bool = False
    path: str | None = None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter of a module, and not a buffer."""
        return self.is_trained or self.rank is not None or self.is_counted


class Dropout(float):
    """The probability of a dropout at a branch's input: a constant that an adapter holds as an ``nn.Dropout``.

    So code that looks for such modules, to switch dropout off or on, finds it, as in PEFT.
    """
