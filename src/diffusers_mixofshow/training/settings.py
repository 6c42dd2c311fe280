"""Read name, types, default and documentation of each field from a settings dataclass.

Command-line options, configuration files and error messages are made from these, so that a new field needs no other
code.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Real
from typing import Any, Union, get_args, get_origin, get_type_hints


NOTHING = ("none", "null", "~", "")
"""Texts that mean None, for settings that can be None."""

_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a settings dataclass.

    Args:
        name: The field's name.
        types: Types of its values, such as ``(int,)`` or ``(str, Path)``, without None.
        can_be_none: Whether None is allowed.
        default: The default, or `dataclasses.MISSING`.
        documentation: The field's entry in the class's docstring, on one line; empty under ``python -OO``.
    """

    name: str
    types: tuple[Any, ...]
    can_be_none: bool
    default: Any
    documentation: str

    @property
    def option(self) -> str:
        """The option on the command line, such as ``--class-word``."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of values."""
        return any(get_origin(kind) is tuple for kind in self.types)

    @property
    def expected(self) -> str:
        """The types in words, as the source spells them."""
        names = [str(kind) if get_origin(kind) else kind.__name__ for kind in self.types]
        return " | ".join([*names, *(["None"] if self.can_be_none else [])])

    def accepts(self, value: object) -> bool:
        """Whether a value is of one of the types; an int is a float as well, but True is no number."""
        if value is None:
            return self.can_be_none
        return any(_is_a(value, kind) for kind in self.types)

    def normalise(self, value: object) -> object:
        """Convert a list, or a single text for a setting that is a list, to a tuple; other values stay."""
        if self.is_list and isinstance(value, str | list):
            return (value,) if isinstance(value, str) else tuple(value)
        return value

    def to_plain(self, value: Any) -> Any:
        """Convert a number of another library, such as NumPy, to Python's own, which JSON and checkpoints hold."""
        if float in self.types and isinstance(value, Real) and not isinstance(value, int):
            return float(value)
        return value

    def from_text(self, text: str | Sequence[str]) -> Any:
        """Read a value from text, or from a list of texts if the setting is a list.

        A text that fits no type is returned unchanged, so that `accepts` can refuse it together with other defects.
        """
        if self.is_list:
            (kind,) = (get_args(kind)[0] for kind in self.types if get_origin(kind) is tuple)
            return tuple(_parse(entry, (kind,)) for entry in ([text] if isinstance(text, str) else text))
        if self.can_be_none and isinstance(text, str) and text.strip().lower() in NOTHING:
            return None
        return _parse(text, self.types)


def settings_of(kind: type) -> Mapping[str, Setting]:
    """All settings of a dataclass by their names, in the order of its fields."""
    return _read(kind)


@cache  # called for every config; resolving the annotations takes milliseconds
def _read(kind: type) -> Mapping[str, Setting]:
    hints = get_type_hints(kind)
    texts = _parse_documentation(kind.__doc__ or "")
    found = {}
    for field in fields(kind):
        hint = hints[field.name]
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        found[field.name] = Setting(
            name=field.name,
            types=tuple(member for member in members if member is not types.NoneType),
            can_be_none=types.NoneType in members,
            default=field.default,
            documentation=texts.get(field.name, ""),
        )
    return types.MappingProxyType(found)


def _parse_documentation(docstring: str) -> dict[str, str]:
    """The entries of a docstring's ``Args:`` section, each as one line."""
    _, _, section = docstring.partition("Args:\n")
    section = re.split(r"\n[ \t]*\n", section)[0]
    entries = re.split(r"^        (?=\w+: )", section, flags=re.MULTILINE)
    pairs = [entry.partition(": ") for entry in entries if entry.strip()]
    return {name: " ".join(text.split()) for name, _, text in pairs}


def _is_a(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(entry, get_args(kind)[0]) for entry in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, Real if kind is float else kind)


def _parse(text: Any, kinds: Sequence[Any]) -> Any:
    """Convert a text to the first type that accepts it; return it unchanged if none does."""
    for kind in kinds if isinstance(text, str) else ():
        if kind is bool and text.strip().lower() in _TRUTHS:
            return _TRUTHS[text.strip().lower()]
        if kind is not bool:
            with contextlib.suppress(TypeError, ValueError):
                return kind(text)
    return text
