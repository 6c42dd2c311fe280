"""Convert other programs' files to and from ED-LoRAs; docs/formats.md lists the formats and what each loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_mixofshow.lazy import import_lazily


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

__getattr__ = import_lazily(__name__, _MODULES)
