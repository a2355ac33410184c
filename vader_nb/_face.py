"""A package whose public names are imported on first use."""

import importlib
import sys
from types import ModuleType


def install(package: str, homes: dict[str, str], modules: tuple[str, ...] = ()) -> None:
    """Let `package.name` come from the submodule homes[name]; `modules` are reachable as they are.

    A submodule may bear the name of what it holds (`align` holds `align`). Python binds a submodule to its
    package's attribute when it is imported; here such a name is bound to what the submodule holds instead.
    """

    class Face(ModuleType):
        def __getattr__(self, name):
            if name in modules:
                return importlib.import_module(f".{name}", package)
            if name not in homes:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(importlib.import_module(f".{homes[name]}", package), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name, value):
            if isinstance(value, ModuleType) and homes.get(name) == name:
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self):
            return sorted({*vars(self), *homes, *modules})

    sys.modules[package].__class__ = Face
