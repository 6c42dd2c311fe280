"""``mixofshow fuse``: fuse several ED-LoRAs or plain LoRAs into one pack."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_mixofshow.atomic import check_outputs
from diffusers_mixofshow.base_models import known_family, spell_name
from diffusers_mixofshow.cli.base_model import Base, find_common_base
from diffusers_mixofshow.cli.fuse_sources import describe_sources, read_sources, warn_of_swapped_prompts
from diffusers_mixofshow.cli.next_commands import describe_next_of_pack
from diffusers_mixofshow.cli.plans import Overwrite, plan_fusion, plan_replacing, tell
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.sampling.loading import load_base


if TYPE_CHECKING:
    from diffusers_mixofshow.fusion import FusedPack, FusionSource, GradientFuser, LoRASource
    from diffusers_mixofshow.fusion.solving import Ridge
    from diffusers_mixofshow.fusion.sources import Source


class Method(StrEnum):
    """How concepts are fused."""

    CLOSED_FORM = "closed-form"
    LBFGS = "lbfgs"
    SSR = "ssr"
    AVERAGE = "average"
    SUM = "sum"
    TIES = "ties"
    DARE = "dare"
    SVD = "svd"


class Features(StrEnum):
    """With which model each concept's features are recorded."""

    AUTO = "auto"
    OWN = "own"
    SEQUENTIAL = "sequential"


Sources = Annotated[
    list[str],
    typer.Argument(
        help="ED-LoRAs: Hub ids, folders or files, also of other programs. Plain LoRAs, with --prompts. Or a TOML "
        "file with a table source for each: path, and optionally prompts, weight, scale, name, statistics."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompts with the trigger words of a plain LoRA, separated by '|'. Give it once for each plain LoRA "
        "whose file does not name its trigger words, or for all plain LoRAs, in their order. Methods that record no "
        "features, such as average, need none."
    ),
]
Weights = Annotated[
    list[float] | None, typer.Option(help="Weight of a source; give it once for each, in their order.")
]
Recorded = Annotated[
    Features,
    typer.Option(
        help="own: with each concept's own model; statistics beside the files are used, and written there. "
        "sequential: in the paper's order, needs the base model. auto: own if all files have statistics beside them "
        "and neither --base nor --prior is given."
    ),
]
Solver = Annotated[
    Method,
    typer.Option(help="closed-form is gradient fusion, lbfgs the paper's solver; the others are baselines."),
]
RidgeText = Annotated[
    str | None,
    typer.Option(
        help="Weight of small updates against an exact fit, or 'auto' (default: for each input feature of a layer "
        "2.5e-4, sequential 2.5e-5; more than 1280 features count as 1280)."
    ),
]
Prior = Annotated[
    float,
    typer.Option(help="Weight of keeping the base on prompts without concepts, such as 0.1; needs the base model."),
]
KeepSources = Annotated[
    bool, typer.Option("--keep-sources", help="Put the sources and their statistics into the pack's folder.")
]
HeatMap = Annotated[Path | None, typer.Option(help="PNG of what is kept: a cell for each concept and layer.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and check the sources, show what would be done, load no model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report of the fusion as JSON.")]


