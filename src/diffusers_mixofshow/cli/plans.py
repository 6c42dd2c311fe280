"""``--dry-run``: describe what a command would read, make and need, without loading any model but Toyland's U-Net."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_mixofshow.atomic import find_existing
from diffusers_mixofshow.base_models import (
    classes_of,
    find_size,
    known_family,
    location_of,
    make_loading_error,
    suggest_name,
)
from diffusers_mixofshow.cli.timing import MODELS, estimate_time


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.fusion.solving import Settings
    from diffusers_mixofshow.regions import Isolation
    from diffusers_mixofshow.sampling.drawing import Drawing
    from diffusers_mixofshow.training import TrainingConfig
    from diffusers_mixofshow.training.masking import MaskPlan

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and check everything, show what would be done, load no model.")
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that exist already; without it that is an error.")
]

_OWN = "the model's own"
_BYTES_OF_FLOAT64 = 8
_RECORDED = 8
"""Largest batch while features are recorded: four pictures, both halves of guidance."""


def tell(plan: Mapping[str, object], *, as_json: bool = False) -> None:
    """Print a plan: one line for each entry, and for each item of a list; or JSON."""
    if as_json:
        typer.echo(json.dumps(plan, default=str))
        return
    for name, value in plan.items():
        lines = [f"{name}:", *(f"  {one}" for one in value)] if isinstance(value, list) else [f"{name}: {value}"]
        typer.echo("\n".join(lines))


def plan_replacing(*places: Path, overwrite: bool) -> dict[str, str]:
    """The plan's entry about files and folders that exist already.

    Args:
        places: Files and folders that would be written or removed.
        overwrite: Whether the command line allows that.
    """
    there = ", ".join(map(str, find_existing(*places)))
    return {"replaces": f"{there}{'' if overwrite else '; asks for --overwrite'}" if there else "nothing"}


def plan_sampling(drawing: Drawing, output: Sequence[Path]) -> dict[str, Any]:
    """Describe what `mixofshow sample` would do.

    Args:
        drawing: The settings.
        output: One file for each picture.
    """
    plan, packs, steps = drawing.plan, list(drawing.packs.values()), drawing.steps
    own_height, own_width = find_size(drawing.base) or (None, None)
    height, width = plan.height or own_height, plan.width or own_width
    size = f"{width or _OWN} x {height or _OWN} pixels" if width or height else _OWN
    size += f", {_OWN}" if own_height and not (plan.height or plan.width) else ""
    batch = len(output) * count_halves(drawing.base, drawing.guidance)
    runs = steps if drawing.image is None else int(steps * drawing.strength)
    pixels = (height, width) if height and width else None
    regions, draft, refine = len(plan.regions) * len(output), drawing.draft, drawing.refine
    model = name_denoiser(drawing.base, packs)
    more = [name for name, wanted in (("drafts", draft), ("what is drawn anew", refine)) if wanted]
    return {
        "base model": describe_base(drawing.base),
        "concepts": name_concepts(packs) or "none",
        "weight updates": f"{sum(map(_count_parameters, packs)):,} numbers",
        "strength of the updates": ", ".join(f"{scale:g}" for scale in drawing.lora_scales) or "none",
        "way": drawing.way,
        "prompt": plan.prompt,
        "regions": len(plan.regions),
        "isolation": _describe_isolation(drawing.isolation),
        "size": size,
        "pictures": len(output),
        "seeds": ", ".join(map(str, drawing.seeds)),
        "guidance": f"{drawing.guidance:g}",
        f"{model} runs": f"{runs}, each on a batch of {batch}",
        "drafts": f"{regions} regions, {draft.steps} runs each" if draft else "none",
        **({"after drafts": _describe_prompts(drawing)} if draft and draft.repeat_subject else {}),
        "drawn anew": f"{regions} regions, up to {refine.count_runs(steps)} runs each" if refine else "none",
        "device": drawing.device or "cuda if there is one, else cpu",
        "dtype": str(drawing.dtype or "the device's usual one"),
        "time": ", and ".join([estimate_time(drawing.base, runs, batch, pixels=pixels, model=model), *more]),
        "writes": ", ".join(map(str, output)),
    }


def count_halves(base: str, guidance: float) -> int:
    """How many rows of a batch a picture takes at a guidance scale; a base that is not known counts as most do."""
    family = known_family(base)
    return (2 if guidance > 1 else 1) if family is None else family.count_halves(guidance)


def name_denoiser(base: str, packs: Iterable[EDLoRA]) -> str:
    """What the denoiser of a base model is called, such as ``U-Net``.

    Args:
        base: Its name.
        packs: What is loaded into it; tells of a base that is not known by its name or its folder.

    Returns:
        One of the values of `MODELS`, or ``model`` if it is not known.
    """
    from diffusers_mixofshow.edlora.low_rank import input_widths
    from diffusers_mixofshow.families.recognition import family_of_updates

    family = known_family(base)
    if family is None:
        updates = next((pack.lora for pack in packs if pack.lora), None)
        family = family_of_updates(input_widths(updates)) if updates else None
    return "model" if family is None else MODELS[family.denoiser]


def _describe_prompts(drawing: Drawing) -> str:
    """The regions' prompts in the picture after drafts, with their subjects repeated."""
    from diffusers_mixofshow.pipelines.wording import repeat_subjects

    concepts = [concept for pack in drawing.packs.values() for concept in pack.concepts]
    return "; ".join(region.prompt for region in repeat_subjects(drawing.plan.regions, concepts))


