"""Other programs' files, to and from ED-LoRAs: which ones, and what is lost on the way, is told in docs/formats.md."""

from diffusers_mixofshow.interop.conversion import Conversion, Format, convert
from diffusers_mixofshow.interop.foreign import read_as_edlora
from diffusers_mixofshow.interop.lora_files import read_lora, write_kohya, write_lora
from diffusers_mixofshow.interop.original import write_original
from diffusers_mixofshow.interop.textual_inversion import write_textual_inversion


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
