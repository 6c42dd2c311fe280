"""Public names that are imported on first use (PEP 562), so that importing a package is instant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def import_lazily(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """Make a package's ``__getattr__``.

    Args:
        package: The package's ``__name__``.
        modules: Module in the package to the public names that it defines; a module that is public itself has none.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> object:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
