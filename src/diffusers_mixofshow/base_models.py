"""What a base model is called, and how diffusers is asked for it."""

from __future__ import annotations

import difflib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_mixofshow.errors import ConfigurationError, HubError, first_line


if TYPE_CHECKING:
    import torch


TOYLAND = "toyland"
"""Names the base model that ships in the package, in place of a Hub id."""

_GUIDANCE, _GUIDANCE_OF_TOYLAND = 7.5, 3.0


def location_of(base_model: str) -> str:
    """What diffusers loads for a base model's name: the name itself, or the folder of the embedded base."""
    return str(Path(__file__).parent / "toyland" / "weights") if base_model == TOYLAND else base_model


def usual_guidance(base_model: str) -> float:
    """The guidance scale that a base model draws well with: diffusers' default, or what Toyland measured best."""
    return _GUIDANCE_OF_TOYLAND if base_model == TOYLAND else _GUIDANCE


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument that diffusers takes a dtype by: ``dtype`` since 0.40, ``torch_dtype`` before."""
    known_as = "dtype" if tuple(map(int, version("diffusers").split(".")[:2])) >= (0, 40) else "torch_dtype"
    return {known_as: dtype}


def not_loadable(base_model: str, error: Exception) -> ConfigurationError | HubError:
    """The error of a base model that cannot be found or read, with the reason's first line."""
    kind = HubError if isinstance(error, HubError) else ConfigurationError
    return kind(
        f"The base model {base_model!r} cannot be loaded.{_guess(base_model)} Expected a Hub id, a folder of a "
        f"Stable Diffusion pipeline, or {TOYLAND!r}, the base in the package. ({first_line(error)}.)"
    )


def _guess(base_model: str) -> str:
    """The question whether a name spelt alike is meant: the embedded base, or a folder beside where none is."""
    path = Path(base_model).expanduser()
    folders = [entry for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    places = {folder.name: str(folder) for folder in folders} | {TOYLAND: TOYLAND}
    near = [] if path.exists() else difflib.get_close_matches(path.name, places, n=1)
    return f" Did you mean {places[near[0]]!r}?" if near else ""
