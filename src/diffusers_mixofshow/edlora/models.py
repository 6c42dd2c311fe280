"""Load models of diffusers and transformers by name: from disk, the cache, or the Hub if it answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch

from diffusers_mixofshow.base_models import location_of, make_loading_error
from diffusers_mixofshow.edlora import hub
from diffusers_mixofshow.errors import ConfigurationError, HubError, first_line
from diffusers_mixofshow.progress import announce


_Model = TypeVar("_Model")


def load_model(name: str, load: Callable[..., _Model], *, index: str = "model_index.json") -> _Model:
    """Load a model, and announce that on standard error.

    If the Hub does not answer, the cache is used at once; diffusers alone would first wait for a quarter of a minute.

    Args:
        name: Hub id or folder, or ``toyland``.
        load: ``from_pretrained`` of a class, called with the location and options.
        index: A file that every such model has, to look for it in the cache.

    Raises:
        HubError: If it is not in the cache, and the Hub cannot be reached.
        OSError: If there is no such folder, or it is not in the cache in offline mode.
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
        HubError: If it is only on the Hub, which cannot be reached.
    """
    try:
        return load_model(name, load)
    except ConfigurationError:  # already names the defect
        raise
    except (OSError, ValueError) as error:
        raise make_loading_error(name, error) from error


def load_clip_model(name: str, kind: type, *, called: str, expected: str) -> tuple[Any, Any]:
    """Load a model that encodes pictures and texts, onto the GPU if there is one, with its tokenizer.

    Args:
        name: Hub id or folder.
        kind: A transformers class based on CLIP.
        called: Its description in errors.
        expected: What errors ask for, with an example.

    Returns:
        The model in float32 and evaluation mode, and its CLIP tokenizer.

    Raises:
        HubError: If it is only on the Hub, which cannot be reached.
        ConfigurationError: If it does not exist, or is a model of another kind.
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
        raise _unusable(name, f"{len(missing)} weights are missing, such as {missing[0]}", called, expected)
    return model.float().eval().to("cuda" if torch.cuda.is_available() else "cpu"), words


def silence_if_embedded(name: str) -> AbstractContextManager[None]:
    """`silence_libraries` for an embedded base, whose messages are of no use to users; nothing for other models."""
    return nullcontext() if location_of(name) == name else silence_libraries()


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide progress bars, log messages and warnings of transformers and diffusers inside the block."""
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
    """Refuse a name that can only be a local path and does not exist.

    Raises:
        FileNotFoundError: If the name is such a path.
    """
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())):
        raise FileNotFoundError("There is no such folder")


def _explain_no_access(name: str) -> OSError | None:
    """Why the Hub cannot be used, as an error; None if it can."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return FileNotFoundError(f"{name!r} is not in the cache, and HF_HUB_OFFLINE is set")
    return None if hub.is_reachable() else hub.make_unreachable_error(name)


def _unusable(name: str, reason: str, called: str, expected: str) -> ConfigurationError:
    return ConfigurationError(f"The {called} {name!r} cannot be used: {reason}. Expected {expected}.")
