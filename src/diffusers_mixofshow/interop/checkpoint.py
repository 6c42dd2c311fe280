"""Recognise the family of a checkpoint of one file in the layout of the original code, by its header alone."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from diffusers_mixofshow.edlora.reading import LONGEST_HEADER, PREFIX
from diffusers_mixofshow.errors import ConfigurationError, first_line
from diffusers_mixofshow.families import CONCEPT_FAMILIES, Family
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.interop.other_kinds import other_base


_UNET = "model.diffusion_model.input_blocks."
_SIZES = "model.diffusion_model.label_emb."
"""Layers of SDXL's U-Net that read the pooled vector and the sizes of the picture."""
_TEXT_ENCODERS = {"conditioner.embedders.": STABLE_DIFFUSION_XL, "cond_stage_model.": STABLE_DIFFUSION}
_SHOWN = 80
"""Characters of a name that an error shows; the file is not trusted."""
_OF_LORAS = ("lora_", ".lora", "hada_", "lokr_")


def is_checkpoint(source: object) -> bool:
    """Whether a base model's name is that of a safetensors file on this disk."""
    return Path(str(source)).suffix == ".safetensors" and _is_file(source)


def _is_file(source: object) -> bool:
    try:
        return Path(str(source)).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def family_of_checkpoint(path: Path) -> Family:
    """The family of a checkpoint: Stable Diffusion or Stable Diffusion XL.

    Raises:
        ConfigurationError: If it is something else, or its header cannot be read.
    """
    names = _read_names(path)
    for prefix, family in (*_TEXT_ENCODERS.items(), (_SIZES, STABLE_DIFFUSION_XL), (_UNET, STABLE_DIFFUSION)):
        if any(name.startswith(prefix) for name in names):
            return family
    raise ConfigurationError(
        f"{path} is no checkpoint of {' or '.join(family.name for family in CONCEPT_FAMILIES)}: {_describe(names)}. "
        f"Expected tensors named {_UNET}0.0.weight and so on, as the original code and programs such as ComfyUI name "
        "those of the whole model."
    )


def refuse_single_file(base_model: str) -> None:
    """Raise if a base model's name is that of a file on this disk: bases are loaded from folders in diffusers' layout.

    Raises:
        ConfigurationError: Says how to make a folder of it.
    """
    if not _is_file(base_model):
        return
    if is_checkpoint(base_model):
        made = describe_making_folder(Path(base_model).expanduser())
    else:
        kinds = " or ".join(family.concept_pipeline for family in CONCEPT_FAMILIES)
        made = f"Make one of it in Python: {kinds}.from_single_file(FILE).save_pretrained(FOLDER)."
    raise ConfigurationError(f"The base model {base_model!r} is a single file. Expected a Hub id or a folder. {made}")


def describe_making_folder(path: Path) -> str:
    """Say how to make a folder of a checkpoint of one file, in Python that can be pasted.

    Raises:
        ConfigurationError: If it is no checkpoint of a family with concepts.
    """
    pipeline, folder = family_of_checkpoint(path).concept_pipeline, os.fspath(path.with_suffix(""))
    return (
        f"Make one of it once in Python: {pipeline}.from_single_file({os.fspath(path)!r}, dtype=torch.float16)"
        f".save_pretrained({folder!r}), after import torch and from diffusers_mixofshow import {pipeline}. Then name "
        f"{folder}."
    )


def _read_names(path: Path) -> list[str]:
    """Read the names of the tensors in a safetensors file of any size."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(PREFIX), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"it is no such file: its header would have {length:,} bytes")
            return [name for name in dict(json.loads(file.read(length))) if name != "__metadata__"]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as a checkpoint in safetensors ({first_line(error)}). Copy or download it again."
        ) from error


def _describe(names: Collection[str]) -> str:
    """What a file that is no such checkpoint seems to hold, with an example of its names."""
    example = f"such as {min(names)[:_SHOWN]!r}" if names else "none at all"
    if any(mark in name for name in names for mark in _OF_LORAS):
        return f"its tensors are a LoRA's ({example}), which load_edlora() and load_lora_weights() read"
    base, _ = other_base(names)
    return f"its tensors ({example}) are those of {base}" if base else f"its tensors have other names ({example})"
