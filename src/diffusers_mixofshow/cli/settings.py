"""``mixofshow --config FILE``: options of every verb out of a TOML file, or those of ``sample`` out of a picture."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError, TextError
from diffusers_mixofshow.sampling.provenance import FORMATS, read_options
from diffusers_mixofshow.texts import read_text


def settings_from(path: Path, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Read a TOML file with a table for each verb, whose keys are the verb's options; '-' and '_' are the same.

    A picture that `mixofshow sample` drew stands for a file with its options.

    Args:
        path: The file.
        options: Verb to the spellings of its options, with '_', and typer's parameter that each one sets.

    Raises:
        ConfigurationError: If the file cannot be read, or names a verb or an option that does not exist; names all.
    """
    tables = {"sample": read_options(path)} if path.suffix.lower() in FORMATS else _tables_of(path)
    defects, found = [], {}
    for verb, table in tables.items():
        if verb not in options or not isinstance(table, dict):
            defects.append(f"{verb!r} is no table of a verb ({', '.join(options)})")
            continue
        given = {key.replace("-", "_"): value for key, value in table.items()}
        given |= {f"no_{key}": True for key, value in given.items() if value is False and f"no_{key}" in options[verb]}
        defects += [_unknown(verb, key, options[verb]) for key in given if key not in options[verb]]
        known = {options[verb][key]: value for key, value in given.items() if key in options[verb]}
        found[verb] = {parameter.name: _wrap_repeated(value, parameter) for parameter, value in known.items()}
    if defects:
        raise ConfigurationError(f"{path}: " + "; ".join(defects) + ".")
    return found


def _tables_of(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(read_text(path))
    except (TextError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} is no readable TOML file ({error}).") from error


def _wrap_repeated(value: Any, parameter: Any) -> Any:
    """The value; in a list where the option may be repeated and is given once."""
    takes_several = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    return [value] if takes_several and not isinstance(value, list) else value


def _unknown(verb: str, key: str, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{verb!r} has no option {key!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