def fuse(
    sources: Sources,
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for the fused pack.")],
    method: Solver = Method.CLOSED_FORM,
    prompts: Prompts = None,
    base: Base = None,
    features: Recorded = Features.AUTO,
    weight: Weights = None,
    ridge: RidgeText = None,
    prior: Prior = 0.0,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Reduce fused updates to this rank.")] = None,
    device: Annotated[str, typer.Option(help="Where layers are solved, such as cuda.")] = "cpu",
    keep_sources: KeepSources = False,
    heat_map: HeatMap = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fuse several ED-LoRAs, or plain LoRAs, into one file that holds all of them, without any photos.

    If all have statistics beside them (edlora.statistics.safetensors), no model is loaded, save for --base or --prior.
    Started by `accelerate launch -m diffusers_mixofshow fuse ...`, each process records its share of the concepts.

    ED-LoRAs become one pack of their concepts; plain LoRAs alone one ordinary LoRA, which any program loads.

    \b
    With what 'mixofshow demo' leaves; later one is added, then one left out:
      mixofshow fuse mixofshow-demo/concepts/kiki mixofshow-demo/concepts/rex \\
        --features own --keep-sources --output both
      mixofshow fuse both/sources/* mixofshow-demo/concepts/bobo \\
        --features own --keep-sources --output trio
      mixofshow fuse trio/sources/kiki trio/sources/bobo --output without-rex
    """
    from diffusers_mixofshow.fusion.solving import MEASURED, check_device

    _check_options_of_recording(method, features, ridge, prior)
    settings = {"ridge": _parse_ridge(ridge), "max_rank": max_rank, "device": device}
    if not dry_run:  # a dry run may be on another machine
        check_device(device)
    _refuse_unwritable(output, heat_map)
    writes = _join_processes()
    given = read_sources(sources, prompts or [], recorded=method.value in MEASURED)
    gathered = _gather(given, method, features, weight)
    replaced = _find_replaced(output, heat_map, gathered, carried=keep_sources, overwrite=overwrite or dry_run)
    base_model = _choose_base(gathered, base, features, method, prior)
    if writes:
        _warn_of_idle_sources(gathered, used=base_model is None or features is not Features.AUTO)
        _warn_of_stages(gathered, kept=keep_sources, staged=base_model is not None and features is not Features.OWN)
    found = describe_sources(given, gathered, weight)
    if dry_run:
        plan = _plan(gathered, base_model, features, (output, heat_map), method=method.value, max_rank=max_rank)
        tell({"sources": found} | plan | plan_replacing(*replaced, overwrite=overwrite), as_json=as_json)
        return
    if writes and not as_json:
        typer.echo("\n".join(found))
    fuser = _make_fuser(gathered, base_model, features, prior, **settings)
    fused = fuser.fuse(gathered, method=method.value, weights=weight).name_base(spell_name(base or ""))
    if writes:
        _write(fused, output, heat_map, sources=keep_sources, overwrite=overwrite)
        _tell_result(fused, output, heat_map, sources, as_json=as_json)


def _gather(
    given: Sequence[FusionSource | LoRASource], method: Method, features: Features, weights: Sequence[float] | None
) -> tuple[Source, ...]:
    """Read and check the sources, their prompts and weights, and the statistics beside them where these are used."""
    from diffusers_mixofshow.fusion.solving import MEASURED
    from diffusers_mixofshow.fusion.sources import gather
    from diffusers_mixofshow.fusion.store import StatisticsStore

    recorded = method.value in MEASURED
    gathered = gather(given, None, prompts=None, recorded=recorded)
    _refuse_other_counts(weights, gathered)
    warn_of_swapped_prompts(gathered, given)
    is_own = recorded and features is not Features.SEQUENTIAL
    return StatisticsStore().attach(gathered, given) if is_own else gathered


def _tell_result(
    fused: FusedPack, output: Path, heat_map: Path | None, sources: Sequence[str], *, as_json: bool
) -> None:
    names = [name for source in fused.sources for name in source.prompts]
    if as_json:
        typer.echo(json.dumps({"output": str(output), "concepts": names, **fused.report.data}))
        return
    fused.report.print()
    typer.echo(f"Wrote the fused pack of {', '.join(names)} to {output}")
    if heat_map is not None:
        typer.echo(f"Wrote {heat_map}")
    single = len(sources) == len(fused.concepts) == len(names)
    for line in describe_next_of_pack(fused, output, sources if single else ()):
        typer.echo(line)


def _write(fused: FusedPack, output: Path, heat_map: Path | None, *, sources: bool, overwrite: bool) -> None:
    fused.save_pretrained(output, sources=sources, overwrite=overwrite)
    if heat_map is not None:
        fused.report.heat_map(heat_map, overwrite=overwrite)


def _refuse_unwritable(output: Path, heat_map: Path | None) -> None:
    """Check the places before anything is read; whether files are replaced is known only when sources are read."""
    from diffusers_mixofshow.edlora.file import FILE_NAME

    check_outputs(output / FILE_NAME, *([] if heat_map is None else [heat_map]), overwrite=True)


def _find_replaced(output: Path, heat_map: Path | None, gathered: Sequence[Source], **allowed: bool) -> list[Path]:
    """Find the files and folders that are written, or removed as outdated; raises if they may not be replaced."""
    from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME
    from diffusers_mixofshow.fusion.pack_sources import find_replaced

    file_name = FILE_NAME if any(source.edlora.concepts for source in gathered) else PLAIN_NAME
    return find_replaced(output, file_name, gathered, *([] if heat_map is None else [heat_map]), **allowed)


def _make_fuser(
    gathered: Sequence[Source], base_model: str | None, features: Features, prior: float, **settings: Any
) -> GradientFuser:
    """Make the fuser, and load the base if one is needed."""
    from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
    from diffusers_mixofshow.fusion import GradientFuser
    from diffusers_mixofshow.fusion.solving import family_of_sources

    if base_model is None:
        return GradientFuser(**settings)
    pipe = load_base(base_model, concepts=family_of_sources(gathered) is STABLE_DIFFUSION)
    return GradientFuser(pipe, prior=prior, sequential=features is not Features.OWN, **settings)


def _join_processes() -> bool:
    """Join the processes that a launcher started beside this one; returns whether this one writes the result."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch
    from accelerate import PartialState

    return bool(PartialState(cpu=not torch.cuda.is_available()).is_main_process)


def _choose_base(
    gathered: Sequence[Source], base: str | None, features: Features, method: Method, prior: float
) -> str | None:
    """Choose the model to record features with; None for baselines, and if all sources have statistics."""
    from diffusers_mixofshow.fusion.solving import MEASURED
    from diffusers_mixofshow.fusion.sources import refuse_other_family
    from diffusers_mixofshow.interop.checkpoint import refuse_single_file

    refuse_single_file(base or "")
    if method.value not in MEASURED:
        return None
    all_have = all(map(_has_statistics, gathered))
    if all_have and base is None and not prior and features is not Features.SEQUENTIAL:
        return None
    chosen = base or find_common_base([source.edlora for source in gathered])
    if (family := known_family(chosen)) is not None:  # refused before it is loaded
        refuse_other_family(gathered, family)
    return chosen


def _warn_of_idle_sources(gathered: Sequence[Source], *, used: bool) -> None:
    """Warn of a fusion of one source, and of statistics that were found but not used."""
    having = [source.name for source in gathered if _has_statistics(source)]
    lacking = [source.name for source in gathered if not _has_statistics(source)]
    if len(gathered) == 1:
        warn(
            f"{gathered[0].name} is the only source: there is nothing to reconcile, and the pack acts as it does. If "
            "there are others, name them as well."
        )
    if having and not used:
        why = f"for {', '.join(lacking)} there are none that fit" if lacking else "--base or --prior was given"
        warn(
            f"the statistics beside {', '.join(having)} are not used: as {why}, all sources are recorded in stages, "
            "which takes longer and keeps more. Nothing has to be done; --features own would use the statistics, and "
            "record only what is missing."
        )


def _warn_of_stages(gathered: Sequence[Source], *, kept: bool, staged: bool) -> None:
    """Warn that sources which are kept have no statistics of their own after a fusion in stages."""
    if kept and staged:
        warn(
            f"{', '.join(source.name for source in gathered)} will be fused in stages, whose statistics hold for "
            "these sources together and are not kept: to add or remove concepts later, fuse with --features own."
        )


def _has_statistics(source: Source) -> bool:
    return not source.misfits


def _plan(
    gathered: Sequence[Source], base: str | None, features: Features, places: Sequence[Path | None], **solving: Any
) -> dict[str, Any]:
    from diffusers_mixofshow.fusion.solving import Settings

    packs, written = [source.edlora for source in gathered], [place for place in places if place is not None]
    names = [name for source in gathered for name in source.prompts]
    return plan_fusion(packs, names, base, Settings(**solving), written, work=_count_work(gathered, features))


def _count_work(gathered: Sequence[Source], features: Features) -> tuple[int, int]:
    """Most runs of the denoiser while features are recorded, and steps of single pictures, which the bars count.

    Statistics that exist already save some.
    """
    from diffusers_mixofshow.fusion.collection import Recording
    from diffusers_mixofshow.fusion.solving import family_of_sources, sites_of

    recording, family = Recording(), family_of_sources(gathered)
    stages = {family.stage_of(site) for site in sites_of(gathered)}
    steps = recording.steps
    if features is not Features.OWN:  # a stage of layers that see only the text takes a step of its own
        steps = sum(1 if stage.text_alone else recording.steps for stage in stages)
    prompts = [len(texts) for source in gathered for texts in source.prompts.values()]
    return steps * sum(math.ceil(count / recording.batch_size) for count in prompts), steps * sum(prompts)


def _refuse_other_counts(weights: Sequence[float] | None, gathered: Sequence[Source]) -> None:
    if weights and len(weights) != len(gathered):
        raise ConfigurationError(f"Got --weight {len(weights)} times for {len(gathered)} sources. Give one for each.")


def _check_options_of_recording(method: Method, features: Features, ridge: str | None, prior: float) -> None:
    """Refuse a prior that is no weight, and warn of options of the recording for methods that record nothing."""
    from diffusers_mixofshow.fusion.solving import MEASURED

    if not 0 <= prior < math.inf:
        raise ConfigurationError(f"--prior must be a number of 0 or more, got {prior}.")
    given = {"--features": features is not Features.AUTO, "--ridge": ridge is not None, "--prior": prior != 0}
    idle = [option for option, is_given in given.items() if is_given]
    if idle and method.value not in MEASURED:
        warn(
            f"Without effect: {', '.join(idle)}; --method {method.value} records no features. Methods that do: "
            f"{', '.join(MEASURED)}."
        )


def _parse_ridge(text: str | None) -> Ridge | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"--ridge must be a number of 0 or more, or 'auto', got {text!r}.")
    return value
