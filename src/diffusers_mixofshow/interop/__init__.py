"""Other programs' files, to and from ED-LoRAs: which ones, and what is lost on the way, is told in docs/formats.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers_mixofshow.interop.conversion import Conversion, convert
    from diffusers_mixofshow.interop.foreign import read_as_edlora
    from diffusers_mixofshow.interop.formats import Format
    from diffusers_mixofshow.interop.lora_files import read_lora, write_kohya, write_lora
    from diffusers_mixofshow.interop.original import write_original
    from diffusers_mixofshow.interop.textual_inversion import write_textual_inversion

_MODULES = {
    "conversion": ("Conversion", "convert"),
    "foreign": ("read_as_edlora",),
    "formats": ("Format",),
    "lora_files": ("read_lora", "write_kohya", "write_lora"),
    "original": ("write_original",),
    "textual_inversion": ("write_textual_inversion",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Conversion",
    "Format",
    "convert",
    "read_as_edlora",
    "read_lora",
    "write_kohya",
    "write_lora",
    "write_original",
    "write_textual_inversion",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used; the command line's help needs the formats alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
