"""Target formats of a conversion."""

from enum import StrEnum


class Format(StrEnum):
    """Format to write."""

    EDLORA = "edlora"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    TEXTUAL_INVERSION = "textual-inversion"
    MIX_OF_SHOW = "mix-of-show"
