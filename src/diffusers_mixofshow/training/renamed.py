"""Settings that had other names once, in configuration files, keywords, options and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError, warn


RENAMED = {"text_encoder_lr": "text_encoder_learning_rate", "text_kv_lr": "text_kv_learning_rate"}
"""Former name to the name of today."""


def use_new_names(settings: Mapping[str, Any], *, silent: bool = False) -> dict[str, Any]:
    """Put settings under the names that they have today.

    Args:
        settings: Name to value.
        silent: Whether no warning is given: for what this package has written itself.

    Raises:
        ConfigurationError: If a setting is given by both names.

    Warns:
        MixOfShowWarning: Names the former names and those of today.
    """
    former = {name: RENAMED[name] for name in settings if name in RENAMED}
    if twice := [f"{old} and {new}" for old, new in former.items() if new in settings]:
        raise ConfigurationError(f"The same setting by its former and its present name: {', '.join(twice)}. Keep one.")
    if former and not silent:
        warn("; ".join(f"{old} is called {new} now" for old, new in former.items()) + ".")
    return {former.get(name, name): value for name, value in settings.items()}
