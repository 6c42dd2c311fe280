"""``mixofshow fuse``: several ED-LoRAs to one pack."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffusers_mixofshow.cli.base_model import BASE_HELP, common_base, load_base


class Method(StrEnum):
    """How concepts are fused."""

    CLOSED_FORM = "closed-form"
    AVERAGE = "average"


def fuse(
    concepts: Annotated[list[str], typer.Argument(help="ED-LoRAs: Hub ids, folders or files.")],
    output: Annotated[Path, typer.Option(help="Folder for the fused pack.")],
    method: Annotated[
        Method, typer.Option(help="closed-form is gradient fusion; average is the baseline, equation 2.")
    ] = Method.CLOSED_FORM,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP}  [default: the one they were tuned on]")] = None,
) -> None:
    """Fuse several ED-LoRAs into one pack that holds all their concepts, without any photos.

    Example: mixofshow fuse edlora-potter edlora-hermione user/edlora-thanos --output hogwarts
    """
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.fusion import GradientFuser

    packs = [EDLoRA.from_pretrained(concept) for concept in concepts]
    pipe = load_base(base or common_base(packs))
    fused = GradientFuser(pipe).fuse(packs, method=method.value)
    fused.save_pretrained(output)
    names = ", ".join(concept.placeholder for pack in packs for concept in pack.concepts)
    typer.echo(f"Wrote the fused pack of {names} to {output}")
