"""Commands to go on with after a training or a fusion, ready to be pasted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote
from typing import TYPE_CHECKING

from diffusers_mixofshow.atomic import portable_name
from diffusers_mixofshow.base_models import find_size
from diffusers_mixofshow.training import TrainingConfig


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA


def describe_next_of_pack(pack: EDLoRA, output: Path, singles: Sequence[str]) -> list[str]:
    """Lines with the commands that draw two concepts of a fused pack side by side, and measure what it keeps.

    Args:
        pack: The pack; without two concepts there is nothing to draw side by side, and no line.
        output: Its folder.
        singles: The sources, if each is one concept.
    """
    if len(pack.concepts) < 2:
        return []
    folder, (left, right, *_) = quote(str(output)), pack.concepts
    height, width = find_size(pack.base_model) or (0, 0)
    wide = f" --width {width * 3 // 2} --height {height}" if height else ""
    place = "in a meadow"
    prompt = f"a {left.class_word} and a {right.class_word} {place}"
    own = "".join(f" --own {quote(single)}" for single in singles)
    return [
        "Draw two of them, each in its half of the picture, and measure what the pack keeps of each:",
        f'  mixofshow sample --concepts {folder} --prompt "{prompt}"{wide} --refine'
        f' --region "0,0.1,0.5,0.97:a {left.placeholder}, {place}"'
        f' --region "0.5,0.1,1,0.97:a {right.placeholder}, {place}" --output two.png',
        f"  mixofshow evaluate {folder}{own}",
    ]


def describe_next(config: TrainingConfig) -> list[str]:
    """Lines with where to look at what a training has written, and the commands that draw, measure and fuse it."""
    folder, concept = quote(str(config.output_dir)), config.concept_to_learn
    picture = portable_name(f"{concept.name}.png")
    photos = "" if config.instance_data_dir is None else quote(f"{concept.name}={config.instance_data_dir}")
    sheets = sorted(Path(str(config.output_dir), "validation").glob("step-*.png"))
    return [
        *(f"Look at it, above by its words alone, below with all of its LoRA: {sheet}" for sheet in sheets[-1:]),
        "Draw it, measure it, or fuse it with another one in place of OTHER:",
        f'  mixofshow sample --concepts {folder} --prompt "a {concept.placeholder}" --output {picture}',
        f"  mixofshow evaluate {folder}{photos and f' --photos {photos}'}",
        f"  mixofshow fuse {folder} OTHER --output fused",
    ]


def describe_resumption(config: TrainingConfig, arguments: Sequence[str]) -> list[str]:
    """Lines that tell which checkpoint an interrupted training has, and the command that goes on from it.

    Args:
        config: Its settings.
        arguments: What stood after ``mixofshow`` on the command line.
    """
    from diffusers_mixofshow.training.checkpoints import LATEST, list_checkpoints

    checkpoints = [] if config.output_dir is None else list_checkpoints(Path(config.output_dir))
    if not checkpoints:
        return ["There is no checkpoint to go on from."]
    more = [] if config.resume_from_checkpoint == LATEST else ["--resume-from-checkpoint", LATEST]
    return [f"The checkpoint is {checkpoints[-1]}. Go on from it:", f"  {join(['mixofshow', *arguments, *more])}"]
