"""``mixofshow masks``: make masks for photos that have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_mixofshow.atomic import check_outputs
from diffusers_mixofshow.cli import plans


if TYPE_CHECKING:
    from diffusers_mixofshow.training.masking import MadeMask, MaskPlan


def masks(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="Folder of photos, as train reads it.")],
    class_word: Annotated[str, typer.Option(help="Plain word for what the photos show, e.g. dog.")],
    model: Annotated[
        str | None,
        typer.Option(help="CLIPSeg model that finds it: Hub id or folder. (default: CIDAS/clipseg-rd64-refined)"),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            help="Pixels are inside whose probability is above this fraction of the highest one; more gives smaller "
            "masks."
        ),
    ] = 0.5,
    sheet: Annotated[
        Path | None,
        typer.Option(help="PNG of photos, masks and cut-outs, to look at. (default: PHOTOS-masks.png beside PHOTOS)"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace masks/NAME.png where they exist, and the sheet.")
    ] = False,
    dry_run: plans.DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result for each photo as JSON; with --dry-run, the plan.")
    ] = False,
) -> None:
    """Write a mask beside every photo that has none, so that train can show the concept beside others.

    Look at the sheet afterwards. A photo where nothing, or nearly everything,
    was found gets no mask and is named; draw that by hand: masks/NAME.png,
    white is the concept. Photos that are cut out, or have a mask, are left
    alone. The model is fetched from the Hub once, some 600 MB.

    \b
    With photos of your own:
      mixofshow masks photos/rex --class-word dog
      mixofshow masks photos/potter --class-word man --threshold 0.4 --overwrite
    """
    from diffusers_mixofshow.training.finding import DEFAULT_FINDER
    from diffusers_mixofshow.training.masking import carry_out, plan_masks

    folder = photos.resolve()
    plan = plan_masks(
        photos,
        class_word,
        model=model or DEFAULT_FINDER,
        threshold=threshold,
        sheet=sheet or folder.parent / f"{folder.name}-masks.png",
        overwrite=overwrite,
    )
    check_outputs(*plan.writes, overwrite=overwrite or dry_run)
    if dry_run:
        plans.tell(plans.describe_masks(plan, overwrite=overwrite), as_json=as_json)
        return
    _tell(plan, carry_out(plan), as_json=as_json)


def _tell(plan: MaskPlan, made: Sequence[MadeMask], *, as_json: bool) -> None:
    if as_json:
        photos = [vars(each) | {"photo": str(each.photo), "mask": each.mask and str(each.mask)} for each in made]
        told = {"folder": str(plan.folder), "photos": photos, "masked_before": plan.masked}
        typer.echo(json.dumps(told | {"sheet": str(plan.sheet) if made else None}))
        return
    written = sum(each.mask is not None for each in made)
    typer.echo(f"Wrote masks of {written} of {len(made)} photos that had none; {plan.masked} had one")
    if made:
        typer.echo(f"Look at {plan.sheet}")
