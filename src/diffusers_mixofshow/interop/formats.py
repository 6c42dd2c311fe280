"""What ED-LoRAs are converted to."""

from enum import StrEnum


class Format(StrEnum):
    """What to write."""

    EDLORA = "edlora"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    TEXTUAL_INVERSION = "textual-inversion"
    MIX_OF_SHOW = "mix-of-show"
