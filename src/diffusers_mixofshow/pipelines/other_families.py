"""Refuse what a pipeline class cannot be made of: checkpoints, and folders or repositories, of another family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import CONCEPT_FAMILIES, Family, family_of, family_of_index
from diffusers_mixofshow.interop.checkpoint import family_of_checkpoint, is_checkpoint


def refuse_other_checkpoints(pipeline_class: type, source: object) -> None:
    """Raise if a safetensors file on this disk is no checkpoint that a pipeline class can be made of.

    Links, Hub ids and pickles are left to diffusers.

    Raises:
        ConfigurationError: If it is of another family, or no checkpoint.
    """
    if not is_checkpoint(source):
        return
    path = Path(str(source)).expanduser()
    found, wanted = family_of_checkpoint(path), _family_of_class(pipeline_class)
    if found is not wanted:
        raise ConfigurationError(
            f"{path} is a checkpoint of {found.name}; expected one of {wanted.name}, which {pipeline_class.__name__} "
            f"draws with. Use {found.concept_pipeline}.from_single_file()."
        )


def refuse_other_index(pipeline_class: Any, name: str, source: str, hub: Mapping[str, Any]) -> None:
    """Raise if the index of a pipeline names another family, before gigabytes of its weights are downloaded.

    An index that cannot be read, or is of no known family, is left to diffusers' own error.

    Args:
        pipeline_class: The class, which reads its index.
        name: What is to be loaded, for the error.
        source: Its folder or Hub id.
        hub: Arguments that say where a file of the Hub is found.

    Raises:
        ConfigurationError: If it is of another family.
    """
    try:
        index = pipeline_class.load_config(source, **hub)
    except OSError:
        return
    found, wanted = family_of_index(index), _family_of_class(pipeline_class)
    if found is None:
        return
    # Parts may be null, so that a family with more of them looks like one with fewer: only what is said counts.
    has_all_parts = {wanted.denoiser, *wanted.text_encoders} <= index.keys()
    has_others = found.text_encoders.keys() - wanted.text_encoders.keys()
    if has_others or not has_all_parts:
        _refuse(pipeline_class, name, found)


def refuse_other_families(pipeline_class: type, name: str, components: Mapping[str, object]) -> None:
    """Raise if a pipeline was loaded as a class for another family; diffusers leaves out what the class does not know.

    Args:
        pipeline_class: The class.
        name: What was loaded.
        components: ``pipeline.components``; without a denoiser, anything is let through.

    Raises:
        ConfigurationError: If they are of another family.
    """
    found = family_of(components)
    if components.get(found.denoiser) is not None:
        _refuse(pipeline_class, name, found)


def _refuse(pipeline_class: type, name: str, found: Family) -> None:
    wanted = _family_of_class(pipeline_class)
    if found is wanted:
        return
    instead = f" Use {found.concept_pipeline}.from_pretrained()." if found.concept_pipeline else ""
    raise ConfigurationError(
        f"{name!r} is of {found.name}; expected {wanted.name}, which {pipeline_class.__name__} draws with.{instead}"
    )


def _family_of_class(pipeline_class: type) -> Family:
    """The family whose parts a pipeline class takes, of several the one with most of them."""
    taken = set(inspect.signature(pipeline_class).parameters)
    return max(CONCEPT_FAMILIES, key=lambda family: len(taken.intersection(family.parts)))
