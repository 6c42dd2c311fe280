"""``mixofshow fuse``: several ED-LoRAs to one pack."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_mixofshow.cli.base_model import BASE_HELP, common_base, load_base
from diffusers_mixofshow.cli.plans import plan_of_fusion, tell
from diffusers_mixofshow.errors import ConfigurationError


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.fusion import GradientFuser
    from diffusers_mixofshow.fusion.solving import Ridge


class Method(StrEnum):
    """How concepts are fused."""

    CLOSED_FORM = "closed-form"
    LBFGS = "lbfgs"
    AVERAGE = "average"
    SUM = "sum"
    TIES = "ties"
    DARE = "dare"
    SVD = "svd"


class Features(StrEnum):
    """Whose features are recorded."""

    AUTO = "auto"
    OWN = "own"
    SEQUENTIAL = "sequential"


def fuse(
    concepts: Annotated[list[str], typer.Argument(help="ED-LoRAs: Hub ids, folders or files.")],
    output: Annotated[Path, typer.Option(help="Folder for the fused pack.")],
    method: Annotated[
        Method,
        typer.Option(help="closed-form is gradient fusion, lbfgs the paper's solver; the others are baselines."),
    ] = Method.CLOSED_FORM,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} (default: the one they were tuned on)")] = None,
    features: Annotated[
        Features,
        typer.Option(
            help="own: each concept's own model; statistics beside the files are used, and kept there. sequential: "
            "the paper's order, needs the base model. auto: own if all bring statistics."
        ),
    ] = Features.AUTO,
    weight: Annotated[
        list[float] | None, typer.Option(help="Share of each ED-LoRA, in their order; repeat it.")
    ] = None,
    ridge: Annotated[str, typer.Option(help="Weight of small updates against a perfect fit, or 'auto'.")] = "1e-3",
    max_rank: Annotated[int | None, typer.Option(help="Cut fused updates down to this rank.")] = None,
    heat_map: Annotated[Path | None, typer.Option(help="PNG of what is kept, layers by concepts.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check the sources, tell what would be done, load no model.")
    ] = False,
) -> None:
    """Fuse several ED-LoRAs into one pack that holds all their concepts, without any photos.

    Where every one brings statistics (edlora.statistics.safetensors), no model is loaded. Started by
    `accelerate launch -m diffusers_mixofshow fuse ...`, each process records its share of the concepts.

    \b
    Example:
      mixofshow fuse edlora-potter edlora-hermione user/edlora-thanos --output hogwarts
    """
    from diffusers_mixofshow.edlora import EDLoRA

    writes = _joins_others()
    packs = [EDLoRA.from_pretrained(concept) for concept in concepts]
    if dry_run:
        needs_base = _needs_base(concepts, base, features, method)
        tell(plan_of_fusion(packs, (base or common_base(packs)) if needs_base else None, max_rank, output))
        return
    fuser = _fuser(concepts, packs, base, features, method, _ridge(ridge), max_rank)
    fused = fuser.fuse(concepts, method=method.value, weights=weight)
    if not writes:
        return
    fused.save_pretrained(output)
    if fused.report.residuals:
        fused.report.print()
    if heat_map is not None:
        fused.report.heat_map(heat_map)
    names = ", ".join(concept.placeholder for pack in packs for concept in pack.concepts)
    typer.echo(f"Wrote the fused pack of {names} to {output}")


def _joins_others() -> bool:
    """Join the processes that a launcher started beside this one, if any; whether this one writes the result."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch
    from accelerate import PartialState

    return bool(PartialState(cpu=not torch.cuda.is_available()).is_main_process)


def _fuser(
    concepts: list[str],
    packs: list[EDLoRA],
    base: str | None,
    features: Features,
    method: Method,
    ridge: Ridge,
    max_rank: int | None,
) -> GradientFuser:
    """A fuser without a model where none is needed."""
    from diffusers_mixofshow.fusion import GradientFuser

    if not _needs_base(concepts, base, features, method):
        return GradientFuser(ridge=ridge, max_rank=max_rank)
    pipe = load_base(base or common_base(packs))
    return GradientFuser(pipe, ridge=ridge, max_rank=max_rank, sequential=features is not Features.OWN)


def _needs_base(concepts: list[str], base: str | None, features: Features, method: Method) -> bool:
    """Whether features must be recorded: not for baselines, and not where every source brings statistics."""
    from diffusers_mixofshow.fusion.solving import MEASURED
    from diffusers_mixofshow.fusion.sources import gather

    if method.value not in MEASURED:
        return False
    if features is Features.SEQUENTIAL or base is not None:
        return True
    sources = gather(concepts, None, prompts=None, with_statistics=True)
    return not all(source.statistics and not source.misfits(source.statistics) for source in sources)


def _ridge(text: str) -> Ridge:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise ConfigurationError(f"--ridge must be a number or 'auto', got {text!r}.") from error