def _describe_isolation(isolation: Isolation | None) -> str:
    if isolation is None:
        return "none"
    maps = "all feature maps" if isolation.scales is None else f"maps of {', '.join(map(str, isolation.scales))} cells"
    return f"from {isolation.start:g} to {isolation.end:g} of the steps, {maps}"


def plan_fusion(
    packs: Sequence[EDLoRA],
    names: Sequence[str],
    base: str | None,
    settings: Settings,
    places: Sequence[Path],
    *,
    work: tuple[int, int],
) -> dict[str, Any]:
    """Describe what `mixofshow fuse` would do.

    Args:
        packs: The sources.
        names: Placeholders of their concepts, and names of plain LoRAs.
        base: The base model, if features must be recorded; None if no model is needed.
        settings: How layers are solved.
        places: Folder of the pack, and other files that are written.
        work: Most runs of the denoiser on a batch while features are recorded, and steps of single pictures.

    Warns:
        MixOfShowWarning: Of a method that makes the pack large, as the fusion itself does.
    """
    from diffusers_mixofshow.families import family_of_sites
    from diffusers_mixofshow.fusion.size import count_values, find_ranks, find_sizes, warn_of_full_rank
    from diffusers_mixofshow.fusion.sketch import count_stored_values

    updates = [pack.lora for pack in packs]
    warn_of_full_rank(updates, settings)
    sizes, ranks = find_sizes(updates), find_ranks(updates, settings)
    numbers = count_values(updates, settings) + sum(
        rows.numel() for pack in packs for rows in pack.embeddings.values()
    )
    family, (runs, steps) = family_of_sites(sizes), work
    model = MODELS.get(family.denoiser, family.denoiser)
    inputs = {name: sizes[group[0]][1] for name, group in family.by_input(sizes).items()}
    gram = sum(map(count_stored_values, inputs.values())) * _BYTES_OF_FLOAT64 * (len(packs) if base else 0)
    return {
        "concepts": ", ".join(names),
        "base model": describe_base(base) if base else "none is needed",
        "layers": len(ranks),
        "rank": f"at most {max(ranks.values(), default=0)}",
        "memory for statistics": f"{gram / 1e6:.0f} MB at most" if base else "that of the files beside the sources",
        f"{model} runs": f"{runs} at most, each on a batch of up to {_RECORDED}; bars count single pictures: {steps}"
        if base
        else "none",
        "time": estimate_time(base, runs, _RECORDED, model=model)
        if base
        else f"that of solving {len(ranks)} layers; no model runs",
        "pack": f"{numbers:,} numbers, {2 * numbers / 1e6:.1f} MB in float16"
        + ("; embeddings come on top" if any(pack.embeddings for pack in packs) else ""),
        "writes": ", ".join(map(str, places)),
    }


