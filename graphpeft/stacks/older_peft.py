"""PEFT's files of LoRA of experts' stacks before version 0.19, whose factors are the other way round.

    before 0.19:  ΔW_e = (B_e A_e)ᵀ      A of shape (experts · r, rows), B of shape (columns, r · experts)
    since 0.19:   ΔW_e = B_e A_e         A of shape (experts · r, columns), B of shape (rows, r · experts)

Where a stack's matrices aren't square, the shapes tell which it is. Else the version in the config does, which files
have had since 0.18. Weights of a module that says `is_transposed` are of shape (in, out), and have always had the same
factors.

Source: ``ParamWrapper`` in PEFT's ``tuners/lora/layer.py``, versions 0.18.0 and 0.19.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.stacks.adapter_files import AdapterFiles, Lora, LowRank, read_lora, written_lora


def as_since_0_19(files: AdapterFiles, version: str | None, modules: Mapping[str, nn.Module]) -> AdapterFiles:
    """Returns files with the factors of stacks as they are now.

    Args:
        files: The files.
        version: The version of PEFT that the config names, or None.
        modules: The modules of the model by path.

    Raises:
        CheckpointError: If nothing tells which way round factors are.
    """
    lora = read_lora(files, modules)
    turned = {name: change for name, change in lora.parameters.items() if _is_older(name, change, version, modules)}
    if not turned:
        return files
    other = {
        name: LowRank(change.B.mT.contiguous(), change.A.mT.contiguous(), change.scale)
        for name, change in turned.items()
    }
    names = Lora({}, {**lora.parameters, **other}, {}, {}, {})
    written = written_lora(files.config, names, modules, ())
    return AdapterFiles(files.config, {**files.tensors, **written.tensors})


def _is_older(name: str, change: LowRank, version: str | None, modules: Mapping[str, nn.Module]) -> bool:
    owner, _, own = name.rpartition(".")
    shape = modules[owner].get_parameter(own).shape
    if len(shape) != 3 or change.A.dim() != 3 or getattr(modules[owner], "is_transposed", False):
        return False
    sides = change.B.shape[-2], change.A.shape[-1]
    fits, fitted = sides == shape[-2:], sides[::-1] == shape[-2:]
    if not (fits and fitted):
        return fitted
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers is None:
        raise CheckpointError(
            f"{name} has square matrices, and the adapter's config doesn't say which version of PEFT has saved it: "
            "before 0.19, the factors were the other way round. Write that version as peft_version into the config"
        )
    return (int(numbers[1]), int(numbers[2])) < (0, 19)
