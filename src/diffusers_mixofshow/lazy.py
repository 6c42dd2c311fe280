"""Public names that are imported on first use (PEP 562), so that importing a package is instant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module


def import_lazily(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """Make a package's ``__getattr__``.

    Args:
        package: The package's ``__name__``.
        modules: Module in the package to the public names that it defines; a module that is public itself has none.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in homes and name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with _hide_torchvision_hints():
            module = import_module(f"{package}.{homes.get(name, name)}")
        return getattr(module, name) if name in homes else module

    return __getattr__


@contextmanager
def _hide_torchvision_hints() -> Iterator[None]:
    """Hide transformers' hint that image processors need torchvision; this package does not use them."""
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(_is_no_torchvision_hint)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_torchvision_hint)


def _is_no_torchvision_hint(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