def plan_training(config: TrainingConfig) -> dict[str, Any]:
    """Describe what `mixofshow train` would do, after reading photos, captions and masks.

    Raises:
        TrainingDataError: If photos, captions or masks cannot be used.
        ConceptError: If the base's tokenizer knows the concept's name already, or cannot read its class word.
        ConfigurationError: If the output folder cannot be written.
        MissingExtraError: If the optimiser's or tracker's package is not installed.
    """
    from diffusers_mixofshow.training.base import refuse_other_families
    from diffusers_mixofshow.training.checkpoints import check_writable, find_start
    from diffusers_mixofshow.training.company import compose_company
    from diffusers_mixofshow.training.data import load_photos
    from diffusers_mixofshow.training.optimisers import find_optimizer
    from diffusers_mixofshow.training.tracking import check_tracker

    if (family := known_family(config.pretrained_model_name_or_path)) is not None:
        refuse_other_families(f"The base model {config.pretrained_model_name_or_path!r}", family)
    _check_words(config)
    photos = load_photos(config)
    composed = compose_company(photos, config)
    find_optimizer(config.optimizer)
    check_tracker(config.report_to)
    if config.output_dir is not None:
        check_writable(Path(config.output_dir), make=False)
    checkpoint = find_start(config)
    captions = {caption for photo in photos for caption in photo.captions}
    masks = sum(photo.mask is not None for photo in photos)
    batch = config.train_batch_size * config.gradient_accumulation_steps
    return {
        "base model": describe_base(config.pretrained_model_name_or_path),
        "concept": f"{config.concept_to_learn.placeholder}, a {config.concept_to_learn.class_word}",
        "photos": f"{len(photos)} with {len(captions)} different captions, {masks} with a mask"
        + (f"; {len(composed)} pictures composed of them" if composed else ""),
        "method": f"{config.method}, rank {config.rank}",
        "time": estimate_time(
            config.pretrained_model_name_or_path,
            config.total_steps * config.gradient_accumulation_steps,
            config.train_batch_size,
            pixels=(config.resolution, config.resolution),
            backward=True,
        ),
        "steps": f"{config.total_steps}, each of {batch} pictures at {config.resolution} pixels, photos repeated",
        "begins": f"after {checkpoint}" if checkpoint else "at its start",
        "writes": config.output_dir,
    }


def describe_masks(plan: MaskPlan, *, overwrite: bool) -> dict[str, Any]:
    """Describe what `mixofshow masks` would do.

    Args:
        plan: The photos, and the settings of their masks.
        overwrite: Whether the command line allows that files are replaced.
    """
    return {
        "photos": f"{len(plan.todo)} without a mask, {plan.masked} with one",
        "looks for": plan.class_word,
        "model": describe_model(plan.model) if plan.todo else "none is needed",
        "threshold": plan.threshold,
        "writes": ", ".join(map(str, plan.writes)) or "nothing",
        **plan_replacing(*plan.writes, overwrite=overwrite),
    }


def _check_words(config: TrainingConfig) -> None:
    """Check concept and class word with the tokenizers of a base that is on this disk."""
    from transformers import CLIPTokenizer

    from diffusers_mixofshow.families import CONCEPT_FAMILIES
    from diffusers_mixofshow.training.words import check_words

    place = Path(location_of(config.pretrained_model_name_or_path))
    names = dict.fromkeys(one.tokenizer for family in CONCEPT_FAMILIES for one in family.text_encoders.values())
    if folders := [place / name for name in names if (place / name).is_dir()]:
        tokenizers = map(CLIPTokenizer.from_pretrained, folders)
        check_words(config.concept_to_learn, *tokenizers, drawn=classes_of(config.pretrained_model_name_or_path))


def describe_base(base: str) -> str:
    """Describe the base as `describe_model` does; raises if it is a file, or only a missing folder has such a name."""
    from diffusers_mixofshow.edlora.models import refuse_missing_folder
    from diffusers_mixofshow.interop.checkpoint import refuse_single_file

    refuse_single_file(base)
    try:
        refuse_missing_folder(location_of(base))
    except FileNotFoundError as error:
        raise make_loading_error(base, error) from error
    told, hint = describe_model(base), "" if known_family(base) else suggest_name(base)
    return f"{told}.{hint}" if hint else told


def describe_model(name: str) -> str:
    """Describe a model by its size on this disk, or as one from the Hub."""
    folder = Path(location_of(name))
    if not folder.is_dir():
        return f"{name}, from the Hub or its cache"
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return f"{name}, {size / 1e6:.0f} MB on disk"


def name_concepts(packs: Sequence[EDLoRA]) -> str:
    """The placeholders of all concepts, separated by commas."""
    return ", ".join(concept.placeholder for pack in packs for concept in pack.concepts)


def _count_parameters(pack: EDLoRA) -> int:
    return sum(update.down.numel() + update.up.numel() for update in pack.lora.values())
