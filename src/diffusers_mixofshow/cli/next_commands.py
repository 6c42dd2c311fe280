"""Commands to go on with after a training or a fusion, ready to be pasted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import join
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
    left, right, *_ = pack.concepts
    height, width = find_size(pack.base_model) or (0, 0)
    wide = ("--width", width * 3 // 2, "--height", height) if height else ()
    place = "in a meadow"
    prompt = f"a {left.class_word} and a {right.class_word} {place}"
    halves = {"0,0.1,0.5,0.97": left.placeholder, "0.5,0.1,1,0.97": right.placeholder}
    regions = [part for box, name in halves.items() for part in ("--region", f"{box}:a {name}, {place}")]
    own = [part for single in singles for part in ("--own", single)]
    return [
        "Draw two of them, each in its half of the picture, and measure what the pack keeps of each:",
        _spell("sample", "--concepts", output, "--prompt", prompt, *wide, "--refine", *regions, "--output", "two.png"),
        _spell("evaluate", output, *own),
    ]


def describe_next(config: TrainingConfig) -> list[str]:
    """Lines with where to look at what a training has written, and the commands that draw, measure and fuse it."""
    folder, concept = config.output_dir, config.concept_to_learn
    picture, of_photos = portable_name(f"{concept.name}.png"), f"{concept.name}={config.instance_data_dir}"
    photos = () if config.instance_data_dir is None else ("--photos", of_photos)
    sheets = sorted(Path(str(config.output_dir), "validation").glob("step-*.png"))
    return [
        *(f"Look at it, above by its words alone, below with all of its LoRA: {sheet}" for sheet in sheets[-1:]),
        "Draw it, measure it, or fuse it with another one in place of OTHER:",
        _spell("sample", "--concepts", folder, "--prompt", f"a {concept.placeholder}", "--output", picture),
        _spell("evaluate", folder, *photos),
        _spell("fuse", folder, "OTHER", "--output", "fused"),
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
    return [f"The checkpoint is {checkpoints[-1]}. Go on from it:", _spell(*arguments, *more)]


def _spell(*arguments: object) -> str:
    """Spell a command so that a shell takes every argument as it is: class words of a pack come from strangers."""
    return f"  {join(['mixofshow', *map(str, arguments)])}"
