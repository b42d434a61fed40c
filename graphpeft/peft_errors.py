"""The bases of this library's errors and warnings, with PEFT's names."""

from __future__ import annotations


class PeftError(Exception):
    """The base of the errors about adapters.

    Examples:
        >>> try:
        ...     get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["1"]))
        ... except PeftError as error:
        ...     print(type(error).__name__)
        NoMatchingPeftModuleError
    """


class PeftWarning(UserWarning):
    """The class of this library's warnings.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("error", PeftWarning)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> try:
        ...     model.unmerge_adapter()
        ... except PeftWarning as warning:
        ...     print(warning)
        no adapter is merged, so there is nothing to unmerge
    """
