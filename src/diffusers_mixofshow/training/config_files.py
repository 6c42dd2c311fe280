"""Settings from a TOML or YAML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError, TextError, first_line
from diffusers_mixofshow.texts import read_text
from diffusers_mixofshow.training.renamed import use_new_names
from diffusers_mixofshow.training.settings import Setting


def read_settings(path: str | Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Read a file with one setting a line, without checking names and values.

    Args:
        path: Ends in ``.toml``, ``.yaml`` or ``.yml``.
        known: Settings by name, whose types YAML's values are read as; values of unknown names stay text.

    Raises:
        ConfigurationError: If the file cannot be read or is not of its format.
    """
    path = Path(path)
    readers = {".toml": _from_toml, ".yaml": _from_yaml, ".yml": _from_yaml}
    if path.suffix.lower() not in readers:
        raise ConfigurationError(f"{path} is no configuration file; expected one that ends in {', '.join(readers)}.")
    try:
        text = read_text(path)
    except TextError as error:
        raise ConfigurationError(f"{path} is no readable configuration file ({error}).") from error
    return readers[path.suffix.lower()](text, path, known)


def _from_toml(text: str, path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Read TOML, which has no None: the text "none" stands for it."""
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers that are too long, and lists in lists without end
        raise ConfigurationError(f"{path} is no valid TOML ({first_line(error)}).") from error
    settings = use_new_names(settings)
    return {
        name: None if value == "none" and name in known and known[name].can_be_none else value
        for name, value in settings.items()
    }


def _from_yaml(text: str, path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """Read YAML's values as text first, then by the type of their setting.

    PyYAML follows YAML 1.1, which reads ``1e-4`` as a text and ``no`` as False.
    """
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError(f"{path} needs PyYAML (pip install pyyaml), or write it as TOML.") from error
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        settings = yaml.load(text, Loader=yaml.BaseLoader)  # BaseLoader makes texts, lists and dicts only
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no valid YAML ({' '.join(str(error).split())}).") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigurationError(f"{path} is no list of settings; expected lines such as 'class_word: man'.")
    names = [key.value for key, _ in node.value]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"{path} sets {', '.join(twice)} more than once.")
    settings = use_new_names(settings)
    return {
        name: known[name].from_text(value) if name in known and not isinstance(value, dict) else value
        for name, value in settings.items()
    }
