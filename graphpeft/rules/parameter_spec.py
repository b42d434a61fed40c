"""The parameters that a rule creates, as it describes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class FileForm(NamedTuple):
    """How a parameter is written in files, where that is otherwise than the model has it.

    Attributes:
        shape: Its shape there.
        pack: Returns what is written, from the parameter.
        unpack: Returns the parameter, from what is read; raises ValueError for what it can't be.

    Example:
        >>> halves = FileForm((2,), pack=lambda tensor: tensor / 2, unpack=lambda tensor: tensor * 2)
        >>> halves.unpack(halves.pack(torch.ones(2)))
        tensor([1., 1.])
    """

    shape: tuple[int, ...]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]


class ParameterSpec(NamedTuple):
    """A parameter that a rule creates at a site.

    Attributes:
        shape: Its shape.
        key: Its name in PEFT's files, behind the name of the module.
        is_trained: Whether it is trained, where the adapter is.
        form: Its form in files, if that is another one.
        scope: The name of a tensor that sites of one adapter share: those whose specs have the same scope hold one.
            `initialise` is given its values of before at each of these sites but the first. In files each site may
            have it by a key and in a form of its own.
        written_once: Whether a file has it once for all its sites, as ``base_model.<key>``, and not with each of them.
        is_saved: Whether it is in files; otherwise `initialise` makes it again, where a file is loaded, too.
        dtype: Its dtype, if that isn't the one of the adapter; whole numbers aren't trained, and ``.half()`` leaves
            them as they are.

    Example:
        >>> ParameterSpec((8, 64), "lora_A.weight").is_trained
        True
    """

    shape: tuple[int, ...]
    key: str
    is_trained: bool = True
    form: FileForm | None = None
    scope: str | None = None
    written_once: bool = False
    is_saved: bool = True
    dtype: torch.dtype | None = None
