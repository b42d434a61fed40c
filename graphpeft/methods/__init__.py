"""The methods, one file each: a config and its rules. Importing this package registers them all."""

import importlib
import pkgutil

for _method in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_method.name}")
