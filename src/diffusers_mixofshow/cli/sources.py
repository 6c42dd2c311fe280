"""Read what a command line names: an ED-LoRA, a fused pack, or another program's file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_mixofshow.base_models import embedded_base
from diffusers_mixofshow.errors import EDLoRANotFoundError, warn


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.interop.foreign import Foreign

_SHOWN = 5
"""How many names of a folder an error lists if none is similar to the missing one."""


def read_source(source: str) -> EDLoRA | Foreign:
    """Read an ED-LoRA, or another program's file, from a file, a folder or the Hub.

    Raises:
        EDLoRANotFoundError: If there is no such file, folder or repository.
        EDLoRAFormatError: If it is an ED-LoRA with defects, or cannot be read at all.
        HubError: If the Hub refuses or cannot be reached.
    """
    from diffusers_mixofshow.interop.opening import read_any

    refuse_missing_file(source)
    return read_any(source)


def open_packs(sources: Sequence[str], base: str | None) -> list[EDLoRA]:
    """Read ED-LoRAs, fused packs and other programs' files that are to be loaded into their base.

    Args:
        sources: Files, folders or Hub ids.
        base: The base that the user named; without it, one is guessed for a file that does not name its own.

    Raises:
        MixOfShowError: See `open_edlora`.

    Warns:
        MixOfShowWarning: Which base was guessed, once for all files; not of an embedded base, which no other is like.
    """
    read = {source: _read_pack(source) for source in sources}
    guesses = {source: guess for source, (_, guess) in read.items() if guess and not base}
    for guess in dict.fromkeys(guesses.values()):
        named = [source for source, other in guesses.items() if other == guess]
        if embedded_base(guess) is None:
            verb = "does not tell its" if len(named) == 1 else "do not tell their"
            warn(f"{', '.join(named)} {verb} base model; {guess} is taken; --base names another.")
    return [replace(read[one][0], base_model=guesses[one]) if one in guesses else read[one][0] for one in sources]


def _read_pack(source: str) -> tuple[EDLoRA, str]:
    """Read a pack or file, and guess the base model of a file that does not name its own; empty for all others."""
    from diffusers_mixofshow.interop.foreign import default_base
    from diffusers_mixofshow.interop.opening import open_edlora

    refuse_missing_file(source)
    opened = open_edlora(source)
    unnamed = opened.foreign is not None and not opened.edlora.base_model
    return opened.edlora, default_base(opened.foreign) if opened.foreign is not None and unnamed else ""


def refuse_missing_file(source: str) -> None:
    """Refuse ``folder/name`` if the folder is on this disk without such a name, instead of looking for it on the Hub.

    Raises:
        EDLoRANotFoundError: Names what is in the folder.
    """
    path = Path(source)
    if path.exists() or path.parent == Path() or not path.parent.is_dir():
        return
    there = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, there) or there[:_SHOWN]
    raise EDLoRANotFoundError(
        f"{source} does not exist; the folder {path.parent} is there and holds {', '.join(near) or 'nothing'}. A "
        "repository of that name is read from the Hub where no such folder is."
    )
