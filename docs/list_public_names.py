"""Write docs/api.md, the page of all public names, from their docstrings: `python docs/list_public_names.py`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType


PAGE = Path(__file__).resolve().parent / "api.md"
NAME = "diffusers_mixofshow"
MODULES = ("", "errors", "toyland", "interop", "fusion", "training", "exporting", "demo")
"""Modules whose names are promised, in the order of the page."""


def page() -> str:
    """The text of the page."""
    parts = [
        "# Public names\n\nWritten by `python docs/list_public_names.py` from the docstrings, which `help(name)` "
        "shows in full.\nWhat is not listed here may change in any release.\n"
    ]
    for name in MODULES:
        module = importlib.import_module(f"{NAME}.{name}" if name else NAME)
        rows = [f"| `{each}` | {_first_sentence(getattr(module, each))} |" for each in names_of(module)]
        table = "\n".join(["| name | what it is |", "|---|---|", *rows])
        parts.append(f"## `{module.__name__}`\n\n{_first_sentence(module)}\n\n{table}\n")
    return "\n".join(parts)


def names_of(module: ModuleType) -> list[str]:
    """A module's public names: those in its ``__all__``, else the classes that it defines."""
    own = [
        name for name, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return sorted(getattr(module, "__all__", own))


def _first_sentence(value: object) -> str:
    """The first paragraph of a docstring up to its first full stop; of a plain value, the value."""
    if not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value)):
        return f"`{value!r}`" if isinstance(value, str) else f"{len(value)} entries"  # type: ignore[arg-type]
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
