"""``mixofshow --config FILE``: read options of every verb from a TOML file, or those of ``sample`` from a picture."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError, TextError
from diffusers_mixofshow.sampling.provenance import FORMATS, read_options
from diffusers_mixofshow.texts import read_text


def read_config(path: Path, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Read a TOML file with a table for each verb, whose keys are the verb's options; '-' and '_' are the same.

    A picture that `mixofshow sample` drew is read as a file with its options.

    Args:
        path: The file.
        options: Verb to the spellings of its options, with '_', and typer's parameter that each one sets.

    Returns:
        Verb to the values of its parameters.

    Raises:
        ConfigurationError: If the file cannot be read, or has verbs or options that do not exist; names all of them.
    """
    tables = {"sample": read_options(path)} if path.suffix.lower() in FORMATS else read_toml(path)
    defects, found = [], {}
    for verb, table in tables.items():
        if verb not in options or not isinstance(table, dict):
            defects.append(f"{verb!r} is no table of a verb ({', '.join(options)})")
            continue
        given = {key.replace("-", "_"): value for key, value in table.items()}
        given |= {f"no_{key}": True for key, value in given.items() if value is False and f"no_{key}" in options[verb]}
        defects += [_describe_unknown(verb, key, options[verb]) for key in given if key not in options[verb]]
        known = {options[verb][key]: value for key, value in given.items() if key in options[verb]}
        found[verb] = {parameter.name: _wrap_repeated(value, parameter) for parameter, value in known.items()}
    if defects:
        raise ConfigurationError(f"{path}: " + "; ".join(defects) + ".")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigurationError: If it cannot be read as TOML.
    """
    try:
        return tomllib.loads(read_text(path))
    except (TextError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML: {error}.") from error


def _wrap_repeated(value: Any, parameter: Any) -> Any:
    """Wrap the value in a list if the option may be repeated and is given once."""
    takes_several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    return [value] if takes_several and not isinstance(value, list) else value


def _describe_unknown(verb: str, key: str, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{verb!r} has no option {key!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
