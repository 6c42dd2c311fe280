"""Models that diffusers and transformers load by name: found on this disk, in the cache, or on a Hub that answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch

from diffusers_mixofshow.base_models import location_of, not_loadable
from diffusers_mixofshow.edlora import hub
from diffusers_mixofshow.errors import ConfigurationError, HubError, first_line
from diffusers_mixofshow.progress import announce


_Model = TypeVar("_Model")


def load_model(name: str, load: Callable[..., _Model], *, index: str = "model_index.json") -> _Model:
    """Load a model, without waiting for what cannot come, and say so on standard error.

    Where no Hub answers, diffusers would try for a quarter of a minute before it looks into the cache.

    Args:
        name: Hub id or folder, or ``toyland``.
        load: Given what to load and options: ``from_pretrained`` of a class.
        index: The file that every such model has.

    Raises:
        HubError: If the cache does not hold it, and the Hub cannot be reached.
        OSError: If there is no such folder, or the cache does not hold it and the Hub is not to be asked.
    """
    place = location_of(name)
    if Path(place).exists():
        announce(f"Loading {name} ...")
        with silence_if_embedded(name):
            return load(place)
    refuse_missing_folder(name)
    options: dict[str, Any] = {}
    if reason := _explain_no_access(name):
        if hub.find_in_cache(name, index, revision=None, cache_dir=None) is None:
            raise reason
        options = {"local_files_only": True}
    announce(f"Loading {name} ...")
    return load(place, **options)


def load_base(name: str, load: Callable[..., _Model]) -> _Model:
    """Load a base model, see `load_model`.

    Raises:
        ConfigurationError: If it cannot be found or read.
        HubError: If only the Hub has it, and that cannot be reached.
    """
    try:
        return load_model(name, load)
    except ConfigurationError:  # says itself what is wrong with the model
        raise
    except (OSError, ValueError) as error:
        raise not_loadable(name, error) from error


def load_looker(name: str, kind: type, *, called: str, expected: str) -> tuple[Any, Any]:
    """Load a model that looks at pictures and reads texts, onto the GPU where there is one, with its tokenizer.

    Args:
        name: Hub id or folder.
        kind: A class of transformers that is made of a CLIP.
        called: How errors name it.
        expected: What errors ask for, and an example.

    Returns:
        The model in float32 and evaluation mode, and its CLIP tokenizer.

    Raises:
        HubError: If only the Hub has it, and that cannot be reached.
        ConfigurationError: If there is none, or what is there is something else.
    """
    from transformers import CLIPTokenizer

    try:
        load = partial(kind.from_pretrained, output_loading_info=True)  # type: ignore[attr-defined]
        model, loaded = load_model(name, load, index="config.json")
        words = load_model(name, CLIPTokenizer.from_pretrained, index="config.json")
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise _unusable(name, first_line(error), called, expected) from error
    missing = sorted(key for key in loaded["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise _unusable(name, f"{len(missing)} weights are missing, {missing[0]} among them", called, expected)
    return model.float().eval().to("cuda" if torch.cuda.is_available() else "cpu"), words


def silence_if_embedded(name: str) -> AbstractContextManager[None]:
    """`silence_libraries` for the embedded base, which is ours to answer for; all others may say what they have to."""
    return nullcontext() if location_of(name) == name else silence_libraries()


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep transformers and diffusers from printing bars and notes inside the block; restore their settings."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars[0]:
            diffusers_logging.enable_progress_bar()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def refuse_missing_folder(name: str) -> None:
    """Refuse a name that is not there and can only be meant for a place on this disk.

    Raises:
        FileNotFoundError: If it is one.
    """
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())):
        raise FileNotFoundError("There is no such folder")


def _explain_no_access(name: str) -> OSError | None:
    """Why a model that is not in the cache cannot be had, unless the Hub can be asked."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return FileNotFoundError(f"{name!r} is not in the cache, and HF_HUB_OFFLINE is set")
    return None if hub.answers() else hub.make_unreachable_error(name)


def _unusable(name: str, reason: str, called: str, expected: str) -> ConfigurationError:
    return ConfigurationError(f"The {called} {name!r} cannot be used: {reason}. Expected {expected}.")
