"""What a base model is called."""

from __future__ import annotations

from pathlib import Path


TOYLAND = "toyland"
"""Names the base model that ships in the package, in place of a Hub id."""


def location_of(base_model: str) -> str:
    """What diffusers loads for a base model's name: the name itself, or the folder of the embedded base."""
    return str(Path(__file__).parent / "toyland" / "weights") if base_model == TOYLAND else base_model
