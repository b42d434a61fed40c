"""What each method has to be equal in to PEFT's, a module for each: `test_contracts.py` has the tests of them all."""

import importlib
import pkgutil

from contracts.contract import Contract

CONTRACTS: list[Contract] = [
    contract
    for module in pkgutil.iter_modules(__path__)
    if module.name != "contract"
    for contract in importlib.import_module(f"{__name__}.{module.name}").CONTRACTS
]
"""All of them."""

FIRST: list[Contract] = list({contract.method: contract for contract in reversed(CONTRACTS)}.values())[::-1]
"""The first one of each method."""
