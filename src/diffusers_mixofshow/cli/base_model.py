"""Find the base model that a command works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_mixofshow.base_models import (
    canonical_name,
    embedded_base,
    known_family,
    location_of,
    normalise_name,
    usual_guidance,
)
from diffusers_mixofshow.errors import ConfigurationError, first_line


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.families import BaseModel, Family

LARGEST_SEED = 2**63 - 1
"""Largest seed, and with a minus the smallest: torch takes numbers of 64 bits."""
MOST_STEPS = 1000
"""Most denoising steps: the number of timesteps in training. Schedulers fail with more."""
GUIDANCE_HELP = "Classifier-free guidance scale. (default: 7.5; SDXL: 5; toyland: 3)"
BASE_HELP = (
    "Base model: a Hub id, a folder, or 'toyland', which ships in the package; with the extra 'bases' also "
    "'toyland-xl' or 'toyland-sd3'."
)


def normalise_base(name: str | None) -> str | None:
    """Normalise the spellings of an embedded base's name; typer's callback for options that name a base."""
    return name and normalise_name(name)


Base = Annotated[
    str | None, typer.Option(help=f"{BASE_HELP} (default: the one they were tuned on)", callback=normalise_base)
]
"""The option ``--base`` of verbs that read ED-LoRAs."""


def find_common_base(concepts: Sequence[EDLoRA]) -> str:
    """Find the base model that all ED-LoRAs were tuned on; if none names one, the embedded base that has their layers.

    Raises:
        ConfigurationError: If they differ, or there are none.
    """
    told = [edlora for edlora in concepts if edlora.base_model]
    bases = {
        canonical_name(edlora.base_model): ", ".join(one.placeholder for one in edlora.concepts[:1]) for edlora in told
    }
    if len(bases) != 1:
        model = _recognise_base(concepts)
        if not bases and model is not None and embedded_base(model.id):  # no other base is like it
            return model.id
        found = (
            ", ".join(f"{base} ({placeholder})" if placeholder else base for base, placeholder in bases.items())
            or "none"
        )
        hint = "" if model is None else f" {model.id} (by their layers they are for {model.name})"
        raise ConfigurationError(f"Expected files that name one base model, got {found}. Name it with --base{hint}.")
    return next(iter(bases))


def _recognise_base(concepts: Sequence[EDLoRA]) -> BaseModel | None:
    """The base model that the layers of all ED-LoRAs are those of; None if it is unknown."""
    from diffusers_mixofshow.edlora.low_rank import input_widths
    from diffusers_mixofshow.families.recognition import recognise

    models = {recognise(input_widths(edlora.lora)) for edlora in concepts}
    return models.pop() if len(models) == 1 else None


def refuse_strange_base(packs: Mapping[str, EDLoRA], base: str) -> None:
    """Refuse a base model that is known to be of another family than what is loaded into it, before it is loaded.

    Args:
        packs: What is loaded, by its name.
        base: The base model.

    Raises:
        ConfigurationError: If it is; names the families.
    """
    from diffusers_mixofshow.edlora.low_rank import input_widths
    from diffusers_mixofshow.families.recognition import find_family_defect

    if (family := known_family(base)) is None:
        return
    if defect := find_family_defect({name: input_widths(pack.lora) for name, pack in packs.items()}, family):
        raise ConfigurationError(f"These LoRAs cannot be loaded into {base!r}: {defect}.")


def choose_guidance(base: str, packs: Iterable[EDLoRA]) -> float:
    """Choose the guidance scale for a base model; of one that is not known, the packs tell the family."""
    return usual_guidance(base, family_of_packs(packs))


def family_of_packs(packs: Iterable[EDLoRA]) -> Family | None:
    """The family of the base that packs are for, by their embeddings or, without any, their updates."""
    from diffusers_mixofshow.edlora.embeddings import family_of_embeddings
    from diffusers_mixofshow.edlora.low_rank import input_widths
    from diffusers_mixofshow.families.recognition import family_of_updates

    packs = list(packs)
    names = [name for pack in packs for name in pack.embeddings]
    if names:
        return family_of_embeddings(names)
    return family_of_updates(input_widths(packs[0].lora)) if packs else None


def read_layers(name: str) -> tuple[str, ...]:
    """The layers of a base model on this disk that have an embedding each, or groups of them as SDXL's.

    Empty for any other base model; ED-LoRAs for it name the layers.

    Raises:
        ConfigurationError: If its U-Net cannot be read.
    """
    folder = Path(location_of(name)) / "unet" if name else Path()
    if not (folder / "config.json").is_file():
        return ()
    import torch
    from diffusers import UNet2DConditionModel

    from diffusers_mixofshow.families.layers import embedding_layers

    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
            return embedding_layers({"unet": unet})
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The U-Net of the base model {name!r} cannot be read: {first_line(error)}."
        ) from error
