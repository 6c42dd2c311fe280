"""Former names of settings, still read from configuration files, keywords, options and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError, warn


RENAMED = {"text_encoder_lr": "text_encoder_learning_rate", "text_kv_lr": "text_kv_learning_rate"}
"""Former name to present name."""


def use_new_names(settings: Mapping[str, Any], *, silent: bool = False) -> dict[str, Any]:
    """Replace former names of settings by present ones.

    Args:
        settings: Name to value.
        silent: Whether to give no warning, for files that this package has written.

    Raises:
        ConfigurationError: If a setting is given by both names.

    Warns:
        MixOfShowWarning: Names each former name and its present one.
    """
    former = {name: RENAMED[name] for name in settings if name in RENAMED}
    if twice := [f"{old} and {new}" for old, new in former.items() if new in settings]:
        raise ConfigurationError(f"The same setting by its former and its present name: {', '.join(twice)}. Keep one.")
    if former and not silent:
        warn("; ".join(f"{old} is called {new} now" for old, new in former.items()) + ".")
    return {former.get(name, name): value for name, value in settings.items()}
