"""Every error that a user can cause: what we got, what we expected, what to do."""

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence


class MixOfShowError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConceptError(MixOfShowError, ValueError):
    """A concept's name, token or placeholder is malformed, unknown or taken."""


class EDLoRAFormatError(MixOfShowError, ValueError):
    """A file is no valid ED-LoRA, or does not fit the model it is meant for."""


class EDLoRANotFoundError(MixOfShowError, FileNotFoundError):
    """There is no ED-LoRA at the given path or Hub id."""


class HubError(MixOfShowError, OSError):
    """The Hugging Face Hub cannot be reached, or refuses what was asked."""


class FileWriteError(MixOfShowError, OSError):
    """A file cannot be written: no room, no permission, no such place. What stood there before is untouched."""


class OverwriteError(MixOfShowError, FileExistsError):
    """A file exists where one is to be written, and replacing it was not asked for."""


class RegionError(MixOfShowError, ValueError):
    """A region's box, mask or prompt cannot be used."""


class ConfigurationError(MixOfShowError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class TrainingDataError(MixOfShowError, ValueError):
    """Photos, captions or masks cannot be used for training."""


class PictureError(MixOfShowError, ValueError):
    """A picture or mask cannot be read, or can be understood in more than one way."""


class TextError(MixOfShowError, ValueError):
    """A text file cannot be read as UTF-8 or UTF-16."""


class FusionError(MixOfShowError, ValueError):
    """Concepts cannot be fused with each other or with this model."""


class MissingExtraError(MixOfShowError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class MixOfShowWarning(UserWarning):
    """A call works, but something in it has no effect, or another than the user may expect."""


_BETWEEN = ("diffusers_mixofshow", "diffusers", "torch", "contextlib")
"""Packages that a warning's stack level skips, to name the line in the user's own code."""


def warn(message: str) -> None:
    """Warn with `MixOfShowWarning`, at the line of the user's code that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MixOfShowWarning, stacklevel=level)


def suggest(word: str, known: Iterable[str]) -> str:
    """Ask ``Did you mean X?`` (a space before it) about the most similar known word; empty if none is similar."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def list_first(names: Sequence[object], most: int) -> str:
    """Join names by commas for an error or warning, at most so many, and count the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none, to be quoted in another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
