"""``mixofshow train``: a folder of photos to an ED-LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.cli.base_model import BASE_HELP
from diffusers_mixofshow.errors import ConfigurationError


if TYPE_CHECKING:
    from diffusers_mixofshow.training import TrainingConfig


def train(
    photos: Annotated[
        Path | None,
        typer.Argument(help="Folder of photos, captions (NAME.txt), masks/NAME.png. (required, or in --config)"),
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Name of the concept, e.g. potter for <potter>. (required, or in --config)")
    ] = None,
    class_word: Annotated[
        str | None, typer.Option(help="Plain word for what it is, e.g. man, dog. (required, or in --config)")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="character, pet, object or scene. (default: object)")] = None,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} (default: Stable Diffusion 1.5)")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the ED-LoRA. (default: the concept's name)")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. (default: 800; toyland 250)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step. (default: 4; toyland 12)")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA. (default: 4)")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the training picture in pixels. (default: 512; toyland 64)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number. (default: 0)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any setting of TrainingConfig; options above win.")
    ] = None,
) -> None:
    """Tune one concept on a handful of photos and write it as an ED-LoRA.

    Example: mixofshow train photos/potter --concept potter --class-word man --output edlora-potter
    """
    settings = {
        "instance_data_dir": photos,
        "concept": concept,
        "class_word": class_word,
        "kind": kind,
        "pretrained_model_name_or_path": base,
        "output_dir": output,
        "max_train_steps": steps,
        "train_batch_size": batch_size,
        "rank": rank,
        "lora_alpha": None if rank is None else float(rank),
        "resolution": resolution,
        "seed": seed,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    checked = training_config(_read_toml(config) | given)

    from diffusers_mixofshow.client import tune_concept

    tune_concept(checked)
    typer.echo(f"Wrote the ED-LoRA of <{checked.concept_to_learn.name}> to {checked.output_dir}")


def training_config(settings: dict[str, Any]) -> TrainingConfig:
    """Build the config; the embedded base brings its own defaults, and the output folder has one too."""
    from diffusers_mixofshow.training import TrainingConfig

    if "concept" in settings:
        settings.setdefault("output_dir", Path(str(settings["concept"]).strip("<>")))
    if settings.get("pretrained_model_name_or_path") == TOYLAND:
        return TrainingConfig.toyland(**settings)
    return TrainingConfig.from_mapping(settings)


def _read_toml(path: Path | None) -> dict[str, Any]:
    import tomllib

    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} is no readable TOML file ({error}).") from error
